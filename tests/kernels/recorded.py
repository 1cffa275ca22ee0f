"""What the launchers hand to the compiler, recorded instead of launched, on tensors without memory."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from lorafast.kernels.common import launch
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One launch: its grid, and what distinguishes the code that is compiled for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def code(self) -> tuple[object, ...]:
        """Equal for launches that run the same machine code."""
        return self.kernel.__name__, self.signature, self.constants, self.aligned, self.options

    def constant(self, name: str) -> Any:
        """The value of a compile-time constant."""
        number = next(p.num for p in self.kernel.params if p.name == name)
        return dict(self.constants)[number]

    def source(self) -> ASTSource:
        """For ``triton.compile``."""
        return ASTSource(
            self.kernel,
            dict(self.signature),
            {(number,): value for number, value in self.constants},
            {(number,): _ALIGNED for number in self.aligned},
        )


def _launch(kernel: JITFunction, grid: tuple[int, ...], given: dict[str, Any]) -> Launch:
    """Specialised as Triton does it: by divisibility by 16, by being 1."""
    options = tuple((name, given.pop(name)) for name in _OPTIONS)
    signature, constants, aligned = [], [], []
    assert given.keys() == {p.name for p in kernel.params}
    for p in kernel.params:
        value = given[p.name]
        if p.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            kind = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            kind = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned.append(p.num)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            assert type(value) is int, (p.name, value)
            kind = "i32" if value < 2**31 else "i64"
            if not p.do_not_specialize:
                if value == 1:
                    kind = "constexpr"
                elif value % 16 == 0:
                    aligned.append(p.num)
        if kind == "constexpr":
            constants.append((p.num, value))
        signature.append((p.name, kind))
    return Launch(kernel, grid, tuple(signature), tuple(constants), tuple(aligned), options)


@functools.cache
def _compilable(kernel: InterpretedFunction) -> JITFunction:
    """What the compiler would have got, had the interpreter not been asked for."""
    return JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])


@contextmanager
def intercepted(
    capability: int, run: Callable[[Launch, list[Any]], None], sms: int = 132
) -> Iterator[None]:
    """Within the block launchers work as for a device of this compute capability, and ``run`` gets their
    launches: each with the values of its kernel's parameters, in order."""

    def intercept(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = self if isinstance(self, JITFunction) else _compilable(self)
        given = dict(zip((p.name for p in kernel.params), args, strict=False)) | kwargs
        launched = _launch(kernel, tuple(grid), given)
        run(launched, [given[p.name] for p in kernel.params])

    with (
        mock.patch.object(JITFunction, "run", intercept),
        mock.patch.object(InterpretedFunction, "run", intercept),
        mock.patch.object(launch, "INTERPRETER_CAPABILITY", capability),
        mock.patch.object(launch, "INTERPRETER_SMS", sms),
    ):
        yield


@contextmanager
def recording(capability: int, sms: int = 132) -> Iterator[list[Launch]]:
    """Within the block kernels are recorded, as for a device of this compute capability."""
    launches: list[Launch] = []
    with intercepted(capability, lambda launched, _: launches.append(launched), sms):
        yield launches


def launches_of(capability: int, call: Callable[[], object], sms: int = 132) -> list[Launch]:
    """The launches of ``call``."""
    with recording(capability, sms) as launches:
        call()
    return launches
