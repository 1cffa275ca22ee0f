"""OFT (Qiu et al., 2023): x is rotated by orthogonal blocks on its way into the frozen layer.

PEFT's own code makes the blocks, which are small. What is done here is their product with x.
"""

from typing import Any

import torch
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor

from lorafast.core.convolution import is_channels_last
from lorafast.integrations.peft import convolved, low_rank, rules
from lorafast.integrations.peft.adapters import weight_of
from lorafast.integrations.peft.low_rank import Part
from lorafast.ops.oft_linear import rotated


def parts(layer: Any) -> list[Part]:
    """The active adapters."""
    every = layer.oft_R._modules
    names = [name for name in low_rank.active(layer) if name in every]
    return [Part(name, {"oft_R": every[name]._parameters.get("weight")}) for name in names]


def why_stock(layer: Any) -> str | None:
    """Why a layer is left to PEFT, whatever its input, as the end of a sentence, or None."""
    return _why_stock(layer, parts(layer))


def _why_stock(layer: Any, found: list[Part]) -> str | None:
    reason = low_rank.why_stock_parts(layer, found)
    if reason is not None:
        return reason
    K = weight_of(layer._modules["base_layer"]).shape[1]
    for part in found:
        reason = _why_not_blocks(layer.oft_R._modules[part.name], part.tensors["oft_R"], K)
        if reason is not None:
            return f"adapter {part.name!r} {reason}"
    return None


def _why_not_blocks(module: Any, weight: Tensor, K: int) -> str | None:
    if type(module) is not OFTRotationModule:
        return f"has a {type(module).__name__}"
    if module.coft:
        return "is of COFT, which writes to its parameter in the forward"
    k = module.block_size
    count = 1 if module.block_share else K // k
    if K % k or tuple(weight.shape) != (count, k * (k - 1) // 2):
        return f"has blocks of {k} in a parameter of shape {list(weight.shape)} over {K}"
    return rules.why_called(module)


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """``y = (x·R)·Wᵀ + bias`` in the dtype of x; None where PEFT serves the call itself."""
    found = parts(layer)
    if _why_stock(layer, found) is not None:
        return None
    frozen = low_rank.frozen(layer, found, x)
    if frozen is None:
        return None
    weight, bias, _ = frozen
    few = low_rank.is_small(x, weight, found[0].tensors["oft_R"].dtype)
    for part in found:
        blocks = _blocks(layer.oft_R._modules[part.name], x.shape[-1])
        x = rotated(x, blocks, few=few)
    return low_rank.base_linear(x, weight, bias).to(x.dtype)


def why_stock_conv(layer: Any) -> str | None:
    """As ``why_stock``, over a convolution."""
    return _why_stock_conv(layer, parts(layer))


def _why_stock_conv(layer: Any, found: list[Part]) -> str | None:
    reason = convolved.why_stock_parts(layer, found)
    if reason is not None:
        return reason
    base = layer._modules["base_layer"]
    if any(size != 1 for size in base.kernel_size):
        return f"PEFT rotates windows of {base.kernel_size} of x, which overlap, and sums them"
    for part in found:
        module = layer.oft_R._modules[part.name]
        reason = _why_not_blocks(module, part.tensors["oft_R"], base.in_channels)
        if reason is not None:
            return f"adapter {part.name!r} {reason}"
    return None


def forward_conv(layer: Any, x: Tensor) -> Tensor | None:
    """``y = conv(x·R, W) + bias`` of 1 x 1, in the dtype of x; None where PEFT serves the call."""
    found = parts(layer)
    if _why_stock_conv(layer, found) is not None:
        return None
    if convolved.why_not_input(layer, found, x) is not None:
        return None
    dtype = x.dtype
    for part in found:
        blocks = _blocks(layer.oft_R._modules[part.name], x.shape[1])
        if not x.is_contiguous() and is_channels_last(x):
            x = rotated(x.movedim(1, -1), blocks).movedim(-1, 1)
        else:
            x = _rotated_channels(x, blocks)
    y: Tensor = layer._modules["base_layer"](x)
    return y.to(dtype)


def _rotated_channels(x: Tensor, blocks: Tensor) -> Tensor:
    """``x [batch, b·k, *size]`` whose channels are rotated where they are: ``blocks [b, k, k]``."""
    b, k, _ = blocks.shape
    dtype = torch.promote_types(x.dtype, blocks.dtype)
    channels = x.reshape(x.shape[0], b, k, -1).to(dtype)
    return torch.matmul(blocks.transpose(1, 2).to(dtype), channels).to(x.dtype).reshape(x.shape)


def _blocks(module: Any, K: int) -> Tensor:
    """``[K / k, k, k]``; shared ones are a view."""
    found: Tensor = module._cayley_batch(
        module.weight, module.block_size, module.use_cayley_neumann, module.num_cayley_neumann_terms
    )
    return found.expand(K // module.block_size, -1, -1) if module.block_share else found
