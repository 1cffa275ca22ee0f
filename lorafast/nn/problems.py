"""The problems that an eager training step of a layer asks backends to serve."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafast import operands
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS, Layout, Problem
from lorafast.nn import offload
from lorafast.operands import Weight
from lorafast.ops import siblings
from lorafast.ops.problems import (
    backward_problem,
    bottleneck_backward_problem,
    bottleneck_problem,
    expand_backward_problem,
    layer_problem,
    linear_expand_problem,
    shrink_backward_problem,
    shrink_problem,
)

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


def bottleneck_problems(x: Tensor | None, one: Any) -> tuple[Problem, Problem]:
    """``bottleneck`` and its backward, on rows like those of ``x``, else on many of its own dtype.

    Under ``torch.no_grad`` the forward is that of inference."""
    down, up = one.down, one.up
    dtype = down.dtype if x is None else x.dtype
    device = offload.device_of(one, down) if x is None else x.device
    M = _MANY_ROWS if x is None else x.numel() // max(x.shape[-1], 1)

    def rows(size: int, dtype: torch.dtype = dtype) -> Tensor:  # two rows lie as many do
        return torch.empty((2, size), dtype=dtype, device=device)

    K, N, b = one.in_features, one.out_features, one.bottleneck
    beside = one.has_residual or one.norm is not None
    wants = WANTS["bottleneck"] if torch.is_grad_enabled() else ("y",)
    forward = bottleneck_problem(
        rows(K), down, up, one.down_bias, one.up_bias, one.activation, rows(N) if beside else None,
        wants,
    )  # fmt: skip
    backward = bottleneck_backward_problem(
        rows(N), rows(K), rows(b, wide(dtype)), down, up, one.activation, beside,
        WANTS["bottleneck_backward"], down.dtype,
    )  # fmt: skip
    return forward._replace(M=M), backward._replace(M=M)


def _x_of(layer: Any, x: Tensor | None) -> Tensor:
    """Rows like those of ``x``, else many of the weight's dtype, one of them in memory."""
    W, K = layer.weight, layer.in_features
    device, dtype = (offload.device_of(layer, W), W.dtype) if x is None else (x.device, x.dtype)
    M = _MANY_ROWS if x is None else x.numel() // max(x.shape[-1], 1)
    row = torch.empty((1, K), dtype=dtype, device=device)
    return row.requires_grad_(torch.is_grad_enabled()).expand(M, K)


def why_not_shared(layers: Mapping[str, Any], x: Tensor | None) -> dict[str, str]:
    """Which of these siblings don't share ``x``, and why; all of them, or at least two do."""
    rows = _x_of(next(iter(layers.values())), x)
    M, K = rows.shape
    if M < siblings.FEWEST_ROWS or M * K < siblings.FEWEST_ELEMENTS:
        few = (
            f"x has {M:,} rows of {K:,}, and sharing pays from {siblings.FEWEST_ROWS} rows and "
            f"{siblings.FEWEST_ELEMENTS:,} elements"
        )
        return dict.fromkeys(layers, few)
    if rows.device.type in siblings.SHARED_WITH_A_BACKWARD and not torch.is_grad_enabled():
        return dict.fromkeys(layers, f"without a backward nothing is shared on {rows.device.type}")
    found, first = {}, None
    for name, layer in layers.items():
        own = layer.sibling()
        if own is None:
            found[name] = _why_alone(layer)
        elif not own.fits(rows, own if first is None else first):
            found[name] = (
                "its tensors have other dtypes or another device than x and the other adapters, or its "
                "weight requires a gradient"
            )
        else:
            first = own if first is None else first
    if len(layers) - len(found) == 1:
        found |= {name: "no other shares x" for name in layers if name not in found}
    return found


def _why_alone(layer: Any) -> str:
    if layer.merged:
        return "it is merged"
    return "it is DoRA's" if layer.use_dora else "its dropout has a mask of its own"


def shared_problems(layers: Sequence[Any], x: Tensor | None) -> list[Problem]:
    """What siblings ask backends to serve in an eager training step, in its order: a ``shrink`` of all
    ranks, each one's ``linear_expand`` and ``expand_backward``, a ``shrink_backward``, and dx.

    Under ``torch.no_grad`` the first two."""
    rows = _x_of(layers[0], x)
    dtype = layers[0].lora_A.dtype

    def like(width: int, dtype: torch.dtype) -> Tensor:  # two rows lie as many do
        return torch.empty((2, width), dtype=dtype, device=rows.device)

    own = [layer.sibling() for layer in layers]
    x2, lora_A = like(rows.shape[1], rows.dtype), torch.cat([one.lora_A.detach() for one in own])
    s = like(len(lora_A), wide(rows.dtype))
    parts = siblings.columns(s, own)
    dys = [like(len(one.weight), rows.dtype) for one in own]
    found = [shrink_problem(x2, lora_A, 0.0, None)]
    found += [
        linear_expand_problem(x2, one.weight, part, one.lora_B, one.bias, 0.0, None, False)
        for one, part in zip(own, parts, strict=True)
    ]
    if torch.is_grad_enabled():
        found += [
            expand_backward_problem(dy, part, one.lora_B, ("ds", "dB"), dtype)
            for dy, part, one in zip(dys, parts, own, strict=True)
        ]
        found.append(shrink_backward_problem(s, x2, 0.0, None, dtype))
        found.append(
            linear_expand_problem(dys[0], own[0].weight, s, lora_A.t(), None, 0.0, None, True)
        )
    return [problem._replace(M=len(rows)) for problem in found]
