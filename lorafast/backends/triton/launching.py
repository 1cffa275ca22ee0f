"""From a launch to what runs it, and to the line that describes it."""

from typing import Any

from torch import Tensor

from lorafast.backends.plan import Run
from lorafast.backends.triton.planning import Launch
from lorafast.core.problem import Problem
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    LinearExpandLaunch,
    LoraLinearLaunch,
    ShrinkBackwardLaunch,
    ShrinkLaunch,
)
from lorafast.kernels.expand_backward import kernel as expand_backward
from lorafast.kernels.linear_expand import kernel as linear_expand
from lorafast.kernels.lora_linear import backward, forward
from lorafast.kernels.shrink import kernel as shrink
from lorafast.kernels.shrink_backward import kernel as shrink_backward


def run_of(launch: Launch, p: Problem) -> Run:
    """What runs the problem on tensors."""
    if isinstance(launch, ShrinkLaunch):
        run = shrink.launcher(launch)
        return run if p.operation == "shrink" else _ds_alone(run)
    if isinstance(launch, LinearExpandLaunch):
        return linear_expand.launcher(launch)
    if isinstance(launch, ExpandBackwardLaunch):
        return expand_backward.launcher(launch, p.adapter_dtype)
    if isinstance(launch, ShrinkBackwardLaunch):
        return shrink_backward.launcher(launch, p.adapter_dtype)
    if isinstance(launch, LoraLinearLaunch):
        return forward.launcher(launch)
    return backward.launcher(launch, p.adapter_dtype)


def _ds_alone(shrink_of_dy: Run) -> Run:
    """``ds = scaling · dy·B`` by a shrink of dy."""

    def run(dy: Tensor, s: Tensor | None, lora_B: Tensor, scaling: float) -> Any:
        return shrink_of_dy(dy, lora_B.t(), 0.0, None, scaling), None, None

    return run


def lines(launch: Launch) -> tuple[str, ...]:
    """What is launched, a line each."""
    if isinstance(launch, ShrinkLaunch):
        cut = _cut(launch.grid[1], "K")
        return (f"shrink: {_grid(launch.grid)}, {_tiles(launch.config, 'mk')}{cut}, pointers",)
    if isinstance(launch, ShrinkBackwardLaunch):
        cut = _cut(launch.grid[1], "M")
        grid, tiles = _grid(launch.grid), _tiles(launch.config, "mk")
        return (f"shrink_backward: {grid}, {tiles}{cut}, pointers",)
    if isinstance(launch, ExpandBackwardLaunch):
        wants, grid = ", ".join(launch.wants), _grid(launch.grid)
        made = f"expand_backward ({wants}): {grid}, {_tiles(launch.config, 'mn')}, pointers"
        if "ds" not in launch.wants:
            return (made,)
        return made, f"sum_partials: ds from {launch.grid[0]} column groups"
    if isinstance(launch, LinearExpandLaunch):
        return (f"linear_expand: {_gemm(launch)}",)
    helpers = launch.helpers
    beside = (
        f"{helpers.helpers} of {helpers.programs} programs help for {helpers.waves} rounds of tiles"
    )
    if isinstance(launch, LoraLinearLaunch):
        return (f"lora_linear: {_gemm(launch.gemm)}; {beside}: s",)
    made = "ds, dB, dbias" if launch.dbias else "ds, dB"
    if launch.shrink_backward is None:
        return (f"lora_linear_backward: {_gemm(launch.gemm)}; {beside}: {made}, dA",)
    return (
        f"lora_linear_backward: {_gemm(launch.gemm)}; {beside}: {made}",
        *lines(launch.shrink_backward),
    )


def _gemm(launch: LinearExpandLaunch) -> str:
    read = "TMA" if launch.tma else "pointers"
    tiles = _tiles(launch.config, "mnk")
    return f"grid {launch.programs}, {tiles}{_cut(launch.splits, 'K')}, {read}"


def _grid(grid: tuple[int, int, int]) -> str:
    return f"grid {' × '.join(map(str, grid))}"


def _tiles(c: LaunchConfig, sides: str) -> str:
    sizes = " × ".join(str(getattr(c, f"block_{side}")) for side in sides)
    return f"tiles {sizes}, {c.num_warps} warps, {c.num_stages} stages"


def _cut(count: int, name: str) -> str:
    return f", {name} in {count} shares" if count > 1 else ""
