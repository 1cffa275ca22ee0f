"""The problems that an eager training step of a linear layer asks backends to serve."""

import torch
from torch import Tensor

from lorafast import operands
from lorafast.core.problem import Layout, Problem
from lorafast.operands import Weight
from lorafast.ops.problems import backward_problem, layer_problem

_MANY_ROWS = 1 << 20


def linear_problems(
    x: Tensor | None,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout: bool,
) -> tuple[Problem, Problem]:
    """``lora_linear`` and its backward, on rows like those of ``x``, else on many of the weight's.

    Under ``torch.no_grad`` the forward is that of inference."""
    like = operands.stored(weight)[0] if x is None else x
    dtype = weight.dtype if x is None else x.dtype
    M = _MANY_ROWS if x is None else x.numel() // max(x.shape[-1], 1)
    N, K = weight.shape

    def rows(size: int) -> Tensor:  # one in memory
        return torch.empty((1, size), dtype=dtype, device=like.device).expand(M, size)

    forward = layer_problem(
        rows(K), weight, lora_A, lora_B, bias, dropout, ("y",), layouts=True
    )  # fmt: skip
    fresh = Layout.fresh(M, K, dtype)
    forward = forward._replace(
        layouts=forward.layouts._replace(x=fresh), graph=torch.is_grad_enabled()
    )
    backward = backward_problem(forward, ("dx", "dA", "dB"), rows(N), layouts=True)
    fresh = Layout.fresh(M, N, dtype)
    return forward, backward._replace(layouts=backward.layouts._replace(dy=fresh))
