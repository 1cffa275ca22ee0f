"""How near to the float64 reference is near enough: the package's one numerical contract.

    ‖actual − ref64‖ ≤ 1.25 · ‖eager − ref64‖ + eps · ‖size64‖        (Frobenius norms)

``ref64`` is the reference in float64 on the inputs as rounded to the dtype under test, ``eager`` the
reference in that dtype, ``eps`` the dtype's machine epsilon: a kernel must be as exact as plain
PyTorch, and one rounding of the result is its own.

``size64`` is the square root of the reference on squared inputs: each element's size as its terms
would give it if their signs were random. For a large random matrix its norm is that of ``ref64``. An
output of a few elements, whose terms may cancel, is where they differ: there ``‖ref64‖`` says nothing
about the rounding errors of the terms. Where no such square can be had (a whole model, derivatives of
derivatives) ``ref64`` stands in.

NaN and infinities are exact: ``actual`` has them where ``ref64`` has, the same ones, and nowhere else.
A finite ``ref64`` beyond the dtype's range may be an infinity of its sign. The norms are those of the
other elements; where ``eager`` alone is not finite, it allows nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafast import reference

Call = Callable[[Any, Callable[..., Tensor]], Tensor | tuple[Tensor, ...]]
"""``call(operations, cast)``: calls one of ``operations`` on tensors that it passes through ``cast``,
those of another dtype than the one under test (adapters) as ``cast(tensor, dtype)``."""

_FACTOR = 1.25


@dataclass(frozen=True)
class Verdict:
    """An output's error, the error allowed, and what is against it: the end of a sentence, or None."""

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
    """The right side of the contract for one output, which must be of ``dtype``."""

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
        """What no error measures: another shape or dtype, NaN and infinities in other places."""
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

    ``eps`` is that of ``dtype``, by default that of ``eager``: of a layer in bfloat16, a gradient in
    float32 is made of roundings to bfloat16.
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
    """What is against an output: the end of a sentence that begins with its name, or None."""
    return bound(eager, ref64, size64, dtype).verdict(actual).why_broken


def why_any_broken(actual: Mapping[str, Tensor], of: Mapping[str, Bound]) -> str | None:
    """What is against the first of several outputs that breaks its bound, or None."""
    for name, one in of.items():
        if name not in actual:
            return f"{name} is missing"
        reason = one.verdict(actual[name]).why_broken
        if reason is not None:
            return f"{name} is {reason}"
    more = actual.keys() - of.keys()
    return f"{min(more)} is there and should not be" if more else None


def compare(
    call: Call, operations: Any, dtype: torch.dtype, rounded_to: torch.dtype | None = None
) -> Verdict:
    """Runs ``call`` on ``operations`` in ``dtype``.

    Of several outputs, the verdict on the one that fails, or comes nearest to failing. ``rounded_to``:
    whose ``eps`` counts, of a whole layer, where an output is made of roundings to another dtype than
    its own.
    """

    def cast(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return tensor.to(other)

    def exact(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return tensor.to(other).double()

    def square(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return exact(tensor, other).square()

    verdicts = [
        bound(eager, ref64, squared64.abs().sqrt(), rounded_to).verdict(actual)
        for actual, eager, ref64, squared64 in zip(
            _outputs(call(operations, cast)),
            _outputs(call(reference, cast)),
            _outputs(call(reference, exact)),
            _outputs(call(reference, square)),
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
