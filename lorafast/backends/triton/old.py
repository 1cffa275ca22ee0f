"""The backends: for each, what it needs of the machine, what it refuses, where its code is."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafast.backends.cpu import native


@dataclass(frozen=True)
class Backend:
    """One implementation of the four operations (``cpu`` and ``triton`` have a whole layer's forward and
    backward too: ``select_whole``).

    ``why_unusable()`` and ``why_refused(operation, tensors)`` return a sentence, or None if nothing
    stands in the way. ``modules`` maps an operation to the module that has a function of its name.
    """

    name: str
    why_unusable: Callable[[], str | None]
    why_refused: Callable[[str, tuple[Tensor, ...]], str | None]
    module: Callable[[str], str]

    def implementation(self, operation: str) -> Callable[..., Any]:
        """The function that runs ``operation``; its module is imported on first use."""
        return _implementation(self.module(operation), operation)


@functools.cache
def _implementation(module: str, operation: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(module), operation)
    return function


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _capability(device: torch.device | None = None) -> tuple[int, int]:
    """Of a device; without one, of that which is current at the first call."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def _version(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package."""
    version: str = importlib.import_module(package).__version__
    return tuple(int(part) for part in version.split(".")[:2])


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on any device (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_unusable() -> str | None:
    if not _installed("triton"):
        return "Triton is not installed (pip install triton)"
    if interpreting():
        if not _installed("numpy"):
            return "Triton's interpreter needs NumPy (pip install numpy)"
        if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
            return "Triton before 3.7 can't interpret with NumPy 2.4 or later: upgrade Triton"
        return None
    if not torch.cuda.is_available():
        return (
            "no CUDA device, and on a CPU Triton runs only in its interpreter "
            "(set TRITON_INTERPRET=1 before Python starts)"
        )
    if torch.version.hip is not None:
        return "PyTorch is built for AMD GPUs, the kernels are written for NVIDIA's"
    return _too_old(_capability())


def _too_old(capability: tuple[int, int]) -> str | None:
    if capability < (8, 0):
        return f"compute capability is {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _triton_refused(operation: str, tensors: tuple[Tensor, ...]) -> str | None:
    x = tensors[0]
    if x.dtype not in _TRITON_DTYPES:
        return f"the dtype is {x.dtype}, the kernels have float16, bfloat16 and float32"
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"an input is a {type(tensor).__name__}, the kernels read plain tensors"
        if tensor.device != x.device:
            return f"the inputs are on {x.device} and {tensor.device}, expected one device"
    if x.device.type != "cuda" and not (interpreting() and x.device.type == "cpu"):
        return f"the inputs are on {x.device}, the kernels run on CUDA devices"
    return _too_old(_capability(x.device)) if x.is_cuda else None


_PLAIN = (Tensor, torch.nn.Parameter)
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)  # int64: the seed


def _cpu_refused(operation: str, tensors: tuple[Tensor, ...]) -> str | None:
    for tensor in tensors:
        if tensor.is_cpu and type(tensor) in _PLAIN and tensor.dtype in _CPU_DTYPES:
            continue  # in the way of every call
        if not tensor.is_cpu:
            return f"an input is on {tensor.device}, the native kernels run on the CPU"
        if type(tensor) not in _PLAIN:
            return f"an input is a {type(tensor).__name__}, the kernels read plain tensors"
        return f"the dtype is {tensor.dtype}, the kernels have float32, bfloat16 and float16"
    return None


def _nothing_missing() -> str | None:
    return None


def _nothing_refused(operation: str, tensors: tuple[Tensor, ...]) -> str | None:
    return None


REFERENCE = Backend(
    "reference", _nothing_missing, _nothing_refused, lambda op: "lorafast.reference"
)
ATEN = Backend("aten", _nothing_missing, _nothing_refused, lambda op: "lorafast.ops.aten")


def _triton_module(operation: str) -> str:
    return f"lorafast.kernels.{_TRITON_FOLDERS.get(operation, operation)}"


_TRITON_FOLDERS = {"lora_linear_backward": "lora_linear"}
TRITON = Backend("triton", _triton_unusable, _triton_refused, _triton_module)

CPU = Backend("cpu", native.why_not_loaded, _cpu_refused, lambda op: "lorafast.ops.cpu")

BACKENDS = {backend.name: backend for backend in (REFERENCE, ATEN, TRITON, CPU)}
