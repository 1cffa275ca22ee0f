"""The layer with an adapter per element: the base GEMM, and one batched product over all adapters.

PyTorch's batched products want groups of one size: ``grouping`` brings the elements of an adapter
together. The sums of ``dA`` and ``dB`` over an adapter's groups are float32 and in one order.
"""

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends.grouping import group
from lorafast.backends.plan import Run
from lorafast.core.assignment import Assignment
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS
from lorafast.operands import Weight


def grouped_lora_linear(wants: tuple[str, ...]) -> Run:
    """``y_i = x_i·Wᵀ + scaling[g_i] · (x_i·A[g_i]ᵀ)·B[g_i]ᵀ + bias`` and ``s_i = x_i·A[g_i]ᵀ``."""
    want_s = "s" in wants

    def run(
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor,
        assignment: Assignment,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        n, r, _ = lora_A.shape
        y, low = operands.linear(x, weight, bias), wide(x.dtype)
        grouping = assignment.made(group, n, x.device)
        if grouping is None:
            return y, x.new_zeros((x.shape[0], r), dtype=low) if want_s else None
        elements = _elements(x, assignment)
        T = elements.shape[1]
        factor_A = grouping.of_groups(lora_A).to(low)
        factor_B = _scaled(grouping.of_groups(lora_B), grouping.of_groups(scaling)).to(low)
        s = torch.bmm(grouping.gathered(elements).to(low), factor_A.mT)
        change = torch.bmm(s, factor_B.mT)
        sums = grouping.added(_elements(y.to(low), assignment), change)
        y = sums.view(y.shape).to(x.dtype)
        return y, grouping.scattered(s, T).reshape(x.shape[0], r) if want_s else None

    return run


def grouped_lora_linear_backward(wants: tuple[str, ...], dtype: torch.dtype) -> Run:
    """The gradients, those of A and B in ``dtype``.

    ``ds_i = scaling[g_i] · dy_i·B[g_i]``; over the elements of each adapter ``dA = dsᵀ·x``,
    ``dB = scaling · dyᵀ·s`` and ``dscaling = Σ s ⊙ dy·B``; ``dx_i = dy_i·W + ds_i·A[g_i]``.
    """
    asked = [name in wants for name in WANTS["grouped_lora_linear_backward"]]
    want_dx, want_dweight, want_dA, want_dB, want_dscaling, want_dbias = asked
    grouped = want_dx or want_dA or want_dB or want_dscaling

    def run(
        dy: Tensor,
        x: Tensor | None,
        weight: Weight | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        s: Tensor | None,
        scaling: Tensor,
        assignment: Assignment,
    ) -> tuple[Tensor | None, ...]:
        dx = dweight = dA = dB = dscaling = None
        n, low = scaling.shape[0], wide(dy.dtype)
        if want_dx:
            assert weight is not None
            dx = operands.linear_transposed(dy, weight)
        grouping = assignment.made(group, n, dy.device) if grouped else None
        if grouping is None:
            if want_dA:
                assert x is not None and lora_B is not None
                dA = x.new_zeros((n, lora_B.shape[2], x.shape[1]), dtype=dtype)
            if want_dB:
                assert s is not None
                dB = dy.new_zeros((n, dy.shape[1], s.shape[1]), dtype=dtype)
            if want_dscaling:
                dscaling = torch.zeros_like(scaling)
        else:
            every_dy = _elements(dy, assignment)
            T = every_dy.shape[1]
            # What is left over must be zero in both factors of a sum over rows: 0 · inf is NaN.
            blank_dy = grouping.blanked(grouping.gathered(every_dy).to(low), T)
            scale = grouping.of_groups(scaling)
            adapter = _adapters(n, dy.device) if grouping.adapter is None else grouping.adapter
            blank_s = None
            if want_dB or want_dscaling:
                assert s is not None
                blank_s = grouping.blanked(grouping.gathered(_elements(s, assignment)), T)
            if want_dx or want_dA:
                assert lora_B is not None
                factor_B = _scaled(grouping.of_groups(lora_B), scale).to(low)
                ds = grouping.blanked(torch.bmm(blank_dy, factor_B), T)
            if want_dx:
                assert lora_A is not None and dx is not None
                change = torch.bmm(ds, grouping.of_groups(lora_A).to(low))
                sums = grouping.added(_elements(dx.to(low), assignment), change)
                dx = sums.view(dx.shape).to(dy.dtype)
            if want_dA:
                assert x is not None
                own = grouping.gathered(_elements(x, assignment)).to(low)
                own = grouping.blanked(own, T)
                dA = _sums(torch.bmm(ds.mT, own), adapter, n).to(dtype)
            if want_dB:
                assert blank_s is not None
                partial = _sums(torch.bmm(blank_dy.mT, blank_s), adapter, n)
                dB = _scaled(partial, scaling).to(dtype)
            if want_dscaling:
                assert lora_B is not None and blank_s is not None
                unscaled = torch.bmm(blank_dy, grouping.of_groups(lora_B).to(low))
                unscaled = grouping.blanked(unscaled, T)
                each = (_exact(unscaled) * blank_s).sum((1, 2))
                dscaling = _sums(each, adapter, n).to(scaling.dtype)
        if want_dweight:
            assert x is not None
            dweight = dy.t() @ x
        return dx, dweight, dA, dB, dscaling, dy.sum(0) if want_dbias else None

    return run


def _elements(rows: Tensor, assignment: Assignment) -> Tensor:
    """``[M, C]`` as ``[E, T, C]``."""
    E = assignment.elements
    return rows.view(E, rows.shape[0] // max(E, 1), rows.shape[1])


def _scaled(factors: Tensor, scaling: Tensor) -> Tensor:
    """Not rounded to a half-precision dtype of the factors."""
    return factors * scaling.view(-1, 1, 1)


def _adapters(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device)


def _exact(partial: Tensor) -> Tensor:
    return partial.to(torch.promote_types(partial.dtype, torch.float32))


def _sums(partial: Tensor, adapter: Tensor, n: int) -> Tensor:
    """Of ``[groups, …]`` the sum over each adapter's groups ``[n, …]``: the same bits whenever it runs."""
    partial = _exact(partial)
    sums = partial.new_zeros((n, *partial.shape[1:]))
    if partial.is_cuda:  # where index_add_ adds in whatever order, and this sorts first
        return sums.index_put_((adapter,), partial, accumulate=True)
    return sums.index_add_(0, adapter, partial)
