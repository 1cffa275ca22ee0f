"""Models that FSDP has sharded: it goes on gathering the parameters of the modules that it was given."""

import sys
from collections.abc import Container

from torch import nn


def name_of_sharded(model: nn.Module, layers: Container[nn.Module]) -> str | None:
    """The name of a module that FSDP has sharded and that holds one of ``layers``, or None."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    for name, module in model.named_modules():
        by_fsdp = isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))
        if by_fsdp and any(inner in layers for inner in module.modules()):
            return name or "the model"
    return None


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether ``model`` or a part of it is in the first FSDP, ``FullyShardedDataParallel``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()
    )
