"""LoRA layers that cost little over the frozen layer they adapt."""

import importlib
from typing import TYPE_CHECKING

from lorafast import functional, nn, reference
from lorafast.convert import (
    Adapter,
    AdapterState,
    adapt,
    adapter_names,
    add_adapter,
    combine,
    delete_adapter,
    disabled,
    export_adapter,
    extract,
    freeze,
    import_adapter,
    initialize_corda,
    initialize_eva,
    interpolate,
    interpolation_curve,
    load_adapter,
    load_adapterhub,
    merge,
    mixed,
    new_head,
    parameters,
    quantize,
    remove_bottlenecks,
    save_adapter,
    save_adapterhub,
    set_adapter,
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

if TYPE_CHECKING:
    from lorafast import parallel as parallel

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterState",
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
    "disabled",
    "explain",
    "export_adapter",
    "extract",
    "freeze",
    "functional",
    "import_adapter",
    "initialize_corda",
    "initialize_eva",
    "interpolate",
    "interpolation_curve",
    "keep_dequantized",
    "load_adapter",
    "load_adapterhub",
    "merge",
    "mixed",
    "new_head",
    "nn",
    "parameters",
    "quantize",
    "reference",
    "remove_bottlenecks",
    "restore",
    "save_adapter",
    "save_adapterhub",
    "set_adapter",
    "summary",
    "thaw",
    "use_backend",
    "warm_up",
]


def __getattr__(name: str) -> object:
    if name == "parallel":  # torch.distributed.tensor, which it needs, takes a second to import
        return importlib.import_module("lorafast.parallel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
