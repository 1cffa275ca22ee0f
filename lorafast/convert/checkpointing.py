"""Reentrant activation checkpointing of a Transformers model that is frozen but for its adapters."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert.kinds import adapter_parameters


class _RequiresGrad:
    """Forward hook of input embeddings: their output requires a gradient where blocks need that.

    A reentrant checkpoint has a backward only if one of its inputs requires a gradient. With everything
    below the first adapter frozen none does, and all adapters in the blocks would stay untrained.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks  # those that can checkpoint; they learn later whether they do, and how

    def __call__(self, embedding: nn.Module, args: Any, output: Any) -> None:
        frozen = isinstance(output, Tensor) and not output.requires_grad
        if frozen and torch.is_grad_enabled() and any(map(_is_reentrant, self.blocks)):
            output.requires_grad_(True)


def let_gradients_through(model: nn.Module) -> None:
    """Makes reentrant checkpointing train the model's adapters, whether it is on or comes later.

    As PEFT does it, of Transformers' models that ``model`` is or holds; of those of token ids
    Transformers does it by itself. A warning says so where blocks are checkpointed already and their
    model doesn't tell which its input embeddings are.
    """
    seen: set[nn.Module] = set()
    for owner in model.modules():
        if owner in seen or getattr(owner, "main_input_name", "input_ids") == "input_ids":
            continue
        inside = list(owner.modules())
        seen.update(inside)
        blocks = [module for module in inside if hasattr(module, "gradient_checkpointing")]
        if not blocks or not adapter_parameters(owner):
            continue
        embeddings = _input_embeddings(owner)
        for embedding in embeddings:
            hooks = embedding._forward_hooks.values()
            if not any(isinstance(hook, _RequiresGrad) for hook in hooks):
                embedding.register_forward_hook(_RequiresGrad(blocks))
        if not embeddings and any(map(_is_reentrant, blocks)):
            warnings.warn(
                "reentrant checkpointing trains no adapter of a block whose input requires no gradient, "
                f"and {type(owner).__name__} doesn't name its input embeddings: checkpoint with "
                "use_reentrant=False",
                stacklevel=4,
            )


def undo(model: nn.Module) -> None:
    """Undoes ``let_gradients_through``."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _RequiresGrad):
                del module._forward_hooks[key]


def _is_reentrant(block: nn.Module) -> bool:
    if not block.gradient_checkpointing:
        return False
    arguments = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
    return arguments.get("use_reentrant") is not False


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Those of the model and of the models in it, each once."""
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        getter = getattr(module, "get_input_embeddings", None)
        if not callable(getter):
            continue
        try:
            embedding = getter()
        except NotImplementedError:  # Transformers, of a model without such a layer
            continue
        if isinstance(embedding, nn.Module):
            found[embedding] = None
    return list(found)
