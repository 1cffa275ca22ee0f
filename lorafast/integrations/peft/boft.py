"""BOFT (Liu et al., 2023): x is rotated by a product of butterflies, and what W makes of it is scaled.

A butterfly permutes the columns of x, rotates them block by block and permutes them back: PEFT makes
it a matrix K x K, and x is multiplied by it. PEFT's own code makes the blocks, which are small.
"""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafast.core.context import without_autocast
from lorafast.core.dtypes import wide
from lorafast.integrations.peft import convolved, low_rank
from lorafast.integrations.peft.adapters import weight_of
from lorafast.integrations.peft.low_rank import Part
from lorafast.ops.oft_linear import rotated
from lorafast.ops.scaled import scaled

_Order = tuple[Tensor, Tensor] | None
"""Where each column comes from, before the blocks and after them; None where all stay in place."""
_Key = tuple[Tensor, int, torch.device]
_orders: weakref.WeakKeyDictionary[nn.Module, tuple[_Key, list[_Order]]] = (
    weakref.WeakKeyDictionary()
)


def parts(layer: Any) -> list[Part]:
    """The active adapters."""
    every_R, every_s = low_rank.entries(layer, "boft_R"), low_rank.entries(layer, "boft_s")
    return [
        Part(name, {"boft_R": every_R[name], "boft_s": every_s[name]})
        for name in low_rank.active(layer)
        if name in every_R
    ]


def why_stock(layer: Any) -> str | None:
    """Why a layer is left to PEFT, whatever its input, as the end of a sentence, or None."""
    return _why_stock(layer, parts(layer))


def _why_stock(layer: Any, found: list[Part]) -> str | None:
    reason = low_rank.why_stock_parts(layer, found)
    if reason is not None:
        return reason
    N, K = weight_of(layer._modules["base_layer"]).shape
    return _why_not_butterflies(layer, found, K, (N, 1))


def _why_not_butterflies(
    layer: Any, found: list[Part], K: int, of_scale: tuple[int, int]
) -> str | None:
    if torch.compiler.is_compiling():
        return "it is compiled, and the order of its butterflies is read from a matrix"
    P = layer._buffers.get("boft_P")
    if type(P) is not Tensor or P.is_meta:
        return "its permutations aren't there"
    for part in found:
        R = part.tensors["boft_R"]
        factors = R.shape[0]
        if R.dim() != 4 or R.shape[1] * R.shape[2] != K or tuple(P.shape) != (factors, K, K):
            return (
                f"adapter {part.name!r} has the shape {list(R.shape)}, permutations {list(P.shape)}"
            )
        reason = low_rank.why_not_shapes(part, boft_s=of_scale)
        if reason is not None:
            return f"adapter {part.name!r} {reason}"
    return None


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """``y = s ⊙ ((x·R)·Wᵀ) + bias`` in the dtype of x; None where PEFT serves the call itself."""
    found = parts(layer)
    if _why_stock(layer, found) is not None:
        return None
    frozen = low_rank.frozen(layer, found, x)
    if frozen is None:
        return None
    weight, bias, _ = frozen
    orders = _orders_of(layer, x.device)
    scale = low_rank.product(part.tensors["boft_s"].flatten() for part in found)
    dtype = x.dtype
    few = low_rank.is_small(x, weight, found[0].tensors["boft_R"].dtype)
    blocks = [_blocks(layer, part) for part in found]  # in PEFT's order, which draws the dropout
    for of_one in reversed(blocks):
        x = _rotated(of_one, x, orders, few)
    return scaled(low_rank.base_linear(x, weight, None), scale, bias).to(dtype)


def why_stock_conv(layer: Any) -> str | None:
    """As ``why_stock``, over a convolution."""
    return _why_stock_conv(layer, parts(layer))


def _why_stock_conv(layer: Any, found: list[Part]) -> str | None:
    reason = convolved.why_stock_parts(layer, found)
    if reason is not None:
        return reason
    base = layer._modules["base_layer"]
    windows = (base.kernel_size, base.stride, base.padding)
    if not all(map(convolved.same_along, windows)) or set(base.dilation) != {1}:
        return "it is a convolution of windows that PEFT takes for square and without dilation"
    N, K = base.weight.shape[0], base.weight[0].numel()
    return _why_not_butterflies(layer, found, K, (1, N))


def forward_conv(layer: Any, x: Tensor) -> Tensor | None:
    """``y = conv(x, s ⊙ (W·Rᵀ)) + bias`` in the dtype of x; None where PEFT serves the call itself.

    W is rotated, which is small beside x: its rows go through the butterflies. As in PEFT it has no
    gradient, also where it asks for one.
    """
    found = parts(layer)
    if _why_stock_conv(layer, found) is not None:
        return None
    if convolved.why_not_input(layer, found, x) is not None:
        return None
    base = layer._modules["base_layer"]
    orders = _orders_of(layer, x.device)
    with without_autocast(x):
        scale = low_rank.product(part.tensors["boft_s"].flatten() for part in found)
        rows = base.weight.detach().flatten(1).to(wide(scale.dtype))
        blocks = [
            _blocks(layer, part) for part in found
        ]  # in PEFT's order, which draws the dropout
        for of_one in blocks:
            for i, order in enumerate(orders):
                rows = _through(rows, of_one[i].transpose(1, 2), order, few=False)
        weight = (rows * scale.unsqueeze(1)).to(base.weight.dtype).view(base.weight.shape)
    return F.conv2d(x, weight, base.bias, base.stride, base.padding).to(x.dtype)


def _blocks(layer: Any, part: Part) -> Tensor:
    """``[factors, count, k, k]``: those of one adapter's butterflies."""
    R = part.tensors["boft_R"]
    factors, count, k, _ = R.shape
    blocks = layer.cayley_batch(R.view(factors * count, k, k)).view(R.shape)
    found: Tensor = layer.boft_dropout[part.name](blocks)
    return found


def _rotated(blocks: Tensor, x: Tensor, orders: list[_Order], few: bool) -> Tensor:
    """``x`` through the butterflies of one adapter, the last of which comes first."""
    with without_autocast(x):
        for i in reversed(range(len(orders))):
            x = _through(x, blocks[i], orders[i], few)
    return x


def _through(x: Tensor, blocks: Tensor, order: _Order, few: bool) -> Tensor:
    """``x`` through one butterfly."""
    if order is None:
        return rotated(x, blocks, few=few)
    return rotated(x.index_select(-1, order[0]), blocks, few=few).index_select(-1, order[1])


def _orders_of(layer: Any, device: torch.device) -> list[_Order]:
    """Read of ``boft_P`` once, and kept on ``device``, where x is."""
    P = layer.boft_P
    version = 0 if P.is_inference() else P._version
    kept = _orders.get(layer)
    if kept is not None and kept[0][0] is P and kept[0][1:] == (version, device):
        return kept[1]
    found: list[_Order] = []
    # Not made as inference tensors, which a later backward could not keep.
    with torch.inference_mode(False), torch.no_grad():
        in_place = torch.arange(P.shape[1], device=P.device)
        for matrix in P:
            before, after = matrix.argmax(0), matrix.argmax(1)
            stays = torch.equal(before, in_place)
            found.append(None if stays else (before.to(device), after.to(device)))
    _orders[layer] = ((P, version, device), found)
    return found
