"""LoKr (Yeh et al., 2023): ΔW is the Kronecker product of two small matrices, and is never made.

Each of the two may be a product of two of rank r itself.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast.core.context import autocast_enabled, without_autocast
from lorafast.core.dtypes import wide
from lorafast.integrations.peft import low_rank, lycoris
from lorafast.integrations.peft.adapters import weight_of
from lorafast.integrations.peft.low_rank import Part
from lorafast.ops.lokr_linear import Factors, kronecker

_NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def parts(layer: Any) -> list[Part]:
    """The active adapters, each with the matrices that it has."""
    every = [(name, low_rank.entries(layer, name)) for name in _NAMES]
    found = []
    for name in low_rank.active(layer):
        tensors = {what: of[name] for what, of in every if name in of}
        if tensors:
            found.append(Part(name, tensors))
    return found


def why_stock(layer: Any) -> str | None:
    """Why a layer is left to PEFT, whatever its input, as the end of a sentence, or None."""
    return _why_stock(layer, parts(layer))


def _why_stock(layer: Any, found: list[Part]) -> str | None:
    reason = low_rank.why_stock_parts(layer, found)
    if reason is not None:
        return reason
    N, K = weight_of(layer._modules["base_layer"]).shape
    for part in found:
        reason = _why_not_shapes(part, N, K) or lycoris.why_not_scaling(layer, part.name)
        if reason is not None:
            return f"adapter {part.name!r} {reason}"
    return None


def _why_not_shapes(part: Part, N: int, K: int) -> str | None:
    if "lokr_t2" in part.tensors:
        return "is of a convolution"
    (a, b), (c, d) = _shape(part, "lokr_w1"), _shape(part, "lokr_w2")
    if (a * c, b * d) != (N, K):
        return f"has the shapes {[a, b]} and {[c, d]} over {[N, K]}"
    return None


def _shape(part: Part, name: str) -> tuple[int, int]:
    whole = part.tensors.get(name)
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    return part.tensors[f"{name}_a"].shape[0], part.tensors[f"{name}_b"].shape[1]


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """``y = x·Wᵀ + Σ scaling · x·(w1 ⊗ w2)ᵀ + bias``; None where PEFT serves the call itself."""
    found = parts(layer)
    if _why_stock(layer, found) is not None:
        return None
    frozen = low_rank.frozen(layer, found, x)
    if frozen is None:
        return None
    weight, bias, _ = frozen
    y = low_rank.base_linear(x, weight, bias)
    for part in found:
        if lycoris.takes_part(layer, part.name):
            y = y + _added(layer, part, x)
    return y.to(x.dtype)


def _added(layer: Any, part: Part, x: Tensor) -> Tensor:
    """What one adapter adds; under autocast in its dtype, for float16 in float32."""
    tensors = part.tensors
    w1 = tensors.get("lokr_w1")
    if w1 is None:
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    whole = tensors.get("lokr_w2")
    w2: Factors = (tensors["lokr_w2_a"], tensors["lokr_w2_b"]) if whole is None else whole
    if autocast_enabled(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1 = x.to(dtype), w1.to(wide(dtype))
        dtype = wide(dtype)
        w2 = (w2[0].to(dtype), w2[1].to(dtype)) if isinstance(w2, tuple) else w2.to(dtype)
    with without_autocast(x):
        added = kronecker(x, w1, w2, float(layer.scaling[part.name]))
        rows = lycoris.kept_rows(layer, part.name, added.shape[-1], added.device)
        if rows is None:
            return added
        return added * (rows / rows.mean() if layer.rank_dropout_scale[part.name] else rows)
