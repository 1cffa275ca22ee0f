"""The config files of AdapterHub's ``adapters``: what its bottleneck adapters compute, and where.

With o for what attention or the MLP gives, t for what it is added to, and B for the bottleneck without
its residual, ``adapters`` computes in BERT and RoBERTa, whose LayerNorm ln follows the sum,

    SEQUENTIAL  DoubleSeqBnConfig, Houlsby                ln(o + B(o) + t)
    NORMED      SeqBnConfig, Pfeiffer                     ln(o + B(ln(o + t)) + t)
    AFTER_NORM  SeqBnConfig(original_ln_after=False,      ln(o + t) + B(ln(o + t))
                residual_before_ln=False)
    PARALLEL    ParBnConfig                               ln(o + B(t) + t)

and in Llama and Mistral, whose norms come before, the same without ln.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafast.convert.bottleneck_io import is_finite

ATTENTION, OUTPUT = "mh_adapter", "output_adapter"
"""After attention, and after the MLP: the fields that say whether adapters are there."""
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
    "tanh": "tanh",
}  # fmt: skip
SEQUENTIAL, NORMED, AFTER_NORM, PARALLEL = "sequential", "normed", "after norm", "parallel"
_FLOWS: dict[str, dict[str, Any]] = {
    SEQUENTIAL: {
        "is_parallel": False, "original_ln_before": False, "residual_before_ln": True,
        "original_ln_after": True,
    },
    NORMED: {
        "is_parallel": False, "original_ln_before": True, "residual_before_ln": True,
        "original_ln_after": True,
    },
    AFTER_NORM: {
        "is_parallel": False, "original_ln_before": True, "residual_before_ln": False,
        "original_ln_after": False,
    },
    PARALLEL: {
        "is_parallel": True, "original_ln_before": False, "residual_before_ln": True,
        "original_ln_after": True,
    },
}  # fmt: skip
"""The fields that say what is read and where it is added, as its configs have them."""
_IGNORED = {
    SEQUENTIAL: ("residual_before_ln",), PARALLEL: ("original_ln_before", "residual_before_ln"),
}  # fmt: skip
"""Those of them that it doesn't look at then."""
_NEUTRAL: dict[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "inv_adapter": None,
    "ln_after": False, "ln_before": False, "phm_layer": False, "stochastic_depth": 0.0,
    "use_gating": False,
}  # fmt: skip
"""What else decides what is computed, with the values at which it does nothing."""
_DESCRIPTIVE: dict[str, Any] = {
    "factorized_phm_W": True, "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert", "init_weights_seed": None,
    "inv_adapter_reduction_factor": None, "learn_phm": True, "leave_out": [], ATTENTION: True,
    OUTPUT: True, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001,
    "phm_rank": 1, "reduction_factor": 16, "shared_W_phm": False, "shared_phm_rule": True,
}  # fmt: skip
"""What says how it begins, and where, which the tensors say too; with values of its own."""


@dataclass(frozen=True)
class HubConfig:
    """A config file, parsed."""

    name: str
    flow: str
    activation: str
    scaling: float
    kinds: frozenset[str]
    """``ATTENTION``, ``OUTPUT`` or both."""
    leave_out: frozenset[int]
    """The numbers of the layers without an adapter."""
    model_type: str | None
    """The family of the model that it was trained in, where the file says so."""


def read_config(path: Path) -> HubConfig:
    """The file at ``path``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a field is missing, unknown, or has a value that no adapter here has.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error
    fields = raw.get("config") if isinstance(raw, dict) else None
    name = raw.get("name") if isinstance(raw, dict) else None
    if not isinstance(fields, dict) or not isinstance(name, str):
        raise ValueError(f"{path} is no config of AdapterHub's: it lacks a config or a name")
    for field, value in _NEUTRAL.items():
        if field not in fields or type(fields[field]) not in (type(value), int):
            raise ValueError(f"{field} is {fields.get(field)!r} in {path}, expected {value!r}")
        if fields[field] != value:
            raise ValueError(
                f"{field} is {fields[field]!r} in {path}, expected {value!r}, at which it changes "
                "nothing: no adapter here computes the rest"
            )
    for field in fields:
        known = (*_NEUTRAL, *_DESCRIPTIVE, *_FLOWS[SEQUENTIAL], "scaling", "non_linearity")
        if field not in (*known, "architecture"):
            raise ValueError(f"{path} has the unknown field {field!r}")
    activation: Any = fields.get("non_linearity")
    scaling: Any = fields.get("scaling")
    if not isinstance(activation, str) or activation.lower() not in ACTIVATIONS:
        known_names = ", ".join(ACTIVATIONS)
        raise ValueError(
            f"non_linearity is {activation!r} in {path}, expected one of {known_names}"
        )
    if not is_finite(scaling):
        raise ValueError(f"scaling is {scaling!r} in {path}, expected a finite number")
    return HubConfig(
        name, _flow(fields, path), ACTIVATIONS[activation.lower()], float(scaling),
        *_where(fields, path), _model_type(raw, path),
    )  # fmt: skip


def config_fields(
    flow: str, activation: str, scaling: float, b: int, K: int, kinds: set[str], left_out: set[int]
) -> dict[str, Any]:
    """What the file has as its ``config``."""
    of_hub = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    start = {"init_weights": "mam_adapter"} if flow == PARALLEL else {}
    return _NEUTRAL | _DESCRIPTIVE | _FLOWS[flow] | start | {
        "leave_out": sorted(left_out), ATTENTION: ATTENTION in kinds, OUTPUT: OUTPUT in kinds,
        "reduction_factor": _factor(K, b), "scaling": scaling, "non_linearity": of_hub[activation],
    }  # fmt: skip


def _flow(fields: dict[str, Any], path: Path) -> str:
    """The one of ``_FLOWS`` that the fields describe."""
    for flow, expected in _FLOWS.items():
        looked_at = expected.keys() - set(_IGNORED.get(flow, ()))
        if flow == SEQUENTIAL and not isinstance(fields.get("residual_before_ln"), bool):
            continue
        if all(fields.get(field) is expected[field] for field in looked_at):
            return flow
    said = ", ".join(f"{field} {fields.get(field)!r}" for field in _FLOWS[SEQUENTIAL])
    raise ValueError(
        f"{path} has {said}: no adapter here reads and adds so (those of SeqBnConfig, "
        "DoubleSeqBnConfig and ParBnConfig do)"
    )


def _where(fields: dict[str, Any], path: Path) -> tuple[frozenset[str], frozenset[int]]:
    kinds = set()
    for field in (ATTENTION, OUTPUT):
        given = fields.get(field, True)
        if not isinstance(given, bool):
            raise ValueError(f"{field} is {given!r} in {path}, expected true or false")
        kinds |= {field} if given else set()
    leave_out = fields.get("leave_out", [])
    if not isinstance(leave_out, list) or not all(type(one) is int for one in leave_out):
        raise ValueError(
            f"leave_out is {leave_out!r} in {path}, expected a list of layers' numbers"
        )
    return frozenset(kinds), frozenset(leave_out)


def _model_type(raw: dict[str, Any], path: Path) -> str | None:
    found = raw.get("model_type")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"model_type is {found!r} in {path}, expected a name")
    return found


def _factor(K: int, b: int) -> float:
    """A ``reduction_factor`` of which ``int(K // reduction_factor)`` is b."""
    exact = K / b
    return exact if int(K // exact) == b else K / (b + 0.5)
