"""What a launch is, in a line for ``explain``."""

from lorafast.backends.triton.planning import HybridLaunch, Launch
from lorafast.kernels.common.bottleneck_plan import BottleneckBackwardLaunch, BottleneckLaunch
from lorafast.kernels.common.codes_plan import CodesLaunch
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.decode_plan import DecodeLaunch
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    ExpandLaunch,
    LinearExpandLaunch,
    ShrinkBackwardLaunch,
    ShrinkLaunch,
    WeightNormLaunch,
)
from lorafast.kernels.common.scaled_plan import ScaledGemmLaunch, ScaledLinearLaunch


def lines(launch: Launch) -> tuple[str, ...]:
    """What is launched, a line each."""
    if isinstance(launch, ShrinkLaunch):
        cut = _cut(launch.grid[1], "K")
        return (f"shrink: {_grid(launch.grid)}, {_tiles(launch.config, 'mk')}{cut}, pointers",)
    if isinstance(launch, ExpandLaunch):
        return (f"expand: {_grid(launch.grid)}, {_tiles(launch.config, 'mn')}, pointers",)
    if isinstance(launch, HybridLaunch):
        return *lines(launch.expand), "addmm_: PyTorch's GEMM, accumulated onto that"
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
    if isinstance(launch, CodesLaunch):
        programs, tiles = launch.tiles * launch.splits, _tiles(launch.config, "mnk")
        cut = _cut(launch.splits, "K")
        return (f"linear_expand: grid {programs}, {tiles}{cut}, W read as codes",)
    if isinstance(launch, DecodeLaunch):
        cut, tiles = _cut(launch.splits, "K"), _tiles(launch.config, "mnk")
        codes = ", W read as codes" if launch.group else ""
        made = (
            f"{launch.helpers} programs make s" if launch.helpers else "each tile makes its own s"
        )
        return (f"lora_linear: grid {launch.programs}, {tiles}{cut}{codes}; {made}",)
    if isinstance(launch, WeightNormLaunch):
        tiles = _tiles(launch.config, "nk")
        return (f"weight_norm: grid {launch.programs}, {tiles}, pointers",)
    if isinstance(launch, BottleneckLaunch):
        return (f"bottleneck: {_rows(launch)}",)
    if isinstance(launch, BottleneckBackwardLaunch):
        found = [] if launch.rows is None else [f"bottleneck_backward: {_rows(launch.rows)}"]
        if launch.columns is not None:
            grid, tiles = _grid(launch.columns.grid), _tiles(launch.columns.config, "mkr")
            wants = ", ".join(launch.columns.wants)
            found.append(f"bottleneck_columns ({wants}): {grid}, {tiles}, pointers")
        return tuple(found)
    if isinstance(launch, ScaledLinearLaunch):
        return _scaled(launch)
    helpers = launch.helpers
    beside = (
        f"{helpers.helpers} of {helpers.programs} programs help for {helpers.waves} rounds of tiles"
    )
    return (f"lora_linear: {_gemm(launch.gemm)}; {beside}: s",)


def _scaled(launch: ScaledLinearLaunch) -> tuple[str, ...]:
    gemm, rows, found = launch.gemm, launch.rows, []
    if gemm is not None:
        found.append(f"scaled_linear: {_gemm(gemm.gemm)}; {_folded(gemm)}")
    if rows is not None:
        made = " and ".join([*["the scaled matrix"] * rows.writes, *["sums"] * rows.sums])
        grid, tiles = _grid(rows.grid), _tiles(rows.config, "mn")
        beside = "" if gemm is not None else ", beside PyTorch's GEMM where one is needed"
        found.append(f"scaled_pass: {grid}, {tiles}, for {made}{beside}")
    if (gemm is not None and gemm.sums) or (rows is not None and rows.sums):
        found.append("sum_partials: the vector's gradient")
    return tuple(found)


def _folded(launch: ScaledGemmLaunch) -> str:
    where = "at the load of its first matrix" if launch.at_load else "before y is written"
    return f"the vector multiplies {where}"


def _rows(launch: BottleneckLaunch) -> str:
    return f"{_grid(launch.grid)}, {_tiles(launch.config, 'mnkr')}, pointers"


def _gemm(launch: LinearExpandLaunch) -> str:
    read = "TMA" if launch.tma else "pointers"
    tiles = _tiles(launch.config, "mnk")
    return f"grid {launch.programs}, {tiles}{_cut(launch.splits, 'K')}, {read}"


def _grid(grid: tuple[int, ...]) -> str:
    return f"grid {' × '.join(map(str, grid))}"


def _tiles(c: LaunchConfig, sides: str) -> str:
    sizes = " × ".join(str(getattr(c, f"block_{side}")) for side in sides)
    return f"tiles {sizes}, {c.num_warps} warps, {c.num_stages} stages"


def _cut(count: int, name: str) -> str:
    return f", {name} in {count} shares" if count > 1 else ""
