"""The compiled extension ``lorafast._C``: whether it is here, and loading it once."""

import ctypes
import functools
from pathlib import Path

import torch

OPERATIONS = (
    "shrink",
    "expand_",
    "expand_backward",
    "shrink_backward",
    "lora_linear_",
    "lora_linear_backward_",
)
LIBRARY = Path(__file__).resolve().parents[2] / "_C.abi3.so"


@functools.cache
def why_not_loaded() -> str | None:
    """Loads the extension; the reason for which that can't be done, or None if it is there."""
    if not LIBRARY.is_file():
        return (
            "the native kernels are not built (installing lorafast builds them where there are a C++ "
            "compiler and PyTorch already: pip install --no-deps --force-reinstall . in its checkout)"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native kernels can't be loaded: {error}"
    if not all(hasattr(torch.ops.lorafast_cpu, name) for name in OPERATIONS):
        return "the native kernels are those of another version of lorafast: install it again"
    try:
        capability()
    except OSError as error:
        return f"the native kernels can't run: {error}"
    return None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the native CPU kernels have the processor's own bfloat16 product."""
    return why_not_loaded() is None and capability() == "avx512_bf16"


@functools.cache
def has_avx512() -> bool:
    """Whether the native CPU kernels use AVX-512."""
    return why_not_loaded() is None and capability().startswith("avx512")


@functools.cache
def capability() -> str:
    """The instruction set of the native CPU kernels here: avx512_bf16, avx512, avx2 or portable.

    Raises:
        OSError: ``LORAFAST_CPU`` names one that this processor lacks.
    """
    library = ctypes.CDLL(str(LIBRARY))
    library.lorafast_cpu_capability.restype = ctypes.c_char_p
    raw: bytes = library.lorafast_cpu_capability()
    name = raw.decode()
    if name.startswith("error: "):
        raise OSError(name.removeprefix("error: "))
    return name
