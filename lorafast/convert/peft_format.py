"""PEFT's adapter format: ``adapter_config.json`` and the names in ``adapter_model.safetensors``."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from lorafast.convert.bounded_regex import BoundedRegex, shortened
from lorafast.convert.kinds import kind_of_layer
from lorafast.convert.targets import ALL_LINEAR, check_names, names_by_layer, output_head
from lorafast.nn import AdapterLayer
from lorafast.nn.checks import check_alpha, check_probability, check_rank

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields that change what an adapter computes in a way that no layer here does, and the values with
# which they don't.
_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None, True),  # each layer of the model says it, as in PEFT
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
# Fields of PEFT 0.20 and 0.21 that say where an adapter comes from or how it was trained: it computes
# the same whatever they are. (runtime_config, which older releases wrote, PEFT ignores too.)
_DESCRIPTIVE = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "init_lora_weights", "megatron_core", "qalora_group_size", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "ensure_weight_tying",
    "runtime_config",
})  # fmt: skip
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Starts for which PEFT takes a part of W away, so that B·A belongs to what is left of it.
_OTHER_BASE = ("loftq", "lora_ga")
_OURS = ("pissa", "olora", "corda")
# More than any matrix has rows.
_MOST_RANK = 2**31


_T = TypeVar("_T")


class Selection:
    """Layers that ``target_modules`` or ``exclude_modules`` names: names, their endings, or a regex."""

    def __init__(self, names: Iterable[str] = (), regex: BoundedRegex | None = None) -> None:
        self.names = frozenset(names)
        self.regex = regex

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str)
        if self.regex is not None:
            return self.regex.fullmatch(name)
        parts = name.split(".")
        return any(".".join(parts[i:]) in self.names for i in range(len(parts)))


class ByPattern(Generic[_T]):
    """``rank_pattern`` or ``alpha_pattern``: values of layers by regexes over names or their endings."""

    def __init__(self, where: str, values: dict[str, _T]) -> None:
        self._values = values
        self._regexes = []
        for key, value in values.items():
            BoundedRegex(f"a key of {where}", key)
            embedded = BoundedRegex(f"a key of {where}", rf"(.*\.)?({key})$", key)
            self._regexes.append((embedded, value))

    def get(self, name: str, default: _T) -> _T:
        """PEFT's rule: the first key that matches the name or its ending, or else is the name."""
        for regex, value in self._regexes:
            if regex.match(name):
                return value
        return self._values.get(name, default)


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's ``LoraConfig`` that adapted layers have."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    target_modules: Selection | None
    """None stands for ``all-linear``."""
    exclude_modules: Selection
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[BoundedRegex, ...]
    rank_pattern: ByPattern[int]
    alpha_pattern: ByPattern[float]
    modules_to_save: tuple[str, ...]
    init_lora_weights: str | None
    """A start that took a part of W away, to what is left of which the adapter belongs; else None."""

    def rank(self, name: str) -> int:
        """The rank of layer ``name``."""
        return self.rank_pattern.get(name, self.r)

    def alpha(self, name: str) -> float:
        """The alpha of layer ``name``."""
        return self.alpha_pattern.get(name, self.lora_alpha)

    def targets(self, model: nn.Module) -> set[str]:
        """The layers of ``model`` that can be adapted or are, and that the config names."""
        head = output_head(model) if self.target_modules is None else None
        in_head = set() if head is None else set(head.modules())
        return {
            names[0]
            for layer, names in names_by_layer(model).items()
            if layer not in in_head and self._targets(names[0], layer)
        }

    def _targets(self, name: str, layer: nn.Module) -> bool:
        if name in self.exclude_modules:
            return False
        if any(f".{stored}." in f".{name}." for stored in self.modules_to_save):
            return False
        if self.target_modules is None:
            return kind_of_layer(layer).in_all_linear
        if self.target_modules.regex is not None or name in self.target_modules.names:
            return name in self.target_modules
        return name in self.target_modules and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        if not self.layers_to_transform:
            return True
        for pattern in self.layers_pattern or (_ANY_LAYERS,):
            found = pattern.groups(name)
            if found:
                return (
                    found["index"] is not None and int(found["index"]) in self.layers_to_transform
                )
        return False


# The first number counts, not that of an expert inside the layer.
_ANY_LAYERS = BoundedRegex("layers", r".*?\.[^.]*\.(?P<index>\d+)\.")


def stored_whole(name: str, modules_to_save: Sequence[str]) -> bool:
    """Whether module ``name`` or one around it is stored whole.

    PEFT goes by the last letters: ``norm`` stands for ``input_layernorm`` too.
    """
    parts = name.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(one.endswith(tuple(modules_to_save)) for one in around)


def describe(
    layers: dict[str, AdapterLayer], model: nn.Module, modules_to_save: list[str]
) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for these layers.

    Raises:
        ValueError: PEFT has one value for all layers where these have several.
    """
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": _auto_mapping(model),
        "base_model_name_or_path": str(getattr(model, "name_or_path", None) or "") or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": shortest_targets(layers, [name for name, _ in model.named_modules()]),
        "modules_to_save": modules_to_save or None,
        "rank_pattern": {regex_of(name): layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {
            regex_of(name): _number(layer.alpha)
            for name, layer in layers.items()
            if layer.alpha != alpha
        },
    } | _fields_of_all(layers)


def _fields_of_all(layers: dict[str, AdapterLayer]) -> dict[str, object]:
    """What each layer says of its own, where PEFT has one value for all."""
    fields: dict[str, object] = {
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
    }  # fmt: skip
    seen: dict[str, dict[object, str]] = {}
    for name, layer in layers.items():
        for field, value in layer.peft_fields().items():
            seen.setdefault(field, {})[value] = name
    for field, values in seen.items():
        if len(values) > 1:
            shown = ", ".join(f"{value} in {name}" for value, name in values.items())
            said = field.removeprefix("lora_")
            raise ValueError(f"{said} is {shown}: PEFT's format has one value for all layers")
        fields[field] = next(iter(values))
    return fields


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """What PEFT's ``AutoPeftModel`` makes the base model from."""
    # FSDP2 gives the model a class of its own, before the model's.
    cls = next(cls for cls in type(model).__mro__ if not hasattr(cls, "set_reshard_after_forward"))
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def regex_of(name: str) -> str:
    """A key for this layer alone, and not for those whose names end like it."""
    return "^" + re.escape(name)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def shortest_targets(layers: Collection[str], names: Iterable[str]) -> list[str] | str:
    """``target_modules`` for these layers of a model whose modules have these names.

    Endings if they name these layers and no other module, else full names, else a regex.
    """
    names = list(names)
    endings = sorted({name.rpartition(".")[2] for name in layers})
    for candidate in (endings, sorted(layers)):
        selection = Selection(candidate)
        if {name for name in names if name in selection} == set(layers):
            return candidate
    return "|".join(re.escape(name) for name in sorted(layers))


def parse_config(raw: object, path: Path) -> AdapterConfig:
    """The content of ``adapter_config.json`` at ``path``.

    Raises:
        ValueError: it is not LoRA, has a value that is none or a field that isn't known, asks for what
            no layer here computes, or goes with other base weights.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, expected an object")
    try:
        return _parse(raw, path)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for an adapter's config") from error


def config_digest(raw: dict[str, Any]) -> str:
    """A digest of all fields that an adapter's numbers depend on, whatever order and defaults."""
    meaning = {
        name: _canonical(value)
        for name, value in raw.items()
        if name not in _DESCRIPTIVE and value and value != "none"
    }
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _canonical(value: object) -> object:
    """PEFT keeps names in sets, and 8.0 is 8."""
    if isinstance(value, list):
        return sorted(json.dumps(one) for one in value)
    if isinstance(value, dict):
        return {key: _canonical(one) for key, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse(raw: dict[str, Any], path: Path) -> AdapterConfig:
    def given(name: str, default: Any) -> tuple[str, Any]:
        return f"{name} in {path}", raw.get(name, default)

    def optional(name: str, default: Any) -> tuple[str, Any]:
        value = raw.get(name)
        return f"{name} in {path}", default if value is None else value

    _check_kind(raw, path)
    where, targets = given("target_modules", None)
    if not targets:
        raise ValueError(f"{where} is {targets!r}, expected names or a regex")
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    return AdapterConfig(
        r=_rank(*given("r", 8)),
        lora_alpha=_alpha(*given("lora_alpha", 8)),
        lora_dropout=_probability(*optional("lora_dropout", 0.0)),
        use_rslora=_bool(*optional("use_rslora", False)),
        use_dora=_bool(*optional("use_dora", False)),
        target_modules=None if everything else _selection(where, targets),
        exclude_modules=_selection(*optional("exclude_modules", ())),
        layers_to_transform=_integers(*optional("layers_to_transform", ())),
        layers_pattern=_layers(*optional("layers_pattern", ())),
        rank_pattern=_values(*optional("rank_pattern", {}), _rank),
        alpha_pattern=_values(*optional("alpha_pattern", {}), _alpha),
        modules_to_save=_names(*optional("modules_to_save", ())),
        init_lora_weights=_start(raw, path),
    )


def _check_kind(raw: dict[str, Any], path: Path) -> None:
    """Raises ``ValueError`` unless the adapter is one that is computed here."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type in {path} is {shortened(raw.get('peft_type'))}, expected 'LORA'"
        )
    known = _DESCRIPTIVE.union(_WITHOUT_EFFECT, AdapterConfig.__dataclass_fields__)
    for name, value in raw.items():
        if value and name not in known:
            raise ValueError(
                f"{name} in {path} is {shortened(value)}, a field that lorafast doesn't know: what the "
                "adapter computes may depend on it"
            )
    for name, harmless in _WITHOUT_EFFECT.items():
        if raw.get(name) not in harmless:
            raise ValueError(
                f"{name} in {path} is {shortened(raw[name])}: lorafast doesn't compute that "
                f"(expected {harmless[0]!r})"
            )


def _start(raw: dict[str, Any], path: Path) -> str | None:
    """A start that takes a part of W away, and that lorafast has too; None of those that take none."""
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OURS):
        return start.lower()
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise ValueError(
            f"init_lora_weights in {path} is {shortened(start)}: PEFT changes the base weights for it, "
            "and the adapter doesn't fit others (its save_pretrained converts it, given "
            "path_initial_model_for_weight_conversion)"
        )
    if (start.lower() if isinstance(start, str) else start) not in _STARTS:
        raise ValueError(
            f"init_lora_weights in {path} is {shortened(start)}, a start that lorafast doesn't know: "
            "it may have changed the base weights"
        )
    return None


def _fits(check: Callable[[str, object], _T], where: str, value: object) -> _T:
    try:
        return check(where, value)
    except OverflowError as error:
        raise ValueError(f"{where} is {shortened(value)}, too large for a float") from error


def _rank(where: str, value: object) -> int:
    if isinstance(value, int) and value > _MOST_RANK:
        raise ValueError(f"{where} is {shortened(value)}, more than a matrix has rows")
    return check_rank(where, value)


def _alpha(where: str, value: object) -> float:
    return _fits(check_alpha, where, value)


def _probability(where: str, value: object) -> float:
    return _fits(check_probability, where, value)


def _bool(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {shortened(value)}, expected true or false")
    return value


def _integers(where: str, value: object) -> tuple[int, ...]:
    found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(one) is int for one in found):
        raise ValueError(f"{where} is {shortened(value)}, expected an integer or several")
    return found


def _selection(where: str, value: object) -> Selection:
    if isinstance(value, str):
        return Selection(regex=BoundedRegex(where, value))
    return Selection(_names(where, value))


def _names(where: str, value: object) -> tuple[str, ...]:
    try:
        return check_names(where, value)
    except ValueError as error:
        raise ValueError(f"{where} is {shortened(value)}, expected a list of names") from error


def _layers(where: str, value: object) -> tuple[BoundedRegex, ...]:
    if isinstance(value, str):
        value = (value,) if value else ()
    names = _names(where, value)
    for name in names:
        BoundedRegex(where, name)
    return tuple(
        BoundedRegex(where, rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.", name) for name in names
    )


def _values(where: str, value: object, check: Callable[[str, object], _T]) -> ByPattern[_T]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shortened(value)}, expected an object")
    return ByPattern(
        where, {key: check(f"{where}, for {key!r},", one) for key, one in value.items()}
    )
