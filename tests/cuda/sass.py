"""The schedule that ptxas puts into machine code: how long an instruction holds its warp back.

    PYTHONPATH=.:tests:tests/kernels:tests/cuda python -m sass linear_expand_sm90 90

From sm_70 on an instruction has 128 bits. In the upper 64 of them are its stall, the clocks before
the same warp may issue its next one (bits 41 to 44), whether the scheduler had better take another
warp (45), the barriers that it sets when it has written or read its operands (46 to 48, 49 to 51,
7: none), and those that it waits for first (52 to 57). So the sum of stalls along a path is a bound
from below of a warp's time. What is waited for, memory and tensor cores, comes on top.
"""

import argparse
import heapq
import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptx import nvcc

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\n\s+/\* 0x([0-9a-f]{16}) \*/",
    re.M,
)
MULTIPLIES = ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA")


@dataclass(frozen=True)
class Instruction:
    """One of a kernel, at its address."""

    address: int
    text: str
    stall: int
    waits: int
    """Barriers that it waits for, a bit each."""

    @property
    def opcode(self) -> str:
        """With its modifiers, without its predicate."""
        return re.sub(r"^@!?U?P[T\d]\s+", "", self.text).split()[0]

    @property
    def predicated(self) -> bool:
        """Whether it may do nothing."""
        return self.text.startswith("@")

    @property
    def target(self) -> int | None:
        """Where a branch goes, or where those meet who part."""
        found = re.search(r"0x([0-9a-f]+)$", self.text)
        is_branch = self.opcode.split(".")[0] in ("BRA", "CALL", "BSSY")
        return int(found[1], 16) if found and is_branch else None


Code = Sequence[Instruction]


def read(text: str) -> list[Instruction]:
    """The instructions of a function, as ``cuobjdump -sass`` prints it."""
    found = []
    for address, words, upper in _LINE.findall(text):
        bits = int(upper, 16)
        found.append(Instruction(int(address, 16), words, bits >> 41 & 15, bits >> 52 & 63))
    return found


def functions(cubin: Path) -> dict[str, list[Instruction]]:
    """Those of a cubin, by their names."""
    from machine_code import CUOBJDUMP

    command = [str(CUOBJDUMP), "-sass", str(cubin)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\s+Function : (\S+)$", said, flags=re.M)[1:]
    return {name: read(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def compiled(ptx: str, capability: int) -> dict[str, list[Instruction]]:
    """The functions that ptxas makes of a module. Raises RuntimeError if it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        target = nvcc.TARGETS[capability]
        done = subprocess.run(
            [nvcc.path(), "-cubin", f"-arch={target}", str(source), "-o", str(cubin)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"ptxas refuses a module for {target}:\n{done.stderr}")
        return functions(cubin)


def following(code: Code) -> list[list[int]]:
    """The places after each instruction."""
    place = {one.address: i for i, one in enumerate(code)}
    meets: dict[str, int] = {}
    found = []
    for i, one in enumerate(code):
        name, after = one.opcode.split(".")[0], [i + 1] if i + 1 < len(code) else []
        target = place.get(one.target) if one.target is not None else None
        if name == "BSSY" and target is not None:
            meets[one.text.split()[1].rstrip(",")] = target
        elif name == "BSYNC":
            after = list({*after, meets.get(one.text.split()[-1], i + 1)})
        elif name in ("BRA", "CALL") and target is not None:
            conditional = name == "CALL" or re.search(r"\bU?P\d", one.text) is not None
            after = [*(after if conditional else []), target]
        elif name in ("EXIT", "RET", "BRX") and not one.predicated:
            after = []
        found.append(after)
    return found


def stalls_to(code: Code, last: int) -> dict[int, int]:
    """The least sum of stalls from each instruction up to one, by any way; without those that have
    no way."""
    before: dict[int, list[int]] = {}
    for i, after in enumerate(following(code)):
        for j in after:
            before.setdefault(j, []).append(i)
    heap, known = [(0, last)], dict[int, int]()
    while heap:
        clocks, i = heapq.heappop(heap)
        if i not in known:
            known[i] = clocks
            for j in before.get(i, ()):
                heapq.heappush(heap, (clocks + code[j].stall, j))
    return known


def loops(code: Code) -> list[tuple[int, int]]:
    """The first and the last instruction of each."""
    place = {one.address: i for i, one in enumerate(code)}
    return [
        (place[one.target], i)
        for i, one in enumerate(code)
        if one.target is not None and one.opcode.startswith("BRA") and one.target < one.address
    ]


def multiplies(code: Code, first: int, last: int) -> int:
    """How many instructions are tensor cores'."""
    return sum(one.opcode.split(".")[0] in MULTIPLIES for one in code[first : last + 1])


@dataclass(frozen=True)
class Schedule:
    """Stalls of a warp: in a turn of the main loop, which multiplies so often, and from the last
    product to the last store of y. ``masked``: instructions that add what a mask keeps."""

    loop: int
    multiplies: int
    epilogue: int
    masked: int


def schedule(code: Code) -> Schedule:
    """Of a GEMM. The main loop is the innermost one that multiplies most; the epilogue, the
    shortest way by every wide store that comes behind it. Raises ValueError where there is no such
    loop."""
    found = [loop for loop in loops(code) if multiplies(code, *loop)]
    inner = [
        (a, b)
        for a, b in found
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in found)
    ]
    if not inner:
        raise ValueError("no loop multiplies")
    first, last = max(inner, key=lambda loop: (multiplies(code, *loop), -loop[0]))
    turn = stalls_to(code, last)[first] + code[last].stall
    stores = _stores(code)
    ends = [
        i for i, one in enumerate(code)
        if one.opcode.split(".")[0] in MULTIPLIES or one.opcode.startswith("WARPGROUP.DEPBAR")
    ]  # fmt: skip
    if not stores:
        raise ValueError("no wide store")
    way = stalls_to(code, stores[0])
    clocks = min(way[i] for i in ends if i in way)
    for one, other in itertools.pairwise(stores):
        clocks += stalls_to(code, other)[one]
    return Schedule(turn, multiplies(code, first, last), clocks, masked(code))


def masked(code: Code) -> int:
    """Instructions from the first predicated FFMA to the last, of the way without a branch that has
    most of them. Two bits of PTX that are tested become a word in all predicates at once, so that
    instructions of PTX say little of this."""
    most, first, count = (0, 0), 0, 0
    for i, one in enumerate(code):
        if one.target is not None or one.opcode.startswith(("EXIT", "RET", "BRX")):
            count = 0
        elif one.predicated and one.opcode == "FFMA":
            first, count = (first if count else i), count + 1
            most = max(most, (count, i - first + 1))
    return most[1]


def _stores(code: Code) -> list[int]:
    """Those by which y leaves: through shared memory, so that sums which are only kept aren't meant."""
    found, loaded = [], dict[str, int]()
    for i, one in enumerate(code):
        registers = re.findall(r"\bR\d+", one.text)
        if one.opcode.startswith("LDS.128"):
            loaded[registers[0]] = i
        wide = re.match(r"STG?\.\S*128", one.opcode)
        if one.opcode.startswith(("STSM", "UTMASTG")) or (
            wide and i - loaded.get(registers[-1], -99) < 20
        ):
            found.append(i)
    return found


def main(words: list[str] | None = None) -> None:
    """Prints the schedule of each kernel of a source of csrc/cuda that has a main loop of products."""
    from launchers import CSRC, ptx_of

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="without .cu")
    parser.add_argument("capability", type=int)
    given = parser.parse_args(words)
    text = ptx_of(CSRC / f"{given.source}.cu", given.capability)
    for name, code in compiled(text, given.capability).items():
        try:
            print(name, schedule(code))
        except ValueError as error:
            print(name, error)


if __name__ == "__main__":
    main()
