"""The CUDA C++ kernels: whether they are built and loaded, and on which GPUs they run."""

import ctypes
import functools
import hashlib
from pathlib import Path

import torch

from lorafast.backends.cuda import mask
from lorafast.backends.dropout import Bits
from lorafast.backends.library import Library

_WHY_UNUSABLE, _ARCHITECTURES = "lorafast_cuda_why_unusable", "lorafast_cuda_architectures"
_HAS_WGMMA = "lorafast_cuda_has_wgmma"
"""C functions beside the operations."""


def _start(path: Path) -> None:
    library = ctypes.CDLL(str(path))
    if not all(hasattr(library, name) for name in (_WHY_UNUSABLE, _ARCHITECTURES, _HAS_WGMMA)):
        raise OSError("they are those of another version of lorafast: install it again")


OPERATIONS = (
    "dequantize_eight_bit",
    "dequantize_four_bit",
    "expand",
    "expand_backward",
    "grouped_lora_linear_decode",
    "linear_expand",
    "linear_expand_sm90",
    "lora_linear",
    "lora_linear_backward",
    "lora_linear_backward_sm90",
    "lora_linear_decode",
    "lora_linear_decode_eight_bit",
    "lora_linear_decode_four_bit",
    "lora_linear_sm90",
    "mask",
    "shrink",
    "shrink_backward",
)
"""Those of csrc/cuda/bindings.cpp."""
LIBRARY = Library("cuda", OPERATIONS, start=_start)


def why_unusable() -> str | None:
    """What the installation lacks, a sentence, or None. Which GPU a call is on, its plan asks.

    Without PyTorch's CUDA library, whose symbols the kernels' own needs, that is not loaded.
    """
    if not LIBRARY.path.is_file():
        return LIBRARY.why_not_loaded()
    return _why_no_cuda() or LIBRARY.why_not_loaded()


@functools.cache
def _why_no_cuda() -> str | None:
    if torch.version.hip is not None:
        return "PyTorch is built for AMD GPUs, the kernels are written for NVIDIA's"
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA, whose libraries the kernels need"
    if not torch.cuda.is_available():
        return "no CUDA device: the kernels run on NVIDIA GPUs alone"
    return None


@functools.cache
def why_not_on(index: int) -> str | None:
    """Why the kernels can't run on the CUDA device of this index, or None: the library has no code for
    it, or its driver is too old. To be asked once the library is loaded."""
    why = getattr(ctypes.CDLL(str(LIBRARY.path)), _WHY_UNUSABLE)
    why.argtypes, why.restype = [ctypes.c_int], ctypes.c_char_p
    reason: bytes = why(index)
    return f"the native CUDA kernels can't run here: {reason.decode()}" if reason else None


@functools.cache
def architectures() -> str:
    """The compute capabilities that they were compiled for. To be asked once the library is loaded."""
    which = getattr(ctypes.CDLL(str(LIBRARY.path)), _ARCHITECTURES)
    which.restype = ctypes.c_char_p
    listed: bytes = which()
    return listed.decode()


@functools.cache
def has_wgmma() -> bool:
    """Whether there is code for what sm_90a alone has. Where the library can't be loaded it is assumed:
    a GPU that isn't here can be planned for."""
    if _why_no_cuda() is not None or LIBRARY.why_not_loaded() is not None:
        return True
    has = getattr(ctypes.CDLL(str(LIBRARY.path)), _HAS_WGMMA)
    has.argtypes, has.restype = [], ctypes.c_int
    return bool(has())


@functools.cache
def build() -> str:
    """Which build of the library is here, by its bytes, loaded or not; ``none`` without one."""
    try:
        return hashlib.sha256(LIBRARY.path.read_bytes()).hexdigest()[:16]
    except OSError:
        return "none"


def why_not_here(device: torch.device) -> str | None:
    """Why the kernels can't run on ``device``, or None."""
    if device.type != "cuda":
        return f"the inputs are on {device}, the kernels run on CUDA devices"
    index = torch.cuda.current_device() if device.index is None else device.index
    return why_unusable() or why_not_on(index)


@functools.cache
def bits_on(device: torch.device) -> Bits | None:
    """What makes dropout's bit masks on ``device``, None where the kernels can't run."""
    if why_not_here(device) is not None:
        return None
    return mask.mask


def described() -> list[str]:
    """What the kernels are built for, and why they don't run on a GPU that is here; a line each."""
    reason = why_unusable()
    if reason is not None:
        return [reason]
    lines = [f"built for compute capability {architectures()}"]
    for index in range(torch.cuda.device_count()):
        reason = why_not_on(index)
        if reason is not None:
            lines.append(f"GPU {index}: {reason}")
    return lines
