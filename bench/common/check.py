"""Correctness before time: a contender must compute the layer's function and its gradients.

The yardstick is the package's one contract (``lorafast.reference.contract``), for y, dx, dA and dB.

Every contender draws its own dropout mask, and a compiled one draws it out of reach. So the mask is
read back: with W = 0 and ``ds·A = 1`` everywhere, dx *is* the mask, and from the same state of the
generator the layer draws the same mask for the real tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lorafast.bench.common.contenders import Contender
from lorafast.bench.common.problem import SCALING, Problem, Tensors
from torch import Tensor

from lorafast import reference
from lorafast.reference import contract

_SEED = 20_261_123
_LETTERS = {"x": "dx", "lora_A": "dA", "lora_B": "dB"}


@dataclass(frozen=True)
class Dropped:
    """What a dropout does to x: zero where not ``keep``, else times ``scale``."""

    keep: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.keep, x, 0.0) * self.scale


def run(contender: Contender, x: Tensor, dy: Tensor, seed: int = _SEED) -> dict[str, Tensor]:
    """One forward and backward: ``y``, ``dx`` and the gradients of the contender's parameters."""
    x = x.detach().requires_grad_()
    contender.clear_gradients()
    torch.manual_seed(seed)
    with contender.context():
        y = contender.layer(x)
        y.backward(dy)
    inputs = {"x": x, **contender.parameters}
    found = {"y": y.detach()}
    for name, tensor in inputs.items():
        if tensor.grad is not None:
            found[_LETTERS[name]] = tensor.grad
    contender.clear_gradients()
    return found


def expected(
    tensors: Tensors, dropped: Dropped | None, adapted: bool, dtype: torch.dtype | None, power: int
) -> dict[str, Tensor]:
    """The reference on all tensors to the ``power``, in ``dtype`` (None: each in its own)."""

    def cast(tensor: Tensor) -> Tensor:
        return (tensor if dtype is None else tensor.to(dtype)) ** power

    x = cast(tensors.x[0]).requires_grad_()
    lora_A, lora_B = (cast(t).requires_grad_() for t in (tensors.lora_A, tensors.lora_B))
    bias = None if tensors.bias is None else cast(tensors.bias)
    if dropped is not None:
        dropped = Dropped(dropped.keep, dropped.scale**power)
    inputs = {"x": x}
    if adapted:
        wide = x.to(reference.wide(x.dtype))
        s = reference.shrink(x if dropped is None else dropped(wide), lora_A)
        y = reference.linear_expand(x, cast(tensors.weight), s, lora_B, SCALING**power, bias)
        inputs |= {"lora_A": lora_A, "lora_B": lora_B}
    else:
        y = torch.nn.functional.linear(x, cast(tensors.weight), bias)
    gradients = torch.autograd.grad(y, list(inputs.values()), cast(tensors.dy[0]))
    named = zip((_LETTERS[name] for name in inputs), gradients, strict=True)
    return {"y": y.detach(), **dict(named)}


@contextmanager
def _probing(contender: Contender, tensors: Tensors) -> Iterator[Tensor]:
    """W = 0, A = 1, B's first row ``1 / (SCALING · r)``: yields the dy under which ``ds·A = 1``."""
    changed = (*tensors.frozen(), *contender.parameters.values())
    before = [tensor.detach().clone() for tensor in changed]
    lora_A, lora_B = contender.parameters["lora_A"], contender.parameters["lora_B"]
    dy = torch.zeros_like(tensors.dy[0])
    dy[:, 0] = 1.0
    try:
        with torch.no_grad():
            for tensor in tensors.frozen():
                tensor.zero_()
            lora_A.fill_(1.0)
            lora_B.zero_()[0] = 1 / (SCALING * lora_A.shape[0])
        yield dy
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)


def mask_of(contender: Contender, problem: Problem, tensors: Tensors) -> Dropped | None:
    """The mask that ``run`` will draw, read back from the contender itself; None without dropout."""
    if not problem.dropout_p or not contender.parameters:
        return None
    return Dropped(_read_mask(contender, tensors, _SEED), contender.survivor_scale)


def _read_mask(contender: Contender, tensors: Tensors, seed: int) -> Tensor:
    with _probing(contender, tensors) as dy:
        return run(contender, tensors.x[0], dy, seed)["dx"] != 0


class Judge:
    """Holds contenders against the reference on one problem's first input set."""

    def __init__(self, problem: Problem, tensors: Tensors) -> None:
        self._problem = problem
        self._tensors = tensors
        self._without_dropout: dict[bool, dict[str, contract.Bound]] = {}

    def why_wrong(self, contender: Contender) -> str | None:
        """What is wrong with the contender's results, or None."""
        problem, tensors = self._problem, self._tensors
        dropped = mask_of(contender, problem, tensors)
        if dropped is not None:
            other = _read_mask(contender, tensors, _SEED + 1)
            reason = _why_no_mask(dropped.keep, other, problem.dropout_p)
            if reason is not None:
                return reason
        found = run(contender, tensors.x[0], tensors.dy[0])
        return contract.why_any_broken(found, self._bounds(bool(contender.parameters), dropped))

    def _bounds(self, adapted: bool, dropped: Dropped | None) -> dict[str, contract.Bound]:
        if dropped is None and adapted in self._without_dropout:
            return self._without_dropout[adapted]
        eager = expected(self._tensors, dropped, adapted, None, 1)
        ref64 = expected(self._tensors, dropped, adapted, torch.float64, 1)
        squared64 = expected(self._tensors, dropped, adapted, torch.float64, 2)
        size64 = {name: value.abs().sqrt() for name, value in squared64.items()}
        bounds = contract.bounds(eager, ref64, size64)
        if dropped is None:
            self._without_dropout[adapted] = bounds
        return bounds


def why_wrong(contender: Contender, problem: Problem, tensors: Tensors) -> str | None:
    """What is wrong with the contender's results, or None."""
    return Judge(problem, tensors).why_wrong(contender)


def raised(error: Exception) -> str:
    """An exception in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"it raised {type(error).__name__}: {first}"


def _why_no_mask(keep: Tensor, other: Tensor, dropout_p: float) -> str | None:
    """A mask drops each element with probability p, in every row and column, and changes."""
    count = keep.numel()
    dropped = ~keep
    share = dropped.sum().item() / count
    if not _plausible(dropped.sum().reshape(1), count, dropout_p):
        return f"{share:.2%} of x is dropped, expected {dropout_p:.2%}"
    for dimension, name in ((0, "column"), (1, "row")):
        if not _plausible(dropped.sum(dimension), keep.shape[dimension], dropout_p):
            return f"x is not dropped evenly: a {name} lost too many elements or too few"
    # Masks of a few elements may well be equal by chance.
    if count * dropout_p * (1 - dropout_p) > 100 and torch.equal(keep, other):
        return "two dropout masks in a row are the same"
    return None


def _plausible(dropped: Tensor, of: int, dropout_p: float) -> bool:
    """Whether each count is within seven standard deviations of what is expected.

    Seven more elements are granted, because few elements have longer tails, and a 65536th because
    probabilities are quantised.
    """
    slack = 7 * (of * dropout_p * (1 - dropout_p)) ** 0.5 + 7 + of / 65536
    return bool(((dropped - dropout_p * of).abs() <= slack).all())
