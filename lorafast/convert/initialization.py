"""Ways for an adapter of a linear layer to begin that take a part of W away: PiSSA and OLoRA.

Both are local to a layer and as PEFT has them. ``W' = W − scaling·B·A`` is what stays frozen, so that a
fresh layer computes what W alone did, up to rounding.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.core.dtypes import FLOATS
from lorafast.nn.plain import is_conv1d

_OF_DATA = ("eva", "corda")
"""Starts that have functions of their own, ``initialize_eva`` and ``initialize_corda``."""
_NITER = re.compile(r"pissa_niter_(\d{1,4})")


def check_start(
    how: object, plain: Mapping[nn.Module, Iterable[str]], r: int, alpha: float | None
) -> str:
    """``how``, if it is known here and fits these plain layers, given with their names.

    Raises:
        ValueError: it isn't known, ``alpha`` isn't above 0, which PiSSA divides by, ``r`` is larger than
            a side of a weight, or a weight isn't finite.
        TypeError: a layer isn't a dense linear layer.
    """
    if how in _OF_DATA:
        raise ValueError(
            f"init_lora_weights is {how!r}, which begins from data: adapt without it, then call "
            f"lorafast.initialize_{how}(model, batches)"
        )
    if not isinstance(how, str) or (how not in ("pissa", "olora") and not _NITER.fullmatch(how)):
        raise ValueError(
            f"init_lora_weights is {how!r}, expected 'pissa', 'pissa_niter_<n>', 'olora', True or None"
        )
    if how != "olora" and isinstance(alpha, (int, float)) and not 0 < alpha < math.inf:
        raise ValueError(
            f"alpha is {alpha}, expected a finite number above 0: init_lora_weights is {how!r}"
        )
    for layer, (name, *_) in plain.items():
        weight = layer._parameters.get("weight")
        linear = isinstance(layer, nn.Linear) or is_conv1d(layer)
        if not linear or type(weight) is not nn.Parameter:
            raise TypeError(
                f"{name} is a {type(layer).__name__}, expected a dense linear layer: "
                f"init_lora_weights is {how!r}"
            )
        if weight.is_meta or weight.dtype not in FLOATS:
            raise TypeError(
                f"weight of {name} is {weight.dtype} on {weight.device}, expected float values: "
                f"init_lora_weights is {how!r}"
            )
        if r > min(weight.shape):
            raise ValueError(
                f"r is {r}, expected at most {min(weight.shape)}, the smaller side of the weight of "
                f"{name}: init_lora_weights is {how!r}"
            )
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"weight of {name} has NaN or infinity, and init_lora_weights is {how!r}"
            )
    return how


@torch.no_grad()
def start(layer: Any, how: str) -> None:
    """Gives a fresh linear layer that ``check_start`` allowed its A, B and what is left of W."""
    W: Tensor = layer.base_weight()  # [N, K]
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    layer.take_away(*factors(W, layer.r, layer.scaling, how), how)


def factors(W: Tensor, r: int, scaling: float, how: str) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] of ``W [N, K]``.

    PiSSA (Meng et al., 2024): ``scaling·B·A`` is the best approximation of rank r, of the singular value
    decomposition; ``pissa_niter_<n>`` finds it by n steps of a randomised one. OLoRA (Büyükakyüz, 2024):
    B is the first r columns of Q, A the first rows of R, of ``W = Q·R``.
    """
    if how == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    niter = _NITER.fullmatch(how)
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=int(niter[1]))
        Vh = V.t()
    root = (S / scaling).sqrt()
    return root.unsqueeze(1) * Vh, U * root
