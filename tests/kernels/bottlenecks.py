"""Bottleneck adapters, drawn and held to the contract."""

import torch

from lorafast import reference
from lorafast.core.problem import WANTS
from lorafast.reference import contract
from lorafast.reference.bottleneck import pre_activation

GRADIENTS = WANTS["bottleneck_backward"]
_OWN = ("h", "dy", "residual")


def drawn(M, K, N, b, dtype, adapter_dtype, device, *, biases=True, residual=False, seed=0):
    """Arguments of the kernels by name, and ``dy``; what isn't there is None."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "h": (M, K), "down": (b, K), "up": (N, b), "down_bias": (b,), "up_bias": (N,),
        "residual": (M, N), "dy": (M, N),
    }  # fmt: skip
    missing = {"down_bias": not biases, "up_bias": not biases, "residual": not residual}
    return {
        name: None
        if missing.get(name)
        else torch.randn(size, generator=generator, dtype=torch.float64).to(
            device, dtype if name in _OWN else adapter_dtype
        )
        for name, size in sizes.items()
    }


def results(given, scaling, activation, forward, backward):
    """``y``, ``a`` and the gradients by name, of functions of a call's arguments."""
    t = dict(given)
    dy = t.pop("dy")
    y, a = forward(**t, scaling=scaling, activation=activation)
    rest = (t["down"], t["up"], scaling, activation, t["residual"] is not None)
    found = dict(zip(GRADIENTS, backward(dy, t["h"], a, *rest), strict=True))
    return {"y": y, "a": a} | found


def _reference(h, down, up, down_bias, up_bias, scaling, activation, residual):
    y = reference.bottleneck(h, down, up, down_bias, up_bias, scaling, activation, residual)
    return y, pre_activation(h, down, down_bias)


def assert_right(found, given, scaling, activation):
    """The contract, of what ``results`` gave; what is None in it is not asked for.

    The sizes are those of an activation that changes nothing: of squares, which are positive, that is
    relu. No other's slope is much steeper.
    """
    exact = {name: None if t is None else t.double() for name, t in given.items()}
    squared = {name: None if t is None else t.square() for name, t in exact.items()}
    eager, ref64, size64 = (
        results(t, factor, f, _reference, reference.bottleneck_backward)
        for t, factor, f in (
            (given, scaling, activation),
            (exact, scaling, activation),
            (squared, scaling**2, "relu"),
        )
    )
    size64 = {name: t.sqrt() for name, t in size64.items()}
    bounds = contract.bounds(eager, ref64, size64, dtype=given["h"].dtype)
    asked = {name: bound for name, bound in bounds.items() if found[name] is not None}
    reason = contract.why_any_broken({name: found[name] for name in asked}, asked)
    assert reason is None, reason
