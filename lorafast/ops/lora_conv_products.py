"""The products of a LoRA convolution: what A and B add is added in place.

y and its gradient are read as the matrices that they are in memory: [batch · positions, channels] of a
channels-last tensor, [channels, positions] for each element of the batch of another.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafast.backends import convolution
from lorafast.core.convolution import Geometry, convolve
from lorafast.core.dtypes import wide
from lorafast.ops.dropout import dropout
from lorafast.ops.problems import expand_backward_problem, planned

WANTS = ("dx", "dweight", "dA", "dB", "dbias")
_EXACT = (torch.float32, torch.float64)
# A pass over W costs a CPU about as much as 2 of y, or 1/5 of the two over dx and its convolution.
_FORWARD, _BACKWARD = 2, 5


class Adapter(NamedTuple):
    """What a convolution's adapter is, and the mask of its input."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    geometry: Geometry
    dropout_p: float
    seed: Tensor | None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, keep_s: bool
) -> tuple[Tensor, Tensor | None]:
    """``y`` and, where it is kept or made, ``s [batch, r, *size of y]``."""
    may_merge = _merging_is_exact(x, weight, adapter)
    if not adapter.dropout_p and adapter.geometry.groups == 1:
        A, B, scaling, geometry = adapter[:4]
        found = convolution.lora_conv(x, weight, bias, A, B, scaling, geometry, may_merge, keep_s)
        if found is not None:
            return found
    if may_merge and _pays_forward(x, weight, adapter, keep_s):
        y = convolve(x, merged(weight, adapter), bias, adapter.geometry)
        return y, shrink(x, adapter) if keep_s else None
    y = convolve(x, weight, bias, adapter.geometry)
    s = shrink(x, adapter)
    _add_expanded(y, s, adapter)
    return y, s


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    s: Tensor | None,
    adapter: Adapter,
    wants: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``WANTS``, those not in ``wants`` None.

    ``x`` is read for ``dA`` and ``dweight`` alone; for ``dx`` its size and strides count.
    """
    dx = dweight = None
    may_merge = (
        "dx" in wants
        and "dweight" not in wants
        and weight is not None
        and _merging_is_exact(x, weight, adapter)
    )
    dbias = dy.sum((0, *range(2, dy.dim()))) if "dbias" in wants else None
    alone = not adapter.dropout_p and adapter.geometry.groups == 1 and "dweight" not in wants
    if alone and "dA" in wants and "dB" in wants:
        assert s is not None
        A, B, scaling, geometry = adapter[:4]
        W = weight if "dx" in wants else None
        found = convolution.lora_conv_backward(dy, x, W, s, A, B, scaling, geometry, may_merge)
        if found is not None:
            return found[0], None, *found[2:], dbias
    merge = may_merge and weight is not None and _pays_backward(x, weight)
    low_dx = "dx" in wants and not merge
    dleft, dA, dB = _adapter_gradients(dy, x, s, adapter, low_dx, "dA" in wants, "dB" in wants)
    if "dx" in wants or "dweight" in wants:
        assert weight is not None
        W = merged(weight, adapter) if merge else weight
        needed = ("dx" in wants, "dweight" in wants)
        dx, dweight = convolution.gradients(dy, x, W, adapter.geometry, needed)
    if dleft is not None:
        assert dx is not None
        dx.add_(_drop(dleft, adapter))
    dA = None if dA is None else dA.to(adapter.lora_A.dtype)
    return dx, dweight, dA, dB, dbias


def _adapter_gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor | None,
    adapter: Adapter,
    for_dx: bool,
    for_dA: bool,
    for_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The low-rank part of ``dx`` before its mask, ``dA`` and ``dB``, what is asked for of them."""
    geometry, low = adapter.geometry, wide(x.dtype)
    if not (for_dA or for_dx):
        return None, None, _expand_backward(dy, s, adapter, False, for_dB)[1]
    A = adapter.lora_A.to(low)
    if for_dA:
        left = _drop(x, adapter).to(low)
    else:  # which is not read
        left = x if x.dtype is low else torch.empty_like(x, dtype=low)
    if for_dA and for_dB and geometry.groups == 1:
        assert s is not None
        together = convolution.lora_conv_backward(
            dy, left, None, s, A, adapter.lora_B, adapter.scaling, geometry, may_merge=False
        )
        if together is not None:
            _, found_ds, dA, dB = together
            if not for_dx:
                return None, dA, dB
            needed = True, False
            dleft, _ = convolution.conv_shrink_backward(found_ds, left, A, geometry, needed)
            return dleft, dA, dB
    ds, some_dB = _expand_backward(dy, s, adapter, True, for_dB)
    assert ds is not None
    of_s = convolution.conv_shrink_backward(ds, left, A, geometry, (for_dx, for_dA))
    return *of_s, some_dB


def shrink(x: Tensor, adapter: Adapter) -> Tensor:
    """``s = conv(drop(x), A)`` in the dtype of ``x``, float32 of float16."""
    low = wide(x.dtype)
    left = _drop(x, adapter).to(low)
    return convolution.conv_shrink(left, adapter.lora_A.to(low), adapter.geometry)


def merged(weight: Tensor, adapter: Adapter) -> Tensor:
    """``W + scaling · B·A`` in the dtype and the memory format of ``weight``."""
    N, r = adapter.lora_B.shape[:2]
    A, B = adapter.lora_A.to(weight.dtype), adapter.lora_B.to(weight.dtype).reshape(N, r)
    last = weight.movedim(1, -1)
    if not weight.is_contiguous() and last.is_contiguous():
        W, A = last.view(N, -1), A.movedim(1, -1).reshape(r, -1)
    else:
        W, A = weight.reshape(N, -1), A.reshape(r, -1)
    changed = torch.addmm(W, B, A, alpha=adapter.scaling)
    if not (weight.is_contiguous() or last.is_contiguous()):
        return changed.view(weight.shape)
    return changed.as_strided(
        weight.shape, weight.stride()
    )  # those of sizes 1 too: they are a format


def _merging_is_exact(x: Tensor, weight: Tensor, adapter: Adapter) -> bool:
    """Whether ``W + scaling · B·A`` loses no more than the sum of two outputs does.

    In float32 a convolution with the sum is as exact as the sum of two convolutions. In 16 bits, and in
    float32 that the convolution rounds to fewer, small updates would vanish. It is measured on CPUs.
    """
    if adapter.geometry.groups > 1 or adapter.dropout_p or x.dtype not in _EXACT or not x.is_cpu:
        return False
    if x.dtype is torch.float64:
        return True
    mkldnn: Any = torch.backends.mkldnn  # whose attributes are made at run time
    return mkldnn.conv.fp32_precision not in ("tf32", "bf16")


def _pays_forward(x: Tensor, weight: Tensor, adapter: Adapter, keep_s: bool) -> bool:
    """Whether a pass over W is cheaper than one over y, or than s too where nothing else needs it."""
    positions = x.shape[0]
    for size, stride in zip(x.shape[2:], adapter.geometry.stride, strict=True):
        positions *= -(-size // stride)
    per_output = weight.numel() // max(weight.shape[0], 1)
    return positions >= (_FORWARD * per_output if keep_s else weight.shape[0])


def _pays_backward(x: Tensor, weight: Tensor) -> bool:
    """Whether a pass over W is cheaper than a second convolution to dx and its addition."""
    positions = x.numel() // max(x.shape[1], 1)
    return _BACKWARD * positions >= weight.numel() // max(weight.shape[1], 1)


def _add_expanded(y: Tensor, s: Tensor, adapter: Adapter) -> None:
    """``y += scaling · B·s``: in one pass over y where y is of the dtype of s and has a memory format,
    by a product beside it elsewhere, as in float16, whose s is float32."""
    groups = adapter.geometry.groups
    N = y.shape[1]
    B = adapter.lora_B.to(s.dtype).reshape(groups, N // groups, -1)
    last = y.movedim(1, -1)
    if last.is_contiguous():
        rows, s_rows = last.view(-1, N), s.movedim(1, -1).reshape(-1, s.shape[1])
        if groups == 1 and s.dtype is y.dtype:
            rows.addmm_(s_rows, B[0].t(), alpha=adapter.scaling)
            return
        parts = rows.view(-1, groups, N // groups).transpose(0, 1)  # [groups, M, N / groups]
        grouped = s_rows.unflatten(1, (groups, -1)).transpose(0, 1)  # [groups, M, r / groups]
        if s.dtype is y.dtype:
            parts.baddbmm_(grouped, B.transpose(1, 2), alpha=adapter.scaling)
        else:
            parts.add_(torch.bmm(grouped, B.transpose(1, 2)), alpha=adapter.scaling)
        return
    batch = y.shape[0]
    s = s.reshape(batch, groups, s.shape[1] // groups, s.shape[2:].numel())
    if s.dtype is y.dtype and y.is_contiguous():
        every_B = B.expand(batch, -1, -1, -1).flatten(0, 1)  # a view without groups
        parts = y.view(batch * groups, N // groups, s.shape[3])
        parts.baddbmm_(every_B, s.flatten(0, 1), alpha=adapter.scaling)
        return
    product = torch.matmul(B, s)  # [batch, groups, N / groups, positions]
    y.add_(product.view(y.shape), alpha=adapter.scaling)


def _expand_backward(
    dy: Tensor, s: Tensor | None, adapter: Adapter, for_ds: bool, for_dB: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``ds [batch, r, *size of y]`` and ``dB``, what is asked for of them."""
    if not (for_ds or for_dB):
        return None, None
    groups, (N, per_group) = adapter.geometry.groups, adapter.lora_B.shape[:2]
    last = dy.movedim(1, -1)
    if groups == 1 and (last.is_contiguous() or dy.dtype not in _EXACT):
        rows = last.reshape(-1, N)
        s_rows = s.movedim(1, -1).reshape(-1, per_group) if s is not None else None
        B = adapter.lora_B.reshape(N, per_group)
        wants = tuple(name for name, asked in (("ds", for_ds), ("dB", for_dB)) if asked)
        problem = expand_backward_problem(rows, s_rows, B, wants, B.dtype)
        ds, dB, _ = planned(problem)(rows, s_rows, B, adapter.scaling)
        ds = None if ds is None else ds.view(*last.shape[:-1], per_group).movedim(-1, 1)
        return ds, None if dB is None else dB.view(adapter.lora_B.shape)
    return _expand_backward_by_element(dy, s, adapter, for_ds, for_dB)


def _expand_backward_by_element(
    dy: Tensor, s: Tensor | None, adapter: Adapter, for_ds: bool, for_dB: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same by a product for each element of the batch and each group, in float32 at least."""
    groups, (N, per_group) = adapter.geometry.groups, adapter.lora_B.shape[:2]
    low, dtype = wide(dy.dtype), torch.promote_types(dy.dtype, torch.float32)
    batch, positions = dy.shape[0], dy.shape[2:].numel()
    of_dy = dy.reshape(batch, groups, N // groups, positions).to(dtype)
    ds = dB = None
    if for_ds:
        B = adapter.lora_B.to(low).to(dtype).reshape(groups, N // groups, per_group)
        product = torch.matmul(B.transpose(1, 2) * adapter.scaling, of_dy)
        ds = product.view(batch, groups * per_group, *dy.shape[2:]).to(low)
    if for_dB:
        assert s is not None
        of_s = s.reshape(batch, groups, per_group, positions).to(dtype)
        product = torch.matmul(of_dy, of_s.transpose(2, 3)).sum(0) * adapter.scaling
        dB = product.to(adapter.lora_B.dtype).view(adapter.lora_B.shape)
    return ds, dB


def _drop(x: Tensor, adapter: Adapter) -> Tensor:
    """``drop(x)``, channels last where there is a mask."""
    if not adapter.dropout_p:
        return x
    return dropout(x.movedim(1, -1), adapter.dropout_p, adapter.seed).movedim(-1, 1)
