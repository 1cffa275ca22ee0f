"""A stack of ``nn.MultiheadAttention``, and its adapters as plain PyTorch has them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafast.nn import LoRAMultiheadAttention

_HEAD = 64
_CLASSES = 100
# PEFT adds the change of out_proj twice and differentiates it once.
OUT_PROJ_TIMES = 2


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, max(width // _HEAD, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, batch, width]`` → the same."""
        normed = self.norm(x)
        y: Tensor = self.attention(normed, normed, normed, need_weights=False)[0]
        return x + y


class Network(nn.Module):
    """``[tokens, batch, width]`` → logits: blocks of self-attention alone, then a linear head.

    Not ``batch_first``: of a frozen weight PyTorch multiplies a transposed input batch by batch, so
    that the frozen network would be slower than the one that is trained whole.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the tokens is classified."""
        logits: Tensor = self.head(self.blocks(x).mean(0))
        return logits


class Plain(nn.Module):
    """A ``LoRAMultiheadAttention``'s tensors in PyTorch's own calls: what is right."""

    def __init__(self, layer: LoRAMultiheadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, batch, width]`` → the same."""
        of, out = self.layer, self.layer.out_proj
        y = F.linear(x, of.in_proj_weight, of.in_proj_bias)
        y = y + of.scaling * F.linear(F.linear(x, of.lora_A), of.lora_B)
        by_heads = y.unflatten(-1, (3, of.num_heads, -1)).permute(2, 1, 3, 0, 4)
        o = F.scaled_dot_product_attention(*by_heads).permute(2, 0, 1, 3).flatten(2)
        low_rank = F.linear(F.linear(o, of.out_lora_A), of.out_lora_B)
        return F.linear(o, out.weight, out.bias) + OUT_PROJ_TIMES * of.scaling * low_rank


def factors(layer: Any) -> dict[str, Tensor]:
    """The adapter's tensors of an attention of ours or of PEFT's, by the names of ours."""
    found = {}
    for name, p in layer.named_parameters():
        if "lora_" in name:
            kind = "lora_A" if "lora_A" in name else "lora_B"
            found[f"out_{kind}" if "out_" in name else kind] = p
    return dict(sorted(found.items()))


def results(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """An attention's output, and the gradients of x and of its adapters by name, of its formula."""
    x = x.clone().requires_grad_()
    trained = factors(layer)
    y: Any = layer(x) if isinstance(layer, Plain) else layer(x, x, x, need_weights=False)[0]
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y)
    dx, *gradients = torch.autograd.grad(y, [x, *trained.values()], dy)
    found = {"y": y.detach(), "dx": dx}
    for name, gradient in zip(trained, gradients, strict=True):
        halved = name.startswith("out_") and not isinstance(layer, (Plain, LoRAMultiheadAttention))
        found[f"d{name}"] = OUT_PROJ_TIMES * gradient if halved else gradient
    return found
