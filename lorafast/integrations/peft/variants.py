"""Variants of LoRA over a linear layer: in each call the plain LoRA that one of them comes to.

| PEFT's variant | in a call it is LoRA of |
|---|---|
| MiCA (arXiv:2604.01694) | A and B, of which B is frozen |
| KaSA (arXiv:2412.06071) | A and ``B ⊙ d`` |
| BD-LoRA (arXiv:2510.23346) | A or B as the block-diagonal matrix whose blocks are kept |
| MonteCLoRA (arXiv:2411.04358) | B and in training ``A + Σ wᵢ · Eᵢ``; PEFT draws w and E |
| VeLoRA (arXiv:2405.17991) | A and B; ``velora`` has the gradient of A |

What is made has the size of A or B. Its gradients are those of what it was made of. ``rules`` says
when a variant is left to PEFT.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import variants as stock
from torch import Tensor, nn

from lorafast.integrations.peft import known
from lorafast.integrations.peft.adapters import Adapter
from lorafast.ops.scaled_lora_linear import folded

BLOCKS = stock.BlockDiagonalLinear
"""BD-LoRA's layer in place of A or B; its weight ``[out, in / nblocks]`` is blocks one below another."""
BD = stock.BdLoraLinearVariant
MICA: Any = getattr(stock, "MiCALinearVariant", None)
KASA: Any = getattr(stock, "KasaLinearVariant", None)
MONTE: Any = getattr(stock, "MontecloraLinearVariant", None)
VELORA: Any = getattr(stock, "VeloraLinearVariant", None)
KINDS: dict[Any, str] = {BD: "BD-LoRA"}
"""PEFT's classes, those that this release has, and how ``known`` calls them."""
for _kind, _name in ((MICA, "MiCA"), (KASA, "KaSA"), (MONTE, "MonteCLoRA"), (VELORA, "VeLoRA")):
    if _kind is not None and _name in known.METHODS:
        KINDS[_kind] = _name
_NO_DROPOUT = nn.Identity()


class Factor:
    """An A or B that was made in this call, read and called as an ``nn.Linear`` is."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._parameters = {"weight": weight, "bias": bias}

    def __call__(self, x: Tensor) -> Tensor:
        """``x·weightᵀ + bias``."""
        return F.linear(x, self.weight, self.bias)


def kind_of(layer: Any, name: str) -> Any:
    """The class of an adapter's variant; ``NoneType`` of plain LoRA."""
    return type(layer.lora_variant.get(name))


def shape_of(factor: Any) -> tuple[int, ...]:
    """The shape of A or B as a matrix."""
    shape: tuple[int, ...] = tuple(factor._parameters["weight"].shape)
    return (shape[0], shape[1] * factor.nblocks) if type(factor) is BLOCKS else shape


def is_velora(layer: Any, name: str) -> bool:
    """Whether an adapter's A has VeLoRA's gradient in this call."""
    if VELORA is None or not layer.training or not torch.is_grad_enabled():
        return False
    return kind_of(layer, name) is VELORA


def is_more(layer: Any, name: str) -> bool:
    """Whether an adapter is more than a plain one in this call: it draws samples, or keeps for the
    gradient of A something else than x."""
    samples = MONTE is not None and layer.training and kind_of(layer, name) is MONTE
    return samples or is_velora(layer, name)


def plain(layer: Any, adapters: list[Adapter]) -> list[Adapter]:
    """The adapters, variants as what they come to; to be asked once a call, for it may draw samples."""
    return [_plain(layer, adapter) for adapter in adapters] if layer.lora_variant else adapters


def _plain(layer: Any, adapter: Adapter) -> Adapter:
    kind = kind_of(layer, adapter.name)
    if kind is BD:
        return adapter._replace(lora_A=_whole(adapter.lora_A), lora_B=_whole(adapter.lora_B))
    if kind is KASA:
        return _kasa(adapter, layer.lora_diag[adapter.name])
    if kind is MONTE:
        return _monte(layer, adapter)
    if is_velora(layer, adapter.name):
        return adapter._replace(lora_A=Factor(adapter.lora_A.weight.detach()))
    return adapter


def _whole(factor: Any) -> Any:
    """A or B, whole if it is kept as blocks."""
    return (
        Factor(block_diagonal(factor.weight, factor.nblocks)) if type(factor) is BLOCKS else factor
    )


def block_diagonal(blocks: Tensor, n: int) -> Tensor:
    """The matrix ``[out, in]`` with ``n`` blocks on its diagonal, of these one below another:
    ``blocks [out, in / n]``."""
    rows, columns = blocks.shape[0] // n, blocks.shape[1]
    each = blocks.view(n, rows, columns).permute(1, 2, 0)
    return torch.diag_embed(each, dim1=0, dim2=2).reshape(n * rows, n * columns)


def _kasa(adapter: Adapter, diagonal: Tensor) -> Adapter:
    """``B·diag(d)·A``; of float16 factors in float32."""
    A, B = folded(adapter.lora_A.weight, adapter.lora_B.weight, None, diagonal)
    return adapter._replace(lora_A=Factor(A), lora_B=Factor(B, adapter.lora_B.bias))


def _monte(layer: Any, adapter: Adapter) -> Adapter:
    """``A + Σ wᵢ · Eᵢ`` in training; PEFT averages ``A + Eᵢ``, by weights whose sum is 1."""
    if not layer.training:
        return adapter._replace(dropout=_NO_DROPOUT)
    A = adapter.lora_A.weight
    noise, weights = layer.lora_monteclora_sampler[adapter.name]()
    if (torch.isnan(noise).any() | torch.isnan(weights).any()).item():
        warnings.warn("Monteclora sampling produced NaNs, using base weights.", stacklevel=2)
        return adapter
    wide = torch.promote_types(A.dtype, torch.float32)
    average = torch.einsum("n,nij->ji", weights.to(wide), noise.to(wide))
    return adapter._replace(lora_A=Factor((A + average).to(A.dtype)))
