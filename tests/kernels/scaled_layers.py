"""Frozen layers with a vector, drawn and held to the contract."""

import torch

from lorafast import reference
from lorafast.reference import contract


def drawn(M, K, N, dtype, scale_dtype, device, *, scales_input, bias=True, seed=0):
    """Arguments by name, and ``dy``; every fifth element of the vector is 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "x": (M, K), "weight": (N, K), "scale": (K if scales_input else N,), "bias": (N,),
        "dy": (M, N),
    }  # fmt: skip
    found = {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in sizes.items()
    }
    found["scale"][::5] = 0.0
    return {
        name: None
        if name == "bias" and not bias
        else t.to(device, scale_dtype if name == "scale" else dtype)
        for name, t in found.items()
    }


def results(given, scales_input, forward, backward):
    """``y``, ``z``, ``dx`` and ``dscale`` by name, of functions of a call's arguments."""
    t = dict(given)
    dy = t.pop("dy")
    y, z = forward(**t, scales_input=scales_input)
    kept = t["x"] if scales_input else z
    dx, dscale = backward(dy, kept, t["weight"], t["scale"], scales_input)
    found = {"y": y, "dx": dx, "dscale": dscale}
    return found if scales_input else found | {"z": z}


def by_reference(x, weight, scale, bias, scales_input):
    """``y`` and ``z``."""
    z = None if scales_input else torch.nn.functional.linear(x, weight, bias)
    return reference.scaled_linear(x, weight, scale, bias, scales_input), z


def gradients_by_reference(dy, kept, weight, scale, scales_input):
    """``dx`` and ``dscale``."""
    dx = reference.scaled_dx(dy, weight, scale, scales_input)
    return dx, reference.scaled_dscale(dy, kept, weight, scale.dtype, scales_input)


def assert_right(found, given, scales_input):
    """The contract, of what ``results`` gave; what is None in it is not asked for. The sizes are those
    of the same over squares, which are positive."""
    exact = {name: None if t is None else t.double() for name, t in given.items()}
    squared = {name: None if t is None else t.square() for name, t in exact.items()}
    eager, ref64, size64 = (
        results(t, scales_input, by_reference, gradients_by_reference)
        for t in (given, exact, squared)
    )
    size64 = {name: t.sqrt() for name, t in size64.items()}
    bounds = contract.bounds(eager, ref64, size64, dtype=given["x"].dtype)
    asked = {name: bound for name, bound in bounds.items() if found[name] is not None}
    reason = contract.why_any_broken({name: found[name] for name in asked}, asked)
    assert reason is None, reason
