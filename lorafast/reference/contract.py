"""How near to the float64 reference is near enough: the package's one numerical contract.

    ‖actual − ref64‖ ≤ 1.25 · ‖eager − ref64‖ + eps · ‖size64‖        (Frobenius norms)

``ref64`` is the reference in float64 on the inputs as rounded to the dtype under test, ``eager`` the
reference in that dtype, ``eps`` the dtype's machine epsilon: a kernel must be as exact as plain
PyTorch, and one rounding of the result is its own.

``size64`` is the square root of the reference on squared inputs: each element's size as its terms
would give it if their signs were random. For a large random matrix its norm is that of ``ref64``. An
output of a few elements, whose terms may cancel, is where they differ: there ``‖ref64‖`` says nothing
about the rounding errors of the terms.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafast import reference

Call = Callable[[Any, Callable[..., Tensor]], Tensor | tuple[Tensor, ...]]
"""``call(operations, cast)``: calls one of ``operations`` on tensors that it passes through ``cast``,
those of another dtype than the one under test (adapters) as ``cast(tensor, dtype)``."""


def error(actual: Tensor, ref64: Tensor) -> float:
    """``‖actual − ref64‖``; infinite if the shapes differ or NaN stands where there should be none."""
    if actual.shape != ref64.shape:
        return float("inf")
    distance = torch.linalg.vector_norm(actual.double() - ref64).item()
    return distance if distance == distance else float("inf")


def allowed(eager: Tensor, ref64: Tensor, size64: Tensor) -> float:
    """The right side of the contract; ``eps`` is that of the dtype of ``eager``."""
    size = torch.linalg.vector_norm(size64).item()
    return 1.25 * error(eager, ref64) + torch.finfo(eager.dtype).eps * size


def compare(call: Call, operations: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Runs ``call`` on ``operations`` in ``dtype``; returns its error and the error allowed.

    Of several outputs, those of the one that fails, or comes nearest to failing.
    """

    def cast(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return tensor.to(other)

    def exact(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return tensor.to(other).double()

    def square(tensor: Tensor, other: torch.dtype = dtype) -> Tensor:
        return exact(tensor, other).square()

    worst = (0.0, 0.0)
    for actual, eager, ref64, squared64 in zip(
        _outputs(call(operations, cast)),
        _outputs(call(reference, cast)),
        _outputs(call(reference, exact)),
        _outputs(call(reference, square)),
        strict=True,
    ):
        found = (error(actual, ref64), allowed(eager, ref64, squared64.abs().sqrt()))
        if actual.dtype != eager.dtype:
            found = (float("inf"), found[1])
        if found[0] * worst[1] >= worst[0] * found[1]:
            worst = found
    return worst


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
