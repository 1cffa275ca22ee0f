"""A launch of csrc/cuda at full size, and what the same kernel executes of a part of it.

The family plans the full size for a device of the architecture, and the real launcher is called: grid,
kernel and all numbers of the call (tile, stages, how work is shared out) are the full launch's. It isn't
executed. Executed is the same kernel with the same numbers on few rows or columns, one CTA after the
other, so that nobody waits for a flag (``Whole.part``).
"""

import dataclasses
import functools
import hashlib
import math
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sass
import torch
from launchers import FAKE_STREAM, Launch, launchers, why_not
from on_machine import launched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorafast.backends.cost import Device
from lorafast.backends.cuda import planning
from lorafast.backends.cuda.launch import NONE
from lorafast.backends.cuda.launch import Launch as Planned
from lorafast.core.dtypes import wide
from lorafast.core.problem import Problem

from . import nvcc
from .counts import CLASSES, SMS, Amounts, amounts
from .launch import Count, Ran

BF16, F16 = torch.bfloat16, torch.float16
_DROPOUT = 0.05
_THREADS_OF_AN_SM = {75: 1024, 80: 2048, 86: 1536, 90: 2048}
_SHARED_OF_AN_SM = {75: 64 << 10, 80: 164 << 10, 86: 100 << 10, 90: 228 << 10}
_REGISTERS_OF_AN_SM = 1 << 16
_CTA_TAKES = 1 << 10
"""Bytes of shared memory that the system takes for each CTA."""

SHAPES: dict[str, Callable[[dict[str, int]], tuple[int, ...]]] = {
    "x": lambda n: (n["M"], n["K"]),
    "weight": lambda n: (n["N"], n["K"]),
    "lora_A": lambda n: (n["r"], n["K"]),
    "lora_B": lambda n: (n["N"], n["r"]),
    "dy": lambda n: (n["M"], n["N"]),
    "s": lambda n: (n["M"], n["r"]),
    "ds": lambda n: (n["M"], n["r"]),
    "y": lambda n: (n["M"], n["N"]),
    "dA": lambda n: (n["r"], n["K"]),
    "dB": lambda n: (n["N"], n["r"]),
    "bits": lambda n: (n["M"], -(-n["K"] // 8)),
}
"""Of an operation's tensors, by the names in its schema."""
_SCRATCH = ("partials", "scratch", "counters")
_WIDE = ("s", "ds")
"""Those that are of float32 beside float16."""


def why_no_cuda() -> str | None:
    """A sentence if the CUDA C++ kernels can't be counted here, else None."""
    return why_not()


class Sum(Counter[str]):
    """Amounts of a part of a launch by name, to calculate with."""

    @classmethod
    def of(cls, ran: Ran, ptx: str) -> "Sum":
        counts = without_polls(ran.counts)
        found = amounts(counts)
        one = cls(found.issued)
        for name in ("multiplies", "sectors", "wavefronts", "conflicts"):
            one["its " + name] = getattr(found, name)
        if any(count.opcode.startswith("wgmma") for count in counts):
            one.update(_of_roles(counts, ptx.split("\n")))
        for count in counts:
            if count.opcode.startswith("cp."):
                one["copied"] += count.sectors if ".global.shared" not in count.opcode else 0
            elif "no_allocate" in count.opcode:
                one[f"streamed in line {count.line}"] = count.sectors
            elif count.multiplies:
                one[f"multiplied in line {count.line}"] = count.multiplies
        return one

    def __sub__(self, other: Any) -> "Sum":
        return self.plus(other, -1)

    def plus(self, other: "Sum", times: float = 1.0) -> "Sum":
        """``self + times * other``."""
        return Sum({name: self[name] + times * other[name] for name in {**self, **other}})

    def times(self, factor: float) -> "Sum":
        """``factor * self``."""
        return Sum({name: factor * value for name, value in self.items()})

    @property
    def amounts(self) -> Amounts:
        """As ``counts`` has them."""
        names = ("multiplies", "sectors", "wavefronts", "conflicts")
        of = {name: float(self["its " + name]) for name in names}
        return Amounts({name: float(self[name]) for name in CLASSES}, **of)


def without_polls(counts: tuple[Count, ...]) -> tuple[Count, ...]:
    """As if every wait for an mbarrier ended at once: how often one is polled is the schedule's."""
    found = list(counts)
    for i, (wait, go, back) in enumerate(zip(counts, counts[1:], counts[2:], strict=False)):
        if wait.opcode.startswith("mbarrier.try_wait") and go.opcode == back.opcode == "bra":
            found[i], found[i + 1] = _less(wait, back), _less(go, back)
            found[i + 2] = _less(back, back)
    return tuple(found)


def _less(count: Count, other: Count) -> Count:
    by_warp = tuple(a - b for a, b in zip(count.by_warp, other.by_warp, strict=True))
    lanes = count.lanes - other.lanes
    return dataclasses.replace(
        count, issued=count.issued - other.issued, lanes=lanes, by_warp=by_warp
    )


def _of_roles(counts: tuple[Count, ...], lines: list[str]) -> Counter[str]:
    """Of a warp-specialised kernel: instructions by warp; ``stored``: those of the warps that
    multiply, between the first piece of y and the last; ``trips``: how often a writing warp waits
    for loads."""
    found = Counter[str]()
    stores = [i for i, c in enumerate(counts) if c.issued and c.opcode.startswith("stmatrix")]
    ends = [i for i, c in enumerate(counts) if c.issued and "bulk.commit_group" in c.opcode]
    for i, count in enumerate(counts):
        for warp, issued in enumerate(count.by_warp):
            found[f"warp {warp}"] += issued
        if stores and stores[0] <= i <= ends[-1]:
            found["stored"] += sum(count.by_warp[FIRST_CONSUMER:])
    found["trips"] = trips(counts, lines, 1)
    return found


FIRST_CONSUMER = 4
"""Warp of a CTA from which on they multiply."""


def trips(counts: tuple[Count, ...], lines: list[str], warp: int) -> int:
    """How often a warp waits for what it loads from global memory: once where a block uses what was
    loaded in it or before. Within a block ptxas brings loads together; a branch or a store to
    shared memory ends one."""
    found, waits, before, copying = 0, 0, 0, False
    pending = set[str]()
    for count in counts:
        text, issued = lines[count.line - 1].split("//")[0], count.by_warp[warp]
        labels = any(line.rstrip().endswith(":") for line in lines[before : count.line - 1])
        if labels:
            found, waits = found + waits, 0
        before = count.line
        if not issued:
            continue
        _, _, operands = text.partition(count.opcode)
        used = set(re.findall(r"%\w+", operands)) | set(re.findall(r"@!?(%\w+)", text))
        load = re.match(r"ld(\.\w+)*\.global", count.opcode)
        if load:
            made = re.match(r"\s*(\{[^}]*\}|%\w+)", operands)
            used -= set(re.findall(r"%\w+", made[0])) if made else set()
        if re.match(r"mov|cvt\.u32\.u16", count.opcode) and used & pending:
            pending |= used  # the same value in another register
            continue
        waits_for_copies = copying and count.opcode.startswith("cp.async.wait")
        copying = copying or count.opcode.startswith(("cp.async.cg", "cp.async.ca"))
        if used & pending or waits_for_copies:
            waits, copying = max(waits, issued), False  # copies from before come as soon
            pending.clear()
        if load and made:
            pending |= set(re.findall(r"%\w+", made[0]))
        if re.match(r"bra|st\.shared|bar|cp\.async\.wait", count.opcode):
            found, waits = found + waits, 0
    return found + waits


@dataclass(frozen=True)
class Subject:
    """A call of a family: ``sizes`` are M, K, N and r of the layer."""

    operation: str
    family: str
    sizes: tuple[int, int, int, int]
    dropout: bool = False
    variant: str = ""
    dtype: torch.dtype = BF16

    @property
    def name(self) -> str:
        """Of the operation, and what it is asked for."""
        return f"{self.operation} {self.asked}".strip()

    @property
    def asked(self) -> str:
        """The variant, the mask, and a dtype that is not bfloat16."""
        words = self.variant, "dropout" * self.dropout, "float16" * (self.dtype == F16)
        return " ".join(filter(None, words))

    @property
    def onto(self) -> bool:
        """Whether ``expand`` adds to what is there."""
        return self.variant == "onto"

    def problem(self) -> Problem:
        """As the family is asked."""
        M, K, N, r = self.sizes
        if self.transposed:
            K, N = N, K
        wants = {"expand_backward": ("ds", "dB"), "lora_linear": ("y", "s")}
        if self.family == "decode":
            wants["lora_linear"] = ("y",)
        return Problem(
            self.operation, M,
            0 if self.operation in ("expand", "expand_backward") else K,
            0 if self.operation in ("shrink", "shrink_backward") else N,
            r, self.dtype, self.dtype, torch.device("cpu"), transposed=self.transposed,
            wants=wants.get(self.operation, ()), dropout=self.dropout,
        )  # fmt: skip

    @property
    def transposed(self) -> bool:
        """Whether the weight is read by its columns, as in dx; ``sizes`` are the GEMM's."""
        return self.variant == "dx"

    def arguments(self) -> tuple[Any, ...]:
        """Of the plan's ``run``: tensors whose elements nobody reads."""
        M, K, N, r = self.sizes
        n = {"M": M, "K": K, "N": N, "r": r}
        names = {
            "shrink": "x lora_A", "shrink_backward": "ds x", "expand_backward": "dy s lora_B",
            "expand": "s lora_B", "lora_linear": "x weight lora_A lora_B",
            "linear_expand": "x weight s lora_B",
        }[self.operation].split()  # fmt: skip
        given: list[Any] = [
            torch.empty(SHAPES[name](n), dtype=wide(self.dtype) if name in _WIDE else self.dtype)
            for name in names
        ]
        if self.transposed:
            given[1], given[3] = given[1].t().contiguous(), given[3].t().contiguous().t()
        if self.operation not in ("shrink", "shrink_backward"):
            given.append(2.0)
        if self.operation in ("lora_linear", "linear_expand"):
            given.append(None)
        if self.operation != "expand_backward":
            given += _mask(self.dropout)
        if self.onto:
            given += [None, torch.empty(M, N, dtype=self.dtype)]
        return tuple(given)


def _mask(dropout: bool) -> tuple[float, Tensor | None]:
    return (_DROPOUT, torch.zeros(1, dtype=torch.int64)) if dropout else (0.0, None)


class _Calls(TorchDispatchMode):
    """Keeps the calls of csrc/cuda's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lorafast_cuda":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class Whole:
    """A launch at full size: how it is called, and what the launcher asks the runtime for."""

    subject: Subject
    capability: int
    func: Any
    given: tuple[Any, ...]
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int

    @property
    def n(self) -> dict[str, int]:
        """The sizes, and the numbers of the call."""
        numbers = {a.name: v for a, v in self.arguments() if type(v) is int}
        return numbers | dict(zip("MKNr", self.subject.sizes, strict=True))

    @property
    def ctas(self) -> int:
        """Of the grid."""
        return math.prod(self.grid)

    def arguments(self) -> list[tuple[Any, Any]]:
        """Of the call, each with its place in the schema."""
        return list(zip(self.func._schema.arguments, self.given, strict=True))

    def part(self, **numbers: int) -> Sum:
        """What the same launch executes with other sizes, and other numbers of the call."""
        numbers = {name: value for name, value in numbers.items() if self.n[name] != value}
        return _executed(self, tuple(sorted(numbers.items())))

    def call(self, numbers: dict[str, int]) -> tuple[Any, ...]:
        """The arguments of that."""
        n = self.n | numbers
        given = []
        for argument, value in self.arguments():
            if isinstance(value, Tensor) and argument.name in SHAPES:
                if value.shape != SHAPES[argument.name](self.n):
                    raise RuntimeError(
                        f"{argument.name} of {self.subject.name} has shape {list(value.shape)}"
                    )
                info = argument.alias_info
                is_made = info is not None and info.is_write and not self.subject.onto
                make = torch.empty if is_made else torch.zeros
                shape = SHAPES[argument.name](n)
                turned = value.dim() == 2 and value.stride(0) == 1 != value.stride(1)
                made = make(shape[::-1] if turned else shape, dtype=value.dtype)
                given.append(made.t() if turned else made)
            elif isinstance(value, Tensor) and argument.name.startswith(_SCRATCH):
                given.append(value)
            elif type(value) is int:
                given.append(n[argument.name])
            else:
                given.append(value)
        return tuple(given)

    @functools.cached_property
    def registers(self) -> int:
        """Of a thread, by ptxas."""
        return registers(launchers().ptx_of(self.kernel, self.capability), self.capability)

    @property
    def variant(self) -> str:
        """Of the operation: what it is asked for."""
        subject = self.subject
        plain = "plain" if subject.operation == "linear_expand" and not subject.sizes[3] else ""
        forward = plain and subject.variant == "forward"
        asked = dataclasses.replace(subject, variant="" if forward else subject.variant).asked
        return f"{plain} {asked}".strip()

    def stalls(self, multiplied: float, warps: int) -> dict[str, float]:
        """Those that ptxas gives a warp of a GEMM, in a step in which so many warps multiply so
        often, and around it (``sass``)."""
        of = self.schedule
        return {
            "step": of.loop * multiplied / warps / of.multiplies, "epilogue": float(of.epilogue)
        }  # fmt: skip

    @property
    def schedule(self) -> sass.Schedule:
        """Of a GEMM's machine code."""
        return _schedule(launchers().ptx_of(self.kernel, self.capability), self.capability)

    @property
    def ctas_of_an_sm(self) -> int:
        """That an SM holds at once, of those that it gets."""
        registers = -(-self.registers // 8) * 8 * self.threads
        fit = min(
            _THREADS_OF_AN_SM[self.capability] // self.threads,
            _SHARED_OF_AN_SM[self.capability] // (self.shared + _CTA_TAKES),
            _REGISTERS_OF_AN_SM // registers,
        )
        return min(fit, -(-self.ctas // SMS[self.capability]))


def bare(whole: Whole) -> Whole:
    """The same launch of a ``linear_expand`` with r = 0 and without a mask: a GEMM."""
    M, K, N, _ = whole.subject.sizes
    subject = dataclasses.replace(whole.subject, sizes=(M, K, N, 0), dropout=False)
    given = tuple(
        None if a.name == "seed" else v[:, :0] if a.name in ("s", "lora_B") else v
        for a, v in whole.arguments()
    )
    return dataclasses.replace(whole, subject=subject, given=given)


def undropped(whole: Whole) -> Whole:
    """The same launch without a mask."""
    given = tuple(None if a.name == "seed" else v for a, v in whole.arguments())
    return dataclasses.replace(
        whole, subject=dataclasses.replace(whole.subject, dropout=False), given=given
    )


_known: dict[tuple[Any, ...], Sum] = {}


def _executed(whole: Whole, numbers: tuple[tuple[str, int], ...]) -> Sum:
    n = whole.n | dict(numbers)
    used = [a.name for a, v in whole.arguments() if isinstance(v, Tensor) and a.name in SHAPES]
    shapes = tuple(SHAPES[name](n) for name in used)
    values: tuple[float, ...] = tuple(n[a.name] for a, v in whole.arguments() if type(v) is int)
    values += tuple(v for _, v in whole.arguments() if type(v) is float)
    given = tuple(v if type(v) is bool else v is None for _, v in whole.arguments())
    key = whole.capability, whole.kernel, shapes, values, given
    if key not in _known:
        with launched(whole.capability, seed=2, resident=1, sms=SMS[whole.capability]) as run:
            run.machine.lowest_first = True
            whole.func(*whole.call(dict(numbers)))
        (one,) = run.launches
        if (one.symbol, math.prod(one.block)) != (whole.kernel, whole.threads):
            raise RuntimeError(f"a part of {whole.subject.name} runs another kernel than all")
        _known[key] = Sum.of(one.ran, launchers().ptx_of(whole.kernel, whole.capability))
    return _known[key]


def planned(subject: Subject, device: Device) -> Planned | str:
    """What the family launches; or why it doesn't."""
    (planner,) = [
        planner
        for planner in planning.FAMILIES[subject.operation]
        if planner.__module__.rpartition(".")[2].startswith(subject.family)
    ]
    found: Planned | str = planner(subject.problem(), device, NONE)
    return found


def whole_of(subject: Subject, capability: int) -> Whole | str:
    """The launch at full size; or, where the family doesn't serve it, why."""
    if subject.operation == "mask":
        run, arguments = _run_mask, (subject.sizes,)
    else:
        found = planned(subject, Device.known_by("", capability, SMS[capability]))
        if isinstance(found, str):
            return found
        run, arguments = found.run, subject.arguments()
    asked: list[tuple[str, tuple[int, int, int], int, int]] = []

    def keep(launch: Launch) -> int:
        grid: Any = tuple(launch.grid)
        asked.append((launch.kernel.decode(), grid, math.prod(launch.block), launch.shared))
        return 0

    of = launchers()
    of.device(capability, SMS[capability], FAKE_STREAM)
    of.to(keep)
    try:
        with _Calls() as calls:
            run(*arguments)
    finally:
        of.reset()
    if len(calls.found) != 1 or len(asked) != 1:
        raise RuntimeError(f"{subject.name} is {len(asked)} launches, only one can be counted")
    ((func, given),) = calls.found
    return Whole(subject, capability, func, given, *asked[0])


def _run_mask(sizes: tuple[int, int, int, int]) -> None:
    from lorafast.backends.cuda.mask import mask

    mask(torch.zeros(1, dtype=torch.int64), round(_DROPOUT * 65536), *sizes[:2])


@functools.cache
def _schedule(ptx: str, capability: int) -> sass.Schedule:
    (code,) = sass.compiled(ptx, capability).values()
    return sass.schedule(code)


def registers(ptx: str, capability: int) -> int:
    """Of a thread of the one kernel of a module, by ptxas, which may not spill."""
    target = nvcc.TARGETS[capability]
    key = hashlib.sha256("\0".join((ptx, target, nvcc.version(nvcc.path()))).encode()).hexdigest()[
        :16
    ]
    kept = nvcc.BUILD / f"ptxas-{target}-{key}.txt"
    if not kept.exists():
        source = kept.with_suffix(".ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [nvcc.path(), "-cubin", f"-arch={target}", "-Xptxas=-v", str(source), "-o", "/dev/null"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        source.unlink()
        if done.returncode:
            raise RuntimeError(f"ptxas refuses what nvcc has made for {target}:\n{done.stderr}")
        kept.write_text(done.stderr)
    said = kept.read_text()
    used = re.search(r"Used (\d+) registers", said)
    if used is None:
        raise RuntimeError(f"ptxas does not say how many registers a thread has:\n{said}")
    return int(used[1])
