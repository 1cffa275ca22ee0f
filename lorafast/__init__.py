"""LoRA layers that cost little over the frozen layer they adapt."""

from lorafast import functional, nn, reference
from lorafast.convert import (
    Adapter,
    adapt,
    adapter_names,
    add_adapter,
    combine,
    delete_adapter,
    export_adapter,
    extract,
    import_adapter,
    load_adapter,
    merge,
    quantize,
    save_adapter,
    set_adapter,
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
    "adapter_names",
    "add_adapter",
    "allow_packing",
    "backends",
    "combine",
    "delete_adapter",
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
    "set_adapter",
    "summary",
    "use_backend",
    "warm_up",
]
