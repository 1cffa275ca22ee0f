"""From a launch to what runs it, and to the line that describes it."""

from typing import Any

from torch import Tensor

from lorafast.backends import scaled_linear as with_pytorch
from lorafast.backends.hybrid import hybrid
from lorafast.backends.plan import Run
from lorafast.backends.triton.planning import HybridLaunch, Launch
from lorafast.core.problem import Problem
from lorafast.kernels.bottleneck import backward as bottleneck_backward
from lorafast.kernels.bottleneck import kernel as bottleneck
from lorafast.kernels.common.bottleneck_plan import BottleneckBackwardLaunch, BottleneckLaunch
from lorafast.kernels.common.codes_plan import CodesLaunch
from lorafast.kernels.common.decode_plan import DecodeLaunch
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    ExpandLaunch,
    LinearExpandLaunch,
    ShrinkBackwardLaunch,
    ShrinkLaunch,
    WeightNormLaunch,
)
from lorafast.kernels.common.scaled_plan import ScaledLinearLaunch
from lorafast.kernels.expand import kernel as expand
from lorafast.kernels.expand_backward import kernel as expand_backward
from lorafast.kernels.linear_expand import codes
from lorafast.kernels.linear_expand import kernel as linear_expand
from lorafast.kernels.lora_linear import decode, forward
from lorafast.kernels.scaled_linear import backward as scaled_backward
from lorafast.kernels.scaled_linear import kernel as scaled_linear
from lorafast.kernels.shrink import kernel as shrink
from lorafast.kernels.shrink_backward import kernel as shrink_backward
from lorafast.kernels.weight_norm import kernel as weight_norm


def run_of(launch: Launch, p: Problem) -> Run:
    """What runs the problem on tensors."""
    if isinstance(launch, ShrinkLaunch):
        run = shrink.launcher(launch)
        return run if p.operation == "shrink" else _ds_alone(run)
    if isinstance(launch, ExpandLaunch):
        return expand.launcher(launch, p.dtype)
    if isinstance(launch, HybridLaunch):
        return hybrid(expand.launcher(launch.expand, p.dtype), launch.transposed)
    if isinstance(launch, LinearExpandLaunch):
        return linear_expand.launcher(launch)
    if isinstance(launch, ExpandBackwardLaunch):
        return expand_backward.launcher(launch, p.adapter_dtype)
    if isinstance(launch, ShrinkBackwardLaunch):
        return shrink_backward.launcher(launch, p.adapter_dtype)
    if isinstance(launch, CodesLaunch):
        return codes.launcher(launch)
    if isinstance(launch, DecodeLaunch):
        return decode.launcher(launch)
    if isinstance(launch, WeightNormLaunch):
        return weight_norm.launcher(launch)
    if isinstance(launch, BottleneckLaunch):
        return bottleneck.launcher(launch)
    if isinstance(launch, BottleneckBackwardLaunch):
        return bottleneck_backward.launcher(launch, p.adapter_dtype)
    if isinstance(launch, ScaledLinearLaunch):
        return _scaled_linear(launch, p)
    return forward.launcher(launch)


def _scaled_linear(launch: ScaledLinearLaunch, p: Problem) -> Run:
    """A layer with a vector, forward or backward."""
    of_rows = None if launch.rows is None else scaled_backward.pass_launcher(launch.rows)
    if launch.gemm is None:
        assert of_rows is not None
        if p.operation == "scaled_linear":
            return with_pytorch.forward(p, lambda t, scale: of_rows(t, scale, None, p.dtype)[0])
        return with_pytorch.backward(p, of_rows)
    gemm = scaled_linear.launcher(launch.gemm)
    if p.operation == "scaled_linear":
        return lambda x, weight, scale, bias: gemm(x, weight, scale, bias)[:2]
    if p.scales_input:
        return scaled_backward.summed(gemm)

    def run(dy: Tensor, z: Tensor | None, weight: Tensor, scale: Tensor) -> Any:
        dscale = None if of_rows is None else of_rows(dy, None, z, p.adapter_dtype)[1]
        return gemm(dy, weight, scale)[0], dscale

    return run


def _ds_alone(shrink_of_dy: Run) -> Run:
    """``ds = scaling · dy·B`` by a shrink of dy."""

    def run(dy: Tensor, s: Tensor | None, lora_B: Tensor, scaling: float) -> Any:
        return shrink_of_dy(dy, lora_B.t(), 0.0, None, scaling), None, None

    return run
