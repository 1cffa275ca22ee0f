"""Mixed batches: each element of a batch with an adapter of its own (``adapter_names``), in one pass.

PEFT gathers, multiplies and scatters adapter by adapter. Here the elements of one adapter stand together
in one batched product: ``[groups, elements · T, K]`` by the A's, then the B's, of the groups. An adapter
with more elements than the average has several groups, so that no more than about half is filling.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor

from lorafast.integrations.peft import rules
from lorafast.integrations.peft.adapters import Adapter, named, weight_of


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
    return add_low_rank(base(x), x, adapters, rows)


def add_low_rank(result: Tensor, x: Tensor, adapters: list[Adapter], rows: Sequence[str]) -> Tensor:
    """``result + scaling · x·Aᵀ·Bᵀ``, ``x[i]`` with the adapter ``rows[i]`` if there is one."""
    elements = {a.name: [i for i, name in enumerate(rows) if name == a.name] for a in adapters}
    size = -(-sum(map(len, elements.values())) // len(adapters))
    groups = [
        (adapter, elements[adapter.name][i : i + size])
        for adapter in adapters
        for i in range(0, len(elements[adapter.name]), size)
    ]
    # Filled up with an element of the same adapter: what another one holds must not come near its sums.
    slots = [i for _, group in groups for i in (*group, *group[:1] * (size - len(group)))]
    taken = torch.tensor(slots, device=x.device)
    dtype = result.dtype
    if dtype is torch.float16:
        dtype = adapters[0].lora_A.weight.dtype  # float32 holds what float16 doesn't
    every_A, every_B, bias = _factors([adapter for adapter, _ in groups], dtype)
    x = x.index_select(0, taken).to(dtype)
    s = torch.bmm(x.reshape(len(groups), -1, x.shape[-1]), every_A.mT)  # [groups, size · T, r]
    change = torch.bmm(s, every_B.mT)  # [groups, size · T, N]
    if bias is not None:
        change = change + bias.unsqueeze(1)
    change = change.reshape(len(slots), *result.shape[1:])
    if len(slots) > sum(map(len, elements.values())):
        filled = [i * size + j for i, (_, group) in enumerate(groups) for j in range(len(group))]
        kept = torch.tensor(filled, device=x.device)
        change, taken = change.index_select(0, kept), taken.index_select(0, kept)
    return result.index_add(0, taken, change.to(result.dtype))


def _factors(adapters: list[Adapter], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """``A [n, r, K]``, ``scaling · B [n, N, r]``, ``scaling · bias [n, N]``; zeros fill up to ``r``."""
    r = max(adapter.lora_A.weight.shape[0] for adapter in adapters)
    every_A, every_B, every_bias = [], [], []
    for _, lora_A, lora_B, _, _ in adapters:
        missing = r - lora_A.weight.shape[0]
        every_A.append(F.pad(lora_A.weight, (0, 0, 0, missing)) if missing else lora_A.weight)
        every_B.append(F.pad(lora_B.weight, (0, missing)) if missing else lora_B.weight)
        every_bias.append(lora_B.bias)
    scaling = _scaling(adapters, every_B[0].device)
    B = torch.stack(every_B) * scaling.view(-1, 1, 1)
    bias = None
    if any(b is not None for b in every_bias):
        zeros = torch.zeros_like(B[0, :, 0])
        bias = torch.stack([zeros if b is None else b for b in every_bias]) * scaling.unsqueeze(1)
        bias = bias.to(dtype)
    return torch.stack(every_A).to(dtype), B.to(dtype), bias


def _scaling(adapters: list[Adapter], device: torch.device) -> Tensor:
    """``[n]`` in float32, without asking for the value of a tensor, or in compiled code of a number."""
    values = [adapter.scaling for adapter in adapters]
    if torch.compiler.is_compiling() or any(isinstance(value, Tensor) for value in values):
        one = torch.ones((), device=device)
        return torch.stack([(one * value).to(torch.float32) for value in values])
    return torch.tensor(values, dtype=torch.float32, device=device)
