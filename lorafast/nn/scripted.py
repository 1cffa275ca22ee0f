"""What ``torch.jit.script`` makes of adapter layers: their formulas in PyTorch's own calls."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafast.core.dtypes import LEAST_NORM


class ScriptedLoRALinear(nn.Module):
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` over the parameters of a layer, which it shares.

    A script runs where lorafast isn't installed, at the speed of PyTorch's own calls. Its dropout mask
    is that of ``nn.Dropout``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        lora_A: nn.Parameter,
        lora_B: nn.Parameter,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.scaling = float(scaling)
        self.dropout = float(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        s = F.linear(dropped, self.lora_A.to(dtype))
        low_rank = F.linear(s, self.lora_B.to(dtype) * self.scaling)
        return (F.linear(x, self.weight, self.bias) + low_rank).to(x.dtype)


class ScriptedDoRALinear(nn.Module):
    """``y = m / ‖W + scaling·B·A‖ ⊙ (x·Wᵀ + scaling · x·Aᵀ·Bᵀ) + bias``, as ``ScriptedLoRALinear``.

    With dropout the frozen layer sees x, and the change that DoRA makes what is left of it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        lora_A: nn.Parameter,
        lora_B: nn.Parameter,
        lora_magnitude: nn.Parameter,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.lora_magnitude = lora_magnitude
        self.least_norm = LEAST_NORM
        self.scaling = float(scaling)
        self.dropout = float(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        delta = self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))
        norm = torch.norm((self.weight.to(wide) + delta).detach(), 2, 1)
        scale = (self.lora_magnitude.to(wide) / norm.clamp_min(self.least_norm)).to(dtype)
        left = F.dropout(x.to(dtype), self.dropout, self.training)
        frozen = F.linear(left, self.weight.to(dtype))
        s = F.linear(left, self.lora_A.to(dtype))
        low_rank = F.linear(s, self.lora_B.to(dtype) * self.scaling)
        change = scale * (frozen + low_rank) - frozen
        return (F.linear(x, self.weight, self.bias) + change).to(x.dtype)


class ScriptedLoRAEmbedding(nn.Module):
    """``y = scale · (W[x] + scaling · Aᵀ[x]·Bᵀ)`` over the parameters of a layer, which it shares."""

    padding_idx: int | None

    def __init__(
        self,
        weight: nn.Parameter,
        lora_embedding_A: nn.Parameter,
        lora_embedding_B: nn.Parameter,
        scaling: float,
        padding_idx: int | None,
        scale: float,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.lora_embedding_A = lora_embedding_A
        self.lora_embedding_B = lora_embedding_B
        self.scaling = float(scaling)
        self.padding_idx = padding_idx
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """``[...]`` → ``[..., embedding_dim]``."""
        y = F.embedding(x, self.weight, self.padding_idx)
        dtype = torch.float32 if y.dtype == torch.float16 else y.dtype
        s = F.embedding(x, self.lora_embedding_A.t(), self.padding_idx).to(dtype)
        low_rank = F.linear(s, self.lora_embedding_B.to(dtype) * self.scaling)
        return (y + low_rank).to(y.dtype) * self.scale


class ScriptedDoRAEmbedding(nn.Module):
    """``y = scale · m / ‖W + scaling · (B·A)ᵀ‖ ⊙ (W[x] + scaling · Aᵀ[x]·Bᵀ)``, as the other."""

    padding_idx: int | None

    def __init__(
        self,
        weight: nn.Parameter,
        lora_embedding_A: nn.Parameter,
        lora_embedding_B: nn.Parameter,
        lora_magnitude: nn.Parameter,
        scaling: float,
        padding_idx: int | None,
        scale: float,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.lora_embedding_A = lora_embedding_A
        self.lora_embedding_B = lora_embedding_B
        self.lora_magnitude = lora_magnitude
        self.least_norm = LEAST_NORM
        self.scaling = float(scaling)
        self.padding_idx = padding_idx
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """``[...]`` → ``[..., embedding_dim]``."""
        y = F.embedding(x, self.weight, self.padding_idx)
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        A, B = self.lora_embedding_A.to(dtype), self.lora_embedding_B.to(dtype)
        whole = self.weight.to(dtype) + self.scaling * (A.t() @ B.t())
        norm = torch.norm(whole.detach(), 2, 0).clamp_min(self.least_norm)
        m = self.lora_magnitude.to(dtype) / norm
        s = F.embedding(x, A.t(), self.padding_idx)
        return (m * (y.to(dtype) + F.linear(s, B * self.scaling))).to(y.dtype) * self.scale


class _ScriptedConvolution(nn.Module):
    """What scripts of ``LoRAConv`` layers share: the frozen parameters and the windows."""

    bias: nn.Parameter | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    none: list[int]
    ones: list[int]
    beyond: list[int]

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scaling, self.dropout = float(layer.scaling), float(layer.dropout)
        n = layer.weight.dim() - 2
        self.stride, self.dilation, self.groups = [*layer.stride], [*layer.dilation], layer.groups
        self.none, self.ones = [0] * n, [1] * n
        # "same" pads one more behind than before where the sum is odd.
        sizes = zip(self.dilation, layer.weight.shape[2:], strict=True)
        sums = [d * (k - 1) * (layer.padding == "same") for d, k in sizes]
        text = isinstance(layer.padding, str)
        self.padding = [one // 2 for one in sums] if text else [*layer.padding]
        self.beyond = [part for one in reversed(sums) for part in (0, one % 2)]
        self.odd = any(one % 2 for one in sums)

    def padded(self, x: Tensor) -> Tensor:
        """A batch of ``x``, padded by what is more behind than before."""
        batch = x.unsqueeze(0) if x.dim() < self.weight.dim() else x
        return F.pad(batch, self.beyond) if self.odd else batch

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """``conv(x, W) + bias``."""
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, self.none, groups
        )

    def low_rank(self, left: Tensor) -> Tensor:
        """``scaling · conv(conv(left, A), B)`` in the dtype of ``left``."""
        s = self.convolve(left, self.lora_A.to(left.dtype), None, 1)
        B = self.lora_B.to(left.dtype) * self.scaling
        return torch.convolution(
            s, B, None, self.ones, self.none, self.ones, False, self.none, self.groups
        )


class ScriptedLoRAConv(_ScriptedConvolution):
    """``y = conv(x, W) + scaling · conv(conv(drop(x), A), B) + bias``, as ``ScriptedLoRALinear``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, C, *size]`` → ``[batch, N, *size of y]``, batch or not."""
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        batch = self.padded(x)
        low_rank = self.low_rank(F.dropout(batch.to(dtype), self.dropout, self.training))
        y = self.convolve(batch, self.weight, self.bias, self.groups) + low_rank
        return y.to(x.dtype) if x.dim() == y.dim() else y.to(x.dtype).squeeze(0)


class ScriptedDoRAConv(_ScriptedConvolution):
    """``y = m / ‖W + scaling · B·A‖ ⊙ (conv(x, W) + scaling · conv(conv(x, A), B)) + bias``, with the
    norm of each filter, as ``ScriptedDoRALinear``."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.lora_magnitude = layer.lora_magnitude
        self.least_norm = LEAST_NORM

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, C, *size]`` → ``[batch, N, *size of y]``, batch or not."""
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        A, B = self.lora_A.to(wide).flatten(1), self.lora_B.to(wide).flatten(1)
        whole = self.weight.to(wide).flatten(1) + self.scaling * (B @ A)
        norm = torch.norm(whole.detach(), 2, 1).clamp_min(self.least_norm)
        m = self.lora_magnitude.to(wide)
        scale = (m / norm.view(m.shape)).to(dtype)
        batch = self.padded(x)
        left = F.dropout(batch.to(dtype), self.dropout, self.training)
        frozen = self.convolve(left, self.weight.to(dtype), None, 1)
        change = scale * (frozen + self.low_rank(left)) - frozen
        y = self.convolve(batch, self.weight, self.bias, 1) + change
        return y.to(x.dtype) if x.dim() == y.dim() else y.to(x.dtype).squeeze(0)
