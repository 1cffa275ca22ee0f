"""LoHa (Hyeon-Woo et al., 2021): ΔW is the elementwise product of two matrices of rank r.

Such a product has rank r² at most: its A has the products of every row of one ``w_b`` with every row of
the other, its B those of the columns. So ``(W₁ₐ·W₁ᵦ) ⊙ (W₂ₐ·W₂ᵦ)`` is LoRA of rank r², and ΔW is never
made, where that takes fewer operations.
"""

from typing import Any

from torch import Tensor

from lorafast.core.dtypes import wide
from lorafast.integrations.peft import low_rank, lycoris
from lorafast.integrations.peft.low_rank import Kind, Part, Term

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")
"""Of a convolution whose kernel isn't taken as a row of W."""


def parts(layer: Any) -> list[Part]:
    """The active adapters."""
    every = [(name, low_rank.entries(layer, name)) for name in (*_NAMES, *_CORES)]
    return [
        Part(name, {what: of[name] for what, of in every if what in _NAMES or name in of})
        for name in low_rank.active(layer)
        if name in every[0][1]
    ]


def why_not(layer: Any, part: Part, N: int, K: int) -> str | None:
    """Why an adapter doesn't fit a layer of W [N, K], or doesn't pay there."""
    r = part.tensors["hada_w1_b"].shape[0]
    if r * r * (N + K) >= N * K:
        return f"has r = {r}: LoRA of rank {r * r} over {N} x {K} takes as long as ΔW itself"
    reason = lycoris.why_not_scaling(layer, part.name)
    if reason is not None:
        return reason
    if "hada_t1" in part.tensors:
        return "has hada_t1, of which PEFT's gradients are not those of what it computes"
    return low_rank.why_not_shapes(
        part, hada_w1_a=(N, r), hada_w1_b=(r, K), hada_w2_a=(N, r), hada_w2_b=(r, K)
    )


def term(layer: Any, part: Part, N: int, K: int, small: bool) -> Term | None:
    """A and B, of rank r²."""
    if not lycoris.takes_part(layer, part.name):
        return None
    w1_a, w1_b, w2_a, w2_b = (part.tensors[name] for name in _NAMES)
    rows = lycoris.kept_rows(layer, part.name, N, w1_a.device)
    if rows is not None:
        rows = rows / rows.mean()
    scaling = float(layer.scaling[part.name])
    if small and low_rank.is_tiny(N, K):
        return Term((w1_a @ w1_b) * (w2_a @ w2_b), None, scaling, d_out=rows)
    A = _products(w1_b, w2_b)
    B = _products(w1_a.t(), w2_a.t()).t()
    return Term(A, B, scaling, d_out=rows)


def _products(one: Tensor, other: Tensor) -> Tensor:
    """``[r², n]``: every row of ``one [r, n]`` times every row of ``other [r, n]``."""
    dtype = wide(one.dtype)
    return (one.to(dtype).unsqueeze(1) * other.to(dtype).unsqueeze(0)).flatten(0, 1)


LOHA = Kind(parts, why_not, term, as_input=True)
