"""From a launch to what runs it, and to the line that describes it."""

import functools
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
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.linear_expand import linear_expand
from lorafast.kernels.lora_linear import lora_linear, lora_linear_backward
from lorafast.kernels.shrink import shrink
from lorafast.kernels.shrink_backward import shrink_backward


def run_of(launch: Launch, p: Problem) -> Run:
    """What runs the problem on tensors."""
    if isinstance(launch, ShrinkLaunch):
        return functools.partial(shrink, config=launch.config)
    if isinstance(launch, LinearExpandLaunch):
        run = functools.partial(linear_expand, config=launch.config)
        return _transposed(run) if p.transposed else run
    if isinstance(launch, ExpandBackwardLaunch):
        return _expand_backward(launch)
    if isinstance(launch, ShrinkBackwardLaunch):
        return functools.partial(shrink_backward, dtype=p.adapter_dtype, config=launch.config)
    config = launch.gemm.config
    if isinstance(launch, LoraLinearLaunch):
        return functools.partial(lora_linear, config=config)
    return _whole_backward(functools.partial(lora_linear_backward, config=config))


def _transposed(run: Run) -> Run:
    def with_w(x: Tensor, weight: Tensor, *others: Any) -> Any:
        return run(x, weight.t(), *others)

    return with_w


def _whole_backward(run: Run) -> Run:
    def all_five(*arguments: Any) -> Any:
        dx, dA, dB = run(*arguments)
        return dx, None, dA, dB, None

    return all_five


def _expand_backward(launch: ExpandBackwardLaunch) -> Run:
    want_ds, want_dB, want_dbias = (name in launch.wants for name in ("ds", "dB", "dbias"))

    def run(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> Any:
        ds, dB = expand_backward(dy, s, lora_B, scaling, config=launch.config)
        dbias = dy.sum(0) if want_dbias else None
        return ds if want_ds else None, dB if want_dB else None, dbias

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
    if launch.shrink_backward is None:
        return (f"lora_linear_backward: {_gemm(launch.gemm)}; {beside}: ds, dB, dA",)
    return (
        f"lora_linear_backward: {_gemm(launch.gemm)}; {beside}: ds, dB",
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
