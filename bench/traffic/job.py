"""Counts every contender's forward and backward and prints them beside the minimum."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lorafast.bench.common import bases
from lorafast.bench.common.contenders import BUILDERS, FROZEN, SIBLINGS, Contender, UnavailableError
from lorafast.bench.common.problem import DTYPES, Problem, Tensors
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.table import megabytes, table, why_no_time
from lorafast.bench.traffic import bitsandbytes, interpret, siblings
from lorafast.bench.traffic.count import Traffic, counting
from lorafast.bench.traffic.launches import H200_SMS, Launch, standing_in

from lorafast import operands
from lorafast.operands import DENSE, Operand
from lorafast.operands.four_bit import FourBit

_HEADER = (
    "", "launches fwd", "bwd", "MB fwd", "bwd", "both", "of frozen", "of least", "requested",
)  # fmt: skip
NOTES = """\
MB: what every operation reads and writes, each tensor once; least: each operand of the layer once
requested: what a Triton kernel's programs load and store, tiles that they share again each time
lorafast, triton: as on an H200 on which nothing was tuned"""
BASE_NOTE = """\
over a quantized base the frozen layer has the same weight dense; lorafast and triton make W dense in one
launch, which reads codes and scales once, or with few rows have a product that reads them itself (the
CUDA C++ kernels, which serve up to 16 rows in one launch, aren't counted); peft: over bitsandbytes'
layers, counted as it calls its GPU kernels; in int8 these round x to 8 bits too (threshold 0)"""


@dataclass
class Row:
    """One contender's traffic on one problem, in bytes.

    ``requested`` is None where it isn't known, ``ridden`` is what helpers read beside a product that
    reads it too, counted once; ``unchecked`` says why closed forms were not held
    against the interpreter.
    """

    problem: Problem
    contender: str
    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)
    requested: int | None = None
    ridden: int = 0
    unchecked: str | None = None
    wrong: str | None = None
    unavailable: str | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Row":
        """Back from ``dataclasses.asdict``."""
        counts = {name: Traffic(**fields[name]) for name in ("forward", "backward")}
        return cls(**fields | counts | {"problem": Problem.from_json(fields["problem"])})

    @property
    def bytes(self) -> int:
        """Forward and backward, read and written."""
        return self.forward.bytes + self.backward.bytes

    @property
    def least(self) -> int:
        """Forward and backward, every operand of the layer moved once."""
        return self.problem.least_bytes("both", self.contender != FROZEN)


def on_meta(problem: Problem) -> Tensors:
    """The problem's tensors without memory."""
    M, K, N, r = problem.shape.M, problem.shape.K, problem.shape.N, problem.r
    dtype, adapter_dtype = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    weight = empty(N, K)
    return Tensors(
        weight=weight,
        bias=empty(N) if problem.shape.bias else None,
        lora_A=empty(r, K, dtype=adapter_dtype),
        lora_B=empty(N, r, dtype=adapter_dtype),
        x=[empty(M, K)],
        dy=[empty(M, N)],
        operand=bases.quantized(weight, problem.base),
    )


def count(
    contender: Contender, tensors: Tensors, noted: Sequence[Launch] = ()
) -> tuple[Traffic, Traffic]:
    """The traffic of a forward and of its backward with dx.

    ``noted`` is the growing list of what the stand-ins of our own kernels launched.
    """
    x = tensors.x[0].detach().requires_grad_()
    contender.clear_gradients()
    with contender.context():
        with counting() as forward:
            y = contender.layer(x)
        of_forward = len(noted)
        with counting() as backward:
            y.backward(tensors.dy[0])
    for traffic, launches in ((forward, noted[:of_forward]), (backward, noted[of_forward:])):
        for launch in launches:
            traffic.add(1, launch.read, launch.written)
    return forward, backward


def measure(problem: Problem, against: Sequence[str], *, sms: int = H200_SMS) -> list[Row]:
    """Rows of the frozen layer, lorafast, and those named; Triton's as on so many ``sms``."""
    tensors = on_meta(problem)
    rows = []
    for name in dict.fromkeys((FROZEN, "lorafast", *against)):
        noted: list[Launch] = []
        row = Row(problem, name)
        try:
            if name.endswith("-compiled"):
                raise UnavailableError("its kernels are the compiler's, which aren't counted")
            if name == "peft":
                _refuse_own_kernels(problem)
                _refuse_copies(problem)
            with standing_in(sms, noted.extend):
                contender = BUILDERS[name](problem, tensors)
                row.forward, row.backward = count(contender, tensors, noted)
        except UnavailableError as error:
            row.unavailable = str(error)
        if noted:
            row.requested = sum(launch.loaded + launch.stored for launch in noted)
            row.ridden = sum(launch.helped for launch in noted)
        rows.append(row)
    return rows


def _refuse_own_kernels(problem: Problem) -> None:
    if _is_four_bit(problem) and problem.shape.M < bitsandbytes.FEWEST:
        raise UnavailableError(
            f"with fewer than {bitsandbytes.FEWEST} rows bitsandbytes may launch a kernel of its own, "
            "which isn't counted"
        )


def _is_four_bit(problem: Problem) -> bool:
    return issubclass(operands.kind_of(problem.base) or Operand, FourBit)


def _refuse_copies(problem: Problem) -> None:
    if problem.use_dora and _is_four_bit(problem):
        raise UnavailableError(
            "for DoRA it copies a layer of bitsandbytes, which has no values here to be copied"
        )


def run(problems: Sequence[Problem], against: Sequence[str], *, record: Record) -> list[Row]:
    """The rows of all problems, printed and kept in ``record``."""
    rows: list[Row] = []
    verdict = interpret.Verdict()
    if "triton" in against:
        say("holding the closed forms of the Triton kernels against the interpreter")
        verdict = interpret.check(problems)
    for problem in progress(problems, "problem"):
        found = measure(problem, [name for name in against if name != SIBLINGS])
        for row in found:
            if row.contender == "triton":
                row.wrong, row.unchecked = verdict.wrong, verdict.unchecked
        record.add("traffic", found)
        rows += found
        say(f"\n{problem}\n{format_rows(found)}")
    if SIBLINGS in against:
        for name, sizes, problem in siblings.groups_of(problems):
            group = siblings.measure(name, sizes, problem)
            record.add("siblings", group)
            say(siblings.format_rows(group))
    say("\n" + NOTES)
    if any(problem.base != DENSE for problem in problems):
        say(BASE_NOTE)
    if "triton" in against:
        say(f"triton: closed forms, {_describe(verdict)}")
    return rows


def _describe(verdict: interpret.Verdict) -> str:
    if verdict.wrong is not None:
        return f"WRONG: {verdict.wrong}"
    if verdict.unchecked is not None:
        return f"not checked here: {verdict.unchecked}"
    return "which agree with every load and store that the interpreter counted at reduced sizes"


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each contender."""
    remarks = [why_no_time(row.wrong, row.unavailable) for row in rows]
    frozen = next((row.bytes for row in rows if row.contender == FROZEN), 0)
    lines = [table(_HEADER, [_line(row, frozen) for row in rows], remarks=remarks)]
    lines += [_apart(row, frozen) for row in rows if row.ridden and frozen and row.wrong is None]
    return "\n".join(lines)


def _apart(row: Row, frozen: int) -> str:
    both = row.bytes + row.ridden
    return (
        f"  {row.contender}: {row.bytes / frozen:.2f} × the frozen layer's bytes; {both / frozen:.2f} × "
        "if the cache keeps nothing of what helpers and tiles both read"
    )


def _line(row: Row, frozen: int) -> tuple[str, ...]:
    name = f"  {row.contender}"
    if row.unavailable is not None or row.wrong is not None:
        return (name,)
    return (
        name,
        str(row.forward.launches),
        str(row.backward.launches),
        megabytes(row.forward.bytes),
        megabytes(row.backward.bytes),
        megabytes(row.bytes),
        f"{row.bytes / frozen:.2f}" if frozen else "",
        f"{row.bytes / row.least:.2f} × {megabytes(row.least)}",
        "" if row.requested is None else megabytes(row.requested),
    )
