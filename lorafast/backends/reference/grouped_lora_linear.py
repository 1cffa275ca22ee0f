"""The layer with an adapter per element: the definition, and a backward adapter by adapter."""

import torch
from torch import Tensor

from lorafast import operands, reference
from lorafast.backends.plan import Run
from lorafast.core.assignment import Assignment
from lorafast.core.problem import WANTS, Problem
from lorafast.operands import Weight


def grouped_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    assignment: Assignment,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``y_i = x_i·Wᵀ + scaling[g_i] · (x_i·A[g_i]ᵀ)·B[g_i]ᵀ + bias`` and ``s_i = x_i·A[g_i]ᵀ``."""
    adapter_of, dense = assignment.adapter_of, operands.as_dense(weight)
    elements = reference.as_elements(x, adapter_of)
    y = reference.grouped_lora_linear(
        elements, dense, lora_A, lora_B, scaling, adapter_of, bias, operands.activations(x, weight)
    )
    return y.reshape(x.shape[0], dense.shape[0]), reference.grouped_shrink(x, lora_A, adapter_of)


def of_one_adapter(problem: Problem) -> Problem:
    """The backward of the rows that one adapter has."""
    wants = tuple(name for name in ("dx", "dA", "dB") if name in problem.wants)
    return problem._replace(operation="lora_linear_backward", wants=wants, adapters=0)


def grouped_lora_linear_backward(of_one: Run, wants: tuple[str, ...]) -> Run:
    """The gradients; ``of_one`` gives ``dx``, ``dA`` and ``dB`` of the rows that one adapter has."""
    want_dx, want_dweight, want_dA, want_dB, want_dscaling, want_dbias = (
        name in wants for name in WANTS["grouped_lora_linear_backward"]
    )

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
        adapter_of = assignment.adapter_of
        every_dy = reference.as_elements(dy, adapter_of)
        none = reference.members(adapter_of, -1)
        order, every_dA, every_dB, every_dscaling = [none], [], [], []
        every_dx = []
        if want_dx:
            assert weight is not None
            every_dx.append(every_dy[none] @ operands.as_dense(weight))
        for g in range(scaling.shape[0]):
            index = reference.members(adapter_of, g)
            own_dy, own_x, own_s = (_rows_of(tensor, index, adapter_of) for tensor in (dy, x, s))
            assert own_dy is not None
            A = None if lora_A is None else lora_A[g]
            B = None if lora_B is None else lora_B[g]
            dx, _, dA, dB, _ = of_one(own_dy, own_x, weight, A, B, own_s, scaling[g], 0.0, None)
            order.append(index)
            if want_dx:
                every_dx.append(dx.view(len(index), every_dy.shape[1], dx.shape[1]))
            every_dA.append(dA)
            every_dB.append(dB)
            if want_dscaling:
                assert B is not None
                assert own_s is not None
                unscaled = reference.expand_ds(own_dy, B, 1.0)
                every_dscaling.append((unscaled * own_s).sum().to(scaling.dtype))
        dx = dweight = None
        if want_dx:
            dx = torch.cat(every_dx)[torch.cat(order).argsort()]
            dx = dx.reshape(dy.shape[0], dx.shape[-1])
        if want_dweight:
            assert x is not None
            dweight = dy.t() @ x
        return (
            dx,
            dweight,
            torch.stack(every_dA) if want_dA else None,
            torch.stack(every_dB) if want_dB else None,
            torch.stack(every_dscaling) if want_dscaling else None,
            dy.sum(0) if want_dbias else None,
        )

    return run


def _rows_of(rows: Tensor | None, index: Tensor, adapter_of: list[int] | Tensor) -> Tensor | None:
    """Of ``[M, C]`` the rows of the elements ``index``."""
    if rows is None:
        return None
    own = reference.as_elements(rows, adapter_of)[index]
    return own.reshape(index.shape[0] * own.shape[1], own.shape[2])
