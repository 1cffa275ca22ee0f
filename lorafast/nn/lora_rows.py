"""A ``LoRALinear`` in a block of ``mixed``: each element of its batch with an adapter of its own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import functional, ops
from lorafast.core.transfer import on_device
from lorafast.nn import inactive
from lorafast.nn.rows import Rows


def forward(layer: Any, rows: Rows, x: Tensor) -> Tensor:
    """The layer's output for ``x [elements, …, in_features]``.

    One adapter beside elements that have none, which are neighbours: one pass, and the backward of the
    adapter's rows alone where the others are constants. Several: ``grouped_lora_linear``. DoRA, and what
    is neither: the parts one by one.
    """
    rows.check(x, 2)
    names, own = rows.used, rows.own
    dropout_p = (
        max([_dropout(layer, name) for name in names], default=0.0) if layer.training else 0.0
    )
    if len(names) > 1:
        return _of_several(layer, rows, names, x, dropout_p)
    if own is not None and len(rows.runs) > 1 and not layer._use_dora:
        weight, bias = layer.fitted(x)
        A, B, scaling = _factors(layer, names[0])
        y = ops.lora_linear_on_some_rows(
            x, weight, A, B, scaling, own, bias, dropout_p, constants=rows.constants
        )
        if y is not None:
            return y
    if names in ([], [layer._adapter_name]):
        return rows.by_parts((x,), layer.forward_active, layer.base_forward, 2)

    def of_waiting(x: Tensor) -> Tensor:
        weight, bias = layer.fitted(x)
        A, B, scaling = _factors(layer, names[0])
        return functional.lora_linear(x, weight, A, B, scaling, bias, dropout_p=dropout_p)

    return rows.by_parts((x,), of_waiting, layer.base_forward, 2)


def _of_several(layer: Any, rows: Rows, names: list[str], x: Tensor, dropout_p: float) -> Tensor:
    """One product with W, and one batched over the adapters ``names``."""
    if dropout_p:
        raise ValueError(
            "in a block of mixed several adapters have no dropout: call model.eval() before, or adapt "
            "with dropout 0"
        )
    weight, bias = layer.fitted(x)
    index = {name: i for i, name in enumerate(names)}
    every_A, every_B, scalings = zip(*(_factors(layer, name) for name in names), strict=True)
    # A scaling of float32 would round what is computed in float64.
    dtype = torch.float64 if torch.float64 in (x.dtype, every_A[0].dtype) else torch.float32
    r = max(A.shape[0] for A in every_A)
    y = functional.grouped_lora_linear(
        x,
        weight,
        torch.stack([F.pad(A, (0, 0, 0, r - A.shape[0])) for A in every_A]),
        torch.stack([F.pad(B, (0, r - B.shape[1])) for B in every_B]),
        on_device(list(scalings), dtype, x.device),
        [-1 if name is None else index[name] for name in rows.names],
        bias,
    )
    return rows.with_constants(y)


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """A, B and the scaling of the adapter ``name``."""
    if name == layer._adapter_name:
        return layer.lora_A, layer.lora_B, layer._scaling
    held = inactive.waiting(layer)[name]
    if layer._local is not None:
        parts = layer._local.parts_of(held)
        return parts["lora_A"], parts["lora_B"], held.settings["_scaling"]
    return held.lora_A, held.lora_B, held.settings["_scaling"]


def _dropout(layer: Any, name: str) -> float:
    """That of the adapter ``name``."""
    if name == layer._adapter_name:
        return float(layer.dropout)
    return float(inactive.waiting(layer)[name].settings["dropout"])
