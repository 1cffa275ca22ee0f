"""``accelerate`` and ``restore``: layers get their fast class, or PEFT's own back."""

import functools
import types
import warnings
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import layer as stock
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorafast.convert.targets import COMPILED, why_not_here
from lorafast.integrations.peft import (
    attention_rules,
    conv_rules,
    embedding,
    embedding_rules,
    known,
    parameter_rules,
    rules,
)
from lorafast.integrations.peft.adapters import active
from lorafast.integrations.peft.layers import (
    FAST,
    LAYERS,
    Embedding,
    FastConv,
    FastKind,
    FastLinear,
    MultiheadAttention,
    ParamWrapper,
    fast_of,
)


def warn_of_changes() -> None:
    """Says once what this release of PEFT has changed, if anything."""
    _warn(known.changes())


@functools.cache
def _warn(sentence: str | None) -> None:
    if sentence is not None:
        warnings.warn(sentence, stacklevel=5)


def accelerate(model: nn.Module, *, quiet: bool = False) -> nn.Module:
    """Serves the LoRA layers of ``model`` fast from now on; says in a line how many."""
    for module in model.modules():
        fast = fast_of(type(module))
        if fast is not None and "forward" not in module.__dict__:
            module.__class__ = fast
    warn_of_changes()
    served = explain(model)
    if not quiet:
        print(f"lorafast: {served.summary}")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives the layers of ``model`` PEFT's own classes back."""
    fast = tuple(FAST.values())
    found: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, fast)}
    for name, module in found.items():
        if type(module) not in fast:
            raise ValueError(
                f"{name} was given the class {type(module).__qualname__} after it was accelerated "
                "(FSDP does so): it can't be restored"
            )
    for module in found.values():
        _give_back(module)
    return model


def _give_back(module: nn.Module) -> None:
    fast: Any = type(module)
    module.__class__ = fast._stock
    # A hook of accelerate's that was put on in between calls what it found.
    for name in ("forward", "_old_forward"):
        kept = module.__dict__.get(name)
        if getattr(kept, "__func__", None) is fast.forward:
            setattr(module, name, types.MethodType(fast._stock.forward, module))


@dataclass(frozen=True)
class Served:
    """What serves each adapter layer: None for a fast one, else why it isn't; prints as text."""

    layers: dict[str, str | None]

    @property
    def summary(self) -> str:
        """In a line, how many layers are fast, and what the others are."""
        reasons = self.layers.values()
        inactive = sum(reason == rules.INACTIVE for reason in reasons)
        uncalled = [n for n, reason in self.layers.items() if (reason or "").startswith(_UNCALLED)]
        fast = sum(reason is None for reason in reasons)
        stock = len(reasons) - fast - inactive - len(uncalled)
        parts = [f"{fast} of {len(reasons)} adapter layers are fast"]
        if inactive:
            parts.append(f"{inactive} without an active adapter")
        if uncalled:
            more = ", ..." if len(uncalled) > _NAMED else ""
            parts.append(f"{len(uncalled)} never called ({', '.join(uncalled[:_NAMED])}{more})")
        if stock:
            parts.append(f"{stock} PEFT's own")
        hint = "" if fast == len(reasons) else " (lorafast.explain(model) says why)"
        return f"{', '.join(parts)}{hint}"

    def __str__(self) -> str:
        groups: dict[str | None, list[str]] = {}
        for name, reason in self.layers.items():
            groups.setdefault(reason, []).append(name)
        lines = [self.summary]
        for reason, names in groups.items():
            lines.append(f"{_heading(reason)}:")
            lines += [f"  {name}" for name in names]
        return "\n".join(lines)

    __repr__ = __str__


_ELSEWHERE = {
    "peft.tuners.lora.gptq": "GPTQ's packed integers, which its own kernels alone read here",
    "peft.tuners.lora.awq": "AWQ's packed integers, which its own kernels alone read here",
    "peft.tuners.lora.hqq": "HQQ's packed integers, which its own layer alone reads here",
    "peft.tuners.lora.eetq": "EETQ's 8-bit integers in its kernels' layout, which they alone read here",
    "peft.tuners.lora.aqlm": "AQLM's codes of codebooks, which its own kernels alone read here",
    "peft.tuners.lora.inc": "Intel Neural Compressor's float8, which its own layer alone reads here",
}
"""Quantized layers that are left to PEFT, by the module that PEFT has for them."""
_OTHER_BASES = {
    "peft.tuners.adalora.gptq": "AdaLoRA over GPTQ's packed integers",
    "peft.tuners.ia3.layer": "(IA)³ over a convolution, of which PyTorch's own calls are all",
    "peft.tuners.oft.layer": "OFT over an embedding, of which PyTorch's own calls are all",
}
"""Layers of LoRA's relatives that are left to PEFT, by the module that PEFT has for them."""
_UNCALLED = "never called, for "
_NAMED = 3


def _heading(reason: str | None) -> str:
    if reason is None:
        return "served by lorafast"
    if reason == rules.INACTIVE:
        return "without an active adapter"
    return reason if reason.startswith(_UNCALLED) else f"served by PEFT, {reason}"


def explain(model: nn.Module) -> Served:
    """What serves each of PEFT's adapter layers in ``model`` as it is now, for an input that fits it.

    Raises:
        ValueError: there is none.
    """
    layers = {
        name or "(module)": _why_uncalled(name, model) or _why_stock(module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not _is_part(name, model)
    }
    if not layers:
        raise ValueError("the model has none of PEFT's adapter layers")
    return Served(layers)


def _is_part(name: str, model: nn.Module) -> bool:
    """Whether it is the ``out_proj`` of an attention that PEFT has adapted, whose adapters read it."""
    around, _, last = name.rpartition(".base_layer.")
    if last != "out_proj":
        around, _, last = ("", "", name.removeprefix("base_layer."))
    return last == "out_proj" and isinstance(model.get_submodule(around), stock.MultiheadAttention)


def _why_uncalled(name: str, model: nn.Module) -> str | None:
    """The reason for which the layer of this name never runs, or None."""
    if (
        name.rpartition(".")[2] == COMPILED
    ):  # it goes on calling the layer, with the class that it has
        return None
    anything = nn.Linear(1, 1, device="meta")  # it is the place that is asked about, not the layer
    reason = why_not_here([name], anything, model)
    return reason and f"{_UNCALLED}{reason}"


def _calls_its_class(module: nn.Module) -> bool:
    """Whether a forward of the instance, if there is one, is a hook of accelerate's over its class's."""
    own = module.__dict__
    kept = own.get("_old_forward") or own.get("forward")
    return kept is None or getattr(kept, "__func__", None) is type(module).forward


def _why_stock(module: nn.Module) -> str | None:
    kind = type(module)
    if fast_of(kind) is not None:
        if "forward" in module.__dict__:
            return (
                "its forward was replaced (a hook of accelerate's, X-LoRA) before it was made fast"
            )
        return "it isn't accelerated: it was made later, or restored"
    fast = (FastLinear, Embedding, FastConv, FastKind, MultiheadAttention, ParamWrapper)
    if isinstance(module, fast) and not _calls_its_class(module):
        return "its forward was replaced after it was made fast"
    if isinstance(module, FastLinear):
        return rules.why_stock_linear(module, active(module))
    if isinstance(module, Embedding):
        return embedding_rules.why_stock_embedding(module, embedding.active(module))
    if isinstance(module, FastConv):
        conv: Any = module
        return conv_rules.why_stock_conv(conv, active(conv))
    if isinstance(module, FastKind):
        return module.why_stock()
    if isinstance(module, MultiheadAttention):
        return attention_rules.why_stock_attention(module, active(module))
    if isinstance(module, ParamWrapper):
        return parameter_rules.why_stock_parameter(module, active(module))
    changed = known.why_changed(LAYERS[kind]) if kind in LAYERS else None
    if changed is not None:
        return changed
    if kind.__module__ in _OTHER_BASES:
        return f"a {kind.__qualname__} of {_OTHER_BASES[kind.__module__]}"
    if kind.__module__ in _ELSEWHERE:
        return f"its weight is stored as {_ELSEWHERE[kind.__module__]}"
    if isinstance(module, LoraLayer):
        return f"a {kind.__qualname__} layer, for which there is no faster way here"
    return f"{kind.__module__}.{kind.__qualname__} is of a kind that has no faster way here"
