"""What the Triton kernels are launched with for a problem on a device: decided here and nowhere else.

Pure functions of a problem and a made-up or real ``Device``: configuration (this machine's record, else
the rule of the architecture), TMA or pointers, the cut of a reduction, helpers or launches of their own.

Bits of a result depend on all that: they differ between buckets of M, numbers of SMs and tables. The
kernels are not batch-invariant; two runs of one call give the same bits.
"""

from lorafast.backends.cost import Device, key_of, record_of
from lorafast.core.problem import LAYER_OPERATIONS, Problem
from lorafast.kernels import tables
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    LinearExpandLaunch,
    LoraLinearBackwardLaunch,
    LoraLinearLaunch,
    ShrinkBackwardLaunch,
    ShrinkLaunch,
    expand_backward_launch,
    linear_expand_launch,
    lora_linear_backward_launch,
    lora_linear_launch,
    may_help,
    precision_of,
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
    """How float32 operands are rounded."""
    return precision_of(p.dtype, p.tf32)


def plan_shrink(p: Problem, device: Device, config: LaunchConfig | None = None) -> ShrinkLaunch:
    """One pass over x, its columns shared out where rows are few."""
    c = config or config_of(p, device)
    return shrink_launch(
        c, p.M, p.K, p.r, sms=device.sms, precision=precision(p), dropout=p.dropout
    )


def plan_expand_backward(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> ExpandBackwardLaunch | ShrinkLaunch:
    """One pass over dy for all that is wanted; ds alone is a shrink of dy."""
    if p.wants == ("ds",):
        return plan_shrink(as_shrink(p), device, config)
    c = config or config_of(p, device)
    return expand_backward_launch(
        c, p.M, p.N, p.r, sms=device.sms, precision=precision(p), wants=p.wants
    )


def as_shrink(p: Problem) -> Problem:
    """``ds = scaling · dy·B``, which is all that is wanted, as a shrink of dy."""
    layouts = p.layouts._replace(x=p.layouts.dy)
    return p._replace(operation="shrink", K=p.N, N=0, wants=(), layouts=layouts)


def plan_shrink_backward(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> ShrinkBackwardLaunch:
    """One pass over x, its rows shared out where columns are few."""
    c = config or config_of(p, device)
    return shrink_backward_launch(
        c, p.M, p.K, p.r, sms=device.sms, precision=precision(p), dropout=p.dropout
    )


def plan_linear_expand(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> LinearExpandLaunch:
    """The GEMM of y, or transposed that of dx, with its low-rank term."""
    K, N = (p.N, p.K) if p.transposed else (p.K, p.N)
    return linear_expand_launch(
        config or config_of(p, device), p.M, K, N, p.r, sms=device.sms, dtype=p.dtype,
        precision=precision(p), tma=tma(p), transposed=p.transposed, by_rows=_by_rows(p),
        bias=p.bias, dropout=p.dropout,
    )  # fmt: skip


def plan_lora_linear(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> LoraLinearLaunch | str:
    """A layer's forward in one launch with helpers, or why they can't serve it."""
    reason = _why_no_helpers(p)
    if reason is not None:
        return reason
    own = config or config_of(p, device)
    launch = lora_linear_launch(
        own, p.M, p.K, p.N, p.r,
        sms=device.sms, dtype=p.dtype, precision=precision(p), tma=True, by_rows=_by_rows(p),
        bias=p.bias, dropout=p.dropout,
    )  # fmt: skip
    return launch or (_CANNOT_SERVE if own.helpers else _HAS_NONE)


def plan_lora_linear_backward(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> LoraLinearBackwardLaunch | str:
    """A frozen layer's backward with helpers, and dA after them, or why they can't serve it."""
    if p.wants not in (FROZEN, (*FROZEN, "dbias")):
        return f"they make {', '.join(FROZEN)} at once, and {', '.join(p.wants)} is asked for"
    reason = _why_no_helpers(p)
    if reason is not None:
        return reason
    own = config or config_of(p, device)
    of_dA = p._replace(operation="shrink_backward", N=0, wants=())
    launch = lora_linear_backward_launch(
        own, config_of(of_dA, device), p.M, p.K, p.N, p.r,
        sms=device.sms, dtype=p.dtype, precision=precision(p), tma=True, by_rows=_by_rows(p),
        dropout=p.dropout, dbias="dbias" in p.wants,
    )  # fmt: skip
    return launch or (_CANNOT_SERVE if own.helpers else _HAS_NONE)


_HAS_NONE = "the configuration has none"
_CANNOT_SERVE = "a mask, the rank, or few tiles or SMs would keep them too long beside the GEMM"


def _why_no_helpers(p: Problem) -> str | None:
    if not may_help(p.dtype):
        return "float16's skinny work is in float32, in other tiles than the GEMM's"
    if min(p.M, p.K, p.N, p.r) < 1:
        return "there is nothing to compute"
    if not tma(p):
        return "TMA can't read or write the GEMM's matrices"
    return None


def tma(p: Problem) -> bool:
    """Whether TMA can read what the problem's GEMM reads and write what it writes: the one place that
    says so."""
    if p.transposed or p.operation == "lora_linear_backward":
        return tma_fits(p.dtype, p.layouts.dy, p.layouts.weight, p.M, p.N, p.K)
    return tma_fits(p.dtype, p.layouts.x, p.layouts.weight, p.M, p.K, p.N)


def _by_rows(p: Problem) -> bool:
    """Whether the weight lies in memory as its shape says, or as its transpose's."""
    return p.layouts.weight.rows > 0


def config_of(p: Problem, device: Device) -> LaunchConfig:
    """What was measured for the call or near it, else the rule of the architecture."""
    record = record_of(p, device.name)
    if record is not None and record.config is not None:
        described = record.config.descriptors
        if not described or tma(p):
            return record.config
    return rule_of(p, device)


def rule_of(p: Problem, device: Device) -> LaunchConfig:
    """The rule of the architecture for the call."""
    key = key_of(p)
    bulk = p.operation in ("linear_expand", *LAYER_OPERATIONS) and tma(p)
    return tables.find(p.operation, device.capability, p.dtype, p.M, key.K, key.N, p.r, bulk)
