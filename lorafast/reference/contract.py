"""The numerical contract: how near to the float64 reference a result must be.

    ‖actual − ref64‖ ≤ 1.25 · ‖eager − ref64‖ + eps · ‖size64‖        (Frobenius norms)

- ``ref64``: the reference in float64, on inputs that were rounded to the dtype under test;
- ``eager``: the reference in the dtype under test;
- ``eps``: the machine epsilon of that dtype;
- ``size64``: the square root of the reference on squared inputs.

So a kernel is as exact as plain PyTorch in the same dtype, and may round its result once more.

``size64`` is the size that an element would have if its terms had random signs. For a large random
matrix ``‖size64‖`` is about ``‖ref64‖``. For an output of a few elements the terms may cancel: then
``‖ref64‖`` is small and the rounding errors of the terms are not. Where the reference can't be run on
squares (a whole model, second derivatives) ``ref64`` stands in for ``size64``.

NaN and infinities must stand where ``ref64`` has them, with the same values, and nowhere else. Where
``ref64`` is finite and beyond the range of the dtype, an infinity of its sign is right too. The norms
are those of the finite elements. Elements at which ``eager`` alone isn't finite allow no error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafast import reference

Call = Callable[[Any, Callable[..., Tensor]], Tensor | tuple[Tensor, ...]]
"""``call(operations, cast)`` calls one of ``operations`` on tensors that it passes through ``cast``.
``cast(tensor, dtype)`` is for tensors whose dtype is not the one under test, such as adapters."""

_FACTOR = 1.25


@dataclass(frozen=True)
class Verdict:
    """An output's error, and the error that is allowed.

    ``why_broken``: how the contract is broken, as the end of a sentence that begins with the output's
    name; None if it holds.
    """

    error: float
    allowed: float
    why_broken: str | None

    @property
    def severity(self) -> float:
        """The share of what is allowed; infinite if the contract is broken."""
        if self.why_broken is not None:
            return float("inf")
        return self.error / self.allowed if self.allowed else 0.0


@dataclass(frozen=True)
class Bound:
    """The right side of the contract, for an output that must have ``dtype``."""

    ref64: Tensor
    dtype: torch.dtype
    allowed: float

    def verdict(self, actual: Tensor) -> Verdict:
        """Holds an output to the contract."""
        reason = self._why_unlike(actual)
        if reason is not None:
            return Verdict(float("inf"), self.allowed, reason)
        error = _norm(actual.double() - self.ref64)
        if error <= self.allowed:
            return Verdict(error, self.allowed, None)
        reason = f"off by {error:.1e}, allowed {self.allowed:.1e}"
        return Verdict(error, self.allowed, reason)

    def _why_unlike(self, actual: Tensor) -> str | None:
        """A difference that has no norm: in shape, in dtype, in the places of NaN and infinities."""
        ref64 = self.ref64
        if actual.shape != ref64.shape:
            return f"of shape {list(actual.shape)}, expected {list(ref64.shape)}"
        if actual.dtype != self.dtype:
            return f"{actual.dtype}, expected {self.dtype}"
        special = ~(actual.isfinite() & ref64.isfinite())
        if not special.any():
            return None
        found, right = actual[special], ref64[special].to(self.dtype)
        wrong = ~((found == right) | (found.isnan() & right.isnan()))
        if not wrong.any():
            return None
        place = special.nonzero()[wrong][0].tolist()
        value, expected = found[wrong][0].item(), ref64[special][wrong][0].item()
        others = int(wrong.sum()) - 1
        return f"{value:.3g} at {place}, expected {expected:.3g}" + (
            f", and so in {others} other places" if others else ""
        )


def bound(
    eager: Tensor,
    ref64: Tensor,
    size64: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Bound:
    """What the contract asks of an output.

    ``eps`` is that of ``dtype``, by default the dtype of ``eager``. A layer in bfloat16 has gradients in
    float32 that are made of values rounded to bfloat16: pass bfloat16 for them.
    """
    if eager.shape != ref64.shape:
        raise ValueError(f"eager has shape {list(eager.shape)}, expected {list(ref64.shape)}")
    size = _norm(ref64 if size64 is None else size64)
    allowed = _FACTOR * _norm(eager.double() - ref64) + torch.finfo(dtype or eager.dtype).eps * size
    return Bound(ref64, eager.dtype, allowed)


def bounds(
    eager: Mapping[str, Tensor],
    ref64: Mapping[str, Tensor],
    size64: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Bound]:
    """The bounds of several outputs by name."""
    if eager.keys() != ref64.keys():
        raise ValueError(f"eager has {sorted(eager)}, expected {sorted(ref64)}")
    return {
        name: bound(eager[name], value, None if size64 is None else size64[name], dtype)
        for name, value in ref64.items()
    }


def why_broken(
    actual: Tensor,
    eager: Tensor,
    ref64: Tensor,
    size64: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """How an output breaks the contract, as the end of a sentence that begins with its name, or None."""
    return bound(eager, ref64, size64, dtype).verdict(actual).why_broken


def why_any_broken(actual: Mapping[str, Tensor], of: Mapping[str, Bound]) -> str | None:
    """How the first of several outputs that breaks its bound does so, a sentence, or None."""
    for name, one in of.items():
        if name not in actual:
            return f"{name} is missing"
        reason = one.verdict(actual[name]).why_broken
        if reason is not None:
            return f"{name} is {reason}"
    more = actual.keys() - of.keys()
    return f"{min(more)} is there and should not be" if more else None


def compare(
    call: Call,
    operations: Any,
    dtype: torch.dtype,
    rounded_to: torch.dtype | None = None,
    sizes: Call | None = None,
) -> Verdict:
    """Runs ``call`` on ``operations`` in ``dtype``, and on the reference, and holds it to the contract.

    Of several outputs it returns the verdict on the worst. ``rounded_to``: the dtype whose ``eps``
    counts where outputs are made of values rounded to another dtype than their own, as a layer's
    gradients are. ``sizes``: what is run on squared inputs, where ``call`` is no polynomial of its
    inputs; a call with as many outputs.
    """

    def cast(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return tensor.to(other)

    def exact(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return tensor.to(other).double()

    def square(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return exact(tensor, other).square()

    exactly = _outputs(call(reference, exact))
    of_squares = _outputs((sizes or call)(reference, square))
    verdicts = [
        bound(eager, ref64, size64, rounded_to).verdict(actual)
        for actual, eager, ref64, size64 in zip(
            _outputs(call(operations, cast)),
            _outputs(call(reference, cast)),
            exactly,
            [size.abs().sqrt() for size in of_squares],
            strict=True,
        )
    ]
    return max(verdicts, key=lambda verdict: verdict.severity)


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _norm(tensor: Tensor) -> float:
    """Of the finite elements."""
    finite = torch.where(tensor.isfinite(), tensor, 0.0)
    return torch.linalg.vector_norm(finite).item()
