"""What the fused ``linear_expand`` executes, beside the same kernel without a low-rank term.

    PYTHONPATH=.:tests:tests/kernels:tests/cuda python -m linear_expand_counts [sm_80 sm_86]

Cycles of a tile by unit, each at its full rate (``ptx.counts``). ``low rank``: what a tile takes beside
that of a plain GEMM, by the unit that takes longest, and the share of it in the tile's tensor cycles.
"""

import argparse

from ptx import cuda_counts
from ptx.counts import LAYERS, RANKS, RATES, Row
from ptx.cuda_counts import Subject, plain


def main(words: list[str] | None = None) -> None:
    """Prints a line a launch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="*", metavar="sm_80")
    given = parser.parse_args(words)
    for capability in [int(c.removeprefix("sm_")) for c in given.capabilities] or [80, 86]:
        for layer in (*LAYERS, cuda_counts.WIDE):
            for r in RANKS:
                for variant, dropout in (("forward", False), ("dx", False), ("dx", True)):
                    subject = Subject(
                        "linear_expand", "linear_expand", (*layer, r), dropout, variant
                    )
                    row, bare = cuda_counts.count(subject, capability), plain(subject, capability)
                    assert isinstance(row, Row), row
                    print(_line(subject, row, bare), flush=True)


def _line(subject: Subject, row: Row, bare: Row) -> str:
    rates = RATES[row.capability]
    beside = row.tile.minus(bare.tile).cycles(rates, True)
    tensor, unit = bare.cycles["tensor"], max(beside, key=beside.__getitem__)
    steps = row.step.issued
    return (
        f"sm_{row.capability} {subject.name} {'x'.join(map(str, subject.sizes))}: {row.tiles} CTAs of "
        f"{row.steps:.4g} steps, a step {sum(steps.values()):.0f} issued for {steps['tensor']:.0f} mma, "
        f"{row.step.conflicts:.0f} conflicts; a tile "
        + ", ".join(f"{name} {cycles:,.0f}" for name, cycles in row.cycles.items())
        + f"; bound by {row.bound}; low rank {beside[unit]:,.0f} of {unit} "
        f"({beside[unit] / tensor:.2%}), tensor {beside['tensor']:,.0f}; in flight "
        f"{row.in_flight:,.0f}; {row.registers} registers"
    )


if __name__ == "__main__":
    main()
