"""PEFT's adapter format: ``adapter_config.json`` and the names in ``adapter_model.safetensors``."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lorafast.convert.targets import ALL_LINEAR, matches, output_embeddings
from lorafast.nn import LoRALinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"

# Fields that change what an adapter computes in a way that LoRALinear does not, and the values with
# which they don't.
_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "megatron_config": (None, {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
}


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's ``LoraConfig`` that a LoRA linear layer has."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: list[int] | None = None
    layers_pattern: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)

    def rank(self, name: str) -> int:
        """The rank of layer ``name``."""
        return int(_pattern_value(self.rank_pattern, name, self.r))

    def alpha(self, name: str) -> float:
        """The alpha of layer ``name``."""
        return float(_pattern_value(self.alpha_pattern, name, self.lora_alpha))

    def targets(self, model: nn.Module) -> set[str]:
        """The linear layers of ``model``, adapted or not, that the config names."""
        names = set()
        head = output_embeddings(model) if self.target_modules == ALL_LINEAR else None
        for name, module in model.named_modules():
            linear = isinstance(module, (nn.Linear, LoRALinear)) and module is not head
            if linear and self._targets(name):
                names.add(name)
        return names

    def _targets(self, name: str) -> bool:
        if self.exclude_modules and matches(self.exclude_modules, name):
            return False
        if self.target_modules != ALL_LINEAR and not matches(self.target_modules, name):
            return False
        if self.layers_to_transform is None:
            return True
        patterns = [rf".*\.{p}\.(\d+)\." for p in self.layers_pattern or []]
        for pattern in patterns or [r".*\.[^.]*\.(\d+)\."]:
            found = re.match(pattern, f".{name}")
            if found:
                return int(found.group(1)) in self.layers_to_transform
        return False


def _pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first key that is a regex for the name or for its ending."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


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
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _shortest_targets(layers, model),
        "modules_to_save": modules_to_save or None,
        "rank_pattern": {
            re.escape(name): layer.r for name, layer in layers.items() if layer.r != r
        },
        "alpha_pattern": {
            re.escape(name): _number(layer.alpha)
            for name, layer in layers.items()
            if layer.alpha != alpha
        },
    }


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
        ValueError: it is not JSON, not LoRA, or asks for what ``LoRALinear`` doesn't compute.
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
    if not raw.get("target_modules"):
        raise ValueError(f"target_modules in {path} is {raw.get('target_modules')!r}")
    return AdapterConfig(
        r=_positive(raw, "r", 8, path),
        lora_alpha=_positive(raw, "lora_alpha", 8, path),
        lora_dropout=_probability(raw, path),
        use_rslora=bool(raw.get("use_rslora", False)),
        target_modules=raw["target_modules"],
        exclude_modules=raw.get("exclude_modules"),
        layers_to_transform=_as_list(raw.get("layers_to_transform")),
        layers_pattern=_as_list(raw.get("layers_pattern")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        modules_to_save=list(raw.get("modules_to_save") or []),
    )


def _as_list(value: Any) -> list[Any] | None:
    return value if value is None or isinstance(value, list) else [value]


def _positive(raw: dict[str, Any], name: str, default: int, path: Path) -> Any:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"{name} in {path} is {value!r}, expected a number above 0")
    return value


def _probability(raw: dict[str, Any], path: Path) -> float:
    value = raw.get("lora_dropout") or 0.0
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"lora_dropout in {path} is {value!r}, expected a probability")
    return float(value)
