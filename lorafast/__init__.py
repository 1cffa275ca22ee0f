"""LoRA layers that cost little over the frozen layer they adapt."""

from lorafast import functional, nn, reference
from lorafast.convert import (
    Adapter,
    adapt,
    combine,
    export_adapter,
    extract,
    import_adapter,
    load_adapter,
    merge,
    quantize,
    save_adapter,
    summary,
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
    "Adapter",
    "BackendError",
    "BackendStatus",
    "accelerate",
    "accelerated",
    "adapt",
    "allow_packing",
    "backends",
    "combine",
    "explain",
    "export_adapter",
    "extract",
    "functional",
    "import_adapter",
    "keep_dequantized",
    "load_adapter",
    "merge",
    "nn",
    "quantize",
    "reference",
    "restore",
    "save_adapter",
    "summary",
    "use_backend",
    "warm_up",
]
