"""LoKr (Yeh et al., 2023): ΔW is the Kronecker product of two small matrices, and is never made.

Each of the two may be a product of two of rank r itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.core.context import autocast_enabled, without_autocast
from lorafast.core.dtypes import wide
from lorafast.integrations.peft import low_rank, lycoris, one_conv
from lorafast.integrations.peft.adapters import weight_of
from lorafast.integrations.peft.low_rank import Part
from lorafast.ops.lokr_linear import Factors, add_kronecker, kronecker

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
    small = low_rank.is_tiny(*weight.shape) and low_rank.is_small(x, weight, _dtype(found[0]))
    alone = len(found) == 1 and y.dtype is x.dtype and not autocast_enabled(x)
    for part in found:
        if not lycoris.takes_part(layer, part.name):
            continue
        if small:
            y = _small(layer, part, x, y)
        elif alone and not lycoris.drops_rows(layer, part.name):
            y = add_kronecker(y, x, *_factors(part), float(layer.scaling[part.name]))
        else:
            y = y + _added(layer, part, x)
    return y.to(x.dtype)


def why_stock_conv(layer: Any) -> str | None:
    """As ``why_stock``, over a convolution."""
    return one_conv.why_stock(layer, parts(layer))


def forward_conv(layer: Any, x: Tensor) -> Tensor | None:
    """``y = conv(x, W + Σ scaling · W₁ ⊗ W₂) + bias``; None where PEFT serves the call itself."""
    return one_conv.forward(layer, x, parts(layer))


def _dtype(part: Part) -> torch.dtype:
    found: torch.dtype = next(iter(part.tensors.values())).dtype
    return found


def _factors(part: Part) -> tuple[Tensor, Factors]:
    """``w1``, and ``w2`` or the two that it is the product of."""
    tensors = part.tensors
    w1, w2 = tensors.get("lokr_w1"), tensors.get("lokr_w2")
    if w1 is None:
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    return w1, (tensors["lokr_w2_a"], tensors["lokr_w2_b"]) if w2 is None else w2


def _small(layer: Any, part: Part, x: Tensor, y: Tensor) -> Tensor:
    """``y`` and what one adapter adds, by a ΔW that takes the host less time than smaller products."""
    w1, w2 = _factors(part)
    if isinstance(w2, tuple):
        w2 = w2[0] @ w2[1]
    change = torch.kron(w1, w2)
    added = F.linear(x.to(change.dtype), change)
    rows = _rows(layer, part, added)
    return torch.add(y, added if rows is None else added * rows, alpha=layer.scaling[part.name])


def _rows(layer: Any, part: Part, added: Tensor) -> Tensor | None:
    """What ``rank_dropout`` multiplies the columns of ``added [..., N]`` by, or None."""
    rows = lycoris.kept_rows(layer, part.name, added.shape[-1], added.device)
    return rows / rows.mean() if rows is not None and layer.rank_dropout_scale[part.name] else rows


def _added(layer: Any, part: Part, x: Tensor) -> Tensor:
    """What one adapter adds; under autocast in its dtype, for float16 in float32."""
    w1, w2 = _factors(part)
    if autocast_enabled(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1 = x.to(dtype), w1.to(wide(dtype))
        dtype = wide(dtype)
        w2 = (w2[0].to(dtype), w2[1].to(dtype)) if isinstance(w2, tuple) else w2.to(dtype)
    with without_autocast(x):
        added = kronecker(x, w1, w2, float(layer.scaling[part.name]))
        rows = _rows(layer, part, added)
        return added if rows is None else added * rows
