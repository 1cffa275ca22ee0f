"""Each kind of adapter as PEFT makes it over one linear layer."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lorafast.bench.common.contenders import UnavailableError
from lorafast.bench.common.problem import SCALING
from torch import nn

import lorafast

STOCK, FAST = "peft", "accelerated"
_VERA_RANK = 256
_OFT_BLOCK = 32
_BOFT_BLOCK = 4


@dataclass(frozen=True)
class Kind:
    """``settings`` are the arguments of PEFT's ``config`` at rank r; ``size`` says in words what r, or a
    block, is."""

    config: str
    settings: Callable[[int], dict[str, Any]]
    size: str


def _with_alpha(r: int) -> dict[str, Any]:
    return {"r": r, "alpha": int(SCALING * r)}


KINDS = {
    "LoRA": Kind(
        "LoraConfig", lambda r: {"r": r, "lora_alpha": int(SCALING * r)}, "r={r}"
    ),
    "VeRA": Kind("VeraConfig", lambda r: {"r": _VERA_RANK}, f"r={_VERA_RANK}"),
    "AdaLoRA": Kind(
        "AdaLoraConfig",
        lambda r: {"init_r": r, "lora_alpha": int(SCALING * r), "total_step": 1000},
        "r={r}",
    ),
    "(IA)³": Kind("IA3Config", lambda r: {"feedforward_modules": []}, ""),
    "LoHa": Kind("LoHaConfig", _with_alpha, "r={r}"),
    "LoKr": Kind("LoKrConfig", _with_alpha, "r={r}"),
    "OFT": Kind("OFTConfig", lambda r: {"r": 0, "oft_block_size": _OFT_BLOCK}, f"b={_OFT_BLOCK}"),
    "BOFT": Kind("BOFTConfig", lambda r: {"boft_block_size": _BOFT_BLOCK}, f"b={_BOFT_BLOCK}"),
}  # fmt: skip
"""LoRA first, for comparison. VeRA's rank and the blocks of OFT and BOFT are PEFT's defaults, whatever r
is."""


def named(kind: str, r: int) -> str:
    """``LoHa, r=16``; ``OFT, b=32``."""
    size = KINDS[kind].size.format(r=r)
    return f"{kind}, {size}" if size else kind


@dataclass
class Pair:
    """PEFT's layer, stock and accelerated, with the same values; ``left`` says why lorafast leaves the
    latter to PEFT, None if it doesn't."""

    stock: nn.Module
    fast: nn.Module
    left: str | None


def pair(kind: str, linear: nn.Linear, r: int) -> Pair:
    """Both layers over ``linear``, in training.

    Raises:
        UnavailableError: PEFT isn't installed or can't make the layer.
    """
    try:
        import peft
    except ImportError:
        raise UnavailableError("PEFT is not installed (pip install peft)") from None
    of = KINDS[kind]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, of.config)(**of.settings(r), target_modules=["0"])
        try:
            model = peft.get_peft_model(nn.Sequential(linear), config).train()
        except ImportError as error:
            raise UnavailableError(f"PEFT {peft.__version__}: {error}") from None
    _draw(model)
    fast = copy.deepcopy(model, {id(p): p for p in linear.parameters()})
    served = lorafast.explain(lorafast.accelerate(fast, quiet=True)).layers
    (left,) = served.values()
    return Pair(_only_layer(model), _only_layer(fast), left)


def _only_layer(model: Any) -> nn.Module:
    layer: nn.Module = model.get_submodule("base_model.model.0")
    return layer


def _draw(model: nn.Module) -> None:
    """Small changes of what PEFT begins with, so that nothing is zero or one."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape).to(p))
