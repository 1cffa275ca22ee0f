"""Operations of csrc/cuda, executed: their launchers run, and the machine runs what they launch.

    with launched(arch=90, seed=3, resident=4) as run:
        bits = torch.empty(64, 16, dtype=torch.uint8)
        torch.ops.lorafast_cuda.mask(seed, threshold, 128, bits)
    run.launches[0].grid

An operation's tensors are known to its kernels by the names of its schema, and no other memory is.
Those that it mutates may be written. Made by ``torch.empty`` within the block, they have no values until
a kernel writes them, and must be written to the last element by the end of the block; scratch memory
(``partials``, ``scratch``) need not be. ``counters`` are zeros before and after every operation. A
kernel must be launched on PyTorch's current stream, under a device guard, and with no more shared memory
than was allowed for it. Whatever is wrong is a ``Fault``.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from launchers import FAKE_STREAM, Launch, Launchers, launchers, why_not
from ptx import nvcc, plant
from ptx.launch import Fault, In, InOut, Machine, Out, Program, Ran, memory_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FIRST_CLUSTERS = 90
MOST_PORTABLE_CLUSTER = 8
MOST_SILENT = 100_000
"""Steps in which nothing changes, of a launch in which a fault is planted: it may hang."""
SHARED_ALWAYS = 48 * 1024
"""Bytes of shared memory that a kernel has without cudaFuncSetAttribute."""
LAUNCH_FAILURE = 719
"""cudaErrorLaunchFailure"""
SCRATCH = ("partials", "scratch")
COUNTERS = ("counters",)
SPARSE = 1 << 26
"""Bytes from which on a tensor's rows are known one by one, if there is much between them."""

needs_nvcc = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
"""Of tests that use ``launched``."""

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass(frozen=True)
class Launched:
    """One launch."""

    op: str
    kernel: str
    """Its name, without namespaces and template arguments."""
    symbol: str
    """Its name in the PTX."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    """Zeros where the launch says nothing of clusters."""
    shared: int
    """Bytes of dynamic shared memory."""
    stream: int
    parameters: bytes
    ran: Ran


@dataclass(frozen=True)
class _Known:
    """Memory that kernels may use."""

    begin: int
    end: int
    tensor: Tensor
    name: str
    written: bool
    scratch: bool = False


@dataclass
class Run:
    """The launches of a block."""

    machine: Machine
    arch: int
    edit: Callable[[str], str] | None
    stream: int
    launches: list[Launched] = field(default_factory=list)
    _made: list[Tensor] = field(default_factory=list)
    _unwritten: list[_Known] = field(default_factory=list)
    """Outputs that kernels know and have not written to the last element."""
    _settled: list[tuple[int, int]] = field(default_factory=list)
    """Memory of ``_made`` that has been written."""
    _op: str = ""
    _raised: BaseException | None = None

    def undefined(self, tensor: Tensor) -> Tensor:
        """The tensor, from now on without values: as if made by ``torch.empty`` within the block."""
        self._made.append(tensor)
        begin, end = _extent(tensor)
        self._settled = [(b, e) for b, e in self._settled if e <= begin or end <= b]
        return tensor

    def ran(self) -> list[Ran]:
        """What the launches executed."""
        return [launch.ran for launch in self.launches]

    # An operation

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation; its kernels know its tensors and nothing else."""
        self._op, self._raised = func._schema.name.partition("::")[2], None
        given = _given(func, args, kwargs)
        self._check_counters(given, "is given")
        known = [at for at in _without_overlaps(given) if not self._is_unwritten(at)]
        kinds = [(at, self._kind(at)) for at in known]
        for at, kind in kinds:
            self.machine.region(kind(at.name, at.tensor))
        returned = False
        try:
            try:
                done = func(*args, **kwargs)
            finally:
                if self._raised is not None:
                    raise self._raised from None
            returned = True
        finally:
            for at, kind in kinds:
                if kind is Out and returned:
                    self._unwritten.append(at)
                elif at.end > at.begin:
                    self.machine.forget(at.begin)
        self._settle()
        self._check_counters(given, "leaves")
        return done

    def _kind(self, at: _Known) -> type[In]:
        if not at.written:
            return In
        for tensor in self._made:
            storage = tensor.untyped_storage()
            if 0 <= at.begin - storage.data_ptr() < storage.nbytes():
                known = any(b < at.end and at.begin < e for b, e in self._settled)
                return InOut if known else Out
        return InOut

    def _is_unwritten(self, at: _Known) -> bool:
        """Whether it is, or is a part of, what an earlier operation should have written."""
        for known in self._unwritten:
            if known.begin <= at.begin and at.end <= known.end and at.begin < at.end:
                return True
            if known.begin < at.end and at.begin < known.end:
                raise NotImplementedError(
                    f"{self._op}: {at.name} overlaps {known.name}, which is not written yet"
                )
        return False

    def _settle(self) -> None:
        """Outputs that are written are memory like any other."""
        left = []
        for at in self._unwritten:
            if self.machine.unwritten(Out(at.name, at.tensor)) is not None:
                left.append(at)
                continue
            self._settled.append((at.begin, at.end))
            if at.end > at.begin:
                self.machine.forget(at.begin)
        self._unwritten = left

    def _check_counters(self, given: list[_Known], what: str) -> None:
        for at in given:
            if at.name.startswith(COUNTERS) and (found := at.tensor.flatten().nonzero()).numel():
                place = int(found[0])
                value = int(at.tensor.flatten()[place])
                raise Fault(f"{self._op} {what} {at.name}[{place}] = {value}, expected zeros")

    def check_written(self) -> None:
        """A fault if an output has elements that nobody has written."""
        for at in self._unwritten:
            why = self.machine.unwritten(Out(at.name, at.tensor))
            if why and not at.scratch:
                raise Fault(f"{why}; its shape is {list(at.tensor.shape)}")

    # A launch

    def execute(self, of: Launchers, launch: Launch) -> int:
        """CUDA's error code; what the machine raises is raised again when the operation has returned."""
        try:
            self._execute(of, launch)
        except BaseException as error:  # nothing may pass through C++
            self._raised = self._raised or error
            return LAUNCH_FAILURE
        return 0

    def _execute(self, of: Launchers, launch: Launch) -> None:
        symbol = launch.kernel.decode()
        name = short_name(symbol)
        ptx = of.ptx_of(symbol, self.arch)
        program = _program(self.edit(ptx) if self.edit else ptx, symbol)
        stream = launch.stream or 0
        if stream != self.stream:
            raise Fault(
                f"{name} is launched on stream {stream:#x}, PyTorch's current one is {self.stream:#x}"
            )
        if launch.guards == 0:
            raise Fault(f"{name} is launched without a device guard")
        _check_shared(name, program.layout.static, launch)
        packed = bytearray(program.layout.params_size)
        for i, param in enumerate(program.layout.params):
            value = ctypes.string_at(launch.arguments[i], param.size)
            packed[param.offset : param.offset + param.size] = value
        grid, block, cluster = map(tuple, (launch.grid, launch.block, launch.cluster))
        _check_cluster(name, cluster, self.arch, launch)
        asked = None if cluster == (0, 0, 0) else cluster
        try:
            ran = self.machine.start(
                program, grid, block, bytes(packed), cluster=asked, shared=launch.shared
            )
        except ValueError as error:
            raise Fault(str(error)) from None
        self.launches.append(
            Launched(
                self._op,
                name,
                symbol,
                grid,
                block,
                cluster,
                launch.shared,
                stream,
                bytes(packed),
                ran,
            )
        )


@contextmanager
def launched(
    arch: int,
    seed: int = 0,
    resident: int = 4,
    late: str | None = None,
    edit: Callable[[str], str] | None = None,
    sms: int = 132,
    stream: int = FAKE_STREAM,
    of: Launchers | None = None,
) -> Iterator[Run]:
    """Within it operations of ``lorafast_cuda`` run on tensors of the CPU, as on a device of ``arch``.

    ``edit`` changes the PTX of every launch before it runs: a module with that kernel alone. ``of``:
    launchers of another folder, in a namespace that begins with ``lorafast_cuda``. Raises ``Fault``;
    RuntimeError without nvcc.
    """
    of = of or launchers()
    patience = {"most_silent": MOST_SILENT} if edit else {}
    machine = Machine(seed=seed, resident=resident, late=late, **patience)
    run = Run(machine, arch, edit, stream)
    of.device(arch, sms, stream)
    of.to(functools.partial(run.execute, of))
    try:
        with _Mode(run):
            yield run
        run.check_written()
    finally:
        of.reset()


class _Mode(TorchDispatchMode):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace.startswith("lorafast_cuda"):
            return self.run.call(func, args, kwargs)
        made = func(*args, **kwargs)
        empty = func.namespace == "aten" and func._schema.name.partition("::")[2] in _EMPTY
        if empty and made.device.type == "cpu":
            self.run._made.append(made)
        return made


def planted(kernel: str, *edits: plant.Edit) -> Callable[[str], str]:
    """An ``edit`` that plants a fault in the kernels whose symbol has ``kernel``, and in no other."""

    def edit(ptx: str) -> str:
        (symbol,) = re.findall(r"\.entry\s+([\w$]+)", ptx)
        return plant.Planted(symbol, edits)(ptx) if re.search(kernel, symbol) else ptx

    return edit


def short_name(symbol: str) -> str:
    """The last identifier of a mangled name, without what encloses it."""
    at, name = re.match(r"(_ZN?K?)?", symbol).end(), symbol
    while at and (length := re.match(r"\d+", symbol[at:])):
        begin = at + length.end()
        at = begin + int(length[0])
        name = symbol[begin:at]
    return name


@functools.lru_cache(maxsize=512)
def _program(ptx: str, kernel: str) -> Program:
    return Program.from_text(ptx, kernel)


def _check_shared(name: str, static: int, launch: Launch) -> None:
    if launch.allowed < 0:
        if static + launch.shared > SHARED_ALWAYS:
            raise Fault(
                f"{name} is launched with {launch.shared} bytes of shared memory beside {static} of its "
                "own, without cudaFuncSetAttribute"
            )
    elif launch.shared > launch.allowed:
        raise Fault(
            f"{name} is launched with {launch.shared} bytes of shared memory, and {launch.allowed} "
            "were allowed"
        )


def _check_cluster(name: str, cluster: tuple[int, ...], arch: int, launch: Launch) -> None:
    ctas = cluster[0] * cluster[1] * cluster[2]
    if ctas > 1 and arch < FIRST_CLUSTERS:
        raise Fault(f"{name}: a cluster of {cluster} on sm_{arch}, which has none")
    if ctas > MOST_PORTABLE_CLUSTER and not launch.large_clusters:
        raise Fault(f"{name}: a cluster of {cluster} is not portable, and was not allowed")


# Tensors of an operation


def _given(func: Any, args: Any, kwargs: Any) -> list[_Known]:
    """Its tensors on the CPU, by the schema's names."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        several = isinstance(value, (list, tuple))
        for j, tensor in enumerate(value if several else (value,)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                name = f"{argument.name}[{j}]" if several else argument.name
                found += _pieces(name, tensor, written)
    return found


def _pieces(name: str, tensor: Tensor, written: bool) -> Iterator[_Known]:
    begin, end = _extent(tensor)
    if end - begin > max(SPARSE, 4 * tensor.numel() * tensor.element_size()):
        dim = max(range(tensor.dim()), key=tensor.stride)
        for i, row in enumerate(tensor.unbind(dim)):
            yield from _pieces(f"{name}[{i}]", row, written)
    else:
        yield _Known(begin, end, tensor, name, written, name.startswith(SCRATCH))


def _extent(tensor: Tensor) -> tuple[int, int]:
    at = memory_of(tensor)
    return at.address, at.address + at.size


def _without_overlaps(given: list[_Known]) -> list[_Known]:
    """Each memory once: what overlaps without being the same is known as bytes from end to end."""
    found: list[_Known] = []
    for at in sorted(given, key=lambda at: (at.begin, -at.end)):
        if found and at.begin < found[-1].end:
            found[-1] = _together(found[-1], at)
        else:
            found.append(at)
    return found


def _together(one: _Known, other: _Known) -> _Known:
    name = one.name if one.name == other.name else f"{one.name} and {other.name}"
    a, b = one.tensor, other.tensor
    same = (one.begin, a.shape, a.stride()) == (other.begin, b.shape, b.stride())
    dense = a.numel() * a.element_size() == one.end - one.begin
    end = max(one.end, other.end)
    if not same and not (dense and end == one.end):
        storage = a.untyped_storage()
        offset = one.begin - storage.data_ptr()
        a = torch.empty(0, dtype=torch.uint8).set_(storage, offset, (end - one.begin,))
    return _Known(
        one.begin, end, a, name, one.written or other.written, one.scratch and other.scratch
    )


__all__ = [
    "Fault", "Launched", "Run", "launched", "launchers", "needs_nvcc", "nvcc", "planted", "short_name",
]  # fmt: skip
