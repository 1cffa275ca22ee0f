"""``LoRALinear(..., use_dora=True)``: the formula, the magnitude, merging, state, what leaves Python."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_formats import FORMATS

import lorafast
from lorafast import functional
from lorafast.nn import LoRALinear

pytestmark = pytest.mark.usefixtures("toy_formats")
KEYS = ["weight", "bias", "lora_A", "lora_B", "lora_magnitude"]


def _conv1d(**options):
    transformers = pytest.importorskip("transformers.pytorch_utils")
    linear = transformers.Conv1D(5, 7).double()
    return LoRALinear.from_linear(linear, 3, use_dora=True, **options)


def _operand(**options):
    linear = nn.Linear(7, 5, dtype=torch.float64)
    weight = FORMATS["negative"](linear.weight.detach())
    return LoRALinear.from_operand(weight, 3, bias=linear.bias, use_dora=True, **options)


def fresh(**options):
    return LoRALinear(7, 5, 3, **{"dtype": torch.float64, "use_dora": True} | options)


def layer(make=fresh, **options):
    made = make(**options)
    with torch.no_grad():
        made.lora_B.normal_()
        made.lora_magnitude.mul_(torch.rand(5) + 0.5)
    return made


KINDS = pytest.mark.parametrize("make", [fresh, _conv1d, _operand], ids=["dense", "conv1d", "toy"])


def formula(made):
    """The weight of the plain layer that computes the same."""
    W = made.base_weight() + made.scaling * made.lora_B @ made.lora_A
    return (made.lora_magnitude / W.norm(dim=1))[:, None] * W


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def x():
    return torch.randn(2, 3, 7, dtype=torch.float64)


@KINDS
@pytest.mark.parametrize("options", [{}, {"alpha": 8}, {"alpha": 8, "use_rslora": True}], ids=str)
def test_it_is_the_formula(make, options, x):
    made = layer(make, **options)
    same(made(x), F.linear(x, formula(made), made.bias))


@KINDS
def test_a_fresh_layer_is_the_plain_one(make, x):
    made = make()
    W = made.base_weight()
    same(made.lora_magnitude.detach(), W.detach().norm(dim=1))
    same(made(x), F.linear(x, W, made.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fresh_layer_is_the_plain_one_bit_for_bit(dtype):
    linear = nn.Linear(64, 48, bias=False, dtype=dtype)
    given = torch.randn(9, 64).to(dtype)
    assert torch.equal(LoRALinear.from_linear(linear, 4, use_dora=True)(given), linear(given))


def with_a_row_of_zeros(**options):
    """As of a padded vocabulary, or of a layer that starts at zero: the norm is 0."""
    linear = nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        linear.weight[2] = 0
    return LoRALinear.from_linear(linear, 2, use_dora=True, **options)


@pytest.mark.parametrize("how", ["eager", "merged", "script"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_row_of_zeros_stays_one(how, x):
    made = with_a_row_of_zeros().eval()
    if how == "merged":
        made.merge()
    found = torch.jit.script(made) if how == "script" else made
    same(found(x), F.linear(x, made.weight, made.bias))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_row_of_zeros_is_trained(dropout, x):
    made = with_a_row_of_zeros(dropout=dropout)
    optimizer = torch.optim.SGD(made.adapter_parameters().values(), 0.1)
    for _ in range(3):
        made(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in made.adapter_parameters().values())
        optimizer.step()
    assert made.lora_magnitude[2].abs() > 1e-3


def test_parameters_and_which_are_trained():
    made = LoRALinear.from_linear(nn.Linear(7, 5), 3, use_dora=True)
    assert list(made.state_dict()) == KEYS
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {*KEYS[2:]}
    assert made.lora_magnitude.shape == (5,)
    assert "use_dora=True" in repr(made)
    assert made.use_dora
    plain = LoRALinear(7, 5, 3)
    assert not plain.use_dora
    assert "lora_magnitude" not in plain.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    made = LoRALinear(64, 48, 4, dtype=dtype, use_dora=True)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert made.lora_magnitude.dtype is expected
    torch.testing.assert_close(made.lora_magnitude, made.weight.to(expected).norm(dim=1))
    assert made(torch.randn(3, 64, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_output_and_gradients_are_those_of_the_function(dropout, x):
    made = layer(dropout=dropout)
    dy = torch.randn(2, 3, 5, dtype=torch.float64)
    x.requires_grad_()
    torch.manual_seed(3)
    y = made(x)
    y.backward(dy)
    found = [x.grad, *(p.grad for p in made.adapter_parameters().values())]
    x.grad = None
    made.zero_grad()
    torch.manual_seed(3)
    expected = functional.dora_linear(
        x, made.weight, *made.adapter_parameters().values(), made.scaling, made.bias,
        dropout_p=dropout,
    )  # fmt: skip
    expected.backward(dy)
    same(y, expected)
    gradients = [x.grad, *(p.grad for p in made.adapter_parameters().values())]
    for one, other in zip(found, gradients, strict=True):
        assert other.any()
        same(one, other)
    assert made.weight.grad is None
    made.eval()
    same(made(x), F.linear(x, formula(made), made.bias))


@pytest.mark.parametrize("value", [1, "yes", None], ids=repr)
def test_use_dora_must_be_a_bool(value):
    linear = nn.Linear(7, 5)
    with pytest.raises(TypeError, match=f"use_dora is {value!r}, expected True or False"):
        LoRALinear.from_linear(linear, 3, use_dora=value)
    assert linear.weight.requires_grad


class TestMerging:
    @KINDS
    def test_merge_and_unmerge(self, make, x):
        made = layer(make)
        expected = made(x)
        made.merge()
        same(made(x), expected)
        assert not made(x).requires_grad
        made.alpha = 7
        same(made(x), F.linear(x, formula(made), made.bias))
        made.unmerge()
        assert made(x).requires_grad
        same(made(x), F.linear(x, formula(made), made.bias))

    @KINDS
    def test_a_merged_model(self, make, x):
        model = nn.Sequential(layer(make))
        expected = model(x)
        lorafast.merge(model)
        assert not isinstance(model[0], LoRALinear)
        assert not {"lora_magnitude", "_use_dora", "_aside"} & dir_of(model[0])
        same(model(x), expected)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_magnitude_that_is_not_finite_is_refused(self, value):
        made = layer()
        with torch.no_grad():
            made.lora_magnitude[2] = value
        with pytest.raises(
            ValueError, match=r"^its lora_magnitude is NaN or infinite in 1 of 5 elements$"
        ):
            made.merge()

    def test_a_weight_beyond_the_dtype_is_refused(self):
        made = layer(dtype=torch.float16)
        with torch.no_grad():
            made.lora_magnitude[2] = 1e9
        with pytest.raises(ValueError, match=r"m · \(W \+ .* is beyond torch\.float16 in 7 of 35"):
            made.merge()


def dir_of(module):
    return {*vars(module), *module._parameters, *module._buffers}


class TestState:
    @KINDS
    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    @pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
    def test_copies(self, make, clone, merged, x):
        made = layer(make)
        if merged:
            made.merge()
        twin = clone(made)
        assert torch.equal(twin(x), made(x))
        assert twin.lora_magnitude is not made.lora_magnitude
        twin.unmerge()
        same(twin(x), made(x))

    def test_a_checkpoint_of_its_own(self, x):
        made, other = layer(), layer()
        other.load_state_dict(made.state_dict())
        assert torch.equal(other(x), made(x))

    def test_one_without_the_magnitude_is_refused(self):
        made = layer()
        state = made.state_dict()
        del state["lora_magnitude"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"lora_magnitude"'):
            made.load_state_dict(state)

    def test_a_plain_checkpoint_under_a_fresh_adapter_is_the_plain_layer(self, x):
        made, plain = fresh(), nn.Linear(7, 5, dtype=torch.float64)
        assert made.load_state_dict(plain.state_dict()) == ([], [])
        same(made(x), plain(x))

    def test_a_plain_checkpoint_leaves_a_trained_adapter_alone(self):
        made, plain = layer(), nn.Linear(7, 5, dtype=torch.float64)
        before = made.lora_magnitude.clone()
        made.load_state_dict(plain.state_dict())
        assert torch.equal(made.lora_magnitude, before)

    @pytest.mark.parametrize("how", ["assign", "to_empty"])
    def test_from_meta(self, how):
        plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7, bias=False))
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7, bias=False))
        lorafast.adapt(model, 2, use_dora=True)
        assert model[0].lora_magnitude.is_meta
        if how == "to_empty":
            model.to_empty(device="cpu")
        model.load_state_dict(plain.state_dict(), assign=how == "assign")
        given = torch.randn(3, 7)
        torch.testing.assert_close(model(given), plain(given))

    def test_reset_parameters(self):
        made = layer()
        made.reset_parameters()
        assert not made.lora_B.any()
        same(made.lora_magnitude.detach(), made.weight.norm(dim=1))


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(7, 5))
    W = model[0].weight.detach().clone()
    accelerate.cpu_offload(model, torch.device("cpu"))
    lorafast.adapt(model, 3, use_dora=True)
    assert model[0].weight.is_meta
    torch.testing.assert_close(model[0].lora_magnitude.detach(), W.norm(dim=1))
    nn.init.normal_(model[0].lora_B)
    given = torch.randn(4, 7)
    expected = model(given)
    lorafast.merge(model)
    torch.testing.assert_close(model(given), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [fresh, _operand], ids=["dense", "toy"])
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("how", ["trace", "script", "export"])
def test_what_leaves_python(how, merged, make, x):
    made = layer(make).eval()
    if merged:
        made.merge()
    if how == "export":
        found = torch.export.export(made, (x,)).module()
    else:
        script = torch.jit.trace(made, x) if how == "trace" else torch.jit.script(made)
        buffer = io.BytesIO()
        torch.jit.save(script, buffer)
        buffer.seek(0)
        found = torch.jit.load(buffer)
    same(found(x), made(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_trains_as_the_layer(x):
    made = layer()
    torch.jit.script(made)(x).square().sum().backward()
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    made(x).square().sum().backward()
    assert found.keys() == {*KEYS[2:]}
    for name, gradient in found.items():
        same(gradient, made.get_parameter(name).grad)


@KINDS
def test_fx_has_a_node_for_it(make, x):
    model = nn.Sequential(layer(make))
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert len(calls) == 1
    assert calls[0].__name__ in ("dora_linear", "dora_linear_of")
    same(traced(x), model(x))


def test_autocast_changes_neither_the_norm_nor_what_is_merged():
    made = layer(dtype=torch.float32)
    calls = (made._weight_norm, made.delta_weight, made.merged_weight)
    expected = [call() for call in calls]
    with torch.autocast("cpu", torch.bfloat16):
        found = [call() for call in calls]
    assert all(map(torch.equal, found, expected))


def test_compiled_without_a_graph_break(x):
    made = layer()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    same(compiled(x), made(x))
    compiled(x).sum().backward()
    found = made.lora_magnitude.grad
    made.zero_grad()
    made(x).sum().backward()
    same(found, made.lora_magnitude.grad)


def test_explain():
    made = layer()
    choices = lorafast.explain(made).layers["(module)"]
    assert [choice.operation for choice in choices] == ["lora_linear", "lora_linear_backward"]
    assert "within DoRA" in choices[0].reason
    half = LoRALinear(7, 5, 3, dtype=torch.float16, use_dora=True)
    (choice,) = lorafast.explain(half).layers["(module)"]
    assert choice.backend is None
