"""Mixed batches: each element of a batch with an adapter of its own (``adapter_names``), without a loop.

PEFT gathers the elements of each adapter, multiplies them and scatters the results, adapter by adapter.
Here the factors are laid side by side, an element's own A and B beside each element, and multiplied as
one batch; or, for elements of few rows, where that would copy more than it computes, every row meets
every adapter and a mask keeps its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor

from lorafast.integrations.peft import rules
from lorafast.integrations.peft.adapters import Adapter, named, weight_of

_FEW_ROWS = 8
"""Rows of an element below which its own factors aren't copied."""


def forward(layer: Linear, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    if rules.why_stock_mixed(layer, x, kwargs) is not None:
        return None
    rows: list[str] = kwargs["adapter_names"]
    adapters = named(layer, dict.fromkeys(rows))
    if rules.why_stock_linear(layer, adapters) is not None:
        return None
    base = layer._modules["base_layer"]
    if rules.why_stock_input(layer, adapters, weight_of(base), x) is not None:
        return None
    result: Tensor = base(x)
    elements = x.reshape(len(rows), -1, x.shape[-1])  # [batch, T, K]
    T = elements.shape[1]
    batched = result.reshape(len(rows), T, -1)  # [batch, T, N]
    y = (_masked if T < _FEW_ROWS else _side_by_side)(adapters, rows, elements, batched)
    return y.reshape(result.shape).to(result.dtype)


def _side_by_side(adapters: list[Adapter], rows: list[str], x: Tensor, result: Tensor) -> Tensor:
    """``result + x·Aᵀ·(scaling · B)ᵀ`` with the A and B of each element of the batch."""
    r = max(adapter.lora_A.weight.shape[0] for adapter in adapters)
    factors = {adapter.name: _factors(adapter, r, result.dtype) for adapter in adapters}
    # An element without an adapter meets zeros.
    none = tuple(torch.zeros_like(factor) for factor in factors[adapters[0].name])
    own = [factors.get(name, none) for name in rows]
    every_A, every_B, every_bias = (torch.stack(kind) for kind in zip(*own, strict=True))
    x = x.to(result.dtype)
    y = torch.baddbmm(result, torch.bmm(x, every_A.mT), every_B.mT)
    return y + every_bias.unsqueeze(1) if _have_bias(adapters) else y


def _masked(adapters: list[Adapter], rows: list[str], x: Tensor, result: Tensor) -> Tensor:
    """The same with every adapter for every row, and zeros for all but its own."""
    ranks = [adapter.lora_A.weight.shape[0] for adapter in adapters]
    factors = [_factors(a, r, result.dtype) for a, r in zip(adapters, ranks, strict=True)]
    every_A, every_B, every_bias = zip(*factors, strict=True)
    owns = torch.tensor([[a.name == row for a in adapters] for row in rows], device=x.device)
    owns = owns.to(result.dtype)  # [batch, adapters]
    mask = torch.cat([owns[:, i : i + 1].expand(-1, r) for i, r in enumerate(ranks)], 1)
    s = F.linear(x.to(result.dtype), torch.cat(every_A)) * mask.unsqueeze(1)  # [batch, T, Σr]
    y = result + F.linear(s, torch.cat(every_B, 1))
    if _have_bias(adapters):
        y = y + (owns @ torch.stack(every_bias)).unsqueeze(1)
    return y


def _factors(adapter: Adapter, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``A [r, K]``, ``scaling · B [N, r]`` and ``scaling · bias [N]``, filled up with zeros to ``r``."""
    lora_B, scaling = adapter.lora_B, adapter.scaling
    A, B = adapter.lora_A.weight.to(dtype), (lora_B.weight * scaling).to(dtype)
    bias = B.new_zeros(B.shape[0]) if lora_B.bias is None else (lora_B.bias * scaling).to(dtype)
    missing = r - A.shape[0]
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)), bias) if missing else (A, B, bias)


def _have_bias(adapters: list[Adapter]) -> bool:
    return any(adapter.lora_B.bias is not None for adapter in adapters)
