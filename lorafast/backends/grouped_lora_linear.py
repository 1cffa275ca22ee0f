"""The layer with an adapter per element: a base GEMM, and one batched product over all adapters.

PyTorch's batched products want groups of one size: ``grouping`` brings the elements of an adapter
together. ``dA`` and ``dB`` are sums over an adapter's groups, in float32 and in one order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lorafast.backends.grouping import Grouping, group
from lorafast.backends.plan import Run
from lorafast.core.assignment import Assignment
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS
from lorafast.operands import Weight

Linear = Callable[[Tensor, Weight, Tensor | None], Tensor]
"""``x·Wᵀ + bias``, new memory."""
LinearTransposed = Callable[[Tensor, Weight], Tensor]
"""``dy·W``, new memory."""


def grouped_lora_linear(wants: tuple[str, ...], linear: Linear) -> Run:
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
        y, low = linear(x, weight, bias), wide(x.dtype)
        grouping = assignment.made(group, n, x.device)
        if grouping is None:
            return y, x.new_zeros((x.shape[0], r), dtype=low) if want_s else None
        A = grouping.of_groups(lora_A).to(low)
        B = _scaled(grouping.of_groups(lora_B), grouping.of_groups(scaling)).to(low)
        elements = _elements(x, assignment)
        s = torch.bmm(grouping.gathered(elements).to(low), A.mT)  # [groups, size · T, r]
        y = _added(y, torch.bmm(s, B.mT), grouping, assignment)
        if not want_s:
            return y, None
        return y, grouping.scattered(s, elements.shape[1]).reshape(x.shape[0], r)

    return run


def grouped_lora_linear_backward(
    wants: tuple[str, ...], dtype: torch.dtype, linear_transposed: LinearTransposed
) -> Run:
    """The gradients, those of A and B in ``dtype``.

    ``ds_i = scaling[g_i] · dy_i·B[g_i]`` and ``dx_i = dy_i·W + ds_i·A[g_i]``; summed over the elements
    of each adapter ``dA = dsᵀ·x``, ``dB = scaling · dyᵀ·s`` and ``dscaling = Σ s ⊙ dy·B``.
    """
    want_dx, want_dweight, want_dA, want_dB, want_dscaling, want_dbias = (
        name in wants for name in WANTS["grouped_lora_linear_backward"]
    )
    want_ds, want_s = want_dx or want_dA, want_dB or want_dscaling

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
        n, grouping = scaling.shape[0], None
        dx = dweight = dA = dB = dscaling = None
        if want_dx:
            assert weight is not None
            dx = linear_transposed(dy, weight)
        if want_dweight:
            assert x is not None
            dweight = dy.t() @ x
        if want_ds or want_s:
            grouping = assignment.made(group, n, dy.device)
        if grouping is None:
            dA, dB, dscaling = zeros(dy, x, lora_B, s, scaling)
        else:
            # What is left over is zero in both factors of a sum over rows: 0 · inf would be NaN.
            every_dy = _gathered(dy, grouping, assignment)
            every_s = every_ds = None
            if want_s:
                assert s is not None
                every_s = _gathered(s, grouping, assignment)
            if want_ds:
                assert lora_B is not None
                B = _scaled(grouping.of_groups(lora_B), grouping.of_groups(scaling))
                every_ds = _of_dy(every_dy, B, grouping)
            if dx is not None:
                assert lora_A is not None
                assert every_ds is not None
                A = grouping.of_groups(lora_A).to(every_ds.dtype)
                dx = _added(dx, torch.bmm(every_ds, A), grouping, assignment)
            if want_dA:
                assert x is not None
                assert every_ds is not None
                every_x = _gathered(x, grouping, assignment)
                dA = grouping.summed(_exact(torch.bmm(every_ds.mT, every_x)), n).to(dtype)
            if want_dB:
                assert every_s is not None
                partial = _exact(torch.bmm(every_dy.mT, every_s))
                dB = grouping.summed(_scaled(partial, grouping.of_groups(scaling)), n).to(dtype)
            if want_dscaling:
                assert lora_B is not None
                assert every_s is not None
                B = grouping.of_groups(lora_B)
                unscaled = _exact(_of_dy(every_dy, B, grouping))
                partial = (unscaled * every_s).sum((1, 2))
                dscaling = grouping.summed(partial, n).to(scaling.dtype)
        return dx, dweight, dA, dB, dscaling, dy.sum(0) if want_dbias else None

    def zeros(
        dy: Tensor, x: Tensor | None, lora_B: Tensor | None, s: Tensor | None, scaling: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``dA``, ``dB`` and ``dscaling`` where no element has an adapter."""
        n, dA, dB = scaling.shape[0], None, None
        if want_dA:
            assert x is not None
            assert lora_B is not None
            dA = x.new_zeros((n, lora_B.shape[2], x.shape[1]), dtype=dtype)
        if want_dB:
            assert s is not None
            dB = dy.new_zeros((n, dy.shape[1], s.shape[1]), dtype=dtype)
        return dA, dB, torch.zeros_like(scaling) if want_dscaling else None

    return run


def _elements(rows: Tensor, assignment: Assignment) -> Tensor:
    """``[M, C]`` as ``[E, T, C]``."""
    E = assignment.elements
    return rows.view(E, rows.shape[0] // max(E, 1), rows.shape[1])


def _gathered(rows: Tensor, grouping: Grouping, assignment: Assignment) -> Tensor:
    """``[M, C]`` by groups ``[groups, size · T, C]``, with zeros in what is left over."""
    elements = _elements(rows, assignment)
    found = grouping.gathered(elements).to(wide(rows.dtype))
    return grouping.blanked(found, elements.shape[1])


def _of_dy(every_dy: Tensor, B: Tensor, grouping: Grouping) -> Tensor:
    """``dy·B`` by groups, with zeros in what is left over."""
    T = every_dy.shape[1] // grouping.size
    return grouping.blanked(torch.bmm(every_dy, B.to(every_dy.dtype)), T)


def _added(rows: Tensor, change: Tensor, grouping: Grouping, assignment: Assignment) -> Tensor:
    """``rows [M, C]`` plus ``change [groups, size · T, C]``, rounded once; ``rows`` are written on."""
    sums = grouping.added(_elements(rows.to(change.dtype), assignment), change)
    return sums.view(rows.shape).to(rows.dtype)


def _scaled(factors: Tensor, scaling: Tensor) -> Tensor:
    """``scaling · factors [n, …]``, not rounded to the factors' dtype if that has half precision."""
    return factors * scaling.view(-1, 1, 1)


def _exact(partial: Tensor) -> Tensor:
    """In the dtype of sums."""
    return partial.to(torch.promote_types(partial.dtype, torch.float32))
