"""The DoRA convolution, made of ``lora_conv``: what is scaled, what is dropped."""

from torch import Tensor

from lorafast.core.convolution import Geometry, convolve
from lorafast.core.dtypes import wide
from lorafast.ops.dropout import dropout
from lorafast.ops.lora_conv import lora_conv


def dora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    scaling: float,
    bias: Tensor | None,
    geometry: Geometry,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = conv(x, W) + (scale − 1) ⊙ conv(left, W) + scale ⊙ scaling · conv(conv(left, A), B) +
    bias``, ``left = drop(x)``.

    As ``functional.lora_conv`` with a magnitude, on checked arguments outside autocast, with
    ``scale [N]`` for ``magnitude / weight_norm`` and the seed of the mask given. Without dropout that is
    one ``lora_conv``, scaled. With it W is convolved once more.
    """
    N = weight.shape[0]
    ones = (1,) * (weight.dim() - 2)
    factor = scale.view(N, *ones)
    if not dropout_p:
        y = lora_conv(x, weight, lora_A, lora_B, scaling, None, geometry)
        y = y * factor
        return (y if bias is None else y + bias.view(N, *ones)).to(x.dtype)
    scaled_B = scale.view(N, 1, *ones) * lora_B
    A = lora_A.to(scaled_B.dtype)
    y = lora_conv(x, weight, A, scaled_B, scaling, bias, geometry, dropout_p, seed)
    left = dropout(x.movedim(1, -1).to(wide(x.dtype)), dropout_p, seed).movedim(-1, 1)
    frozen = convolve(left, weight.to(left.dtype), None, geometry)
    return (y + (factor - 1) * frozen).to(x.dtype)
