"""Every kind of adapter under ``torch.func``, in forward mode, and differentiated twice.

The oracle of first derivatives is PyTorch's backward through the layer, for one element of y after
another; of second ones ``torch.func.hessian``, which differentiates PyTorch's own operations.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import lorafast
from lorafast import functional


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixed = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        # PyTorch's fused attention has neither a tangent nor a second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return self.mixed(x, x, x, need_weights=False)[0]


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x)], -1)


class Function(nn.Module):
    """A public function over a frozen W ``[4, 6]``, with the adapter's parameters."""

    def __init__(self, call, **shapes):
        super().__init__()
        self.call = call
        self.register_buffer("weight", torch.randn(4, 6))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.call(x, self.weight, **self._parameters)


def vera(x, weight, A, B, m, d_out):
    return functional.scaled_lora_linear(x, weight, A, B, 0.5, m=m, d_out=d_out)


def lokr(x, weight, w1, c, d):
    return functional.lokr_linear(x, weight, w1, (c, d), 0.5)


def grouped(x, weight, A, B):
    adapter_of = torch.ones(x.shape[:1], dtype=torch.int64)
    return functional.grouped_lora_linear(x, weight, A, B, 0.5, adapter_of)


def bottleneck(x, weight, down, up):
    return functional.bottleneck(x @ weight.t(), down, up, activation="gelu")


IMAGE, ROWS, WIDE = (2, 3, 3), (2, 4), (2, 6)
DORA = {"use_dora": True}
KINDS = {
    "linear": (lambda: nn.Linear(4, 3), ROWS, {}),
    "dora": (lambda: nn.Linear(4, 3), ROWS, DORA),
    "nf4": (lambda: nn.Sequential(nn.Linear(4, 3)), ROWS, {}),
    "dora of nf4": (lambda: nn.Sequential(nn.Linear(4, 3)), ROWS, DORA),
    "siblings": (Siblings, ROWS, {"fuse": "siblings"}),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), ROWS, {}),
    "conv2d": (lambda: nn.Conv2d(2, 4, 2, groups=2), IMAGE, {}),
    "dora of conv2d": (lambda: nn.Conv2d(2, 3, 2), IMAGE, DORA),
    "embedding": (lambda: nn.Embedding(5, 3), None, {}),
    "dora of embedding": (lambda: nn.Embedding(5, 3), None, DORA),
    "attention": (Attention, (3, 4), {"targets": "mixed"}),
    "bottleneck": (lambda: Function(bottleneck, down=(2, 4), up=(4, 2)), WIDE, None),
    "vera": (lambda: Function(vera, A=(2, 6), B=(4, 2), m=(2,), d_out=(4,)), WIDE, None),
    "lokr": (lambda: Function(lokr, w1=(2, 3), c=(2, 1), d=(1, 2)), WIDE, None),
    "oft": (lambda: Function(functional.oft_linear, blocks=(3, 2, 2)), WIDE, None),
    "grouped": (lambda: Function(grouped, A=(2, 2, 6), B=(2, 4, 2)), WIDE, None),
}


def case(kind):
    """``f(parameters, x)``, the trained parameters by name, and two samples."""
    make, shape, options = KINDS[kind]
    model = make().double()
    if "nf4" in kind:
        lorafast.quantize(model, "nf4", block=64)
    if options is not None:
        model = lorafast.adapt(model, 2, **{"targets": ".*"} | options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.5)
    parameters = {name: p.detach().clone() for name, p in trained.items()}
    x = torch.randn(2, *shape, dtype=torch.float64) if shape else torch.tensor([[1, 4], [4, 0]])
    return lambda p, x: functional_call(model, p, (x,)), parameters, x


def leaves_of(parameters):
    return {name: t.clone().requires_grad_() for name, t in parameters.items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
        assert tensor.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_jacobians(kind):
    """Reverse mode, forward mode, and products with a direction."""
    f, parameters, x = case(kind)
    leaves = leaves_of(parameters)
    y = f(leaves, x)
    rows = [torch.autograd.grad(e, list(leaves.values()), retain_graph=True) for e in y.flatten()]
    expected = {
        name: torch.stack(column).view(*y.shape, *leaves[name].shape)
        for name, column in zip(leaves, zip(*rows, strict=True), strict=True)
    }
    assert_close(jacrev(f)(parameters, x), expected)
    assert_close(jacfwd(f)(parameters, x), expected)
    tangents = {name: t.cos() for name, t in parameters.items()}
    found, dy = jvp(lambda p: f(p, x), (parameters,), (tangents,))
    torch.testing.assert_close(found, y.detach())
    products = [(J * tangents[name]).flatten(y.dim()).sum(-1) for name, J in expected.items()]
    torch.testing.assert_close(dy, torch.stack(products).sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_samples_and_of_adapters(kind):
    f, parameters, x = case(kind)

    def loss(p, sample):
        return f(p, sample[None]).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        leaves = leaves_of(parameters)
        one = torch.autograd.grad(loss(leaves, sample), list(leaves.values()))
        expected = dict(zip(leaves, one, strict=True))
        assert_close({name: t[i] for name, t in found.items()}, expected)
    doubled = {name: 2 * t for name, t in parameters.items()}
    both = {name: torch.stack([t, doubled[name]]) for name, t in parameters.items()}
    expected = torch.stack([f(parameters, x), f(doubled, x)])
    torch.testing.assert_close(vmap(f, (0, None))(both, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_through_the_backward(kind):
    """DoRA's divides by a norm that counts as constant: finite differences are no oracle of that."""
    f, parameters, x = case(kind)

    def loss(p):
        return f(p, x).square().sum()

    leaves = leaves_of(parameters)
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    directions = {name: t.sin() for name, t in parameters.items()}
    along = sum((g * v).sum() for g, v in zip(first, directions.values(), strict=True))
    found = dict(zip(leaves, torch.autograd.grad(along, list(leaves.values())), strict=True))
    H = hessian(loss)(parameters)
    expected = {
        one: sum(torch.tensordot(v, H[other][one], v.dim()) for other, v in directions.items())
        for one in parameters
    }
    assert_close(found, expected)
