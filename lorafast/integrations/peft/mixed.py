"""Mixed batches: each element of a batch with an adapter of its own (``adapter_names``), in one pass.

PEFT gathers, multiplies and scatters adapter by adapter; ``functional.grouped_lora_linear`` has one
batched product for all. Here a call of PEFT's is put into its terms.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import functional
from lorafast.core.assignment import Assignment
from lorafast.core.transfer import on_device
from lorafast.integrations.peft import alora, quantized, rules, variants
from lorafast.integrations.peft.adapters import Adapter, named, weight_of
from lorafast.operands import Operand


def forward(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    if rules.why_stock_mixed(layer, layer.mixed_changed, x, kwargs) is not None:
        return None
    rows: list[str] = kwargs["adapter_names"]
    adapters = named(layer, dict.fromkeys(rows))
    if rules.why_stock_linear(layer, adapters) is not None:
        return None
    base = layer._modules["base_layer"]
    weight, bias = weight_of(base), base._parameters["bias"]
    if rules.why_stock_input(layer, adapters, weight, x) is not None:
        return None
    offsets = kwargs.get("alora_offsets")
    if rules.why_stock_alora(layer, adapters, x, offsets) is not None:
        return None
    result = None
    if isinstance(weight, Operand):
        frozen = quantized.frozen(base, x)
        if frozen.apart:
            return None
        weight, bias, result = frozen.weight, frozen.bias, frozen.result
    adapters = variants.plain(layer, adapters)
    index = {adapter.name: i for i, adapter in enumerate(adapters)}
    of_element = [index.get(name, -1) for name in rows]
    adapter_of: list[int] | Assignment | Tensor = of_element
    if any(rules.is_alora(layer, adapter.name) for adapter in adapters):
        adapter_of = _activated(layer, rows, of_element, x, offsets)
    lora_A, lora_B = _stacked(adapters)
    scaling = _scaling(adapters, x.device)
    y = functional.grouped_lora_linear(x, weight, lora_A, lora_B, scaling, adapter_of, bias)
    if any(adapter.lora_B.bias is not None for adapter in adapters):
        if isinstance(adapter_of, list):
            y = with_lora_bias(y, adapters, adapter_of)
        else:
            for g, (_, _, lora_B, _, scale) in enumerate(adapters):
                if lora_B.bias is not None:
                    y = alora.with_bias(y, lora_B.bias * scale, adapter_of, g)
    return y if result is None else y.to(result)


def _activated(
    layer: Any, rows: list[str], adapter_of: list[int], x: Tensor, offsets: Sequence[Any] | None
) -> Assignment | Tensor:
    """Where adapters of aLoRA have the last tokens of their elements, and the others have all."""
    every, T = alora.counts_of(offsets, x), alora.tokens_of(x)
    counts = (
        count if rules.is_alora(layer, name) else T for name, count in zip(rows, every, strict=True)
    )
    return alora.assigned(adapter_of, tuple(counts), x)


def _stacked(adapters: list[Adapter]) -> tuple[Tensor, Tensor]:
    """``A [n, r, K]`` and ``B [n, N, r]``; zeros fill up to the largest rank."""
    r = max(adapter.lora_A.weight.shape[0] for adapter in adapters)
    every_A, every_B = [], []
    for _, lora_A, lora_B, _, _ in adapters:
        missing = r - lora_A.weight.shape[0]
        every_A.append(F.pad(lora_A.weight, (0, 0, 0, missing)) if missing else lora_A.weight)
        every_B.append(F.pad(lora_B.weight, (0, missing)) if missing else lora_B.weight)
    return torch.stack(every_A), torch.stack(every_B)


def _scaling(adapters: list[Adapter], device: torch.device) -> Tensor | float:
    """``[n]`` in float32, without asking for the value of a tensor, or in compiled code of a number."""
    values = [adapter.scaling for adapter in adapters]
    if torch.compiler.is_compiling() or any(isinstance(value, Tensor) for value in values):
        one = torch.ones((), device=device)
        return torch.stack([(one * value).to(torch.float32) for value in values])
    if len(set(values)) == 1:
        return float(values[0])
    return on_device(values, torch.float32, device)


def with_lora_bias(y: Tensor, adapters: list[Adapter], adapter_of: Sequence[int]) -> Tensor:
    """``y_i + scaling · bias`` of the adapter of element i, where that has a ``lora_B`` with a bias.

    The sum, and that of the gradient of ``bias``, is in the wider dtype of the two.
    """
    wide = torch.promote_types(y.dtype, adapters[0].lora_B.weight.dtype)
    elements: list[int] = []
    changes = []
    for g, (_, _, lora_B, _, scaling) in enumerate(adapters):
        if lora_B.bias is not None:
            own = [i for i, of in enumerate(adapter_of) if of == g]
            elements += own
            # Not picked from a table: the gradient of that would be a sum in whatever order.
            changes.append((lora_B.bias * scaling).to(wide).expand(len(own), -1))
    change = torch.cat(changes)
    change = change.view(len(elements), *[1] * (y.dim() - 2), change.shape[1])
    index = on_device(elements, torch.int64, y.device)
    change = change.expand(len(elements), *y.shape[1:])
    return y.to(wide).index_add(0, index, change).to(y.dtype)
