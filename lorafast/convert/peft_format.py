"""PEFT's adapter format: ``adapter_config.json`` and the names in ``adapter_model.safetensors``."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lorafast.convert.targets import (
    ALL_LINEAR,
    check_names,
    check_pattern,
    check_regex,
    matches,
    output_head,
)
from lorafast.nn import LoRALinear
from lorafast.nn.checks import check_alpha, check_probability, check_rank
from lorafast.nn.lora_conv1d import LoRAConv1D
from lorafast.nn.plain import stock_class

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"

# Fields that change what an adapter computes in a way that LoRALinear does not, and the values with
# which they don't.
_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None, True),  # each layer of the model says it, as in PEFT
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "megatron_config": (None, {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Starts for which PEFT takes a part of W away, so that B·A belongs to what is left of it.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's ``LoraConfig`` that a LoRA linear layer has."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    def rank(self, name: str) -> int:
        """The rank of layer ``name``."""
        return _pattern_value(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """The alpha of layer ``name``."""
        return _pattern_value(self.alpha_pattern, name, self.lora_alpha)

    def targets(self, model: nn.Module) -> set[str]:
        """The linear layers of ``model``, adapted or not, that the config names."""
        head = output_head(model) if self.target_modules == ALL_LINEAR else None
        in_head = set() if head is None else set(head.modules())
        return {
            name
            for name, module in model.named_modules()
            if (isinstance(module, LoRALinear) or stock_class(module) is not None)
            and module not in in_head
            and self._targets(name)
        }

    def _targets(self, name: str) -> bool:
        if matches(self.exclude_modules, name):
            return False
        if any(f".{stored}." in f".{name}." for stored in self.modules_to_save):
            return False
        if self.target_modules == ALL_LINEAR:
            return True
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return matches(self.target_modules, name)
        return matches(self.target_modules, name) and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        if not self.layers_to_transform:
            return True
        # The first number counts, not that of an expert inside the layer.
        patterns = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
            found = re.match(pattern, name)
            if found:
                return (
                    found["index"] is not None and int(found["index"]) in self.layers_to_transform
                )
        return False


_T = TypeVar("_T")


def _pattern_value(patterns: dict[str, _T], name: str, default: _T) -> _T:
    """PEFT's rule: the first key that is a regex for the name or its ending, or else is the name."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return patterns.get(name, default)


def stored_whole(name: str, modules_to_save: Sequence[str]) -> bool:
    """Whether module ``name`` or one around it is stored whole.

    PEFT goes by the last letters: ``norm`` stands for ``input_layernorm`` too.
    """
    parts = name.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(one.endswith(tuple(modules_to_save)) for one in around)


def describe(
    layers: dict[str, LoRALinear], model: nn.Module, modules_to_save: list[str]
) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for these layers.

    Raises:
        ValueError: PEFT has one value for all layers where these have several.
    """
    for attribute in ("dropout", "use_rslora"):
        values = {getattr(layer, attribute): name for name, layer in layers.items()}
        if len(values) > 1:
            seen = ", ".join(f"{value} in {name}" for value, name in values.items())
            raise ValueError(f"{attribute} is {seen}: PEFT's format has one value for all layers")
    first = next(iter(layers.values()))
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(getattr(model, "name_or_path", None) or "") or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "init_lora_weights": True,
        "target_modules": _shortest_targets(layers, model),
        "modules_to_save": modules_to_save or None,
        "rank_pattern": {_regex(name): layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {
            _regex(name): _number(layer.alpha)
            for name, layer in layers.items()
            if layer.alpha != alpha
        },
    }


def _regex(name: str) -> str:
    """A key for this layer alone, and not for those whose names end like it."""
    return "^" + re.escape(name)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _shortest_targets(layers: dict[str, LoRALinear], model: nn.Module) -> list[str] | str:
    """Endings if they name these layers and no other module, else full names, else a regex."""
    names = [name for name, _ in model.named_modules()]
    endings = sorted({name.rpartition(".")[2] for name in layers})
    for candidate in (endings, sorted(layers)):
        if {name for name in names if matches(candidate, name)} == set(layers):
            return candidate
    return "|".join(re.escape(name) for name in sorted(layers))


def read_config(folder: Path) -> AdapterConfig:
    """Reads ``adapter_config.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, not LoRA, has a value that is none, asks for what ``LoRALinear``
            doesn't compute, or goes with other base weights.
    """
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, expected an object")
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"peft_type in {path} is {raw.get('peft_type')!r}, expected 'LORA'")
    for name, harmless in _WITHOUT_EFFECT.items():
        if raw.get(name) not in harmless:
            raise ValueError(
                f"{name} in {path} is {raw[name]!r}: LoRALinear doesn't compute that "
                f"(expected {harmless[0]!r})"
            )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise ValueError(
            f"init_lora_weights in {path} is {start!r}: PEFT changes the base weights for it, and the "
            "adapter doesn't fit others (its save_pretrained converts it, given "
            "path_initial_model_for_weight_conversion)"
        )
    return _parse(raw, path)


def _parse(raw: dict[str, Any], path: Path) -> AdapterConfig:
    def given(name: str, default: Any) -> tuple[str, Any]:
        return f"{name} in {path}", raw.get(name, default)

    def optional(name: str, default: Any) -> tuple[str, Any]:
        value = raw.get(name)
        return f"{name} in {path}", default if value is None else value

    where, targets = given("target_modules", None)
    if not targets:
        raise ValueError(f"{where} is {targets!r}, expected names or a regex")
    return AdapterConfig(
        r=check_rank(*given("r", 8)),
        lora_alpha=check_alpha(*given("lora_alpha", 8)),
        lora_dropout=check_probability(*optional("lora_dropout", 0.0)),
        use_rslora=_bool(*optional("use_rslora", False)),
        target_modules=check_pattern(where, targets),
        exclude_modules=check_pattern(*optional("exclude_modules", ())),
        layers_to_transform=_integers(*optional("layers_to_transform", ())),
        layers_pattern=_regexes(*optional("layers_pattern", ())),
        rank_pattern=_values(*optional("rank_pattern", {}), check_rank),
        alpha_pattern=_values(*optional("alpha_pattern", {}), check_alpha),
        modules_to_save=check_names(*optional("modules_to_save", ())),
    )


def _bool(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}, expected true or false")
    return value


def _integers(where: str, value: object) -> tuple[int, ...]:
    found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(one) is int for one in found):
        raise ValueError(f"{where} is {value!r}, expected an integer or several")
    return found


def _regexes(where: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,) if value else ()
    return tuple(check_regex(where, one) for one in check_names(where, value))


def _values(where: str, value: object, check: Callable[[str, object], _T]) -> dict[str, _T]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, expected an object")
    return {
        check_regex(f"a key of {where}", key): check(f"{where}, for {key!r},", one)
        for key, one in value.items()
    }
