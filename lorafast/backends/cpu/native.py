"""The native CPU kernels: whether they are here, and which instructions they use."""

import ctypes
import functools
from pathlib import Path

from lorafast.backends.library import Library


def _capability(path: Path) -> str:
    kernels = ctypes.CDLL(str(path))
    kernels.lorafast_cpu_capability.restype = ctypes.c_char_p
    raw: bytes = kernels.lorafast_cpu_capability()
    name = raw.decode()
    if name.startswith("error: "):
        raise OSError(name.removeprefix("error: "))
    return name


LIBRARY = Library(
    "cpu",
    (
        "shrink",
        "expand_",
        "expand_backward",
        "shrink_backward",
        "linear_expand",
        "lora_linear",
        "lora_linear_backward",
        "lora_linear_on_rows",
        "lora_linear_backward_on_rows",
        "lora_linear_",
        "lora_linear_backward_",
        "bottleneck",
        "bottleneck_backward",
        "conv_shrink",
        "conv_shrink_backward",
        "lora_conv",
        "lora_conv_backward",
        "dequantize_four_bit",
        "dequantize_eight_bit",
        "linear_four_bit",
        "linear_eight_bit",
        "lora_linear_four_bit",
        "lora_linear_eight_bit",
    ),
    start=_capability,
)
why_not_loaded = LIBRARY.why_not_loaded


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
    return _capability(LIBRARY.path)
