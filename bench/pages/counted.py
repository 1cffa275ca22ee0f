"""What is counted, not timed: traffic, what kernels execute, machine code."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.table import markdown, megabytes
from lorafast.bench.pages.text import Run, describe, relative, unique

from lorafast.bench import executed, traffic
from lorafast.core.problem import DENSE


def of_traffic(path: Path, run: Run) -> str:
    """Bytes and launches."""
    rows = [traffic.Row.from_json(row) for row in run["traffic"]]
    frozen = {row.problem: row.bytes for row in rows if row.contender == FROZEN}
    quantized = any(row.problem.base != DENSE for row in rows)
    lines = [
        [
            describe(row.problem) + f", {row.problem.adapter_dtype} adapter",
            f"{row.problem.dropout_p:g}",
            row.contender,
            f"{row.forward.launches} + {row.backward.launches}",
            f"{megabytes(row.forward.bytes)} + {megabytes(row.backward.bytes)}",
            *([f"{row.bytes / frozen[row.problem]:.2f}"] if quantized else []),
            f"{row.bytes / row.least:.2f}",
        ]
        for row in rows
        if row.wrong is None and row.unavailable is None
    ]
    of_frozen = ["over the frozen"] if quantized else []
    header = ["layer", "dropout", "", "launches", "MB", *of_frozen, "over the least"]
    riding = [
        f"{(row.bytes + row.ridden) / row.bytes:.2f}"
        for row in rows
        if row.ridden and row.wrong is None
    ]
    ridden = (
        "" if not riding else " What helper CTAs read beside a GEMM that reads it too counts once, as "
        "everything within a launch; if the cache kept none of it, `triton` would move "
        f"{' and '.join(unique(riding))} times as much."
    )  # fmt: skip
    return (
        "## Traffic, counted\n\n"
        "Counted, not timed: launches and device-memory traffic of a forward and a backward on a GPU "
        "(`lorafast bench --traffic`, the same on every machine; "
        f"[record]({relative(path)})). *The least* moves every operand once.{ridden}\n\n"
        + "\n\n".join([markdown(header, lines), *_of_others(run)])
    )


def _of_others(run: Run) -> list[str]:
    """Of convolutions, of LoRA's relatives, of bottleneck adapters."""
    found = []
    for kind in (traffic.convolutions, traffic.relatives, traffic.bottlenecks):
        name = f"traffic_{kind.__name__.rpartition('.')[2]}"
        found += kind.paragraphs([kind.Row.from_json(row) for row in run.get(name, ())])
    return found


def of_executed(path: Path, run: Run) -> str:
    """Instructions and accesses of our kernels."""
    every = [executed.Row(**row) for row in run["executed"]]
    pairs = executed.beside(every)
    rows = executed.alone(every, pairs)
    lines = [
        [
            f"sm_{row.capability}", f"`{row.name}`", _layer_of(row),
            *(f"{row.cycles[unit] / 1000:.1f}" for unit in executed.UNITS), row.bound,
            f"{row.issued_per_multiply:.2f}", f"{row.step['conflicts']:.0f}",
            f"{row.in_flight / 1024:.0f}", f"{row.registers}",
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "", "kernel", "layer", *executed.UNITS, "bound by", "issued a multiply", "conflicts",
        "KB in flight", "registers",
    ]  # fmt: skip
    return (
        "## What kernels execute, counted\n\n"
        "Executed, not timed: the PTX of our Triton kernels is run instruction by instruction on a CPU, "
        f"and counted (`{run['command']}`, the same on every machine; [record]({relative(path)})). "
        "*tensor*, *issue*, *shared* and *memory* are thousands of cycles of an SM for a tile of a GEMM "
        "or a program of a skinny kernel, or an item of helpers: what each unit takes alone, at its "
        "full rate; memory is L2 for a GEMM and beside it, device memory else. *issued a multiply*: "
        "instructions of warps in the main loop "
        "for each 16 × 8 × 16 multiply-adds. *conflicts*: passes over the banks of shared memory "
        "in a step beyond the least.\n\n"
        + markdown(header, lines)
        + _beside(pairs, run)
        + _gemms(every)
    )


def _layer_of(row: executed.Row) -> str:
    if not row.N:
        return f"{row.M} × {row.K}"
    return f"{row.M} × {row.K} → {row.N}, r = {row.r}"


def _beside(pairs: Sequence[tuple[executed.Row, list[executed.Row]]], run: Run) -> str:
    """The kernels of csrc/cuda beside Triton's, a table an architecture; or why they aren't there."""
    said = [row["reason"] for row in run.get("executed_without", ())]
    if said:
        return "\n\n" + " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in said)
    if not pairs:
        return ""
    header = [
        "kernel", "layer", *executed.LAUNCH_UNITS, "bound by", "issued a multiply", "moved",
        "conflicts", "KB in flight", "registers", "launches",
    ]  # fmt: skip
    parts = [
        "\n\n### CUDA C++ beside Triton, executed, not timed",
        "A cell has the kernel of `csrc/cuda`, then Triton's; – is what there is none of. Thousands "
        "of cycles of the whole launch, each unit alone at its full rate: *tensor*, *issue*, *shared* "
        "and *L2*, by which all sectors come, of an SM that has the most tiles; *memory* of the whole "
        "device, for operands and results once, or for what was counted. *moved*: bytes in sectors, by "
        "what operands and results are; what is read again comes from L2. `lora_linear` stands beside "
        "Triton's `shrink` and `linear_expand`: cycles and bytes are of both, the other cells of each. "
        "*launches*: of the operation, of which the first is counted.",
    ]
    decoded = [row for row, _ in pairs if row.from_memory]
    if decoded:
        parts.append(_decoding(decoded))
    for capability, of in itertools.groupby(pairs, key=lambda pair: pair[0].capability):
        lines = [
            [f"`{row.name}`", _layer_of(row), *executed.beside_cells(row, triton)]
            for row, triton in of
        ]
        parts.append(f"sm_{capability}{'a' if capability == 90 else ''}:")
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def _gemms(rows: Sequence[executed.Row]) -> str:
    """Tiles of the GEMMs of csrc/cuda, each beside the one without a low-rank term."""
    tiles = executed.gemms(rows)
    if not tiles:
        return ""
    lines = [
        [f"sm_{row.capability}", f"`{row.name}`", _layer_of(row), *executed.gemm_cells(row, plain)]
        for row, plain in tiles
    ]
    return "\n\n".join([
        "\n\n### Tiles of CUDA C++ GEMMs, counted and modelled",
        "*tensor / issued / stalls a step*: cycles of tensor cores, cycles in which four "
        "schedulers issue the instructions of all warps, and the stalls that ptxas gives one "
        "warp. *L2 bytes a clock*: of an SM while tensor cores are busy. *beside*: cycles of a "
        "tile beside its steps, by unit. *stalls after*: of a warp from its last product to its "
        "last store. *added*: by the low-rank term to a tile of the same GEMM without it "
        "(`plain`): by the unit that takes longest, for `wgmma` by the timeline. "
        "*tensor-bound*: the share of a tile's clocks in which tensor cores multiply, by that "
        "timeline, a model of the CTA's warps (`tests/cuda/timeline.py`): instructions are "
        "counted, latencies assumed, nothing is timed. *idle most*: what tensor cores wait for "
        "most, in clocks of a tile. A fused backward has the tile of dx. A masked dx that takes "
        "other tiles than a plain one has nothing to be added to. Triton's tiles are in the table "
        "before: they are the same for every layer of this K, so those of r = 64 and of 14336 "
        "outputs aren't counted again.",
        markdown(["", "kernel", "layer", *executed.GEMM_HEADER[2:]], lines),
    ])  # fmt: skip


def _decoding(rows: Sequence[executed.Row]) -> str:
    """The bytes that a layer of few rows moves from and to device memory, by those of W."""
    said = []
    for N, K, r in unique((row.N, row.K, row.r) for row in rows):
        of = [row for row in rows if (row.N, row.K, row.r) == (N, K, r)]
        most = max(row.from_memory / (2.0 * N * K) for row in of)
        adapter = r * (N + K) / (N * K)
        said.append(f"{most:.4f} for {K} → {N} at r = {r}, where A and B are {adapter:.4f}")
    return (
        "Decoding is one launch, and moves at most this many times the bytes of W from and to memory: "
        f"{'; '.join(said)}. W, A and B are counted as often as they are loaded, A once where each CTA "
        "makes its own s (the rest comes from L2), x and y once."
    )


def of_compiled(path: Path, run: Run) -> str:
    """Registers, shared memory and spills of Triton's kernels."""
    lines = [
        [
            f"sm_{row['capability']}",
            f"`{row['kernel']}`",
            str(row["variants"]),
            str(row["registers"]),
            f"{row['shared']:,} of {row['shared_limit']:,}",
            str(row["spills"]),
            ", ".join(row["instructions"]),
        ]
        for row in run["compiled"]
    ]
    header = ["", "kernel", "variants", "registers", "shared memory", "spills", "multiplies with"]
    packages = run["machine"]["packages"]
    return (
        "## Machine code, compiled\n\n"
        "Compiled, not run: what the machine code of every launch configuration in `kernels/tables` "
        f"needs at most, by Triton {packages['triton']} (`{run['command']}`, which the tests run and "
        f"which prints a line for each variant; [record]({relative(path)})).\n\n"
        + markdown(header, lines)
    )


def of_nvcc(path: Path, run: Run) -> str:
    """The same of the kernels of ``csrc/cuda``."""
    lines = [
        [
            row["arch"], f"`{row['kernel']}`", str(row["instances"]), str(row["registers"]),
            f"{row['shared']:,}", str(row["spills"]), ", ".join(row["instructions"]),
        ]
        for row in run["nvcc"]
    ]  # fmt: skip
    header = [
        "", "kernel", "instances", "registers", "static shared memory", "spills", "multiplies with",
    ]  # fmt: skip
    versions = ", ".join(unique(row["nvcc"] for row in run["nvcc"]))
    return (
        "## Machine code of csrc/cuda\n\n"
        f"Compiled by nvcc {versions}, not run: what the instances of each kernel need at most "
        f"(`{run['command']}`; [record]({relative(path)})).\n\n" + markdown(header, lines)
    )
