"""Programs and launches on the machine: what tests write.

    program = Program.from_text(ptx, "kernel")
    machine = Machine(seed=3, resident=4)
    machine.launch(program, (8,), (128,), [In("x", x), Out("y", y), 1024])

Tensors are NumPy arrays or PyTorch tensors on the CPU: the program's addresses are theirs.
"""

import ctypes
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np

from . import build, limits
from .parse import parse
from .program import Program as Layout
from .program import layout
from .syntax import PtxError
from .tensormap import TensorMap

LATE = ("late", "random", "soon")
_MESSAGE = 1 << 16
_TRACE = 1 << 24
_LANES = 32


class Fault(Exception):  # noqa: N818
    """What a program did wrong, and where."""

    trace = ""
    """What a launch with ``trace`` had executed."""


class UnknownInstruction(Exception):  # noqa: N818
    """An instruction, or a modifier of one, that the machine doesn't have."""


class _Options(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("resident", ctypes.c_int),
        ("late", ctypes.c_uint8),
        ("most_steps", ctypes.c_uint64),
        ("most_silent", ctypes.c_uint64),
        ("trace_cta", ctypes.c_int),
        ("trace_thread", ctypes.c_int),
        ("lowest_first", ctypes.c_bool),
        ("in_clusters", ctypes.c_bool),
    ]


class _Count(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("issued", "lanes", "bytes", "sectors", "wavefronts", "multiplies")
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.library()
    library.ptx_program.restype = library.ptx_machine.restype = ctypes.c_void_p
    library.ptx_undefined.restype = ctypes.c_uint64
    return library


@dataclass(frozen=True)
class Count:
    """How often one instruction was executed, and what it moved."""

    line: int
    opcode: str
    issued: int
    """Warps that issued it."""
    lanes: int
    """Active lanes, summed over them."""
    bytes: int
    """Bytes of memory that its lanes asked for."""
    sectors: int
    """32-byte sectors of global memory."""
    wavefronts: int
    """Passes over the banks of shared memory."""
    multiplies: int
    """Multiply-adds of a matrix instruction."""
    by_warp: tuple[int, ...] = ()
    """How often each warp of a CTA issued it, by its place there, summed over CTAs."""


@dataclass(frozen=True)
class Ran:
    """What a launch did."""

    steps: int
    """Instructions issued by all warps."""
    trace: str
    _count: Callable[[], tuple[Count, ...]] = field(repr=False)

    @functools.cached_property
    def counts(self) -> tuple[Count, ...]:
        """Of every instruction."""
        return self._count()

    def issued(self, prefix: str = "") -> int:
        """Instructions issued whose opcode begins with ``prefix``."""
        return sum(c.issued for c in self.counts if c.opcode.startswith(prefix))


class Program:
    """A kernel that the machine can execute."""

    def __init__(self, laid_out: Layout) -> None:
        self.layout = laid_out
        message = ctypes.create_string_buffer(_MESSAGE)
        self._handle = _library().ptx_program(laid_out.text.encode(), message, _MESSAGE)
        if self._handle is None:
            raise UnknownInstruction(message.value.decode())

    @classmethod
    def from_text(cls, text: str, kernel: str) -> "Program":
        """The kernel of that name in a module's PTX."""
        return cls(layout(parse(text), kernel))

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.layout.name

    @functools.cached_property
    def code(self) -> tuple[tuple[int, str], ...]:
        """Line and opcode of every instruction."""
        library = _library()
        found = []
        for index in range(library.ptx_code_size(ctypes.c_void_p(self._handle))):
            line, opcode = ctypes.c_int(), ctypes.create_string_buffer(256)
            library.ptx_code(ctypes.c_void_p(self._handle), index, ctypes.byref(line), opcode, 256)
            found.append((line.value, opcode.value.decode()))
        return tuple(found)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            _library().ptx_free_program(ctypes.c_void_p(self._handle))


@dataclass(frozen=True)
class In:
    """A tensor that a kernel may only read."""

    name: str
    array: Any
    read_only: bool = field(default=True, repr=False)
    undefined: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Out(In):
    """A tensor that holds no values before the kernel writes them."""

    read_only: bool = field(default=False, repr=False)
    undefined: bool = field(default=True, repr=False)


@dataclass(frozen=True)
class InOut(In):
    """A tensor that a kernel may read and write."""

    read_only: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class _Constant(In):
    """A variable of a module's constant memory."""


@dataclass(frozen=True)
class _Memory:
    """Where a tensor lies: addresses and strides in bytes."""

    address: int
    size: int
    item: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def memory_of(array: Any, name: str = "a tensor") -> _Memory:
    """Of a NumPy array or a tensor on the CPU; strides in items. Raises PtxError."""
    if isinstance(array, np.ndarray):
        item = array.itemsize
        if array.dtype.hasobject or item == 0 or any(s % item for s in array.strides):
            raise PtxError(f"{name} is an array of {array.dtype} that no kernel can read")
        strides = tuple(s // item for s in array.strides)
        address = array.ctypes.data
    elif is_tensor(array):
        if array.device.type != "cpu":
            raise PtxError(f"{name} is on {array.device}, expected a tensor on the CPU")
        if str(array.layout) != "torch.strided":
            raise PtxError(f"{name} has layout {array.layout}, expected torch.strided")
        item = array.element_size()
        strides = tuple(array.stride())
        address = array.data_ptr()
    else:
        kind = type(array).__name__
        raise PtxError(f"{name} is of type {kind}, expected a NumPy array or a PyTorch tensor")
    if any(s < 0 for s in strides):
        raise PtxError(f"{name} has negative strides, which no kernel can be given")
    shape = tuple(array.shape)
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    return _Memory(address, reach * item, item, shape, strides)


def is_tensor(value: Any) -> bool:
    """A PyTorch tensor, without PyTorch, which takes seconds to import."""
    return all(hasattr(value, name) for name in ("data_ptr", "element_size", "layout", "device"))


class Machine:
    """Global memory, and how launches on it are scheduled.

    ``seed`` decides who runs when; ``resident`` CTAs run at once; asynchronous copies and products
    happen as ``late`` as waits allow, at ``random``, or as ``soon`` as they are asked for. A launch
    ends in a ``Fault`` after ``most_steps`` instructions of warps, or after ``most_silent`` in which
    nothing changes. ``shared_limit``: bytes of a CTA's shared memory, by ``.target`` unless given.
    ``lowest_first``: lanes of a warp that have parted meet as soon as they can, whatever the seed, so
    that counts are the program's; a group that spins lets none behind it go on.
    """

    def __init__(
        self,
        seed: int = 0,
        resident: int = 4,
        late: str | None = None,
        most_steps: int = 200_000_000,
        most_silent: int = 3_000_000,
        shared_limit: int | None = None,
        lowest_first: bool = False,
    ) -> None:
        if not isinstance(seed, Integral) or not 0 <= seed < 1 << 64:
            raise ValueError(f"seed is {seed!r}, expected an integer from 0 to 2**64 - 1")
        for name, number in (
            ("resident", resident), ("most_steps", most_steps), ("most_silent", most_silent),
        ):  # fmt: skip
            if not isinstance(number, Integral) or not 0 < number < 1 << 31:
                raise ValueError(f"{name} is {number!r}, expected an integer from 1 to 2**31 - 1")
        self.seed, self.resident = seed, resident
        self.late = late if late is not None else LATE[seed % len(LATE)]
        if self.late not in LATE:
            raise ValueError(f"late is {late!r}, expected one of {', '.join(LATE)}")
        self.most_steps, self.most_silent, self.shared_limit = most_steps, most_silent, shared_limit
        self.lowest_first = lowest_first
        self._handle = ctypes.c_void_p(_library().ptx_machine())
        self._kept: list[Any] = []

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            _library().ptx_free_machine(self._handle)

    def region(self, tensor: In) -> int:
        """Makes a tensor known; its address."""
        at = memory_of(tensor.array, tensor.name)
        if at.size:
            integers = ctypes.c_int64 * max(len(at.shape), 1)
            read_only = int(tensor.read_only) + isinstance(tensor, _Constant)
            _library().ptx_region(
                self._handle, tensor.name.encode(),
                ctypes.c_void_p(at.address), ctypes.c_uint64(at.size),
                read_only, int(tensor.undefined), at.item,
                len(at.shape), integers(*at.shape), integers(*at.strides),
            )  # fmt: skip
        self._kept.append(tensor.array)
        return at.address

    def forget(self, address: int) -> None:
        """Takes a tensor's memory away: to access it is a fault."""
        _library().ptx_forget_region(self._handle, ctypes.c_void_p(address))

    def unwritten(self, tensor: In) -> str | None:
        """A sentence if there are elements of a tensor that nobody has written."""
        at = memory_of(tensor.array, tensor.name)
        first = ctypes.c_uint64()
        missing = _library().ptx_undefined(
            self._handle, ctypes.c_void_p(at.address), ctypes.byref(first)
        )
        if not at.size or not missing:
            return None
        left, index = first.value // at.item, [0] * len(at.shape)
        for dim in sorted(range(len(at.shape)), key=lambda d: -at.strides[d]):
            if at.strides[dim]:
                index[dim], left = divmod(left, at.strides[dim])
        place = ", ".join(map(str, index))
        return f"{missing} bytes of {tensor.name} are never written, the first in [{place}]"

    def launch(
        self,
        program: Program,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: list[Any],
        *,
        cluster: tuple[int, ...] | None = None,
        shared: int = 0,
        trace: tuple[int, int] | None = None,
    ) -> Ran:
        """Executes a kernel. Arguments: ``In``, ``Out``, ``InOut``, ``TensorMap``, numbers, bytes.

        ``shared``: bytes of dynamic shared memory. ``trace``: the CTA and the thread whose registers
        are printed. Raises ``Fault``.
        """
        options = self._options(program.layout, grid, block, cluster, shared, trace)
        _check_arguments(program.layout, arguments)
        values = [self._value(argument) for argument in arguments]
        packed = program.layout.pack(*values)
        outs = [a for a in map(_tensor_of, arguments) if isinstance(a, Out)]
        ran = self._start(program, packed, options)
        for out in outs:
            if why := self.unwritten(out):
                raise Fault(f"{program.name}: {why}")
        return ran

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, In):
            return self.region(argument)
        if isinstance(argument, TensorMap):
            return argument.encoded(self.region(argument.tensor))
        return argument

    def start(
        self,
        program: Program,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        packed: bytes,
        *,
        cluster: tuple[int, ...] | None = None,
        shared: int = 0,
        trace: tuple[int, int] | None = None,
    ) -> Ran:
        """The same with the parameters' bytes, of tensors that are known already."""
        if len(packed) != program.layout.params_size:
            size = program.layout.params_size
            raise PtxError(f"{program.name} takes {size} bytes of parameters, not {len(packed)}")
        options = self._options(program.layout, grid, block, cluster, shared, trace)
        return self._start(program, packed, options)

    def _start(self, program: Program, packed: bytes, options: _Options) -> Ran:
        laid_out = program.layout
        for buffer in laid_out.memory:
            kind = _Constant if buffer.constant else InOut
            self.region(kind(buffer.name, buffer.data))
        size = _library().ptx_code_size(ctypes.c_void_p(program._handle))
        counts = (_Count * max(size, 1))()
        warps = -(-math.prod(options.block) // _LANES)
        by_warp = (ctypes.c_uint64 * max(size * warps, 1))()
        steps = ctypes.c_uint64()
        message = ctypes.create_string_buffer(_MESSAGE)
        traced = ctypes.create_string_buffer(_TRACE if options.trace_cta >= 0 else 1)
        code = _library().ptx_launch(
            self._handle, ctypes.c_void_p(program._handle), ctypes.byref(options), packed,
            ctypes.c_uint64(len(packed)), counts, by_warp, ctypes.byref(steps), traced, len(traced),
            message, _MESSAGE,
        )  # fmt: skip
        if code == 1:
            fault = Fault(self._with_source(message.value.decode(), laid_out))
            fault.trace = traced.value.decode()
            raise fault
        if code:
            raise UnknownInstruction(message.value.decode())

        def count() -> tuple[Count, ...]:
            found = []
            for i, (line, opcode) in enumerate(program.code):
                numbers = (getattr(counts[i], name) for name, _ in _Count._fields_)
                of_warps = tuple(by_warp[i * warps : (i + 1) * warps])
                found.append(Count(line, opcode, *numbers, of_warps))
            return tuple(found)

        return Ran(steps.value, traced.value.decode(), count)

    @staticmethod
    def _with_source(message: str, laid_out: Layout) -> str:
        """The PTX of the line that a message names first, below it; or of each where threads stand."""

        def source(line: str) -> str:
            return laid_out.lines[int(line) - 1].strip()

        if "\n" in message:
            place = r"(threads? at line (\d+)) \S+ (\(.*\))"
            return re.sub(place, lambda m: f"{m[1]} {m[3]}: {source(m[2])}", message.rstrip())
        named = re.search(r"\bline (\d+)", message)
        if named is None or not 0 < int(named[1]) <= len(laid_out.lines):
            return message
        return "\n".join(
            (message, f"  {named[1]}: {source(named[1])}", *_variable(message, laid_out))
        )

    def _options(
        self,
        laid_out: Layout,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        cluster: tuple[int, ...] | None,
        shared: int,
        trace: tuple[int, int] | None,
    ) -> _Options:
        name = laid_out.name
        grid, block = (
            limits.three(f"{name}: {what}", sizes)
            for what, sizes in (("grid", grid), ("block", block))
        )
        in_clusters = cluster is not None
        cluster = limits.cluster_of(laid_out, cluster)
        limit = self.shared_limit or limits.shared_limit(laid_out.target)
        if why := limits.why_not(laid_out, grid, block, cluster, shared, limit):
            raise ValueError(f"{name}: {why}")
        if trace is not None:
            limits.check_trace(trace, grid, block)
        three = ctypes.c_uint32 * 3
        cta, thread = trace or (-1, -1)
        return _Options(
            three(*grid), three(*block), three(*cluster), shared, self.seed, self.resident,
            LATE.index(self.late), self.most_steps, self.most_silent, cta, thread, self.lowest_first,
            in_clusters,
        )  # fmt: skip


def _variable(message: str, laid_out: Layout) -> Iterator[str]:
    """Which of several variables the shared memory lies in that a message names."""
    named = re.search(r"\bshared memory at (\d+)", message)
    if named is None or len(laid_out.variables) < 2:
        return
    at = int(named[1])
    for begin, name in reversed(laid_out.variables):
        if begin <= at:
            yield f"  shared memory at {at}: {name} + {at - begin} bytes"
            return


def _tensor_of(argument: Any) -> Any:
    return argument.tensor if isinstance(argument, TensorMap) else argument


def _check_arguments(laid_out: Layout, arguments: Any) -> None:
    """Their number, and that tensors are where the kernel takes addresses. Raises PtxError.

    Types of elements aren't checked: PTX doesn't say them.
    """
    name, params = laid_out.name, laid_out.params
    if len(arguments) != len(params):
        takes = ", ".join(f"{p.name} ({p.kind})" for p in params) or "none"
        raise PtxError(f"{name} takes {len(params)} arguments, not {len(arguments)}: {takes}")
    for param, value in zip(params, arguments, strict=True):
        if isinstance(value, In):
            given, fits = f"the tensor {value.name}", param.address
        elif isinstance(value, TensorMap):
            given, fits = "a tensor map", param.array
        elif (isinstance(value, np.ndarray) and value.ndim) or is_tensor(value):
            raise PtxError(
                f"{name}: argument {param.name} is a bare tensor, expected In, Out or InOut of it"
            )
        else:
            continue
        if not fits:
            raise PtxError(f"{name}: argument {param.name} is {given}, expected {param.kind}")
    tensors = [a for a in map(_tensor_of, arguments) if isinstance(a, In)]
    for one, other in itertools.combinations(tensors, 2):
        a, b = (memory_of(t.array, t.name) for t in (one, other))
        apart = a.address + a.size <= b.address or b.address + b.size <= a.address
        same = (a.address, a.size, type(one)) == (b.address, b.size, type(other))
        if not (apart or same or (one.read_only and other.read_only)):
            raise PtxError(f"{name}: {one.name} and {other.name} overlap, and one is written")
