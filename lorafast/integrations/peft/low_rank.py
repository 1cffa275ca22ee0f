"""LoRA's relatives: adapters that are ``scaling · (drop(x)·Aᵀ)·Bᵀ`` once what they train is in A and B.

``vera``, ``adalora`` and ``loha`` each describe a ``Kind``. Here is what they share: the rules, and one
pass over x.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafast import functional
from lorafast.core.context import alone, autocast_enabled
from lorafast.integrations.peft import quantized, rules
from lorafast.integrations.peft.adapters import weight_of
from lorafast.operands import Operand, Weight
from lorafast.ops.scaled_lora_linear import folded

_FEW = 1 << 15
"""Elements of x and y below which PyTorch's own calls, differentiated by itself, take less time than an
``autograd.Function`` does on the host."""
_OF_WIDE = 16
"""What K or N is at most of a rank that is wide: at 768² the pass takes less time at 16 and more at 64,
at 2048² less at 64 and more at 256."""


class Part(NamedTuple):
    """One active adapter of a layer as PEFT keeps it; the tensors by the names that PEFT has."""

    name: str
    tensors: dict[str, Any]
    dropout: Any = None


class Term(NamedTuple):
    """``scaling · d_out ⊙ ((drop(x)·Aᵀ) ⊙ m)·Bᵀ``: ``lora_A [r, K]``, ``lora_B [N, r]``, ``m [r]`` and
    ``d_out [N]``, or None. Without ``lora_B``, as in a small call, ``lora_A`` is ``ΔW [N, K]``."""

    lora_A: Tensor
    lora_B: Tensor | None
    scaling: float
    dropout: Any = None
    m: Tensor | None = None
    d_out: Tensor | None = None

    @property
    def dropout_p(self) -> float:
        """The probability of dropping an element; 0 unless it is in training."""
        p: float = self.dropout.p if drops(self.dropout) else 0.0
        return p

    def folded(self) -> "Term":
        """The same without vectors: they are in A and B."""
        assert self.lora_B is not None
        A, B = folded(self.lora_A, self.lora_B, None, self.m, self.d_out)
        return Term(A, B, self.scaling, self.dropout)


def drops(dropout: Any) -> bool:
    """Whether it is a dropout in training, not the identity."""
    return type(dropout) is nn.Dropout and dropout.training


class Kind(NamedTuple):
    """A kind of adapter.

    ``parts(layer)``: its active adapters. ``why_not(layer, part, N, K)``: why one doesn't fit a layer of
    ``W [N, K]``, as the end of a sentence, or None. ``term(layer, part, N, K, small)``: its A and B, or
    None for one that adds nothing in this call, which may be ``small``. ``as_input``: whether PEFT's
    result has the dtype of x, not that of the base layer's. ``wider(layer, part)``: the dtype to which
    an adapter promotes it.
    """

    parts: Callable[[Any], list[Part]]
    why_not: Callable[[Any, Part, int, int], str | None]
    term: Callable[[Any, Part, int, int, bool], Term | None]
    as_input: bool
    wider: Callable[[Any, Part], torch.dtype] | None = None


def active(layer: Any) -> Sequence[str]:
    """The names of the active adapters, whether the layer has them or not."""
    names = layer._active_adapter
    return (names,) if isinstance(names, str) else names


def entries(layer: Any, name: str) -> Any:
    """A ``ParameterDict`` of a layer, as a dictionary if it has nothing but parameters.

    Its own look-up takes nn.Module's, ten times as long.
    """
    kept = layer._modules[name]
    found = kept._parameters
    return found if len(found) == len(kept) else kept


def why_stock(layer: Any, kind: Kind) -> str | None:
    """Why a layer of ``kind`` is left to PEFT, whatever its input, as the end of a sentence."""
    parts = kind.parts(layer)
    return why_stock_parts(layer, parts) or why_none_fits(layer, parts, kind)


def why_stock_parts(layer: Any, parts: Sequence[Part]) -> str | None:
    """The same of what every kind must have: a base layer, plain tensors of one dtype."""
    reason = rules.why_stock(layer, parts) or rules.why_not_base(layer._modules["base_layer"])
    return reason or why_not_tensors(parts)


def why_not_tensors(parts: Sequence[Part]) -> str | None:
    """Why adapters can't be read: they must be plain tensors of one dtype."""
    dtype = None
    for name, tensors, dropout in parts:
        if dropout is not None:
            reason = rules.why_not_dropout(name, dropout)
            if reason is not None:
                return reason
        for what, tensor in tensors.items():
            if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
                return (
                    f"{what} of adapter {name!r} is a {type(tensor).__name__}, not a plain tensor"
                )
            if tensor.is_meta or tensor.layout is not torch.strided:
                return f"{what} of adapter {name!r} is on the meta device, or not strided"
            dtype = dtype or tensor.dtype
            if tensor.dtype is not dtype:
                return f"{what} of adapter {name!r} is {tensor.dtype}, another is {dtype}"
    return None


def why_none_fits(layer: Any, parts: Sequence[Part], kind: Kind) -> str | None:
    """Why an adapter doesn't fit its layer, by its name."""
    weight = weight_of(layer._modules["base_layer"])
    N, K = weight.shape[0], math.prod(weight.shape[1:])
    for part in parts:
        reason = kind.why_not(layer, part, N, K)
        if reason is not None:
            return f"adapter {part.name!r} {reason}"
    return None


def why_not_shapes(part: Part, **shapes: tuple[int, ...]) -> str | None:
    """Why the tensors of an adapter don't have the shapes that their kind gives them, by name."""
    for what, shape in shapes.items():
        found = tuple(part.tensors[what].shape)
        if found != shape:
            return f"has {what} of shape {list(found)}, expected {list(shape)}"
    return None


def why_stock_input(layer: Any, parts: Sequence[Part], weight: Weight, x: Any) -> str | None:
    """Why a layer that ``why_stock`` has nothing against is left to PEFT for this input."""
    tensors = [tensor for part in parts for tensor in part.tensors.values()]
    reason = rules.why_not_input(layer, tensors[0].dtype, weight, x)
    if reason is not None:
        return reason
    device = x.device
    for tensor in tensors:
        if tensor.device != device:
            return f"its input is on {device}, and an adapter isn't"
    return None


def frozen(
    layer: Any, parts: Sequence[Part], x: Tensor
) -> tuple[Weight, Tensor | None, torch.dtype | None] | None:
    """W, bias and the dtype of the base layer's result, where it is another than they give.

    Of a layer that ``why_stock`` has nothing against; None where this input is left to PEFT.
    """
    base = layer._modules["base_layer"]
    weight, bias = weight_of(base), base._parameters["bias"]
    if why_stock_input(layer, parts, weight, x) is not None:
        return None
    result = None
    if isinstance(weight, Operand):
        weight, bias, result, _ = quantized.frozen(base, x)
    return weight, bias, result


def forward(layer: Any, x: Tensor, kind: Kind) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    parts = kind.parts(layer)
    if why_stock_parts(layer, parts) is not None:
        return None
    if why_none_fits(layer, parts, kind) is not None:
        return None
    found = frozen(layer, parts, x)
    if found is None:
        return None
    weight, bias, result = found
    N, K = weight.shape
    small = is_small(x, weight, next(iter(parts[0].tensors.values())).dtype)
    terms = [term for part in parts if (term := kind.term(layer, part, N, K, small)) is not None]
    if small or apart(x, weight) or _wide_on_cpu(x, weight, terms):
        y = base_linear(x, weight, bias)
        y = _added(y, x, terms).to(y.dtype)
    else:
        y = in_one_pass(x, weight, bias, terms)
    if kind.as_input:
        result = x.dtype
    if kind.wider is not None:
        for part in parts:
            result = torch.promote_types(result or y.dtype, kind.wider(layer, part))
    return y if result is None else y.to(result)


def in_one_pass(x: Tensor, weight: Weight, bias: Tensor | None, terms: list[Term]) -> Tensor:
    """``x·Wᵀ + bias`` and the terms.

    Several terms are one: A's stacked, B's side by side. Where each drops elements of its own, the first
    is in the pass and the others are added to it; wider ones than the weight are all added to the base
    layer, so that their sum is rounded once.
    """
    if not terms:
        return base_linear(x, weight, bias)
    first, *others = [term.folded() for term in terms]
    added: list[Term] = []
    if others and any(term.dropout_p for term in terms):
        if first.lora_A.dtype is not weight.dtype:
            y = base_linear(x, weight, bias)
            return _added(y, x, terms).to(y.dtype)
        added, others = others, []
    A, B, scaling = as_one([first, *others])
    y = functional.lora_linear(x, weight, A, B, scaling, bias, dropout_p=first.dropout_p)
    return _added(y, x, added).to(y.dtype) if added else y


def as_one(terms: Sequence[Term]) -> tuple[Tensor, Tensor, float]:
    """A, B and the scaling of a sum of terms that have no vectors."""
    every: Any = terms
    if len(terms) == 1:
        return every[0].lora_A, every[0].lora_B, every[0].scaling
    A = torch.cat([term.lora_A for term in every])
    return A, torch.cat([term.lora_B * term.scaling for term in every], 1), 1.0


def _added(y: Tensor, x: Tensor, terms: list[Term]) -> Tensor:
    """By PyTorch's own calls, in the widest dtype: the caller rounds it."""
    for A, B, scaling, dropout, m, d_out in terms:
        left = x.to(A.dtype)
        if type(dropout) is nn.Dropout:
            left = dropout(left)
        added = F.linear(left, A)
        if B is not None:
            added = F.linear(added if m is None else added * m, B)
        if d_out is not None:
            added = added * d_out
        y = y + added if scaling == 1.0 else torch.add(y, added, alpha=scaling)
    return y


def is_small(x: Tensor, weight: Weight, dtype: torch.dtype) -> bool:
    """Whether a layer with adapters of this dtype takes the host longer than its products.

    Narrow adapters would be rounded between those, and so would any under autocast.
    """
    N, K = weight.shape
    return (
        x.numel() * (K + N) < _FEW * K
        and dtype is torch.float32
        and not torch.compiler.is_compiling()
        and not autocast_enabled(x)
        and alone()
    )


def is_tiny(N: int, K: int) -> bool:
    """Whether ΔW ``[N, K]`` takes the host no longer than a row of it does."""
    return N * K < _FEW


def apart(x: Tensor, weight: Weight) -> bool:
    """Whether a quantized weight computes in another dtype than that of x."""
    return isinstance(weight, Operand) and weight.dtype is not x.dtype


def _wide_on_cpu(x: Tensor, weight: Weight, terms: Sequence[Term]) -> bool:
    """Whether PyTorch's own calls take less time than the pass, as measured on a CPU in float32.

    Gradients of vectors that are folded into a frozen B take one more product over y and r, which
    keeping ``s·Bᵀ`` spares. In 16 bits the pass wins that back.
    """
    if x.device.type != "cpu" or x.dtype is not torch.float32 or isinstance(weight, Operand):
        return False
    if autocast_enabled(x):
        return False
    wide = min(weight.shape) // _OF_WIDE
    return any(
        B is not None and d_out is not None and not B.requires_grad and B.shape[1] > wide
        for _, B, _, _, _, d_out in terms
    )


def base_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias`` in the dtype of x, over a dense or a quantized weight, under autocast too."""
    if isinstance(weight, Operand):
        return functional.quantized_linear(x.to(weight.dtype), weight, bias).to(x.dtype)
    return F.linear(x, weight, bias)


def is_dense_like(weight: Weight, x: Tensor) -> bool:
    """Whether a weight is a plain matrix in the dtype of x."""
    return not isinstance(weight, Operand) and weight.dtype is x.dtype


def product(vectors: Iterable[Tensor]) -> Tensor:
    """The elementwise product of one vector or more."""
    return functools.reduce(torch.mul, vectors)
