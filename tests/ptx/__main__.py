"""Executes a kernel of a PTX file on the machine.

    python -m tests.ptx FILE.ptx                          its kernels and their parameters
    python -m tests.ptx FILE.ptx --kernel add --grid 2 --block 128 in:f32:256 out:f32:256 256

An argument is a number, or a tensor: `in`, `out` or `inout`, its type (f64, f32, f16, s64, s32, s16,
s8, u64 … u8; b16 for bfloat16's bits) and its shape (4x8). Inputs are drawn at random, `in:s32:8=3` is
filled with threes. `--trace CTA:THREAD` prints what that thread writes to registers, instruction by
instruction. The exit status is 1 where the kernel did something wrong, 2 where the command did.
"""

import argparse
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from . import Fault, In, InOut, Machine, Out, Program, PtxError, UnknownInstruction
from .launch import LATE
from .parse import parse
from .program import Program as Layout
from .program import layout

_ACCESS = {"in": In, "out": Out, "inout": InOut}
_TYPES = {
    "f64": np.float64, "f32": np.float32, "f16": np.float16, "b16": np.uint16,
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def number(word: str) -> int | float | None:
    """A word's value, if it is one."""
    for kind in (lambda: int(word, 0), lambda: float(word)):
        try:
            return kind()
        except ValueError:
            pass
    return None


def argument(word: str, index: int, random: np.random.Generator) -> Any:
    """What a word of the command line stands for."""
    head, *rest = word.split(":")
    if head not in _ACCESS:
        value = number(word)
        if value is None:
            raise PtxError(f"argument {index} is {word!r}, expected a number or a tensor")
        return value
    if len(rest) != 2 or rest[0] not in _TYPES:
        raise PtxError(
            f"argument {index} is {word!r}, expected {head}:TYPE:SHAPE, as {head}:f32:4x8"
        )
    sizes, equals, fill = rest[1].partition("=")
    if not all(size.isdecimal() for size in sizes.split("x")):
        raise PtxError(f"argument {index} has shape {sizes!r}, expected sizes such as 4x8")
    if equals and head == "out":
        raise PtxError(f"argument {index} is an out, which has no values before: {word!r}")
    shape = tuple(int(size) for size in sizes.split("x"))
    try:
        array = _array(shape, np.dtype(_TYPES[rest[0]]), fill if equals else None, random)
    except (MemoryError, ValueError):
        raise PtxError(f"argument {index} has shape {sizes}, too large for this machine") from None
    if array is None:
        raise PtxError(f"argument {index} is filled with {fill!r}, expected a number of {rest[0]}")
    return _ACCESS[head](f"argument {index}", array)


def _array(
    shape: tuple[int, ...], kind: np.dtype, fill: str | None, random: np.random.Generator
) -> np.ndarray | None:
    """None: its elements can't be what it is filled with."""
    if fill is None and kind.kind == "f":
        return random.standard_normal(shape).astype(kind)
    if fill is None:
        return random.integers(0, 100, shape).astype(kind)
    value = number(fill)
    if value is None:
        return None
    if kind.kind != "f" and not (
        isinstance(value, int) and np.iinfo(kind).min <= value <= np.iinfo(kind).max
    ):
        return None
    return np.full(shape, value, kind)


def sizes_of(word: str) -> tuple[int, ...]:
    """``4x2`` as numbers."""
    sizes = word.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{word!r}, expected sizes such as 4 or 4x2x1")
    return tuple(int(size) for size in sizes)


def trace_of(word: str) -> tuple[int, int]:
    """``0:37`` as a CTA and a thread."""
    numbers = word.split(":")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(f"{word!r}, expected CTA:THREAD, as 0:37")
    return int(numbers[0]), int(numbers[1])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{message}\n")


def main(words: list[str] | None = None) -> int:
    """0; 1 where the kernel did something wrong, 2 where the command did."""
    parser = _Parser(
        prog="python -m tests.ptx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT")
    parser.add_argument("--kernel")
    parser.add_argument("--grid", type=sizes_of, default=(1,), metavar="XxYxZ")
    parser.add_argument(
        "--block", type=sizes_of, metavar="XxYxZ", help="as .reqntid says, else 32, unless given"
    )
    parser.add_argument(
        "--cluster", type=sizes_of, metavar="XxYxZ", help="as .reqnctapercluster says unless given"
    )
    parser.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule, and of inputs")
    parser.add_argument("--resident", type=int, default=4, help="CTAs that run at once")
    parser.add_argument(
        "--late", choices=LATE, help="when asynchronous work happens; the seed decides unless given"
    )
    parser.add_argument(
        "--most-steps",
        type=int,
        default=200_000_000,
        help="instructions of warps before it is ended",
    )
    parser.add_argument("--trace", type=trace_of, metavar="CTA:THREAD")
    given = parser.parse_intermixed_args(words)
    try:
        return _run(given)
    except (PtxError, UnknownInstruction, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    try:
        text = given.file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PtxError(f"{given.file} is no text, so no PTX") from None
    except OSError as error:
        raise PtxError(f"{given.file}: {error.strerror}") from None
    try:
        module = parse(text)
        names = module.kernels if given.kernel is None else [given.kernel]
        kernels = [layout(module, name) for name in names]
    except PtxError as error:
        raise PtxError(f"{given.file}: {error}") from None
    if given.kernel is None:
        if not kernels:
            raise PtxError(f"{given.file} has no kernel")
        if given.arguments:
            raise PtxError(f"--kernel is missing, to be one of {', '.join(names)}")
        _print_parameters(kernels)
        return 0
    program = Program(kernels[0])
    block = given.block or program.layout.directives.get("reqntid") or (32,)
    machine = Machine(
        seed=given.seed, resident=given.resident, late=given.late, most_steps=given.most_steps
    )
    random = np.random.default_rng(given.seed)
    arguments = [argument(word, i, random) for i, word in enumerate(given.arguments)]
    try:
        ran = machine.launch(
            program, given.grid, block, arguments,
            cluster=given.cluster, shared=given.shared, trace=given.trace,
        )  # fmt: skip
    except Fault as fault:
        _print_trace(fault.trace, program.layout)
        sys.stdout.flush()
        print(fault, file=sys.stderr)
        return 1
    _print_trace(ran.trace, program.layout)
    issued = Counter[str]()
    for count in ran.counts:
        issued[count.opcode.split(".")[0]] += count.issued
    print(f"{program.name}: {ran.steps} instructions issued")
    for word, times in issued.most_common(12):
        print(f"    {times:>8}  {word}")
    for tensor in arguments:
        if isinstance(tensor, (Out, InOut)):
            print(f"{tensor.name} = {np.array2string(tensor.array, threshold=64, precision=6)}")
    return 0


def _print_parameters(kernels: list[Layout]) -> None:
    for laid_out in kernels:
        print(laid_out.name)
        for param in laid_out.params:
            print(f"    {param.type:<4} {param.size:>4} bytes  {param.name}")


def _print_trace(trace: str, laid_out: Layout) -> None:
    """Each line of PTX with what it wrote."""
    for line in trace.splitlines():
        at, opcode, *values = line.split(" ")
        if int(at) == 0:  # what the machine says of the trace
            print(" ".join((opcode, *values)))
            continue
        text = " ".join(laid_out.lines[int(at) - 1].split())
        print(f"{at:>6}  {text:<60}  {' '.join(_shown(opcode, v) for v in values)}".rstrip())


def _shown(opcode: str, value: str) -> str:
    """A register's bits as the floating-point number that an instruction writes."""
    kind = next((w for w in opcode.split(".")[1:] if w in _TYPES or w[:1] == "b"), "")
    if kind not in ("f32", "f64") or not value.startswith("0x"):
        return value
    bits = np.array(int(value, 16), f"u{np.dtype(_TYPES[kind]).itemsize}")
    return f"{bits.view(_TYPES[kind]):.6g} ({value})"


if __name__ == "__main__":
    # The machine runs long without looking at Python's handlers.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
