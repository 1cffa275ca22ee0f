"""What the Triton kernels are launched with for a problem on a device: decided here and nowhere else.

Pure functions of a problem and a made-up or real ``Device``: configuration (this machine's record, else
the rule of the architecture), TMA or pointers, the cut of a reduction, helpers or launches of their own.

Bits of a result depend on all that: they differ between buckets of M, numbers of SMs and tables. The
kernels are not batch-invariant; two runs of one call give the same bits.
"""

import torch

from lorafast.backends.cost import Device, record_of
from lorafast.core.problem import Problem
from lorafast.kernels import tables
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    Helpers,
    LinearExpandLaunch,
    LoraLinearBackwardLaunch,
    LoraLinearLaunch,
    ShrinkBackwardLaunch,
    ShrinkLaunch,
    backward_helpers,
    expand_backward_launch,
    forward_helpers,
    group_rows,
    linear_expand_launch,
    may_help,
    shrink_backward_launch,
    shrink_launch,
    tma_fits,
)

Launch = (
    ShrinkLaunch
    | LinearExpandLaunch
    | ExpandBackwardLaunch
    | ShrinkBackwardLaunch
    | LoraLinearLaunch
    | LoraLinearBackwardLaunch
)
FROZEN = ("dx", "dA", "dB")
"""What the backward of a frozen layer is asked for, which one launch with helpers gives."""


def precision(p: Problem) -> str:
    """How float32 operands are rounded: as PyTorch's own products round them; beside float16 to its
    significand, with float32's range."""
    if p.dtype is torch.float16:
        return "tf32"
    return "tf32" if p.dtype is torch.float32 and p.tf32 else "ieee"


def plan_shrink(p: Problem, device: Device) -> ShrinkLaunch:
    """One pass over x, its columns shared out where rows are few."""
    c = _config(p, device, p.M, p.K, p.K)
    return shrink_launch(
        c, p.M, p.K, p.r, sms=device.sms, precision=precision(p), dropout=p.dropout
    )


def plan_expand_backward(p: Problem, device: Device) -> ExpandBackwardLaunch:
    """One pass over dy for all that is wanted."""
    c = _config(p, device, p.M, p.N, p.N)
    return expand_backward_launch(
        c, p.M, p.N, p.r, sms=device.sms, precision=precision(p), wants=p.wants
    )


def plan_shrink_backward(p: Problem, device: Device) -> ShrinkBackwardLaunch:
    """One pass over x, its rows shared out where columns are few."""
    c = _config(p, device, p.M, p.K, p.K)
    return shrink_backward_launch(
        c, p.M, p.K, p.r, sms=device.sms, precision=precision(p), dropout=p.dropout
    )


def plan_linear_expand(p: Problem, device: Device) -> LinearExpandLaunch:
    """The GEMM of y, or transposed that of dx, with its low-rank term."""
    K, N = _gemm(p)
    return _linear_expand(p, device, _config(p, device, p.M, K, N, tma(p)), p.dropout, None)


def plan_lora_linear(p: Problem, device: Device) -> LoraLinearLaunch | str:
    """A layer's forward in one launch with helpers, or why they can't serve it."""
    reason = _why_no_helpers(p)
    if reason is not None:
        return reason
    own = _config(p, device, p.M, p.K, p.N, True)
    shrink = _rule("shrink", p, device, p.K)
    helpers = forward_helpers(
        own, shrink, p.M, p.K, p.N, p.r, p.dtype.itemsize, p.dropout, device.sms
    )
    if helpers is None:
        return _CANNOT_SERVE if own.helpers else _HAS_NONE
    return LoraLinearLaunch(_linear_expand(p, device, own, False, helpers), helpers, shrink)


def plan_lora_linear_backward(p: Problem, device: Device) -> LoraLinearBackwardLaunch | str:
    """A frozen layer's backward in one launch with helpers, with a mask in two, or why they can't serve
    it."""
    if p.wants != FROZEN:
        return f"they make {', '.join(FROZEN)}, and {', '.join(p.wants)} is asked for"
    reason = _why_no_helpers(p)
    if reason is not None:
        return reason
    own = _config(p, device, p.M, p.N, p.K, True)
    rows = _rule("expand_backward", p, device, p.N)
    columns = _rule("shrink_backward", p, device, p.K)
    helpers = backward_helpers(
        own, rows, columns, p.M, p.K, p.N, p.r, p.dtype.itemsize, p.dropout, device.sms
    )
    if helpers is None:
        return _CANNOT_SERVE if own.helpers else _HAS_NONE
    groups = -(-p.N // rows.block_n), -(-p.M // group_rows(own))
    alone = None
    if p.dropout:
        part = p._replace(operation="shrink_backward", N=0, wants=())
        alone = plan_shrink_backward(part, device)
    gemm = _linear_expand(p, device, own, p.dropout, helpers)
    return LoraLinearBackwardLaunch(gemm, helpers, rows, columns, groups, alone)


_HAS_NONE = "the configuration has none"
_CANNOT_SERVE = "a mask, the rank or too few tiles would keep them too long beside the GEMM"


def _why_no_helpers(p: Problem) -> str | None:
    if not may_help(p.dtype):
        return "float16's skinny work is in float32, in other tiles than the GEMM's"
    if not tma(p):
        return "TMA can't read or write the GEMM's matrices"
    if min(p.M, p.K, p.N, p.r) < 1:
        return "there is nothing to compute"
    return None


def tma(p: Problem) -> bool:
    """Whether TMA can read what the problem's GEMM reads and write what it writes: the one place that
    says so."""
    read = p.layouts.dy if _is_backward(p) else p.layouts.x
    return tma_fits(p.dtype, read, p.layouts.weight, p.M, _gemm(p)[1])


def _gemm(p: Problem) -> tuple[int, int]:
    """Depth and columns of the problem's GEMM."""
    return (p.N, p.K) if _is_backward(p) else (p.K, p.N)


def _is_backward(p: Problem) -> bool:
    return p.transposed or p.operation == "lora_linear_backward"


def _linear_expand(
    p: Problem, device: Device, c: LaunchConfig, dropout: bool, helpers: Helpers | None
) -> LinearExpandLaunch:
    K, N = _gemm(p)
    by_rows = p.layouts.weight.rows > 0
    return linear_expand_launch(
        c, p.M, K, N, p.r, sms=device.sms, dtype=p.dtype, precision=precision(p), tma=tma(p),
        n_major=by_rows is _is_backward(p), bias=p.bias, dropout=dropout, helpers=helpers,
    )  # fmt: skip


def _config(p: Problem, device: Device, M: int, K: int, N: int, bulk: bool = False) -> LaunchConfig:
    """What was measured for the call or near it, else the rule of the architecture."""
    record = record_of(p, device.name)
    if record is not None and record.config is not None and (bulk or not record.config.descriptors):
        return record.config
    return tables.find(p.operation, device.capability, p.dtype, M, K, N, p.r, bulk)


def _rule(operation: str, p: Problem, device: Device, length: int) -> LaunchConfig:
    """The rule of the architecture, whatever was tuned: beside a GEMM's configuration it must fit."""
    return tables.find(operation, device.capability, p.dtype, p.M, length, length, p.r)
