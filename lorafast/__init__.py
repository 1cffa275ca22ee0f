"""LoRA layers that cost little over the frozen layer they adapt."""

from lorafast import functional, nn, reference
from lorafast.convert import (
    adapt,
    load_adapter,
    merge,
    quantize,
    remove_bottlenecks,
    save_adapter,
    summary,
    without_bottlenecks,
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
    "explain",
    "functional",
    "keep_dequantized",
    "load_adapter",
    "merge",
    "nn",
    "quantize",
    "reference",
    "remove_bottlenecks",
    "restore",
    "save_adapter",
    "summary",
    "use_backend",
    "warm_up",
    "without_bottlenecks",
]
