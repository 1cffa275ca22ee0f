"""Multi-head attention around two linear layers with adapters: what ``nn.MultiheadAttention`` computes
between and beside its projections."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.functional import lora_linear


class Projection(NamedTuple):
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias``, or some of its rows; without A a plain layer."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., N]``."""
        if self.lora_A is None or self.lora_B is None:
            return F.linear(x, self.weight, self.bias)
        return lora_linear(
            x, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias,
            dropout_p=self.dropout_p,
        )  # fmt: skip

    def rows(self, start: int, stop: int) -> "Projection":
        """The layer of these rows of W, B and bias, whose A is the same."""
        return self._replace(
            weight=self.weight[start:stop],
            bias=None if self.bias is None else self.bias[start:stop],
            lora_B=None if self.lora_B is None else self.lora_B[start:stop],
        )


class Heads(NamedTuple):
    """What an attention is beside its projections, by the names of ``nn.MultiheadAttention``.

    ``dropout_p`` is that of the attention weights, 0 outside training.
    """

    num_heads: int
    batch_first: bool = False
    dropout_p: float = 0.0
    bias_k: Tensor | None = None
    bias_v: Tensor | None = None
    add_zero_attn: bool = False


def multihead_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_proj: Projection,
    out_proj: Projection,
    heads: Heads,
    *,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``out_proj(softmax(q·kᵀ / √D + mask)·v)`` by heads, with ``q, k, v`` of ``in_proj`` (Vaswani et
    al., 2017): arguments and numbers of ``nn.MultiheadAttention`` outside its inference fast path.

    Inputs that are the same tensor go through one product: one for self-attention, two where the keys
    are the values or the queries, else three.

    Args:
        query: ``[L, N, E]``, with ``batch_first`` ``[N, L, E]``, or ``[L, E]``.
        key, value: ``[S, N, E]``, ``[N, S, E]`` or ``[S, E]``.
        in_proj: ``[3E, E]``: the rows of q, k and v.
        out_proj: ``[E, E]``.
        heads: ``num_heads``, which divides E, and the rest.
        key_padding_mask: ``[N, S]`` or ``[S]``.
        attn_mask: ``[L, S]`` or ``[N · num_heads, L, S]``. Masks are True where nothing may be seen, or
            floats to be added.
        need_weights: return the attention weights too, which costs the fused attention.
        average_attn_weights: their mean over the heads.
        is_causal: ``attn_mask`` is the causal mask. As in PyTorch, without ``key_padding_mask`` and
            ``need_weights`` it isn't read then, and may have any size.

    Returns:
        The output, in the shape of ``query``, and the weights ``[N, L, S]`` or ``[N, num_heads, L, S]``,
        without N for inputs without it, or None.

    Raises:
        ValueError: an argument doesn't fit.
    """
    E, H = in_proj.weight.shape[1], heads.num_heads
    reason = why_not_inputs(
        query, key, value, key_padding_mask, attn_mask, is_causal, E, heads, need_weights
    )
    if reason is not None:
        raise ValueError(reason)
    batched = query.dim() == 3
    batch_first = heads.batch_first and batched
    N, L, S = _sizes(query, key, batch_first)
    kept = _is_hint_alone(key_padding_mask, is_causal, need_weights)
    q, k, v = (
        _by_heads(one if batched else one.unsqueeze(1), H, batch_first)
        for one in _projected(query, key, value, in_proj, E)
    )
    k, v, added = _longer(k, v, heads)
    mask = None
    if not kept:
        by_head = attn_mask is not None and attn_mask.dim() == 3
        padding = _added(key_padding_mask, query.dtype, N, 1, 1, S)
        mask = _added(attn_mask, query.dtype, *((N, H) if by_head else (1, 1)), L, S)
        mask = _merged(padding, mask, added)
    if need_weights:
        o, weights = _with_weights(q, k, v, mask, heads.dropout_p)
    else:
        o, weights = F.scaled_dot_product_attention(q, k, v, mask, heads.dropout_p, kept), None
    o = o.transpose(1, 2) if batch_first else o.permute(2, 0, 1, 3)
    y = out_proj(o.flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if not batched:
        y, weights = y.squeeze(1), None if weights is None else weights.squeeze(0)
    return y, weights


def _projected(
    query: Tensor, key: Tensor, value: Tensor, in_proj: Projection, E: int
) -> tuple[Tensor, ...]:
    """``q [..., L, E]``, ``k`` and ``v [..., S, E]``."""
    if query is key and key is value:
        return in_proj(query).chunk(3, -1)
    if key is value:
        return in_proj.rows(0, E)(query), *in_proj.rows(E, 3 * E)(key).chunk(2, -1)
    v = in_proj.rows(2 * E, 3 * E)(value)
    if query is key:
        return *in_proj.rows(0, 2 * E)(query).chunk(2, -1), v
    return in_proj.rows(0, E)(query), in_proj.rows(E, 2 * E)(key), v


def _by_heads(x: Tensor, num_heads: int, batch_first: bool) -> Tensor:
    """``[N, L, E]`` or ``[L, N, E]`` → ``[N, num_heads, L, D]``, a view."""
    x = x.unflatten(-1, (num_heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _longer(k: Tensor, v: Tensor, heads: Heads) -> tuple[Tensor, Tensor, int]:
    """``k`` and ``v [N, H, S + added, D]`` with ``bias_k``, ``bias_v`` and zeros, and how many."""
    N, H, _, D = k.shape
    added = 0
    if heads.bias_k is not None and heads.bias_v is not None:
        k = torch.cat([k, heads.bias_k.view(1, H, 1, D).expand(N, H, 1, D)], dim=2)
        v = torch.cat([v, heads.bias_v.view(1, H, 1, D).expand(N, H, 1, D)], dim=2)
        added += 1
    if heads.add_zero_attn:
        k = torch.cat([k, k.new_zeros((N, H, 1, D))], dim=2)
        v = torch.cat([v, v.new_zeros((N, H, 1, D))], dim=2)
        added += 1
    return k, v, added


def _merged(padding: Tensor | None, mask: Tensor | None, added: int) -> Tensor | None:
    """One mask of both, which leaves the ``added`` last keys to be seen."""
    if padding is not None:
        mask = padding if mask is None else mask + padding
    return F.pad(mask, (0, added)) if mask is not None and added else mask


def _with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """``o [N, H, L, D]`` and the weights ``[N, H, L, S]``, as PyTorch's own calls make them."""
    (N, H, L, D), S = q.shape, k.shape[2]
    q = q.reshape(N * H, L, D)
    k, v = (one.reshape(N * H, S, D) for one in (k, v))
    q = q * math.sqrt(1.0 / D)
    if mask is None:
        weights = torch.bmm(q, k.transpose(1, 2))
    else:
        one_for_all = mask.shape[0] == mask.shape[1] == 1
        mask = mask[0] if one_for_all else mask.expand(N, H, -1, -1).flatten(0, 1)
        weights = torch.baddbmm(mask, q, k.transpose(1, 2))
    weights = F.softmax(weights, dim=-1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, p=dropout_p)
    return torch.bmm(weights, v).view(N, H, L, D), weights.view(N, H, L, S)


def why_not_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    E: int,
    heads: Heads,
    need_weights: bool = True,
) -> str | None:
    """What of a call of ``multihead_attention`` doesn't fit the layer or the rest, or None."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested:
            return (
                f"{name} is nested, expected a padded tensor and a key_padding_mask: of an "
                "nn.TransformerEncoder set use_nested_tensor to False, or make it with "
                "enable_nested_tensor=False"
            )
        if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != E:
            expected = "two or three" if x is query else f"{query.dim()}"
            return (
                f"{name} has shape {list(x.shape)}, expected {expected} dimensions, the last of {E}"
            )
    if not _is_of(value, key.shape):
        return f"value has shape {list(value.shape)}, expected that of key, {list(key.shape)}"
    N, L, S = _sizes(query, key, heads.batch_first)
    if query.dim() == 3 and key.shape[0 if heads.batch_first else 1] != N:
        return f"key has shape {list(key.shape)}, expected a batch of {N}, as query has"
    if is_causal and attn_mask is None:
        return "is_causal is True, expected the causal mask as attn_mask beside it"
    for name, mask, shapes in (
        ("key_padding_mask", key_padding_mask, ((N, S),) if query.dim() == 3 else ((S,),)),
        ("attn_mask", attn_mask, ((L, S), (N * heads.num_heads, L, S))),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            return f"{name} is {mask.dtype}, expected torch.bool or floats"
        if name == "attn_mask" and _is_hint_alone(key_padding_mask, is_causal, need_weights):
            continue
        if not any(_is_of(mask, shape) for shape in shapes):
            expected = " or ".join(str(list(shape)) for shape in shapes)
            return f"{name} has shape {list(mask.shape)}, expected {expected}"
    return None


def _is_hint_alone(key_padding_mask: Tensor | None, is_causal: bool, need_weights: bool) -> bool:
    """Whether ``is_causal`` is passed on in place of ``attn_mask``."""
    return is_causal and key_padding_mask is None and not need_weights


def _is_of(x: Tensor, shape: Sequence[int]) -> bool:
    """Whether ``x`` has this shape; for ``torch.compile`` one of a symbol is never ``in`` a tuple."""
    return x.dim() == len(shape) and all(
        size == expected for size, expected in zip(x.shape, shape, strict=True)
    )


def _sizes(query: Tensor, key: Tensor, batch_first: bool) -> tuple[int, int, int]:
    """``N, L, S``."""
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    batch, length = (0, 1) if batch_first else (1, 0)
    return query.shape[batch], query.shape[length], key.shape[length]


def _added(mask: Tensor | None, dtype: torch.dtype, *sizes: int) -> Tensor | None:
    """What is added to the scores: ``-inf`` where a mask of truth values is True."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.reshape(sizes)
