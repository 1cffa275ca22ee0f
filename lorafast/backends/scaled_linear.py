"""A frozen layer with a vector as PyTorch's GEMM and a pass before or behind it.

A pass of the backward gives the scaled matrix and the vector's gradient: ``(l ⊙ g, Σ g ⊙ t)`` over the
rows, of g and t of one shape. g is dy and t is z where y is scaled; ``dy·W`` and x where x is. Whose
pass it is, the backend says.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.backends.plan import Run
from lorafast.core.problem import Problem

Pass = Callable[
    [Tensor, Tensor | None, Tensor | None, torch.dtype], tuple[Tensor | None, Tensor | None]
]
"""``l ⊙ g`` and ``Σ g ⊙ t`` in the dtype, of ``g, scale, t``; what is None isn't asked for."""


def forward(problem: Problem, times: Callable[[Tensor, Tensor], Tensor | None]) -> Run:
    """``y`` and ``z``, of ``x, weight, scale, bias``; ``times`` scales a matrix."""
    scales_input, keeps = problem.scales_input, "z" in problem.wants

    def run(
        x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if scales_input:
            scaled = times(x, scale)
            assert scaled is not None
            return F.linear(scaled, weight, bias), None
        z = F.linear(x, weight, bias)
        return times(z, scale), z if keeps else None

    return run


def backward(problem: Problem, of_pass: Pass) -> Run:
    """``dx`` and ``dscale``, of ``dy, kept, weight, scale``, by one GEMM at most and one pass."""
    scales_input, dtype = problem.scales_input, problem.adapter_dtype
    want_dx, want_dscale = "dx" in problem.wants, "dscale" in problem.wants

    def run(
        dy: Tensor, kept: Tensor | None, weight: Tensor | None, scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        factor, t = scale if want_dx else None, kept if want_dscale else None
        if scales_input:
            assert weight is not None
            return of_pass(torch.mm(dy, weight), factor, t, dtype)
        scaled, dscale = of_pass(dy, factor, t, dtype)
        if scaled is None:
            return None, dscale
        assert weight is not None
        return torch.mm(scaled, weight), dscale

    return run


def times(t: Tensor, scale: Tensor) -> Tensor:
    """``scale ⊙ t`` in the dtype of ``t``, rounded once and written at once."""
    return torch.mul(t, scale, out=torch.empty_like(t))


def by_pytorch(
    g: Tensor, scale: Tensor | None, t: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The pass in PyTorch's own calls. The products of the sum are float32 at least."""
    dscale = None
    if t is not None:
        wide = torch.promote_types(g.dtype, torch.float32)
        # Onto zeros of the wider dtype, in which it is computed then.
        product = torch.addcmul(g.new_zeros(g.shape[1], dtype=wide), g, t)
        dscale = product.sum(0).to(dtype)
    return None if scale is None else times(g, scale), dscale
