"""``initialize_corda``: adapters begin with a part of W that their inputs choose (CorDA)."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafast.convert.from_data import (
    Forward,
    call,
    check_finite,
    check_seen,
    device_of,
    fresh_layers,
    moved,
    watching,
)
from lorafast.convert.targets import unwrapped
from lorafast.core.dtypes import FLOATS
from lorafast.nn import LoRALinear

_START = "CorDA"
_DAMPING, _MOST_DAMPING, _INVERSE_ERROR = 0.01, 1e6, 0.05
"""PEFT's: of the mean of C's diagonal, what is added to it, twice as much until ``C·C⁻¹`` is near I."""


def initialize_corda(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: Literal["ipm", "kpm"] = "ipm",
    forward: Forward = call,
) -> None:
    """Begins fresh adapters with a part of W, by the covariance C of their inputs, and takes it away.

    CorDA (Yang et al., 2024), with the numbers of PEFT's ``preprocess_corda`` and
    ``init_lora_weights="corda"``: ``W·C = U·S·Vᵀ``, ``B = U·√(S/scaling)`` and
    ``A = √(S/scaling)·Vᵀ·C⁻¹``, both cut to r, and ``W − scaling·B·A`` stays frozen, so that the model
    computes what it did, up to rounding. ``C`` is the mean over calls of ``XᵀX`` with ``X [M, K]`` all
    inputs of a call over their largest one.

    Call it after ``adapt`` and before an optimizer is made. Dense linear layers alone begin so. Until
    all are made, C is held (``K²`` float32 numbers of each layer) and the model's own weights are held
    beside. Saved adapters name the start. They belong to what these batches left of W: ``load_adapter``
    reads them where ``initialize_corda`` was called with the same, PEFT where ``preprocess_corda`` was.
    For the model as it was before take ``lorafast.extract`` of the merged one, with ``2·r``.

    Args:
        model: a model whose adapters are fresh.
        batches: what the model is called with, gone through once. Tensors are brought to the adapters'
            device. PEFT takes one text a batch, of which there should be some hundreds of inputs more
            than features.
        method: ``"ipm"`` (instruction-previewed) trains the largest singular values; ``"kpm"``
            (knowledge-preserved) the smallest, so that what these inputs need stays frozen.
        forward: as for ``initialize_eva``.

    Raises:
        ValueError: an adapter isn't fresh, there is no linear one, no batch reaches a layer, ``r`` is
            larger than a side of a weight, inputs or weights aren't finite, C has no inverse, or
            ``method`` or ``alpha`` doesn't fit. The model is unchanged.
        TypeError: the weight of a layer is quantized.
    """
    if method not in ("ipm", "kpm"):
        raise ValueError(f"method is {method!r}, expected 'ipm' or 'kpm'")
    inner = unwrapped(model)
    layers = fresh_layers(inner, _START)
    for name, layer in layers.items():
        _check(name or "the model", layer)
    device = device_of(layers)
    covariances: dict[str, Tensor] = {}
    calls = dict.fromkeys(layers, 0)

    def look(name: str, x: Tensor) -> None:
        X = x.reshape(-1, x.shape[-1]).float()
        check_finite(name, X)
        X = X / X.max().abs()
        if not torch.isfinite(X).all():
            raise ValueError(f"the largest input of {name or 'the model'} in a batch is 0")
        calls[name] += 1
        C = X.t() @ X
        covariances[name] = covariances[name].add_(C) if name in covariances else C

    with watching(inner, layers, look):
        for batch in batches:
            forward(inner, moved(batch, device))
    check_seen(layers, covariances)
    with torch.no_grad():
        found = {
            name: _factors(name, layer, covariances.pop(name) / calls[name], method)
            for name, layer in layers.items()
        }
    before: list[tuple[LoRALinear, nn.Parameter, Tensor]] = []
    try:
        for name, layer in layers.items():
            before.append(
                (layer, layer.weight, layer.adapter_parameters()["lora_A"].detach().clone())
            )
            layer.take_away(*found[name], "corda")
    except BaseException:
        for layer, weight, A in before:
            layer.weight = weight
            layer.init_lora_weights = None
            layer.begin(A, layer.alpha)
        raise


def _check(name: str, layer: LoRALinear) -> None:
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dtype not in FLOATS:
        raise TypeError(
            f"the weight of {name} is no dense one of floats, and {_START} takes a part of it away"
        )
    if layer.r > min(weight.shape):
        raise ValueError(
            f"r of {name} is {layer.r}, expected at most {min(weight.shape)}, the smaller side of its "
            "weight"
        )
    if layer.scaling <= 0:
        raise ValueError(f"alpha of {name} is {layer.alpha}, expected a number above 0")
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of {name} has NaN or infinity")


def _factors(name: str, layer: LoRALinear, C: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """``A [r, K]`` and ``B [N, r]`` of a layer whose inputs have the covariance ``C [K, K]``."""
    C, inverse = _inverted(name or "the model", C)
    U, S, Vh = torch.linalg.svd(layer.base_weight().float() @ C, full_matrices=False)
    Vh = Vh @ inverse
    kept = slice(layer.r) if method == "ipm" else slice(len(S) - layer.r, None)
    root = (S[kept] / layer.scaling).sqrt()
    A, B = root.unsqueeze(1) * Vh[kept], U[:, kept] * root
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ValueError(f"what {name or 'the model'} would begin with isn't finite")
    return A, B


def _inverted(name: str, C: Tensor) -> tuple[Tensor, Tensor]:
    """C with as much on its diagonal as its inverse needs, and that."""
    unit = torch.eye(len(C), device=C.device)
    damping = _DAMPING
    while damping < _MOST_DAMPING:
        damped = C + unit * (C.diagonal().mean() * damping)
        inverse, info = torch.linalg.inv_ex(damped)
        if not info.item() and torch.dist(damped @ inverse, unit).item() < _INVERSE_ERROR:
            return damped, inverse
        damping *= 2
    raise ValueError(f"the covariance of the inputs of {name} has no inverse: give other batches")
