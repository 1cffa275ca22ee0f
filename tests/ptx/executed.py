"""Triton's launchers, executed: each kernel is compiled to PTX, and the machine runs it on CPU tensors.

    with executed(arch=90, seed=3, resident=4):
        y, s = lora_linear(x, weight, lora_A, lora_B, 2.0)

Needs a process in which ``TRITON_INTERPRET`` is not set: an interpreted kernel is another one.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from lorafast.kernels.common.launch import INTERPRETED
from recorded import Launch, intercepted
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Fault, In, InOut, Machine, Out, Program, Ran, memory_of
from .tensormap import ELEMENTS, encode

SWIZZLES = (0, 32, 64, 128)
"""Bytes of a swizzle, by its number in Triton's metadata and in CUDA's."""
WARP = 32
OLDEST = 75
"""Compute capability, of those that lorafast has kernels for."""


@dataclass(frozen=True)
class Compiled:
    """What Triton makes of one launch for one architecture."""

    ptx: str
    kernel: str
    shared: int
    threads: int
    cluster: int
    tensors: tuple[Any, ...] | None
    """Of each tensor descriptor the box and swizzle that the kernel reads with."""


@dataclass
class Executed:
    """The launches of a block."""

    machine: Machine
    ran: list[tuple[Launch, Compiled, Ran]] = field(default_factory=list)
    tensors: dict[int, In] = field(default_factory=dict)
    """Those that kernels were given, by address."""
    made: list[tuple[Tensor, type[In]]] = field(default_factory=list)
    """Those that may be written. They are kept: their addresses tell what is a view of them."""

    def kind_of(self, address: int) -> type[In]:
        """How kernels may use what lies there."""
        for tensor, kind in self.made:
            storage = tensor.untyped_storage()
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return kind
        return In

    def check_written(self) -> None:
        """A fault if a tensor that a kernel was given empty has elements that nobody has written."""
        for tensor in self.tensors.values():
            if isinstance(tensor, Out) and (why := self.machine.unwritten(tensor)):
                raise Fault(f"{why}; its shape is {list(tensor.array.shape)}")


@contextmanager
def executed(
    arch: int,
    seed: int = 0,
    resident: int = 4,
    late: str | None = None,
    sms: int = 132,
    edit: Any = None,
    writable: tuple[Tensor, ...] = (),
) -> Iterator[Executed]:
    """Within it Triton's kernels run on the machine, as for a device of ``arch`` with ``sms`` SMs.

    Tensors that the block makes by ``torch.empty`` have no values until a kernel writes them, those made
    by ``torch.zeros`` or named ``writable`` may be written, all others are inputs. ``edit`` changes a
    kernel's PTX before it runs. Raises ``Fault``, RuntimeError where Triton is interpreted, ValueError
    for an ``arch`` that Triton makes no PTX for.
    """
    if INTERPRETED:
        raise RuntimeError("executing Triton's PTX needs a process without TRITON_INTERPRET")
    if not isinstance(arch, int) or arch < OLDEST:
        raise ValueError(f"arch is {arch!r}, expected a compute capability from {OLDEST} on, as 90")
    state = Executed(Machine(seed=seed, resident=resident, late=late))
    state.made = [(tensor, InOut) for tensor in writable]

    def remembering(make: Any, kind: type[In]) -> Any:
        def make_and_remember(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = make(*args, **kwargs)
            if tensor.device.type == "cpu":
                state.made.append((tensor, kind))
            return tensor

        return make_and_remember

    with (
        intercepted(arch, functools.partial(_execute, state, arch, edit), sms),
        mock.patch.object(torch, "empty", remembering(torch.empty, Out)),
        mock.patch.object(torch, "zeros", remembering(torch.zeros, InOut)),
    ):
        yield state
    state.check_written()


def _execute(state: Executed, arch: int, edit: Any, launch: Launch, values: list[Any]) -> None:
    compiled = compile_launch(launch, arch)
    program = _program(edit(compiled.ptx) if edit else compiled.ptx, compiled.kernel)
    constants = {number for number, _ in launch.constants}
    descriptors = iter(compiled.tensors or ())
    arguments: list[Any] = []
    for parameter, value in zip(launch.kernel.params, values, strict=True):
        if parameter.num in constants:
            continue
        name = parameter.name.removesuffix("_ptr")
        if isinstance(value, TensorDescriptor):
            address = _region(state, name, value.base)
            arguments.append(_tensor_map(value, address, next(descriptors)))
            arguments += [*value.shape, *value.strides]
        elif isinstance(value, Tensor):
            arguments.append(_region(state, name, value))
        else:
            arguments.append(value)
    # Scratch memory, which our kernels have none of.
    arguments += [0] * (len(program.layout.params) - len(arguments))
    ran = state.machine.start(
        program,
        launch.grid,
        (compiled.threads,),
        program.layout.pack(*arguments),
        cluster=(compiled.cluster,),
        shared=compiled.shared,
    )
    state.ran.append((launch, compiled, ran))


_compiled: dict[tuple[Any, ...], Compiled] = {}


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """A launch compiled for an architecture, once a process."""
    key = (arch, launch.code)
    if key not in _compiled:
        target = GPUTarget("cuda", arch, WARP)
        try:
            with _no_machine_code():
                made = triton.compile(launch.source(), target=target, options=dict(launch.options))
        except RuntimeError as error:
            name, why = launch.kernel.__name__, str(error).strip().split("\n")[0]
            raise ValueError(f"Triton makes no PTX of {name} for arch={arch}: {why}") from error
        of = made.metadata
        if getattr(of, "global_scratch_size", 0):
            raise NotImplementedError(f"{launch.kernel.__name__} needs scratch memory")
        _compiled[key] = Compiled(
            made.asm["ptx"], of.name, of.shared, _threads(made.asm["ptx"]),
            getattr(of, "num_ctas", 1), getattr(of, "tensordesc_meta", None),
        )  # fmt: skip
    return _compiled[key]


@contextmanager
def _no_machine_code() -> Iterator[None]:
    """Within it Triton compiles to PTX and keeps that apart: nobody executes what ptxas makes of it."""

    def inspect(backend: Any = None, stages: Any = None, *given: Any) -> tuple[str, str] | None:
        if stages is None:
            return "PTX alone", "PTX alone"  # in the keys of what Triton keeps
        stages["cubin"] = lambda ptx, metadata: b""
        return None

    runtime = triton.knobs.runtime
    with runtime.scope():
        if hasattr(runtime, "add_stages_inspection_hook"):
            runtime.add_stages_inspection_hook = inspect
        yield


def _threads(ptx: str) -> int:
    """Of a CTA: warps that are specialised come on top of those asked for."""
    return int(ptx.split(".reqntid", 1)[1].split(None, 1)[0].strip(","))


@functools.lru_cache(maxsize=512)
def _program(ptx: str, kernel: str) -> Program:
    return Program.from_text(ptx, kernel)


def _region(state: Executed, name: str, tensor: Tensor) -> int:
    """The address of a tensor, known to the machine from its first launch on."""
    at = memory_of(tensor, name)
    end = at.address + at.size
    for begin, known in list(state.tensors.items()):
        known_end = begin + memory_of(known.array).size
        if begin <= at.address and end <= known_end:
            return at.address
        if at.address <= begin and known_end <= end:
            # It was a part of this one.
            state.machine.forget(begin)
            del state.tensors[begin]
        elif at.address < known_end and begin < end:
            raise NotImplementedError(f"{name} overlaps {known.name}, which was passed before")
    state.tensors[at.address] = state.kind_of(at.address)(name, tensor)
    state.machine.region(state.tensors[at.address])
    return at.address


def _tensor_map(descriptor: TensorDescriptor, address: int, meta: Any) -> bytes:
    item = meta["elem_size"]
    dtype = str(descriptor.base.dtype).removeprefix("torch.")
    return encode(
        address=address,
        element_bytes=item,
        sizes=tuple(reversed(descriptor.shape)),
        strides=tuple(item * s for s in reversed(descriptor.strides[:-1])),
        box=tuple(reversed(meta["block_size"])),
        swizzle=SWIZZLES[meta["swizzle"]],
        fill_nan=descriptor.padding == "nan",
        dtype=dtype if dtype in ELEMENTS else None,
    )
