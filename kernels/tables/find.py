"""The row of a table that serves a call."""

import functools
import importlib
import math
from types import ModuleType

import torch
from lorafast.kernels.common.configs import SHARED_MEMORY, LaunchConfig

from lorafast.reference import wide

GEMMS = ("linear_expand", "lora_linear")
"""Operations whose launch is a GEMM: they take the same rows."""

Row = tuple[int, int, int, int, int, LaunchConfig]
Table = dict[str, tuple[Row, ...]]


def nearest_architecture(capability: int) -> int:
    """The architecture whose file serves a device: its own, else the newest that is older."""
    return max((known for known in SHARED_MEMORY if known <= capability), default=80)


def table_of(capability: int) -> Table:
    """The table of the architecture that serves a device of this compute capability."""
    table: Table = _module(nearest_architecture(capability)).TABLE
    return table


def tuned_on(capability: int) -> tuple[str, ...]:
    """The devices on which that table was measured."""
    names: tuple[str, ...] = _module(nearest_architecture(capability)).TUNED_ON
    return names


def _module(architecture: int) -> ModuleType:
    return importlib.import_module(f"lorafast.kernels.tables.sm_{architecture}")


@functools.lru_cache(maxsize=4096)
def find(
    operation: str,
    capability: int,
    dtype: torch.dtype,
    M: int,
    K: int,
    N: int,
    r: int,
    tma: bool = False,
) -> LaunchConfig:
    """The configuration for a call; ``tma``: whether TMA can read and write its operands.

    A layer's GEMM takes the rows of ``linear_expand``.
    """
    if operation in GEMMS:
        operation = "linear_expand"
    if operation != "linear_expand":
        dtype = wide(dtype)  # what reads float16 for the low-rank term multiplies in float32
    rows = [row for row in table_of(capability)[operation] if row[0] == 8 * dtype.itemsize]
    described = [row for row in rows if row[5].descriptors]
    if described:
        rows = described if tma else [row for row in rows if not row[5].descriptors]
    return nearest(rows, M, K, N, r)


def nearest(rows: list[Row], M: int, K: int, N: int, r: int) -> LaunchConfig:
    """The row of the rank's bucket that is nearest in M, K and N."""
    ranks = sorted({row[4] for row in rows})
    bucket = next((rank for rank in ranks if r <= rank), ranks[-1])
    return min(
        (row for row in rows if row[4] == bucket),
        key=lambda row: distance((M, K, N), row[1:4]),
    )[5]


def distance(sizes: tuple[int, ...], others: tuple[int, ...]) -> float:
    """In powers of two, added up."""
    return sum(
        abs(math.log2(max(size, 1) / max(other, 1)))
        for size, other in zip(sizes, others, strict=True)
    )
