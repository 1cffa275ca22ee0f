"""LoRA layers that cost little over the frozen layer they adapt."""

from lorafast import functional, nn, reference
from lorafast.convert import (
    adapt,
    disabled,
    freeze,
    interpolate,
    interpolation_curve,
    load_adapter,
    merge,
    new_head,
    parameters,
    quantize,
    save_adapter,
    summary,
    thaw,
)
from lorafast.integrations import accelerate, accelerated, explain, restore, warm_up
from lorafast.ops import (
    BackendError,
    BackendStatus,
    allow_packing,
    backends,
    keep_dequantized,
    use_backend,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendStatus",
    "accelerate",
    "accelerated",
    "adapt",
    "allow_packing",
    "backends",
    "disabled",
    "explain",
    "freeze",
    "functional",
    "interpolate",
    "interpolation_curve",
    "keep_dequantized",
    "load_adapter",
    "merge",
    "new_head",
    "nn",
    "parameters",
    "quantize",
    "reference",
    "restore",
    "save_adapter",
    "summary",
    "thaw",
    "use_backend",
    "warm_up",
]
