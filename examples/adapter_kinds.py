"""The kinds of adapters that `finetune_kinds.py` compares: how each is made, and its learning rate."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from comparing import Batch
from sentence_encoder import (
    HEAD_ONLY_LR,
    HEAD_WITH_LORA_LR,
    LORA_LR,
    TARGETS,
    Arm,
    head_only_model,
)
from torch import Tensor, nn

import lorafast

ALL = "all"
LORA, BOTTLENECK, RELATIVE, BAR = "LoRA", "bottleneck", "PEFT's, accelerated", "no adapter"
Make = Callable[[nn.Module, Namespace], nn.Module]
EVA_BATCHES = 4


@dataclass(frozen=True)
class Kind:
    """One way to train the encoder; `args.rank`, `.steps` and `.seed` are the options of the run."""

    family: str
    make: Make
    lr: float
    """The learning rate of what is trained besides the head."""
    prepare: Callable[[Arm], None] | None = None
    """What its training asks for besides a loss and an optimizer."""
    begin: Callable[[nn.Module, Sequence[Batch]], object] | None = None
    """A start that reads the training batches. It takes as long as several kinds: such a kind is trained
    where it is named, and not among all of them."""


def _lora(alpha_per_rank: float, **arguments: Any) -> Make:
    def make(model: nn.Module, args: Namespace) -> nn.Module:
        lorafast.adapt(model, args.rank, TARGETS, alpha=alpha_per_rank * args.rank, **arguments)
        model.classifier.requires_grad_(True)
        return model

    return make


def _lora_fa(model: nn.Module, args: Namespace) -> nn.Module:
    """LoRA whose A stays as it was drawn."""
    made = _lora(2)(model, args)
    for name, parameter in made.named_parameters():
        if name.endswith("lora_A"):
            parameter.requires_grad_(False)
    return made


def _faster_b(arm: Arm) -> None:
    """LoRA+: A at a quarter of LoRA's rate, and B at sixteen times that."""
    groups = lorafast.parameters(arm.model.encoder, LORA_LR / 4, ratio=16, weight_decay=0.0)
    head = {"params": list(arm.model.classifier.parameters()), "lr": HEAD_WITH_LORA_LR}
    arm.optimizer = torch.optim.AdamW([*groups, head], weight_decay=0.0)


def _call(model: nn.Module, batch: Batch) -> Tensor:
    return model(*batch.inputs)


def _eva(model: nn.Module, batches: Sequence[Batch]) -> None:
    """EVA's start, from a few batches, of which it goes through all layers' inputs again and again."""
    lorafast.initialize_eva(
        model, batches[:EVA_BATCHES], mask=lambda batch: batch.inputs[1].bool(), forward=_call
    )


def _corda(model: nn.Module, batches: Sequence[Batch]) -> None:
    """CorDA's start, from all batches: of more inputs than a layer has features."""
    lorafast.initialize_corda(model, batches, forward=_call)


class LoRAXS(nn.Module):
    """A frozen linear layer with LoRA-XS (Bałazy et al., 2024).

    A and B, of the first singular vectors of W, are frozen too: R [r, r] between them is trained, and
    small at first.
    """

    def __init__(self, base: nn.Linear, r: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        U, S, Vh = torch.linalg.svd(base.weight, full_matrices=False)
        self.register_buffer("lora_A", Vh[:r].clone())
        self.register_buffer("lora_B", U[:, :r] * S[:r])
        self.R = nn.Parameter(1e-5 * torch.randn(r, r))

    def forward(self, x: Tensor) -> Tensor:
        return lorafast.functional.scaled_lora_linear(
            x, self.base.weight, self.lora_A, self.lora_B, self.scaling, self.base.bias, m=self.R
        )


def _lora_xs(model: nn.Module, args: Namespace) -> nn.Module:
    model.encoder.requires_grad_(False)
    for parent in list(model.encoder.modules()):
        for name, layer in list(parent.named_children()):
            if name in TARGETS:
                setattr(parent, name, LoRAXS(layer, args.rank, 1.0))
    return model


def _bottleneck(kind: str, **arguments: Any) -> Make:
    def make(model: nn.Module, args: Namespace) -> nn.Module:
        lorafast.adapt(model.encoder, kind=kind, **arguments)
        return model

    return make


def _relative(config: str, arguments: Callable[[Namespace], dict[str, Any]]) -> Make:
    """PEFT's layers of this config, served by lorafast; where it can't serve one, PEFT's own code."""

    def make(model: nn.Module, args: Namespace) -> nn.Module:
        import peft

        chosen = {"target_modules": TARGETS, "modules_to_save": ["classifier"]} | arguments(args)
        made = peft.get_peft_model(model, getattr(peft, config)(**chosen))
        return lorafast.accelerate(made, quiet=True)

    return make


def _adalora(args: Namespace) -> dict[str, Any]:
    """From 3/2 of the rank down to the rank in the mean, as PEFT's defaults, 12 and 8, have it."""
    return {
        "init_r": args.rank * 3 // 2,
        "target_r": args.rank,
        "lora_alpha": 2 * args.rank,
        "total_step": args.steps,
        "tinit": args.steps // 10,
        "tfinal": args.steps // 3,
    }


def _follow_budget(arm: Arm) -> None:
    """Let AdaLoRA's ranks follow their budget after each step, and keep P and Q near orthogonal."""
    tuner, steps = arm.model.base_model, count()
    weight = arm.model.active_peft_config.orth_reg_weight

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + weight * _from_orthogonal(arm.model)

    arm.loss = loss
    arm.optimizer.register_step_post_hook(lambda *_: tuner.update_and_allocate(next(steps)))


def _from_orthogonal(model: nn.Module) -> Tensor:
    """The mean of ``‖P·Pᵀ − 1‖`` over AdaLoRA's factors, rows of A and columns of B."""
    a = [p @ p.T for name, p in model.named_parameters() if "lora_A" in name]
    b = [p.T @ p for name, p in model.named_parameters() if "lora_B" in name]
    return torch.stack([torch.dist(g, torch.eye(len(g)).to(g)) for g in a + b]).mean()


def _full(model: nn.Module, args: Namespace) -> nn.Module:
    return model


# The demo's rate is the common one. Others, but LoRA+'s and LoRA-XS's, were chosen here, among a few, by
# the accuracy on the held-out texts: what a kind scores is a little too good, and no statement on kinds
# elsewhere.
KINDS = {
    "head": Kind(BAR, lambda model, args: head_only_model(model), HEAD_ONLY_LR),
    "full": Kind(BAR, _full, 3e-4),
    "lora": Kind(LORA, _lora(2), LORA_LR),
    "rslora": Kind(LORA, _lora(2, use_rslora=True), LORA_LR),
    "lora+": Kind(LORA, _lora(2), LORA_LR, _faster_b),
    "lora-fa": Kind(LORA, _lora_fa, LORA_LR),
    "dora": Kind(LORA, _lora(2, use_dora=True), LORA_LR),
    "pissa": Kind(LORA, _lora(1, init_lora_weights="pissa"), LORA_LR),
    "olora": Kind(LORA, _lora(1, init_lora_weights="olora"), LORA_LR),
    "eva": Kind(LORA, _lora(2), LORA_LR, begin=_eva),
    "corda": Kind(LORA, _lora(1), LORA_LR, begin=_corda),
    "lora-xs": Kind(LORA, _lora_xs, 4e-3),
    "houlsby": Kind(BOTTLENECK, _bottleneck("houlsby"), 3e-3),
    "pfeiffer": Kind(BOTTLENECK, _bottleneck("pfeiffer"), 1e-3),
    "parallel": Kind(
        BOTTLENECK,
        # BERT has no module that is the whole MLP: beside its second layer.
        _bottleneck("parallel", targets=r".*layer\.\d+\.output\.dense", reduction_factor=16),
        LORA_LR,
    ),
    "mica": Kind(
        RELATIVE,
        _relative(
            "LoraConfig",
            lambda args: {
                "r": args.rank,
                "lora_alpha": 2 * args.rank,
                "init_lora_weights": "mica",
            },
        ),
        LORA_LR,
    ),
    "vera": Kind(RELATIVE, _relative("VeraConfig", lambda args: {}), 1e-2),
    "adalora": Kind(RELATIVE, _relative("AdaLoraConfig", _adalora), 2e-3, _follow_budget),
    "ia3": Kind(
        RELATIVE,
        _relative(
            "IA3Config",
            lambda args: {
                "target_modules": ["key", "value", "output.dense"],
                "feedforward_modules": ["output.dense"],
            },
        ),
        8e-3,
    ),
    "loha": Kind(
        RELATIVE,
        # As many parameters as LoRA has.
        _relative("LoHaConfig", lambda args: {"r": -(-args.rank // 2), "alpha": args.rank}),
        LORA_LR,
    ),
    "lokr": Kind(
        RELATIVE,
        _relative("LoKrConfig", lambda args: {"r": args.rank, "alpha": args.rank}),
        5e-3,
    ),
    "oft": Kind(RELATIVE, _relative("OFTConfig", lambda args: {}), LORA_LR),
    "boft": Kind(RELATIVE, _relative("BOFTConfig", lambda args: {"boft_block_size": 8}), LORA_LR),
}
"""By name, in the order in which they are run."""
QUICK = {name for name, kind in KINDS.items() if kind.begin is None}
"""All that ``all`` stands for."""


def kind_name(text: str) -> str:
    """Return the name of a kind, as argparse asks for it."""
    known = [ALL, *KINDS]
    if text in known:
        return text
    close = difflib.get_close_matches(text.lower(), known, n=1)
    nearest = f"; the nearest name is {close[0]!r}" if close else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}{nearest}")


def has_peft() -> bool:
    try:
        return importlib.util.find_spec("peft") is not None
    except ValueError:  # `sys.modules` has None for it
        return False


def served(model: nn.Module) -> tuple[int, int]:
    """Return how many adapters the model has, and how many of these lorafast serves."""
    ours = (lorafast.nn.AdapterLayer, lorafast.nn.Bottleneck, LoRAXS)
    made = sum(isinstance(module, ours) for module in model.modules())
    if made:
        return made, made
    try:
        layers = lorafast.explain(model).layers
    except ValueError:  # no adapter
        return 0, 0
    return len(layers), sum(reason is None for reason in layers.values())
