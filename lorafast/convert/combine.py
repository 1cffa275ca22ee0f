"""``combine``: one adapter of several, by the rules of PEFT's ``add_weighted_adapter``."""

import math
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lorafast.convert.adapter import (
    OUT_PROJ,
    Adapter,
    Pair,
    Source,
    adapter_of,
    float_of,
    others_of,
    pairs_of,
    patterns,
    saved,
)
from lorafast.core.context import without_autocast
from lorafast.core.dtypes import FLOATS
from lorafast.nn.checks import check_alpha, check_rank

Signs = Literal["total", "frequency"]
_SHORT = {"dare": "dare_linear"}
_OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_OF_PRODUCTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
HOW = (*_OF_FACTORS, "cat", *_OF_PRODUCTS)
"""PEFT's names of the rules; ``"dare"`` is short for ``"dare_linear"``."""
_WITHOUT_DENSITY = ("linear", "cat", "svd")
# What of a config says which layers it is for.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def combine(
    adapters: Sequence[Source],
    weights: Sequence[float],
    how: str = "linear",
    *,
    density: float | None = None,
    majority_sign_method: Signs = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Adapter:
    """One adapter of several: in the simplest case of ``Σ wᵢ · scalingᵢ · Bᵢ·Aᵢ``.

    The rules and their numbers are those of PEFT's ``add_weighted_adapter``. With
    ``cᵢ = wᵢ · scalingᵢ``:

    - ``"linear"``: ``A = Σ ±√|cᵢ| · Aᵢ`` (the sign of ``cᵢ``), ``B = Σ √|cᵢ| · Bᵢ``. Its product has
      terms ``Bᵢ·Aⱼ`` of different adapters too: fast, and rough.
    - ``"cat"``: ``A`` is ``[c₁·A₁; c₂·A₂; …]``, ``B`` is ``[B₁, B₂, …]``: exactly the sum. The ranks add
      up.
    - ``"svd"``: the best approximation of the sum of rank ``svd_rank``.
    - ``"ties"`` (Yadav et al., 2023): of each factor the largest ``density`` of the elements; where
      the adapters' signs differ, those of the majority's; their mean.
    - ``"dare_linear"``, ``"dare_ties"`` (Yu et al., 2023): of each factor a random ``density`` of the
      elements, divided by ``density``; then ``"linear"`` or the majority's. ``torch``'s generator
      draws.
    - ``"magnitude_prune"``: the largest ``density`` of the elements, then ``"linear"``.
    - ``"ties_svd"``, ``"dare_linear_svd"``, ``"dare_ties_svd"``, ``"magnitude_prune_svd"``: the same of
      the products ``scalingᵢ · Bᵢ·Aᵢ`` instead of their factors, and then the SVD.

    One adapter alone is scaled: ``how`` is ``"linear"`` then. A layer that some adapters don't have is
    combined of those that do. The factors are combined in float32 (float64 if they are that), which is
    also what comes out.

    The result has ``scaling`` 1, also where the adapters use rsLoRA. (PEFT gives its result the
    ``use_rslora`` of the first adapter, and thereby ``√r`` times the sum.) Where a layer's rank differs
    from the most, ``rank_pattern`` says so; PEFT pads ``"cat"`` with zeros instead. Tensors besides the
    adapters (modules stored whole, embeddings) are taken as they are, and must be equal where
    several adapters have them.

    Args:
        adapters: folders in PEFT's format, ``Adapter`` objects, or tuples (config, state dict).
        weights: as many numbers; negative ones subtract.
        how: the rule; ``"dare"`` is ``"dare_linear"``.
        density: the share of the elements that is kept, above 0 and at most 1.
        majority_sign_method: ``"total"``: the sign of the sum of the values; ``"frequency"``: of the
            sum of their signs.
        svd_rank: the rank that the SVD leaves; None is the largest of the adapters'.
        svd_clamp: the factors of the SVD are clamped to this quantile of their values.
        folder: where to write the result too.

    Returns:
        The adapter, for ``load_adapter`` and ``save_adapter``.

    Raises:
        ValueError: an argument doesn't fit, the adapters differ in the shape of a factor (the
            message names the first) or in ``init_lora_weights`` (PiSSA, OLoRA), a factor isn't finite
            floats or lacks its partner, a tensor is no adapter's and no module's by its name, one of
            them has DoRA, whose magnitudes don't add up, or what else lorafast doesn't compute.
        TypeError: ``adapters`` or ``weights`` is no list, or an element of ``adapters`` is no adapter.
        OSError: a folder can't be read or written.
    """
    how = _checked_how(how)
    if isinstance(adapters, (str, os.PathLike, Adapter)):
        raise TypeError(f"adapters is {type(adapters).__name__}, expected a list of adapters")
    found = [adapter_of(one) for one in adapters]
    numbers = _checked_weights(found, weights)
    if len(found) == 1:
        how = "linear"
    density = _checked_density(how, density)
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(
            f"majority_sign_method is {majority_sign_method!r}, expected 'total' or 'frequency'"
        )
    if svd_rank is not None:
        check_rank("svd_rank", svd_rank)
    if svd_clamp is not None and not 0 < check_alpha("svd_clamp", svd_clamp) <= 1:
        raise ValueError(f"svd_clamp is {svd_clamp!r}, expected a quantile above 0 and up to 1")
    layers = _by_layer(found, numbers)
    for group in layers.values():
        _check_alike(group, how)
    most = max(pair.r for group in layers.values() for pair, _ in group)
    merge: Callable[[list[Tensor], list[float]], Tensor] = partial(
        _merged, how=how.removesuffix("_svd"), density=density, signs=majority_sign_method
    )
    tensors = _others(found)
    ranks: dict[str, int] = {}
    with torch.no_grad():
        for name, group in layers.items():
            pair = group[0][0]
            with without_autocast(pair.A):
                if how == "cat":
                    A, B = _side_by_side(group)
                elif how in _OF_FACTORS:
                    A, B = _of_factors(group, merge)
                else:
                    transposed = pair.is_embedding or bool(found[0].config.get("fan_in_fan_out"))
                    sized = svd_rank or most
                    A, B = _of_products(group, how, merge, sized, svd_clamp, transposed)
            tensors[pair.key_A], tensors[pair.key_B] = A, B
            ranks[name] = A.shape[0]
    _check_start(found, layers, ranks)
    return saved(Adapter(_config(found, ranks), tensors), folder)


def _checked_how(how: str) -> str:
    how = _SHORT.get(how, how)
    if how not in HOW:
        raise ValueError(f"how is {how!r}, expected one of {', '.join(HOW)}")
    return how


def _checked_weights(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[float]:
    if not adapters:
        raise ValueError("adapters is empty, expected at least one")
    if not isinstance(weights, Sequence | Tensor):
        raise TypeError(f"weights is {type(weights).__name__}, expected a list of numbers")
    if len(weights) != len(adapters):
        raise ValueError(f"weights are {len(weights)}, expected {len(adapters)}, one an adapter")
    return [check_alpha(f"weights[{i}]", weight) for i, weight in enumerate(weights)]


def _checked_density(how: str, density: float | None) -> float:
    if how in _WITHOUT_DENSITY:
        return 1.0
    if density is None or not 0 < check_alpha("density", density) <= 1:
        raise ValueError(
            f"density is {density!r}, expected a number above 0 and at most 1 for how = {how!r}"
        )
    return density


Group = list[tuple[Pair, float]]
"""The adapters of one layer, each with its weight."""


def _by_layer(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Group]:
    layers: dict[str, Group] = {}
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        if adapter.parsed().use_dora:
            raise ValueError(
                f"adapter {i} has DoRA, whose magnitudes don't add up: merge it into a model, and "
                "extract an adapter from that"
            )
        pairs = list(pairs_of(adapter))
        if not pairs:
            raise ValueError(f"adapter {i} has no LoRA tensors")
        for pair in pairs:
            for key, tensor in ((pair.key_A, pair.A), (pair.key_B, pair.B)):
                if tensor.dtype not in FLOATS:
                    raise ValueError(f"{key} of adapter {i} is {tensor.dtype}, expected floats")
                if not tensor.isfinite().all():
                    raise ValueError(f"{key} of adapter {i} is NaN or infinite")
            layers.setdefault(pair.name, []).append((pair, weight))
    return layers


def _check_start(
    adapters: Sequence[Adapter], layers: dict[str, Group], ranks: dict[str, int]
) -> None:
    """Raises ``ValueError`` unless all belong to one ``W'``, to which the result belongs too.

    ``W' = W − scaling·B·A`` of PiSSA and OLoRA goes by the rank, that of OLoRA by ``scaling`` too.
    """
    start = adapters[0].parsed().init_lora_weights
    for i, adapter in enumerate(adapters):
        other = adapter.parsed().init_lora_weights
        if other != start:
            raise ValueError(
                f"adapter {i} has init_lora_weights {other!r} and adapter 0 has {start!r}: they belong "
                "to what these leave of W, which differs"
            )
    if start is None:
        return
    for name, group in layers.items():
        for pair, _ in group:
            if pair.r != ranks[name] or (start == "olora" and pair.scaling != 1):
                raise ValueError(
                    f"{pair.key_A} has r = {pair.r} and scaling {pair.scaling:g}, and would have r = "
                    f"{ranks[name]} and scaling 1: init_lora_weights = {start!r} leaves another part "
                    "of W then"
                )


def _check_alike(group: Group, how: str) -> None:
    """Raises ``ValueError`` that names the first factor whose shape differs."""
    first = group[0][0]
    for pair, _ in group[1:]:
        factors = ((first.key_A, first.A, pair.A, 0), (first.key_B, first.B, pair.B, 1))
        for key, one, other, rank_dim in factors:
            shapes = [list(one.shape), list(other.shape)]
            if how in _OF_FACTORS and shapes[0] != shapes[1] and pair.r != first.r:
                raise ValueError(
                    f"{key} has shape {shapes[0]} in one adapter and {shapes[1]} in another: how = "
                    f"{how!r} combines equal ranks ('cat' and 'svd' any)"
                )
            for shape in shapes:
                del shape[rank_dim]
            if shapes[0] != shapes[1] or pair.key_A != first.key_A or pair.groups != first.groups:
                raise ValueError(
                    f"{key} has shape {list(one.shape)} in one adapter, and {pair.key_A} and "
                    f"{pair.key_B} have {list(pair.A.shape)} and {list(pair.B.shape)} in another: they "
                    "are of different layers"
                )
    if how in _OF_PRODUCTS and first.groups > 1:
        raise ValueError(
            f"{first.key_A} is of a convolution with {first.groups} groups, whose blocks have no "
            "factors of one SVD: combine with how = 'cat' or 'linear'"
        )


def _side_by_side(group: Group) -> tuple[Tensor, Tensor]:
    """``[c₁·A₁; c₂·A₂; …]`` and ``[B₁, B₂, …]``, of a convolution within each of its groups."""
    groups = group[0][0].groups
    A = [float_of(pair.A) * weight * pair.scaling for pair, weight in group]
    blocks = [one.unflatten(0, (groups, -1)) for one in A]
    return torch.cat(blocks, dim=1).flatten(0, 1), torch.cat([float_of(p.B) for p, _ in group], 1)


def _of_factors(
    group: Group, merge: Callable[[list[Tensor], list[float]], Tensor]
) -> tuple[Tensor, Tensor]:
    scaled = [weight * pair.scaling for pair, weight in group]
    roots = [math.sqrt(abs(c)) for c in scaled]
    signed = [root if c >= 0 else -root for root, c in zip(roots, scaled, strict=True)]
    A = merge([float_of(pair.A) for pair, _ in group], signed)
    return A, merge([float_of(pair.B) for pair, _ in group], roots)


def _of_products(
    group: Group,
    how: str,
    merge: Callable[[list[Tensor], list[float]], Tensor],
    r: int,
    clamp: float | None,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """The factors ``Vᵀ`` and ``U·S`` of the combined products."""
    first = group[0][0]
    dtype = float_of(first.A).dtype
    if how == "svd":
        A, B = _side_by_side(group)
        U, S, Vh = svd_of_product(B.flatten(1), A.flatten(1))
    else:
        deltas = [
            float_of(pair.B).flatten(1) @ float_of(pair.A).flatten(1) * pair.scaling
            for pair, _ in group
        ]
        if transposed:  # as PEFT has it, which the order of random draws goes by
            deltas = [delta.T.contiguous() for delta in deltas]
        delta = merge(deltas, [weight for _, weight in group])
        U, S, Vh = torch.linalg.svd(delta.T if transposed else delta, full_matrices=False)
    A, B = Vh[:r].to(dtype), (U[:, :r] * S[:r]).to(dtype)
    if clamp is not None:
        most = _quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-most, most), B.clamp(-most, most)
    return A.reshape(-1, *first.A.shape[1:]), B.reshape(first.B.shape[0], -1, *first.B.shape[2:])


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, ``S`` and ``Vᵀ`` of ``B·A``, in float64.

    ``B [N, r]``, ``A [r, K]``. With ``B = Q·R`` and ``Aᵀ = P·T`` only ``R·Tᵀ`` is decomposed, which is
    ``[r, r]`` or smaller.
    """
    Q, R = torch.linalg.qr(B.double())
    P, T = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R @ T.T, full_matrices=False)
    return Q @ U, S, Vh @ P.T


def _quantile(values: Tensor, q: float) -> Tensor:
    """``torch.quantile``, which takes 16 million values at most."""
    place = q * (values.numel() - 1)
    below = values.kthvalue(math.floor(place) + 1).values
    above = values.kthvalue(math.ceil(place) + 1).values
    return torch.lerp(below, above, place - math.floor(place))


def _merged(
    tensors: list[Tensor], weights: list[float], how: str, density: float, signs: Signs
) -> Tensor:
    """The weighted sum of pruned tensors; of ``ties`` the mean of those of the majority's sign."""
    prune = _pruned_at_random if how.startswith("dare") else _pruned_by_magnitude
    kept = torch.stack([prune(one, density) for one in tensors])
    factors = torch.tensor(weights, dtype=kept.dtype, device=kept.device)
    weighted = kept * factors.view(-1, *(1,) * (kept.dim() - 1))
    if not how.endswith("ties"):
        return weighted.sum(dim=0)
    sign = kept.sign()
    majority = (kept if signs == "total" else sign).sum(dim=0)
    agrees = sign == torch.where(majority >= 0, 1, -1)
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)


def _pruned_by_magnitude(tensor: Tensor, density: float) -> Tensor:
    """The ``⌊density · numel⌋`` largest elements, zero elsewhere."""
    if density == 1:
        return tensor
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[largest] = 1
    return tensor * mask.view_as(tensor)


def _pruned_at_random(tensor: Tensor, density: float) -> Tensor:
    """Each element with probability ``density``, divided by it: the same in the mean."""
    if density == 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _others(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Modules stored whole and base weights; ``ValueError`` if two adapters differ in one."""
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for key, tensor in others_of(adapter).items():
            if key in found and not torch.equal(found[key], tensor):
                raise ValueError(
                    f"{key} is stored whole in several adapters and not equal in them: interpolate it "
                    "by itself, or take it out of all but one"
                )
            found[key] = tensor.detach().clone()
    return found


def _config(adapters: Sequence[Adapter], ranks: dict[str, int]) -> dict[str, Any]:
    values = list(ranks.values())
    r = max(values, key=lambda one: (values.count(one), one))
    stored = {n for one in adapters for n in one.config.get("modules_to_save") or ()}
    return (
        adapters[0].config
        | _selection(adapters, ranks)
        | patterns(r, r, ranks, ranks)
        | {"use_rslora": False, "modules_to_save": sorted(stored) or None}
    )


def _selection(adapters: Sequence[Adapter], ranks: dict[str, int]) -> dict[str, Any]:
    """What selects the layers: that of all adapters, or the union of their names, or full names."""
    given = [{field: one.config.get(field) for field in _SELECTION} for one in adapters]
    names: list[Any] = [one["target_modules"] for one in given]
    for one in given:
        if isinstance(one["target_modules"], (list, tuple, set)):
            one["target_modules"] = sorted(one["target_modules"])
    if all(one == given[0] for one in given):
        return given[0]
    nothing: dict[str, Any] = dict.fromkeys(_SELECTION)
    alone = not any(one[field] for one in given for field in _SELECTION[1:])
    if alone and not any(isinstance(one, str) for one in names):
        return nothing | {"target_modules": sorted({name for one in names for name in one})}
    layers = [re.escape(name) for name in sorted(ranks) if not name.endswith(OUT_PROJ)]
    return nothing | {"target_modules": "|".join(layers)}
