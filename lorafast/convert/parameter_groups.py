"""``parameters``: what is trained of a model, in groups for an optimizer."""

import math
import re
import sys
from numbers import Real
from typing import Any

from torch import Tensor, nn

from lorafast.convert.targets import unwrapped

_B = re.compile(r"(.*_)?lora(_embedding)?_B")
"""A part of the name of an adapter's second factor, in a layer of lorafast's or of PEFT's."""
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAMED_NORM = re.compile(r"Norm(\dd)?$")


def parameters(
    model: nn.Module,
    lr: float | None = None,
    *,
    ratio: float = 1.0,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` as groups for an optimizer of PyTorch's.

        torch.optim.AdamW(lorafast.parameters(model, lr=2e-4, ratio=16, weight_decay=0.01))

    Each parameter that requires a gradient is in one group, once, also where it has several names, in
    the order of ``model.named_parameters()``. A group that would be empty is not there. Each has a
    ``name``:

    - ``"matrices"``: ``lr`` and ``weight_decay``. Weights, and ``lora_A`` of adapters.
    - ``"lora_B"``: ``lr · ratio`` and ``weight_decay``. The factors B of adapters: LoRA+ (Hayou et al.,
      2024) trains them faster than A.
    - ``"vectors"``: ``lr`` and no weight decay. Biases, whatever belongs to a norm, DoRA's magnitudes,
      and all else of less than two dimensions.

    PEFT's ``create_loraplus_optimizer`` gives vectors the learning rate of B too, and adapters of
    embeddings one of their own, 1e-6. Here vectors have ``lr``, and embeddings' adapters are as others.

    Args:
        model: any module, with adapters of lorafast's or PEFT's or without.
        lr: learning rate of A. None: the groups have none, and the optimizer's own counts.
        ratio: LoRA+'s, B's learning rate over A's; 1 is LoRA. The paper finds 16 good for language
            models.
        weight_decay: of matrices. None: the optimizer's own.

    Raises:
        ValueError: nothing is trained, a trained parameter has no shape yet, ``ratio`` is another than 1
            without ``lr`` or without a B, a number is negative or not finite (a ``ratio`` of 0
            included), or the model is in ``FullyShardedDataParallel``, whose parameters are flat.

    After ``set_adapter`` other parameters are trained: make the optimizer anew.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not (_is_finite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}, expected a finite number that isn't negative")
    if not (_is_finite(ratio) and ratio > 0):
        raise ValueError(f"ratio is {ratio!r}, expected a positive finite number")
    if lr is None and ratio != 1:
        raise ValueError(f"ratio is {ratio!r} and lr is None: give the learning rate that it is of")
    inner = unwrapped(model)
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, fsdp) for module in model.modules()):
        raise ValueError(
            "the model is in FullyShardedDataParallel, which makes parameters flat: shard it by "
            "fully_shard, which keeps their shapes"
        )
    found: dict[str, list[nn.Parameter]] = {"matrices": [], "lora_B": [], "vectors": []}
    for name, parameter in inner.named_parameters():
        if not parameter.requires_grad:
            continue
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet: run the model once first")
        found[_kind(inner, name, parameter)].append(parameter)
    if not any(found.values()):
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    if ratio != 1 and not found["lora_B"]:
        raise ValueError(f"ratio is {ratio!r}, and no factor B of an adapter is trained")
    groups = []
    for kind, members in found.items():
        if not members:
            continue
        group: dict[str, Any] = {"params": members, "name": kind}
        if lr is not None:
            group["lr"] = lr * ratio if kind == "lora_B" else lr
        if kind == "vectors":
            group["weight_decay"] = 0.0
        elif weight_decay is not None:
            group["weight_decay"] = weight_decay
        groups.append(group)
    return groups


def _is_finite(value: object) -> bool:
    """Whether it is a finite number, or a tensor of one, as optimizers take for a learning rate."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and math.isfinite(value)
    return isinstance(value, Real) and math.isfinite(value)


def _kind(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    *path, last = name.split(".")
    magnitude = any(
        part.startswith("lora_magnitude") for part in (*path, last)
    )  # of a convolution 4-d
    norm = _is_norm(model.get_submodule(".".join(path)))
    if parameter.dim() < 2 or last == "bias" or magnitude or norm:
        return "vectors"
    return "lora_B" if any(map(_B.fullmatch, (*path, last))) else "matrices"


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm of PyTorch's, or by its name one of another library's."""
    known = isinstance(module, (*_NORMS, nn.modules.batchnorm._NormBase))
    return known or _NAMED_NORM.search(type(module).__name__) is not None
