"""Rules by which DTensors go through the registered operations: what each rank computes of its parts.

A rule shares out one axis over one dimension of a mesh; PyTorch combines them, and moves what no rule
fits. A tensor that has the axis is cut along it. A result that is a sum over it is pending, ``Partial``,
until someone needs it; so is then what is added to it. So the low-rank term of y adds no collective to
that of the frozen one, and ``dA`` or ``dB`` one of its own size. A weight of another format than dense
is on every rank. There is no dropout here: a mask is of the whole tensor, and ``unstrided`` has it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from lorafast import operands

_WHOLE = "-"
"""Stands for no axis: every rank has all."""


@functools.cache
def tell_dtensor() -> None:
    """Registers the rules with PyTorch, once. Called where a DTensor comes, not when this package is
    imported: ``torch.distributed.tensor`` takes a second."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, rules in _RULES.items():
        register_sharding(getattr(torch.ops.lorafast, name).default)(rules)


class _Rules:
    """The rules of a call: ``x`` has any number of dimensions before its last, M the first of them."""

    def __init__(self, x: Any, given: Sequence[tuple[Any, str]], weight: str | None = None) -> None:
        self._dims = len(x.shape)
        self._given = [axes for tensor, axes in given if tensor is not None]
        self._whole_weight = weight not in (None, operands.DENSE)

    def by(
        self, axis: str, results: Sequence[str], pending: str = ""
    ) -> tuple[list[Any], list[Any]]:
        """The one that shares out ``axis``. ``results``: their axes, with a + before that of a sum over
        it; ``pending``: which of the arguments, by their axes, are added to such a sum."""
        given = [self._placement(axis, axes, axes in pending.split()) for axes in self._given]
        found = [self._placement(axis, axes.lstrip("+"), axes[0] == "+") for axes in results]
        return found, given

    def all(self, *rules: tuple[str, str, str]) -> list[tuple[list[Any], list[Any]]]:
        """Rules as text, those that fit: an axis, the results, what is pending."""
        _, results, _ = rules[0]
        found = [self.by(_WHOLE, [one.lstrip("+") for one in results.split()])]
        for axis, results, pending in rules:
            if self._whole_weight and axis in "NK":
                continue
            if axis != "M" or self._dims > 1:
                found.append(self.by(axis, results.split(), pending))
        return found

    def _placement(self, axis: str, axes: str, is_sum: bool) -> Any:
        from torch.distributed.tensor import Partial, Replicate, Shard

        if axis != _WHOLE and axis in axes:
            # [..., K]: the last dimension, and not that of a matrix.
            last = axes.startswith("...") and axes.endswith(axis)
            return Shard(self._dims - 1 if last else axes.removeprefix("...").index(axis))
        return Partial() if is_sum else Replicate()


def _lora_linear(
    x: Any, weight: Sequence[Any], format: str, A: Any, B: Any, scaling: float, bias: Any = None,
    *_: Any,
) -> Any:  # fmt: skip
    stored = [(one, "NK") for one in weight]
    given = [(x, "...MK"), *stored, (A, "rK"), (B, "Nr"), (bias, "N")]
    return _Rules(x, given, format).all(
        ("M", "...MN Mr", ""), ("N", "...MN Mr", ""), ("K", "+...MN +Mr", "N")
    )


def _lora_linear_backward(
    dy: Any, x: Any, weight: Sequence[Any], format: str, A: Any, B: Any, s: Any, *_: Any
) -> Any:
    stored = [(one, "NK") for one in weight]
    given = [(dy, "...MN"), (x, "...MK"), *stored, (A, "rK"), (B, "Nr"), (s, "Mr")]
    return _Rules(x, given, format).all(
        ("M", "...MK +rK +Nr", ""), ("N", "+...MK +rK Nr", ""), ("K", "...MK rK +Nr", "Mr")
    )


def _shrink(x: Any, A: Any, *_: Any) -> Any:
    return _Rules(x, [(x, "MK"), (A, "rK")]).all(("M", "Mr", ""), ("K", "+Mr", ""), ("r", "Mr", ""))


def _shrink_backward(ds: Any, x: Any, *_: Any) -> Any:
    given = [(ds, "Mr"), (x, "MK")]
    return _Rules(x, given).all(("M", "+rK", ""), ("K", "rK", ""), ("r", "rK", ""))


def _expand(s: Any, B: Any, *_: Any) -> Any:
    return _Rules(s, [(s, "Mr"), (B, "Nr")]).all(("M", "MN", ""), ("N", "MN", ""), ("r", "+MN", ""))


def _expand_backward(dy: Any, s: Any, B: Any, scaling: float, wants: str = "ds,dB", *_: Any) -> Any:
    asked = wants.split(",")

    def of(ds: str, dB: str, dbias: str) -> str:  # what isn't wanted is empty
        named = {"ds": ds, "dB": dB, "dbias": dbias}
        return " ".join(axes if name in asked else "-" for name, axes in named.items())

    rules = _Rules(dy, [(dy, "MN"), (s, "Mr"), (B, "Nr")])
    return rules.all(
        ("M", of("Mr", "+Nr", "+N"), ""),
        ("N", of("+Mr", "Nr", "N"), ""),
        ("K", of("Mr", "+Nr", "N"), "Mr"),  # of x, whose shares s is a sum over
    )


def _linear_expand(
    x: Any, weight: Sequence[Any], format: str, s: Any, B: Any, scaling: float, bias: Any = None,
    dropout_p: float = 0.0, seed: Any = None, transposed: bool = False,
) -> Any:  # fmt: skip
    stored = [(one, "NK") for one in weight]
    a, b = "NK" if transposed else "KN"  # y [..., b] is a sum over a
    given = [(x, f"M{a}"), *stored, (s, "Mr"), (B, f"{b}r"), (bias, b)]
    return _Rules(x, given, format).all(
        ("M", f"M{b}", ""), (b, f"M{b}", ""), (a, f"+M{b}", f"Mr {b}")
    )


_RULES = {
    "expand": _expand,
    "expand_backward": _expand_backward,
    "linear_expand": _linear_expand,
    "lora_linear": _lora_linear,
    "lora_linear_backward": _lora_linear_backward,
    "shrink": _shrink,
    "shrink_backward": _shrink_backward,
}
