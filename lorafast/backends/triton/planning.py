"""What the Triton kernels are launched with for a problem on a device: decided here and nowhere else.

Pure functions of a problem and a made-up or real ``Device``: configuration (this machine's record, else
the rule of the architecture), TMA or pointers, the cut of a reduction, helpers or launches of their own.

Bits of a result depend on all that: they differ between buckets of M, numbers of SMs and tables. The
kernels are not batch-invariant; two runs of one call give the same bits.
"""

from dataclasses import dataclass, replace

import torch

from lorafast.backends.cost import Device, key_of, record_of
from lorafast.backends.triton import quantized
from lorafast.core.problem import DENSE, Problem
from lorafast.kernels import tables
from lorafast.kernels.common.bottleneck_plan import (
    BottleneckBackwardLaunch,
    BottleneckLaunch,
    bottleneck_backward_launch,
    bottleneck_launch,
)
from lorafast.kernels.common.codes_plan import GROUP, MOST_ROWS, CodesLaunch, codes_launch
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.decode_plan import MOST_RANKS, DecodeLaunch, decode_launch
from lorafast.kernels.common.decode_plan import MOST_ROWS as MOST_DECODED
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    ExpandLaunch,
    LinearExpandLaunch,
    LoraLinearLaunch,
    ShrinkBackwardLaunch,
    ShrinkLaunch,
    WeightNormLaunch,
    expand_backward_launch,
    expand_launch,
    linear_expand_launch,
    lora_linear_launch,
    may_help,
    precision_of,
    shrink_backward_launch,
    shrink_launch,
    skinny_precision_of,
    tma_fits,
    weight_norm_launch,
)
from lorafast.kernels.common.scaled_plan import (
    ScaledLinearLaunch,
    scaled_gemm_launch,
    scaled_pass_launch,
)
from lorafast.kernels.tables.find import GEMMS


@dataclass(frozen=True)
class HybridLaunch:
    """``linear_expand`` in two launches: ``expand``, and PyTorch's GEMM accumulated onto its result.

    ``transposed``: it multiplies by the weight, not by its transpose.
    """

    expand: ExpandLaunch
    transposed: bool

    @property
    def config(self) -> LaunchConfig:
        """That of ``expand``."""
        return self.expand.config


Launch = (
    ShrinkLaunch
    | ExpandLaunch
    | LinearExpandLaunch
    | HybridLaunch
    | ExpandBackwardLaunch
    | ShrinkBackwardLaunch
    | LoraLinearLaunch
    | CodesLaunch
    | DecodeLaunch
    | WeightNormLaunch
    | BottleneckLaunch
    | BottleneckBackwardLaunch
    | ScaledLinearLaunch
)


def precision(p: Problem) -> str:
    """How float32 operands are rounded."""
    return precision_of(p.dtype, p.tf32)


def skinny_precision(p: Problem) -> str:
    """The same in ``shrink`` and ``shrink_backward``."""
    return skinny_precision_of(p.dtype, p.tf32)


def plan_shrink(p: Problem, device: Device, config: LaunchConfig | None = None) -> ShrinkLaunch:
    """One pass over x, its columns shared out where rows are few."""
    c = config or config_of(p, device)
    return shrink_launch(
        c, p.M, p.K, p.r, sms=device.sms, precision=skinny_precision(p), dropout=p.dropout
    )


def plan_expand(p: Problem, device: Device, config: LaunchConfig | None = None) -> ExpandLaunch:
    """y written once, its rows shared out among as many programs as run at once."""
    return expand_launch(
        config or config_of(p, device), p.M, p.N, p.r, sms=device.sms, dtype=p.dtype,
        precision=precision(p), bias=p.bias, dropout=p.dropout,
    )  # fmt: skip


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
        c, p.M, p.K, p.r, sms=device.sms, precision=skinny_precision(p), dropout=p.dropout
    )


def plan_weight_norm(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> WeightNormLaunch:
    """One pass over W. It has one rule for all devices, whatever ``config`` says."""
    return weight_norm_launch(p.N, p.K, p.r, sms=device.sms)


def plan_bottleneck(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> BottleneckLaunch:
    """A bottleneck adapter in one launch, by the rule of the architecture, whatever ``config`` says."""
    c = tables.find("bottleneck", device.capability, p.dtype, p.M, p.K, p.N, p.r)
    return bottleneck_launch(
        c, p.M, p.K, p.N, p.r, sms=device.sms, dtype=p.dtype, tf32=p.tf32, activation=p.activation,
        keeps="a" in p.wants,
    )  # fmt: skip


def plan_bottleneck_backward(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> BottleneckBackwardLaunch:
    """A launch over the rows of dy and one over the columns of dy and h, as far as they are needed, by
    the rules of a forward and of its own."""
    sizes = {"bottleneck": (p.N, p.K), "bottleneck_backward": (p.K, p.N)}
    rows, columns = (
        tables.find(operation, device.capability, p.dtype, p.M, K, N, p.r)
        for operation, (K, N) in sizes.items()
    )
    return bottleneck_backward_launch(
        {"rows": rows, "columns": columns}, p.M, p.K, p.N, p.r,
        sms=device.sms, dtype=p.dtype, tf32=p.tf32, activation=p.activation, wants=p.wants,
        residual=p.residual,
    )  # fmt: skip


def plan_scaled_linear(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> ScaledLinearLaunch:
    """A layer with a vector, forward or backward, with a GEMM of ours: that of ``linear_expand``. Where
    the vector scales y, its gradient is a pass of its own."""
    backward, rows = p.operation == "scaled_linear_backward", None
    at_load = p.scales_input is not backward
    if backward and at_load and "dscale" in p.wants:
        rows = scaled_pass_launch(p.M, p.N, sms=device.sms, writes=False)
    if not _has_gemm(p):
        return ScaledLinearLaunch(None, rows)
    gemm = p._replace(operation="linear_expand")
    own = config if config is not None and not config.hybrid else config_of(gemm, device)
    K, N = (p.N, p.K) if backward else (p.K, p.N)
    asked = {"keeps": "z" in p.wants}
    if backward:
        asked = {"writes": "dx" in p.wants, "sums": not at_load and "dscale" in p.wants}
    made = scaled_gemm_launch(
        own, p.M, K, N, sms=device.sms, dtype=p.dtype, precision=precision(p), tma=tma(gemm),
        transposed=p.transposed, by_rows=_by_rows(p), bias=p.bias, at_load=at_load, **asked,
    )  # fmt: skip
    return ScaledLinearLaunch(made, rows)


def plan_scaled_pass(p: Problem, device: Device) -> ScaledLinearLaunch:
    """The same with PyTorch's GEMM: a pass before or behind it, of the backward one for all results."""
    N = p.K if p.scales_input else p.N
    if p.operation == "scaled_linear":
        rows = scaled_pass_launch(p.M, N, sms=device.sms, sums=False)
    else:
        rows = scaled_pass_launch(
            p.M, N, sms=device.sms, writes="dx" in p.wants, sums="dscale" in p.wants
        )
    return ScaledLinearLaunch(None, rows)


def _has_gemm(p: Problem) -> bool:
    """Whether there is a product: for dl alone of a scaled y there is none."""
    return p.operation == "scaled_linear" or p.scales_input or "dx" in p.wants


def plan_linear_expand(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> LinearExpandLaunch:
    """The GEMM of y, or transposed that of dx, with its low-rank term, in one launch."""
    K, N = (p.N, p.K) if p.transposed else (p.K, p.N)
    own = config or config_of(p, device)
    return linear_expand_launch(
        rule_of(p, device) if own.hybrid else own, p.M, K, N, p.r, sms=device.sms, dtype=p.dtype,
        precision=precision(p), tma=tma(p), transposed=p.transposed, by_rows=_by_rows(p),
        bias=p.bias, dropout=p.dropout,
    )  # fmt: skip


def plan_hybrid(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> HybridLaunch | str:
    """The same in two launches, the second PyTorch's; or why not. A ``config`` that is not hybrid is
    the fused kernel's, and says nothing."""
    if p.dtype is torch.float16:
        return "the low-rank term would be rounded to float16 before the GEMM, and may overflow"
    own = config or measured_config(p, device)
    if own is None or not own.hybrid:
        own = hybrid_rule_of(p, device)
    return HybridLaunch(plan_expand(as_expand(p), device, own), p.transposed)


def plan_codes(p: Problem, device: Device, config: LaunchConfig | None = None) -> CodesLaunch | str:
    """A ``linear_expand`` that reads a quantized weight's codes, or why it can't. A ``config`` that is
    hybrid is another's, and says nothing."""
    if p.dropout:
        return "its mask is made by the launch that reads W dense"
    if not 0 < p.M <= MOST_ROWS:
        return f"there are {p.M} rows, it is for up to {MOST_ROWS}"
    if not quantized.shares_scales(p, GROUP):
        return f"rows or scales of W don't come in groups of {GROUP}"
    own = None if config is None or config.hybrid else config
    if own is not None:
        along = own.block_n if p.transposed else own.block_k
        if along % GROUP:
            return f"its tiles have {along} columns of W, and scales come in groups of {GROUP}"
    K, N = (p.N, p.K) if p.transposed else (p.K, p.N)
    return codes_launch(
        p.M, K, N, p.r, sms=device.sms, dtype=p.dtype, precision=precision(p),
        transposed=p.transposed, bias=p.bias, config=own,
    )  # fmt: skip


def plan_decode(p: Problem, device: Device) -> DecodeLaunch | str:
    """A layer's forward of few rows in one launch, W dense or read as codes, or why there is none."""
    if not 0 < p.M <= MOST_DECODED:
        return f"there are {p.M} rows, a launch for decoding is for up to {MOST_DECODED}"
    if p.dropout:
        return "there is dropout, a launch for decoding has none"
    if min(p.K, p.N, p.r) < 1:
        return "there is nothing to compute"
    if p.r > MOST_RANKS:
        return f"the rank is {p.r}, a launch for decoding takes up to {MOST_RANKS}"
    if p.format == DENSE:
        if p.layouts.weight.rows < 16 or p.K % 16:
            return "the rows of W aren't contiguous and aligned to 16 bytes"
        bits = 8 * p.dtype.itemsize
    else:
        if not quantized.shares_scales(p, GROUP):
            return f"rows or scales of W don't come in groups of {GROUP}"
        bits = int(8 * quantized.code_bytes(p))
    return decode_launch(
        p.M, p.K, p.N, p.r, sms=device.sms, dtype=p.dtype, bits=bits, precision=precision(p),
        skinny=skinny_precision(p), bias=p.bias,
    )  # fmt: skip


def hybrid_rule_of(p: Problem, device: Device) -> LaunchConfig:
    """The configuration of a hybrid launch: what was measured for ``expand``, else its rule."""
    return replace(config_of(as_expand(p), device), hybrid=True)


def as_expand(p: Problem) -> Problem:
    """The low-rank term of a ``linear_expand``, with the bias if there is one."""
    N = p.K if p.transposed else p.N
    return p._replace(operation="expand", K=0, N=N, transposed=False)


def plan_lora_linear(
    p: Problem, device: Device, config: LaunchConfig | None = None
) -> LoraLinearLaunch | str:
    """A layer's forward in one launch with helpers, or why they can't serve it."""
    reason = _why_no_helpers(p)
    if reason is not None:
        return reason
    own = config or config_of(p, device)
    # The rule, whatever was tuned for a launch of its own: beside a GEMM's configuration it must fit.
    shrink = tables.find("shrink", device.capability, p.dtype, p.M, p.K, p.K, p.r)
    launch = lora_linear_launch(
        own, shrink, p.M, p.K, p.N, p.r,
        sms=device.sms, dtype=p.dtype, precision=precision(p), tma=True, by_rows=_by_rows(p),
        bias=p.bias, dropout=p.dropout,
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
    if p.transposed:
        return tma_fits(p.dtype, p.layouts.dy, p.layouts.weight, p.M, p.N, p.K)
    return tma_fits(p.dtype, p.layouts.x, p.layouts.weight, p.M, p.K, p.N)


def _by_rows(p: Problem) -> bool:
    """Whether the weight lies in memory as its shape says, or as its transpose's."""
    return p.layouts.weight.rows > 0


def config_of(p: Problem, device: Device) -> LaunchConfig:
    """What was measured for the call or near it, else the rule of the architecture."""
    return measured_config(p, device) or rule_of(p, device)


def measured_config(p: Problem, device: Device) -> LaunchConfig | None:
    """What was measured for the call or near it, where it can serve the call."""
    record = record_of(p, device.name)
    if record is None or record.config is None:
        return None
    return record.config if not record.config.descriptors or tma(p) else None


def rule_of(p: Problem, device: Device) -> LaunchConfig:
    """The rule of the architecture for the call."""
    key = key_of(p)
    by_tma = p.operation in GEMMS and tma(p)
    return tables.find(p.operation, device.capability, p.dtype, p.M, key.K, key.N, p.r, by_tma)
