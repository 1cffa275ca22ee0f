"""A batch of which each element has an adapter of its own, or none: what each would get alone."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lorafast
from lorafast import operands
from lorafast.ops import some_rows
from lorafast.reference import contract

OWN, NONE = "default", None
ORDERS = [
    (OWN, OWN, NONE, NONE),
    (NONE, NONE, OWN, OWN),
    (OWN, NONE, NONE, OWN),
    (NONE, OWN, OWN, NONE),
]


class Model(nn.Module):
    """An embedding, a convolution over positions, linear layers and a trained head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.convolution = nn.Conv1d(12, 12, 3, padding=1)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(torch.tanh(self.up(x)))


def adapted(dtype=torch.float64, **options):
    torch.manual_seed(3)
    model = lorafast.adapt(Model().to(dtype), 3, r"embedding|convolution|up|down", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def gradients(y, model):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(y, list(trained.values())), strict=True))


def check_mixed(model, names, base_grad):
    """Against its elements alone: with the adapters, and disabled."""
    ids, dy = torch.randint(11, (len(names), 5)), torch.randn(len(names), 5, 12)
    own = [i for i, name in enumerate(names) if name is not None]
    others = [i for i, name in enumerate(names) if name is None]
    dy = dy.to(next(model.parameters()).dtype)
    expected = model(ids[own])
    with lorafast.disabled(model):
        base = model(ids[others])
    with lorafast.mixed(model, names, base_grad=base_grad) as same:
        y = model(ids)
    assert same is model
    torch.testing.assert_close(y[own], expected)
    torch.testing.assert_close(y[others], base)
    found = gradients((y * dy).sum(), model)
    for name, gradient in gradients((expected * dy[own]).sum(), model).items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("names", ORDERS)
@pytest.mark.parametrize("base_grad", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_each_element_gets_what_it_gets_alone(names, base_grad, use_dora):
    check_mixed(adapted(use_dora=use_dora), names, base_grad)


@pytest.mark.parametrize("base_grad", [True, False])
def test_all_and_none(base_grad):
    model = adapted()
    check_mixed(model, [OWN] * 3, base_grad)
    ids = torch.randint(11, (3, 5))
    with lorafast.disabled(model):
        expected = model(ids)
    with lorafast.mixed(model, [NONE] * 3, base_grad=base_grad):
        assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("names", ORDERS[:3])
def test_bottlenecks(names):
    model = lorafast.adapt(Model().double(), kind="houlsby", targets=["up", "down"], bottleneck=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    check_mixed(model, names, True)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("base_grad", [True, False])
def test_quantized(format, base_grad):
    torch.manual_seed(3)
    frozen = lorafast.quantize(nn.Linear(64, 32).requires_grad_(False), format)
    model = nn.Sequential(frozen)
    lorafast.adapt(model, 4, targets=["0"])
    with torch.no_grad():
        model[0].lora_B.normal_()
    x = torch.randn(6, 3, 64, requires_grad=True)
    dense = operands.as_dense(model[0].operand()).double()
    A, B = (t.detach().double().requires_grad_() for t in (model[0].lora_A, model[0].lora_B))
    wide = x.detach().double().requires_grad_()
    with lorafast.mixed(model, [OWN] * 2 + [NONE] * 4, base_grad=base_grad):
        y = model(x)
    low = torch.zeros(6, 3, 32).double()
    low[:2] = wide[:2] @ A.mT @ B.mT
    expected = wide @ dense.mT + model[0].bias.double() + low
    dy = torch.randn(6, 3, 32)
    of_loss = expected if base_grad else expected[:2]
    wanted = torch.autograd.grad((of_loss * dy.double()[: len(of_loss)]).sum(), (wide, A, B))
    found = torch.autograd.grad((y * dy).sum(), (x, model[0].lora_A, model[0].lora_B))
    for one, two in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)
    if not base_grad:
        assert torch.equal(found[0][2:], torch.zeros(4, 3, 64))


@pytest.mark.parametrize("base_grad", [True, False])
def test_constants_leave_their_backward_out(base_grad, monkeypatch):
    layer = lorafast.nn.LoRALinear(64, 32, r=4)
    x = torch.randn(8, 64, requires_grad=True)
    rows = []
    with lorafast.mixed(layer, [OWN] * 2 + [NONE] * 6, base_grad=base_grad):
        y = layer(x)

    def counting(call, place):
        def count(*arguments):
            rows.append(arguments[place].shape[0])
            return call(*arguments)

        return count

    for name, place in (("layer_backward", 1), ("_linear_transposed", 0)):
        monkeypatch.setattr(some_rows, name, counting(getattr(some_rows, name), place))
    y.sum().backward()
    assert rows == [8 if base_grad else 2]


@pytest.mark.parametrize("format", [None, "nf4", "w8a8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base_grad", [True, False])
def test_flops_of_the_backward_are_those_of_the_formula(base_grad, dropout, format):
    E, own, T, K, N, r = 6, 2, 3, 64, 32, 4
    model = nn.Sequential(nn.Linear(K, N))
    if format is not None:
        lorafast.quantize(model.requires_grad_(False), format)
    lorafast.adapt(model, r, ["0"], dropout=dropout)
    x = torch.randn(E, T, K, requires_grad=True)
    with lorafast.mixed(model, [OWN] * own + [NONE] * (E - own), base_grad=base_grad):
        y = model(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    of_W = (E if base_grad else own) * N * K
    of_adapter = own * r * (2 * N + 2 * K)  # ds and dB, dA and ds·A
    assert counter.get_total_flops() == 2 * T * (of_W + of_adapter)


def frozen_linear(format):
    model = nn.Sequential(nn.Linear(64, 32))
    return model if format is None else lorafast.quantize(model.requires_grad_(False), format)


@pytest.mark.parametrize("names", [*ORDERS, (OWN, NONE, OWN, NONE), (OWN, "second", NONE, NONE)])
@pytest.mark.parametrize("format", [None, "nf4", "w8a8"])
@pytest.mark.parametrize(
    "surroundings", ["eager", "reference", "aten", "autocast", "compiled", "dropout", "inference"]
)
@pytest.mark.parametrize("base_grad", [True, False])
def test_what_an_adapter_holds_is_nothing_to_elements_without_it(
    names, format, surroundings, base_grad
):
    """The same bits, and of dx, whatever is in A and B: 0 · inf would be NaN."""
    if surroundings == "dropout" and "second" in names:
        pytest.skip("several adapters have no dropout")
    torch.manual_seed(3)
    dropout = 0.4 if surroundings == "dropout" else 0.0
    model = lorafast.adapt(frozen_linear(format), 3, ["0"], dropout=dropout)
    lorafast.add_adapter(model, "second", 2)
    nn.init.normal_(model[0].lora_B)
    called = model
    if surroundings == "compiled":
        torch._dynamo.reset()  # else eager code, once there are eight graphs
        called = torch.compile(model, backend="eager")
    others = [i for i, name in enumerate(names) if name != OWN]
    x, dy = torch.randn(4, 3, 64, requires_grad=True), torch.randn(4, 3, 32)

    def found():
        torch.manual_seed(5)
        with contextlib.ExitStack() as stack:
            if surroundings in ("reference", "aten"):
                stack.enter_context(lorafast.use_backend(surroundings))
            elif surroundings == "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            elif surroundings == "inference":
                stack.enter_context(torch.inference_mode())
            stack.enter_context(lorafast.mixed(model, names, base_grad=base_grad))
            y = called(x)
        if surroundings == "inference":
            return [y[others]]
        (dx,) = torch.autograd.grad((y * dy).sum(), x)
        return [y.detach()[others], dx[others]]

    expected = found()
    assert all(tensor.isfinite().all() for tensor in expected)
    for parameter in (model[0].lora_A, model[0].lora_B):
        before = parameter.detach().clone()
        for value in (torch.inf, torch.nan):
            with torch.no_grad():
                parameter[1, 1] = value
            for tensor, same in zip(found(), expected, strict=True):
                assert torch.equal(tensor, same)
        with torch.no_grad():
            parameter.copy_(before)


@pytest.mark.parametrize("kind", ["dora", "convolution", "embedding", "bottleneck", "peft", "fast"])
def test_nor_is_what_other_kinds_hold(kind):
    torch.manual_seed(3)
    x = torch.randn(4, 12, 12)
    if kind in ("peft", "fast"):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 12)), config)
        if kind == "fast":
            lorafast.accelerate(model, quiet=True)
    elif kind == "bottleneck":
        model = nn.Sequential(nn.Linear(12, 12))
        lorafast.adapt(model, kind="houlsby", targets=["0"], bottleneck=4)
    else:
        frozen = {"convolution": nn.Conv1d(12, 12, 3), "embedding": nn.Embedding(12, 12)}
        model = nn.Sequential(frozen.get(kind, nn.Linear(12, 12)))
        lorafast.adapt(model, 3, ["0"], use_dora=kind == "dora")
        x = torch.randint(12, (4, 5)) if kind == "embedding" else x
    for names in ([OWN, OWN, NONE, NONE], [NONE, OWN, NONE, OWN]):
        others = [i for i, name in enumerate(names) if name is None]
        with lorafast.mixed(model, names):
            expected = model(x).detach()[others]
        for parameter in model.parameters():
            if parameter.requires_grad:
                before = parameter.detach().clone()
                nn.init.constant_(parameter, torch.inf)
                with lorafast.mixed(model, names):
                    assert torch.equal(model(x)[others], expected)
                with torch.no_grad():
                    parameter.copy_(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_one_pass_has_the_bits_of_the_frozen_layer(dtype, format):
    model = lorafast.adapt(frozen_linear(format).to(dtype), 3, ["0"])
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(4, 3, 64).to(dtype)
    with lorafast.disabled(model):
        expected = model(x)
    for names in ORDERS[:2]:
        others = [i for i, name in enumerate(names) if name is None]
        with lorafast.mixed(model, names):
            y = model(x)
        assert "OnSomeRows" in type(y.grad_fn).__name__
        assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [130, 384])
@pytest.mark.parametrize("K", [96, 576, 1024, 1536])
def test_a_wide_layer_has_them_too(bias, rows, K):
    """Where the base product may come last."""
    layer = lorafast.nn.LoRALinear(K, 1536, r=16, bias=bias)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2 * rows, K)
    with torch.no_grad(), lorafast.mixed(layer, [NONE] * rows + [OWN] * rows):
        y = layer(x)
    assert torch.equal(y[:rows], F.linear(x, layer.weight, layer.bias)[:rows])
    bounds = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y[rows:], layer(x[rows:]).detach(), **bounds)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_meet_no_number_of_the_adapters(dtype, dropout):
    """By the native kernels: the same bits, and of dx, whatever is in A and B."""
    layer = lorafast.nn.LoRALinear(192, 160, r=16, dropout=dropout, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(352, 192).to(dtype).requires_grad_()
    dy, others = torch.randn(352, 160).to(dtype), [*range(103), *range(253, 352)]

    def found():
        torch.manual_seed(5)
        with lorafast.mixed(layer, [NONE] * 103 + [OWN] * 150 + [NONE] * 99):
            y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        return torch.cat([y.detach()[others], dx[others]], 1)

    expected = found()
    for parameter in (layer.lora_A, layer.lora_B):
        before = parameter.detach().clone()
        nn.init.constant_(parameter, torch.inf)
        assert torch.equal(found(), expected)
        with torch.no_grad():
            parameter.copy_(before)
    layer.scaling = 1e300  # infinite in float32
    assert torch.equal(found(), expected)


def test_inputs_that_are_not_contiguous():
    layer = lorafast.nn.LoRALinear(24, 10, r=3, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    base = torch.randn(6, 24, 4, 2).double()
    for x in (base[..., 0].transpose(1, 2), base[::2, :, 1, 0], base[1:5, :, 1].mT):
        x = x.detach().requires_grad_()
        names = [OWN] * 2 + [NONE] * (len(x) - 2)
        with lorafast.mixed(layer, names):
            y = layer(x)
        assert "OnSomeRows" in type(y.grad_fn).__name__
        expected = torch.cat([layer(x[:2]), layer.base_forward(x[2:])])
        torch.testing.assert_close(y, expected)
        inputs = (x, layer.lora_A, layer.lora_B)
        for one, two in zip(
            torch.autograd.grad(y.sin().sum(), inputs),
            torch.autograd.grad(expected.sin().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "trained", [("x", "lora_A", "lora_B"), ("lora_A", "lora_B"), ("x", "lora_B")]
)
@pytest.mark.parametrize("base_grad", [True, False])
def test_contract_of_many_rows(dtype, trained, base_grad):
    """Beyond the size from which the native kernels are taken."""
    layer = lorafast.nn.LoRALinear(192, 160, r=16, dtype=dtype, adapter_dtype=torch.float32)
    nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(300, 192).to(dtype), torch.randn(300, 160).to(dtype)
    tensors = [t.detach() for t in (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, dy)]
    asked = tuple({"x": "dx", "lora_A": "dA", "lora_B": "dB"}[name] for name in trained)

    def of_formula(x, W, A, B, bias, dy):
        x, A, B = (t.detach().requires_grad_() for t in (x, A, B))
        dtype = torch.promote_types(x.dtype, A.dtype)
        others = F.linear(x if base_grad else x.detach(), W, bias)
        low = (x[100:].to(dtype) @ A.mT.to(dtype)) @ B.mT.to(dtype)
        y = torch.cat([others[:100], (F.linear(x[100:], W, bias) + low).to(x.dtype)])
        found = results(y, (x, A, B), dy)
        return {name: found[name] for name in ("y", *asked)}

    bounds = contract.bounds(
        of_formula(*tensors), of_formula(*(t.double() for t in tensors)), dtype=dtype
    )
    inputs = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    for name, t in inputs.items():
        t.requires_grad_(name in trained)
    with lorafast.mixed(layer, [NONE] * 100 + [OWN] * 200, base_grad=base_grad):
        y = layer(x)
    found = torch.autograd.grad(y, [inputs[name] for name in trained], dy)
    found = dict(zip(("y", *asked), (y.detach(), *found), strict=True))
    assert contract.why_any_broken(found, bounds) is None


def test_it_is_one_pass_under_a_default_device():
    layer = lorafast.nn.LoRALinear(8, 8, r=2)
    with torch.device("cpu"), lorafast.mixed(layer, [OWN, NONE]):
        y = layer(torch.randn(2, 8))
    assert "OnSomeRows" in type(y.grad_fn).__name__


def of_mixed(base_grad, dropout=0.0):
    """A layer of 4 elements as a function of x, A and B, and what it is: its formula."""
    layer = lorafast.nn.LoRALinear(5, 4, r=2, dropout=dropout, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)

    def mixed():
        torch.manual_seed(5)
        with lorafast.mixed(layer, [NONE, OWN, OWN, NONE], base_grad=base_grad):
            y = layer(x)
        assert "OnSomeRows" in type(y.grad_fn).__name__
        return y

    def formula():
        torch.manual_seed(5)
        others = layer.base_forward(x if base_grad else x.detach())
        return torch.cat([others[:1], layer(x[1:3]), others[3:]])

    return mixed, formula, (x, layer.lora_A, layer.lora_B)


@pytest.mark.parametrize("base_grad", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivatives(base_grad, dropout):
    found = []
    *calls, inputs = of_mixed(base_grad, dropout)
    weights = [torch.randn_like(t) for t in inputs]
    for call in calls:
        first = torch.autograd.grad(call().pow(3).sum(), inputs, create_graph=True)
        loss = sum((t * w).sum() for t, w in zip(first, weights, strict=True))
        found.append([*first, *torch.autograd.grad(loss, inputs)])
    for name, one, two in zip(["dx", "dA", "dB"] * 2, *found, strict=True):
        torch.testing.assert_close(one, two, msg=name)
    if not base_grad:
        assert not found[0][3][[0, 3]].any()


@pytest.mark.parametrize("base_grad", [True, False])
def test_a_second_derivative_needs_x(base_grad):
    mixed, _, (x, A, B) = of_mixed(base_grad)
    A.requires_grad_(False)
    (dB,) = torch.autograd.grad(mixed().sum(), B, retain_graph=True)
    assert dB.any()
    with pytest.raises(RuntimeError, match="second derivative of lora_linear needs x"):
        torch.autograd.grad(mixed().pow(2).sum(), (x, B), create_graph=True)


@pytest.mark.parametrize("base_grad", [True, False])
@pytest.mark.parametrize("how", ["batched", "vmap"])
def test_gradients_in_batches(base_grad, how):
    mixed, formula, inputs = of_mixed(base_grad)
    dys = torch.randn(7, 4, 3, 4, dtype=torch.float64)

    def gradients_of(y, dy, **options):
        return torch.autograd.grad(y, inputs, dy, retain_graph=True, **options)

    y = mixed()
    if how == "batched":
        found = gradients_of(y, dys, is_grads_batched=True)
    else:
        found = torch.func.vmap(lambda dy: gradients_of(y, dy))(dys)
    expected = zip(*(gradients_of(formula(), dy) for dy in dys), strict=True)
    for name, one, two in zip(("dx", "dA", "dB"), found, expected, strict=True):
        torch.testing.assert_close(one, torch.stack(two), msg=name)


@pytest.mark.parametrize("base_grad", [True, False])
@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_gradients_of_one_factor(base_grad, trained):
    mixed, formula, inputs = of_mixed(base_grad)
    inputs[1 if trained == "lora_B" else 2].requires_grad_(False)
    inputs = [t for t in inputs if t.requires_grad]
    found, wanted = (torch.autograd.grad(call().sin().sum(), inputs) for call in (mixed, formula))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("base_grad", [True, False])
def test_compiled_autograd(base_grad):
    layer = lorafast.nn.LoRALinear(8, 6, r=2, dropout=0.3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 8, requires_grad=True)
    with lorafast.mixed(layer, [OWN, OWN, NONE, NONE], base_grad=base_grad):
        y = layer(x)
    wanted = torch.autograd.grad(y.sum(), (x, layer.lora_A, layer.lora_B), retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.sum().backward()
    for parameter, gradient in zip((x, layer.lora_A, layer.lora_B), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("names", [["second"] * 2 + [NONE] * 2, ["second", NONE, "second", NONE]])
@pytest.mark.parametrize("autocast", [False, True])
def test_one_that_waits_has_its_dropout_wherever_its_elements_are(names, autocast):
    layer = lorafast.nn.LoRALinear(24, 10, r=3, alpha=1)
    lorafast.add_adapter(layer, "second", 3, alpha=1, dropout=0.5)
    held = layer.inactive.second
    nn.init.normal_(held.lora_B)
    x, own = torch.randn(4, 24), [i for i, name in enumerate(names) if name]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(5)
        with lorafast.mixed(layer, names):
            y = layer(x)
        torch.manual_seed(5)
        expected = lorafast.functional.lora_linear(
            x[own], layer.weight, held.lora_A, held.lora_B, 1 / 3, layer.bias, dropout_p=0.5
        )
    torch.testing.assert_close(y[own], expected)


def test_a_block_within_a_compiled_function():
    layer = lorafast.nn.LoRALinear(8, 6, r=2)
    nn.init.normal_(layer.lora_B)
    x, names = torch.randn(4, 8), [OWN, OWN, NONE, NONE]

    @torch.compile(backend="eager")
    def compiled(x):
        with lorafast.mixed(layer, names):
            return layer(x)

    with lorafast.mixed(layer, names):
        expected = layer(x)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(layer(x)[:2], expected[:2])
    assert "_rows" not in vars(layer)


def test_float16_under_an_autocast_that_knows_none():
    model = lorafast.adapt(nn.Sequential(nn.Embedding(11, 4)).half(), 2, ["0"])
    ids = torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16), lorafast.mixed(model, [OWN, NONE]):
        assert torch.equal(model(ids)[1], model[0].base_forward(ids[1:])[0])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(4), "expected as many in the first dimension, of 2 or more"),
        (torch.randn(4, 4).to_sparse(), "x is torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.randn(2, 4)] * 4, layout=torch.jagged), "x is nested"),
    ],
    ids=["one row", "sparse", "nested"],
)
@pytest.mark.parametrize("names", [[OWN, OWN, NONE, NONE], [NONE] * 4, [OWN] * 4])
def test_inputs_without_elements_in_rows(x, message, names):
    layer = lorafast.nn.LoRALinear(4, 4, r=2)
    with lorafast.mixed(layer, names), pytest.raises(ValueError, match=message):
        layer(x)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("names", [[OWN, NONE], [OWN, NONE, OWN], [OWN, "second"]])
def test_quantized_with_x_in_another_dtype(format, names):
    """As the layer alone, whose weight follows x."""
    model = nn.Sequential(lorafast.quantize(nn.Linear(64, 32).requires_grad_(False), format))
    layer = lorafast.adapt(model, 4, ["0"])[0]
    lorafast.add_adapter(model, "second", 4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(len(names), 64).bfloat16()
    with lorafast.mixed(model, names):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    own = [i for i, name in enumerate(names) if name == OWN]
    torch.testing.assert_close(y[own], layer(x[own]), rtol=1e-2, atol=2e-2)


def test_dropout_and_scaling_are_those_of_the_adapter_that_is_named():
    layer = lorafast.nn.LoRALinear(24, 10, r=3, alpha=1, dtype=torch.float64)
    lorafast.add_adapter(layer, "second", 3, alpha=1, dropout=0.5)
    held = layer.inactive.second
    for B in (layer.lora_B, held.lora_B):
        nn.init.normal_(B)
    x = torch.randn(4, 24).double()
    torch.manual_seed(5)
    with lorafast.mixed(layer, ["second", "second", NONE, NONE]):
        y = layer(x)
    torch.manual_seed(5)
    expected = lorafast.functional.lora_linear(
        x[:2], layer.weight, held.lora_A, held.lora_B, 1 / 3, layer.bias, dropout_p=0.5
    )
    torch.testing.assert_close(y[:2], expected)
    with (
        lorafast.mixed(layer, [OWN, OWN, "second", NONE]),
        pytest.raises(ValueError, match="no dropout"),
    ):
        layer(x)
    with lorafast.mixed(layer.eval(), [OWN, "second", OWN, NONE]):
        y = layer(x)
    exact = layer.base_forward(x[[0, 2]]) + 1 / 3 * (x[[0, 2]] @ layer.lora_A.mT @ layer.lora_B.mT)
    torch.testing.assert_close(y[[0, 2]], exact, rtol=1e-13, atol=1e-13)


def test_the_active_adapter_stays_within_the_block():
    layer = lorafast.nn.LoRALinear(8, 8, r=2)
    lorafast.add_adapter(layer, "second", 2)
    with (
        lorafast.mixed(layer, [OWN, NONE]),
        pytest.raises(ValueError, match="in a block of mixed"),
    ):
        lorafast.set_adapter(layer, "second")
    convolution = lorafast.nn.LoRAConv1d(4, 4, 3, r=2)
    nn.init.normal_(convolution.lora_B)
    x = torch.randn(2, 4, 5)
    base = convolution.base_forward(x)
    with lorafast.mixed(convolution, [OWN, NONE]):
        convolution.merge()
        torch.testing.assert_close(convolution(x)[1], base[1])


def test_dropout_is_that_of_the_own_rows():
    layer = lorafast.nn.LoRALinear(24, 10, r=3, dropout=0.4, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(5, 4, 24).double(), torch.randn(5, 4, 10).double()
    for names in ([OWN] * 2 + [NONE] * 3, [NONE] * 3 + [OWN] * 2):
        own = slice(0, 2) if names[0] else slice(3, 5)
        for base_grad in (True, False):
            one, two = (x.clone().requires_grad_() for _ in range(2))
            torch.manual_seed(5)
            with lorafast.mixed(layer, names, base_grad=base_grad):
                y = layer(one)
            torch.manual_seed(5)
            expected = layer.base_forward(two if base_grad else two.detach()).index_put(
                (torch.arange(5)[own],), layer(two[own])
            )
            torch.testing.assert_close(y, expected)
            inputs = (layer.lora_A, layer.lora_B)
            found = torch.autograd.grad((y * dy).sum(), (one, *inputs))
            wanted = torch.autograd.grad((expected * dy).sum(), (two, *inputs))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)


def formula(x, W, A, B, bias, dy):
    """What mixing is, with 3 elements that have no adapter before the others."""
    x, A, B = (t.detach().requires_grad_() for t in (x, A, B))
    dtype = torch.promote_types(x.dtype, A.dtype)
    low = (x[3:].to(dtype) @ A.mT.to(dtype)) @ B.mT.to(dtype)
    y = torch.cat([F.linear(x.detach()[:3], W, bias), (F.linear(x[3:], W, bias) + low).to(x.dtype)])
    return results(y, (x, A, B), dy)


def results(y, inputs, dy):
    return dict(zip(("y", "dx", "dA", "dB"), (y, *torch.autograd.grad(y, inputs, dy)), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "aten", "triton"])
def test_contract(dtype, backend):
    layer = lorafast.nn.LoRALinear(130, 70, r=5, dtype=dtype, adapter_dtype=torch.float32)
    nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(9, 130).to(dtype), torch.randn(9, 70).to(dtype)
    tensors = (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, dy)
    tensors = tuple(t.detach() for t in tensors)
    bounds = contract.bounds(
        formula(*tensors), formula(*(t.double() for t in tensors)), dtype=dtype
    )
    x.requires_grad_()
    with (
        lorafast.use_backend(backend),
        lorafast.mixed(layer, [NONE] * 3 + [OWN] * 6, base_grad=False),
    ):
        found = results(layer(x), (x, layer.lora_A, layer.lora_B), dy)
    assert contract.why_any_broken(found, bounds) is None


def test_autocast_compile_and_a_trained_weight():
    layer = lorafast.nn.LoRALinear(24, 10, r=3)
    nn.init.normal_(layer.lora_B)
    x, names = torch.randn(4, 24), [OWN, OWN, NONE, NONE]
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([layer(x[:2]), layer.base_forward(x[2:])])
        with lorafast.mixed(layer, names):
            y = layer(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, expected)
    expected = torch.cat([layer(x[:2]), layer.base_forward(x[2:])])
    with lorafast.mixed(layer, names):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected)
    layer.weight.requires_grad_(True)
    with lorafast.mixed(layer, names):
        layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(10, -1))


@pytest.mark.parametrize("base_grad", [True, False])
def test_several_names(base_grad):
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    lorafast.adapt(model, 3, targets=["0", "2"])
    lorafast.add_adapter(model, "second", 5, alpha=7)
    x, dy = torch.randn(6, 12).double(), torch.randn(6, 6).double()
    expected = torch.empty(6, 6).double()
    wanted = {}
    with lorafast.disabled(model), torch.no_grad():
        expected[4:] = model(x[4:])
    for name, own in (("second", slice(2, 4)), (OWN, slice(0, 2))):
        lorafast.set_adapter(model, name)
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora_B)
        y = model(x[own])
        expected[own] = y.detach()
        wanted |= {
            id(p): torch.autograd.grad(y, p, dy[own], retain_graph=True)[0]
            for p in model.parameters()
            if p.requires_grad
        }
    for layer in (model[0], model[2]):
        layer.inactive.requires_grad_(True)
    with lorafast.mixed(model, [OWN, OWN, "second", "second", NONE, NONE], base_grad=base_grad):
        y = model(x)
    torch.testing.assert_close(y, expected)
    y.backward(dy)
    compared = [(p.grad, wanted[id(p)]) for p in model.parameters() if p.requires_grad]
    assert len(compared) == 8
    for found, gradient in compared:
        torch.testing.assert_close(found, gradient)


def test_after_the_block_all_is_as_before():
    model = adapted()
    ids = torch.randint(11, (4, 5))
    before = model(ids)
    with lorafast.mixed(model, [OWN, NONE]):
        copied = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
    with pytest.raises(ZeroDivisionError), lorafast.mixed(model, [OWN, NONE]):
        raise ZeroDivisionError
    for one in (model, copied, loaded):
        assert torch.equal(one(ids), before)
    with lorafast.mixed(model, [OWN, NONE, NONE, OWN]), lorafast.disabled(model):
        disabled = model(ids)
    with lorafast.disabled(model):
        assert torch.equal(model(ids), disabled)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("default", "names is a str"),
        ([], "names is empty"),
        ([OWN, 3], "names holds 3 at 1"),
        (["defualt", NONE], "no adapter 'defualt': did you mean 'default'?"),
    ],
)
def test_bad_names(names, message):
    model = adapted()
    with pytest.raises((TypeError, ValueError), match=message), lorafast.mixed(model, names):
        pass
    assert all(module._rows is None for module in model.modules() if hasattr(module, "_rows"))


def test_bad_models_and_batches():
    with (
        pytest.raises(ValueError, match="no adapter"),
        lorafast.mixed(nn.Linear(2, 2), [OWN]),
    ):
        pass
    model = adapted()
    with (
        lorafast.mixed(model, [OWN, NONE]),
        pytest.raises(ValueError, match="names adapters for 2 elements"),
    ):
        model(torch.zeros(3, 5, dtype=torch.int64))
    with (
        lorafast.mixed(model, [OWN, NONE]),
        pytest.raises(ValueError, match="a block of mixed around"),
        lorafast.mixed(model, [OWN, NONE]),
    ):
        pass
    lorafast.add_adapter(model.up, "second")
    with (
        pytest.raises(ValueError, match="no adapter 'second'"),
        lorafast.mixed(model, [OWN, "second"]),
    ):
        pass
    model.down.merge()
    with (
        pytest.raises(ValueError, match="down can't be mixed: it is merged"),
        lorafast.mixed(model, [OWN]),
    ):
        pass
    attention = lorafast.adapt(nn.ModuleList([nn.MultiheadAttention(8, 2)]), 2, ["0"])
    with pytest.raises(ValueError, match="attention"), lorafast.mixed(attention, [OWN]):
        pass
    layer = lorafast.nn.LoRALinear(4, 4, r=2, dropout=0.5)
    lorafast.add_adapter(layer, "second", 2)
    with (
        lorafast.mixed(layer, [OWN, "second"]),
        pytest.raises(ValueError, match="no dropout"),
    ):
        layer(torch.randn(2, 4))


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_model_of_pefts(accelerated):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)),
        peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False),
    )
    if accelerated:
        lorafast.accelerate(model, quiet=True)
    x = torch.randn(4, 12)
    expected = model(x)
    with lorafast.disabled(model):
        base = model(x)
    with lorafast.mixed(model, [OWN, OWN, NONE, NONE]):
        y = model(torch.cat([x[:2], x[2:]]))
    torch.testing.assert_close(y, torch.cat([expected[:2], base[2:]]))
    torch.testing.assert_close(model(x), expected)
    for names, base_grad, message in (
        ([OWN, "other"], True, "no adapter 'other'"),
        ([OWN], False, "base_grad is False"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            lorafast.mixed(model, names, base_grad=base_grad),
        ):
            pass
