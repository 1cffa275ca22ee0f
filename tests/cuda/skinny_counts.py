"""What the skinny operations execute at full size: instructions, sectors, passes over banks, by KB of
the large matrix.

    PYTHONPATH=.:tests:tests/kernels:tests/cuda python -m skinny_counts [sm_80 sm_90]

A launch is cut as at full size and executed on a part of it, of full tiles; the rest is more of the
same: row blocks of ``shrink``, column blocks of ``shrink_backward``, and row groups of
``expand_backward``, of which two and three are executed; the last one may be a fraction of a group.
"""

import argparse
from dataclasses import dataclass

import torch
from on_machine import launched
from ptx.counts import Amounts, amounts

from lorafast.backends.cuda.skinny import Shares, shares_of
from lorafast.backends.cuda.tables import SKINNY, row_of
from lorafast.core.dtypes import wide
from lorafast.reference.dropout import survivor_scale, threshold

SMS = {80: 108, 90: 132}
BF16 = torch.bfloat16
KINDS = {"shrink": "shrink", "expand_backward": "backward", "shrink_backward": "reduce"}


@dataclass(frozen=True)
class Row:
    """Amounts by KB of the large matrix."""

    operation: str
    arch: int
    rows: int
    columns: int
    r: int
    shares: Shares
    amounts: Amounts
    from_memory: float
    """Sectors of asynchronous copies."""

    @property
    def issued(self) -> float:
        return sum(self.amounts.issued.values())


def count(
    operation: str,
    arch: int,
    rows: int,
    columns: int,
    r: int,
    dropout_p: float = 0.0,
    dtype: torch.dtype = BF16,
) -> Row:
    """Rows and columns are multiples of every tile's."""
    kind = KINDS[operation]
    shares = shares_of(
        kind, dtype, rows, columns, r, row=row_of(SKINNY, arch), sms=SMS[arch], dropout=dropout_p > 0
    )  # fmt: skip
    tile = shares.tile

    def run(rows: int, columns: int) -> tuple[Amounts, float]:
        seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
        mask = (
            (seed, threshold(dropout_p), survivor_scale(dropout_p)) if dropout_p else (None, 0, 1.0)
        )
        x = torch.zeros(rows, columns, dtype=dtype)
        beside = torch.zeros(rows, r, dtype=wide(dtype))
        partials, counters = (
            torch.empty(shares.partials),
            torch.zeros(shares.counters, dtype=torch.int32),
        )
        with launched(arch, 1, resident=2) as state:
            if operation == "shrink":
                A, s = torch.zeros(r, columns, dtype=dtype), torch.empty_like(beside)
                torch.ops.lorafast_cuda.shrink(
                    x, A, *mask, 1.0, s, partials, counters, *shares.arguments
                )
            elif operation == "shrink_backward":
                dA = torch.empty(r, columns, dtype=dtype)
                torch.ops.lorafast_cuda.shrink_backward(
                    beside, x, *mask, dA, partials, counters, *shares.arguments
                )
            else:
                B, ds = torch.zeros(columns, r, dtype=dtype), torch.empty_like(beside)
                torch.ops.lorafast_cuda.expand_backward(
                    x, beside, B, 1.0, ds, torch.empty_like(B), None, partials, counters,
                    *shares.arguments, shares.chunk,
                )  # fmt: skip
        (ran,) = state.ran()
        return amounts(ran.counts), sum(
            c.sectors for c in ran.counts if c.opcode.startswith("cp.async")
        )

    if operation == "shrink":
        (found, copied), times = run(tile.rows, columns), rows // tile.rows
        found, copied = found.over(1 / times), copied * times
    elif operation == "shrink_backward":
        (found, copied), times = run(rows, tile.columns), columns // tile.columns
        found, copied = found.over(1 / times), copied * times
    else:
        groups, group = shares.grid[1], shares.share * tile.rows
        assert groups >= 3, groups
        (two, copied2), (three, copied3) = run(2 * group, columns), run(3 * group, columns)
        more = rows / group - 2
        found = two.minus(three.minus(two), -more)
        copied = copied2 + more * (copied3 - copied2)
    kb = rows * columns * dtype.itemsize / 1024
    return Row(operation, arch, rows, columns, r, shares, found.over(kb), copied / kb)


def main(words: list[str] | None = None) -> None:
    """Prints a line a launch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="*", metavar="sm_90")
    given = parser.parse_args(words)
    for arch in [int(c.removeprefix("sm_")) for c in given.capabilities] or sorted(SMS):
        for operation, dropout_p in (
            ("shrink", 0.0), ("shrink", 0.05), ("expand_backward", 0.0), ("shrink_backward", 0.0),
        ):  # fmt: skip
            for columns in (4096, 1024):
                for r in (16, 64):
                    row = count(operation, arch, 8192, columns, r, dropout_p)
                    a, shares = row.amounts, row.shares
                    print(
                        f"sm_{arch} {operation}{' dropout' * (dropout_p > 0)} 8192 x {columns} r {r}: "
                        f"grid {shares.grid}, {shares.stages} stages, {shares.ctas_per_sm} CTAs an SM; "
                        f"by KB: issued {row.issued:.1f}, sectors {a.sectors:.1f} "
                        f"({row.from_memory:.1f} copied), wavefronts {a.wavefronts:.1f} "
                        f"({a.conflicts:.2f} conflicts); in flight {shares.in_flight:,}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
