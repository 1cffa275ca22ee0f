"""GPT-2's ``Conv1D``, a linear layer that keeps its weight as [in, out], as a LoRALinear."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D

import lorafast
from lorafast.nn import LoRALinear


@pytest.fixture
def conv():
    return Conv1D(5, 7).double()


@pytest.fixture
def made(conv):
    layer = LoRALinear.from_linear(conv, 3, alpha=6)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture
def x():
    return torch.randn(2, 4, 7, dtype=torch.float64)


def formula(made, x):
    return x @ (made.weight + 2 * (made.lora_B @ made.lora_A).t()) + made.bias


def test_it_shares_the_weight_as_it_is(conv, made):
    assert isinstance(made, LoRALinear)
    assert made.weight is conv.weight
    assert made.bias is conv.bias
    assert (made.in_features, made.out_features) == (7, 5)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert shapes == {"weight": (7, 5), "bias": (5,), "lora_A": (3, 7), "lora_B": (5, 3)}
    assert made.load_state_dict(Conv1D(5, 7).state_dict()) == ([], [])
    assert "in_features=7, out_features=5, r=3, alpha=6" in repr(made)


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_output_and_gradients(made, x, backend):
    found = {}
    for name, run in (("ours", made), ("formula", lambda x: formula(made, x))):
        leaf = x.clone().requires_grad_()
        with lorafast.use_backend(backend):
            y = run(leaf)
            gradients = torch.autograd.grad(y.square().sum(), (leaf, made.lora_A, made.lora_B))
        found[name] = (y, *gradients)
    for name, one, two in zip(("y", "dx", "dA", "dB"), *found.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_layers_compute_the_same_as_a_linear(dtype):
    torch.manual_seed(0)
    conv, linear = Conv1D(264, 200).to(dtype), nn.Linear(200, 264).to(dtype)
    linear.weight.data.copy_(conv.weight.t())
    one, two = (LoRALinear.from_linear(layer, 4, dropout=0.25) for layer in (conv, linear))
    nn.init.normal_(one.lora_B)
    two.bias = one.bias
    two.lora_A, two.lora_B = one.lora_A, one.lora_B
    found = []
    for layer in (one, two):
        torch.manual_seed(7)
        x = torch.linspace(-1, 1, 300 * 200).view(300, 200).to(dtype).requires_grad_()
        y = layer(x)
        found.append(
            (y, *torch.autograd.grad(y.float().square().sum(), (x, layer.lora_A, layer.lora_B)))
        )
    for name, a, b in zip(("y", "dx", "dA", "dB"), *found, strict=True):
        assert (a - b).norm() <= (1e-2 if dtype is torch.bfloat16 else 1e-5) * b.norm(), name


def test_a_fresh_layer_is_the_plain_one(conv, x):
    torch.testing.assert_close(LoRALinear.from_linear(conv, 2)(x), conv(x), rtol=1e-12, atol=1e-12)


def test_merging(conv, made, x):
    expected = formula(made, x)
    weight = conv.weight.clone()
    assert made.delta_weight().shape == (5, 7)
    made.merge()
    torch.testing.assert_close(made(x), expected)
    made.unmerge()
    torch.testing.assert_close(made(x), expected)
    plain = lorafast.merge(nn.Sequential(made))[0]
    assert type(plain) is Conv1D
    assert plain.weight.shape == (7, 5)
    assert plain.weight.is_contiguous()
    assert (plain.nx, plain.nf) == (7, 5)
    assert plain.bias is conv.bias
    torch.testing.assert_close(plain(x), expected)
    assert torch.equal(conv.weight, weight)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(made, x, clone):
    assert torch.equal(clone(made)(x), made(x))


def test_compiled(made, x):
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), formula(made, x))
    compiled(x).sum().backward()
    assert made.lora_A.grad.any()


def test_what_is_told_of_it(made, x):
    (row,) = lorafast.summary(made).layers
    assert (row.in_features, row.out_features, row.parameters) == (7, 5, 3 * 12)
    for sample in (x, None):
        assert {c.operation for c in lorafast.explain(made, sample).layers["(module)"]} == {
            "lora_linear", "lora_linear_backward",
        }  # fmt: skip


def test_packing_waits_for_merging():
    made = LoRALinear.from_linear(Conv1D(24, 40).bfloat16(), 2)
    with pytest.raises(ValueError, match=r"a Conv1D keeps it transposed, merge the layer first"):
        made.pack_()
    made.merge()
    if lorafast.operands.packed.why_unavailable() is None:
        assert "packed=True" in repr(made.pack_())


def test_its_parameters_are_drawn_as_its_own():
    made = LoRALinear.from_linear(Conv1D(400, 300), 2)
    nn.init.ones_(made.bias)
    made.reset_parameters()
    assert made.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not made.bias.any()
    assert not made.lora_B.any()


class Doubled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


def test_refusal():
    with pytest.raises(TypeError, match=r"its forward is not that of Conv1D \(Doubled\)"):
        LoRALinear.from_linear(Doubled(5, 7), 2)
    with pytest.raises(TypeError, match=r"made by LoRALinear\.from_linear\(conv1d, r\)"):
        type(LoRALinear.from_linear(Conv1D(5, 7), 2))(7, 5, 2)


def test_transformers_is_not_imported_for_it():
    code = (
        "import sys, lorafast, torch\n"
        "lorafast.merge(lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(3, 3)), 2))\n"
        "print('transformers' in sys.modules, 'accelerate' in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_and_traced_symbolically(made, x, merged):
    if merged:
        made.merge()
    expected = formula(made, x)
    torch.testing.assert_close(torch.jit.script(made)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(made)(x), expected)
