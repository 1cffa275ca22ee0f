"""Layers that share x, drawn in float64: together, by themselves, by the reference."""

from types import SimpleNamespace

import torch

from lorafast import ops, reference
from lorafast.ops.siblings import Shared, Sibling

SHAPES = {"q": (19, 3, 0.5), "k": (7, 16, 2.0), "v": (12, 5, 1.0)}
"""N, r and scaling of each sibling."""
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
}


def drawn(M=(5, 9), K=21, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

    layers = {
        name: SimpleNamespace(
            W=draw(N, K), A=draw(r, K), B=draw(N, r), bias=draw(N), dy=draw(*M, N)
        )
        for name, (N, r, _) in SHAPES.items()
    }
    layers["k"].bias = None
    return draw(*M, K), layers


def shared(x, siblings, order=None):
    """Every y, taken in an order."""
    keys = dict(zip(siblings, range(len(siblings)), strict=True))
    one = Shared(x, {keys[name]: sibling for name, sibling in siblings.items()})
    taken = {name: one.take(keys[name], x) for name in order or siblings}
    assert not one.left or order is not None
    return taken


def by_themselves(x, siblings, order=None):
    return {
        name: ops.lora_linear(x, s.weight, s.lora_A, s.lora_B, s.scaling, s.bias)
        for name, s in siblings.items()
        if order is None or name in order
    }


def by_reference(x, siblings, order=None):
    return {
        name: reference.lora_linear(x, s.weight, s.lora_A, s.lora_B, s.scaling, s.bias)
        for name, s in siblings.items()
        if order is None or name in order
    }


def step(run, x, layers, dtype, adapter_dtype, order=None, cast=None, frozen=(), need_dx=True):
    """Outputs and gradients by name."""
    cast = cast or (lambda tensor, other=dtype: tensor.to(other))
    x = cast(x).requires_grad_(need_dx)
    siblings, leaves = {}, {"x": x} if need_dx else {}
    for name, one in layers.items():
        A, B = cast(one.A, adapter_dtype), cast(one.B, adapter_dtype)
        for half, tensor in (("A", A), ("B", B)):
            if f"{name}.{half}" not in frozen:
                leaves[f"{name}.{half}"] = tensor.requires_grad_()
        bias = None if one.bias is None else cast(one.bias)
        siblings[name] = Sibling(cast(one.W), A, B, SHAPES[name][2], bias)
    ys = run(x, siblings, order)
    dys = [cast(layers[name].dy) for name in ys]
    found = torch.autograd.grad(list(ys.values()), list(leaves.values()), dys, allow_unused=True)
    return ys | {f"d{name}": t for name, t in zip(leaves, found, strict=True) if t is not None}
