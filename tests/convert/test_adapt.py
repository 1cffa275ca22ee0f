import math

import pytest
import torch
from models import adapted, trained
from torch import nn

import lorafast
from lorafast.nn import LoRALinear

ADAPTERS = {f"{layer}.lora_{half}" for layer in ("block.up", "block.down", "head") for half in "AB"}


# The model


@pytest.mark.parametrize("r", [1, 3, 11], ids=lambda r: f"r{r}")
def test_reaches_into_containers(r, assert_same, draw_adapters):
    model = nn.Sequential(
        nn.Linear(5, 3),
        nn.ModuleList([nn.Linear(3, 2)]),
        nn.ModuleDict({"a": nn.Linear(2, 1)}),
    ).double()
    draw_adapters(lorafast.adapt(model, r))
    assert adapted(model) == {"0", "1.0", "2.a"}
    x = torch.randn(4, 5, dtype=torch.float64)
    layer = model[0]
    expected = nn.functional.linear(x, layer.weight + layer.lora_B @ layer.lora_A, layer.bias)
    assert_same(layer(x), expected)


def test_a_model_that_is_a_linear_is_returned_adapted():
    linear = nn.Linear(5, 3)
    layer = lorafast.adapt(linear, 2)
    assert type(layer) is LoRALinear
    assert layer.weight is linear.weight


def test_a_second_adapt_leaves_the_first_adapters_alone(net):
    lorafast.adapt(net, 2, ["up"])
    up = net.block.up
    lorafast.adapt(net, 3, alpha=5)
    assert net.block.up is up
    assert (net.block.up.r, net.block.down.r, net.head.r) == (2, 3, 3)
    assert trained(net) == ADAPTERS


def test_adapts_a_compiled_model(net):
    compiled = torch.compile(net)
    assert lorafast.adapt(compiled, 2, ["up"]) is compiled
    assert adapted(net) == {"block.up"}


# What a LoRA layer takes over


def test_shares_the_parameters_of_the_layer(net):
    weight, bias, storage = net.block.up.weight, net.block.up.bias, net.block.up.weight.data_ptr()
    lorafast.adapt(net, 2)
    assert net.block.up.weight is weight
    assert net.block.up.bias is bias
    assert net.block.up.weight.data_ptr() == storage
    assert net.block.down.bias is None


def test_a_fresh_adapter_changes_nothing(net, x, assert_same):
    expected = net(x)
    lorafast.adapt(net, 2, alpha=64, dropout=0.5)
    assert_same(net(x), expected)


def test_a_checkpoint_of_the_plain_model_still_loads(make_net, x, assert_same):
    net = lorafast.adapt(make_net(), 2)
    other = make_net()
    with torch.no_grad():
        other.block.up.weight.mul_(3)
    net.load_state_dict(other.state_dict())
    assert_same(net(x), other(x))


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        pytest.param({}, 1.0, id="alpha-is-r"),
        pytest.param({"alpha": 7}, 7 / 3, id="alpha"),
        pytest.param({"alpha": 0.5}, 0.5 / 3, id="small-alpha"),
        pytest.param({"use_rslora": True}, 3 / math.sqrt(3), id="rslora"),
        pytest.param({"alpha": 7, "use_rslora": True}, 7 / math.sqrt(3), id="rslora-alpha"),
    ],
)
def test_scaling(net, options, scaling):
    lorafast.adapt(net, 3, **options)
    assert {net.block.up.scaling, net.block.down.scaling, net.head.scaling} == {scaling}


def test_dropout_reaches_every_layer(net):
    lorafast.adapt(net, 2, dropout=0.25)
    assert [net.block.up.dropout, net.block.down.dropout, net.head.dropout] == [0.25] * 3


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_adapter_dtype(dtype, adapter_dtype, expected):
    layer = lorafast.adapt(nn.Linear(5, 3, dtype=dtype), 2, adapter_dtype=adapter_dtype)
    assert (layer.lora_A.dtype, layer.lora_B.dtype, layer.weight.dtype) == (
        expected,
        expected,
        dtype,
    )


def test_each_layer_keeps_its_mode(net):
    net.block.eval()
    lorafast.adapt(net, 2)
    assert (net.training, net.block.up.training, net.head.training) == (True, False, True)


def test_hooks_move_and_their_handles_still_remove_them(net, x):
    calls = []
    up = net.block.up
    handles = [
        up.register_forward_pre_hook(lambda *_: calls.append("forward_pre")),
        up.register_forward_pre_hook(
            lambda layer, args, kwargs: calls.append("forward_pre_kw"), with_kwargs=True
        ),
        up.register_forward_hook(lambda *_: calls.append("forward")),
        up.register_forward_hook(
            lambda layer, args, kwargs, y: calls.append("forward_kw"), with_kwargs=True
        ),
        up.register_full_backward_hook(lambda *_: calls.append("backward")),
        up.register_full_backward_pre_hook(lambda *_: calls.append("backward_pre")),
    ]
    everything = [
        "forward_pre",
        "forward_pre_kw",
        "forward",
        "forward_kw",
        "backward_pre",
        "backward",
    ]
    lorafast.adapt(net, 2)
    net(x.requires_grad_()).sum().backward()
    assert calls == everything
    for handle in handles:
        handle.remove()
    net(x).sum().backward()
    assert calls == everything


def test_a_hook_that_is_always_called_is_called_when_the_layer_fails(net, x):
    calls = []
    net.block.up.register_forward_hook(lambda *_: calls.append("up"), always_call=True)
    lorafast.adapt(net, 2)
    with pytest.raises(ValueError, match="x has shape"):
        net(x[..., 1:])
    assert calls == ["up"]


# Sharing


def test_a_tied_weight_stays_tied():
    model = nn.Module()
    model.embed = nn.Embedding(7, 5)
    model.head = nn.Linear(5, 7, bias=False)
    model.head.weight = model.embed.weight
    lorafast.adapt(model, 2)
    assert model.head.weight is model.embed.weight
    assert trained(model) == {"head.lora_A", "head.lora_B"}


def test_two_layers_that_share_a_weight_get_an_adapter_each():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    lorafast.adapt(model, 2)
    assert model[0].weight is model[1].weight
    assert model[0].lora_A is not model[1].lora_A


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["first", "second"], ["first"], ["second"], "second"],
    ids=["all-linear", "both-names", "first-name", "second-name", "regex"],
)
def test_a_layer_reached_by_two_names_stays_one_layer(targets):
    model = nn.Module()
    model.first = nn.Linear(5, 5)
    model.second = model.first
    lorafast.adapt(model, 2, targets)
    assert type(model.first) is LoRALinear
    assert model.second is model.first


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_layer_excluded_by_one_of_its_names_is_left_whole(name):
    model = nn.Module()
    model.first = nn.Linear(5, 5)
    model.second = model.first
    model.third = nn.Linear(5, 5)
    lorafast.adapt(model, 2, exclude=[name])
    assert adapted(model) == {"third"}
    assert model.second is model.first


# Freezing


def test_freezes_everything_but_adapters(net):
    lorafast.adapt(net, 2, ["up"])
    assert trained(net) == {"block.up.lora_A", "block.up.lora_B"}


def test_without_freeze_only_the_adapted_layers_are_frozen(net):
    net.norm.bias.requires_grad_(False)
    lorafast.adapt(net, 2, ["up"], freeze=False)
    assert trained(net) == {
        "block.up.lora_A",
        "block.up.lora_B",
        "block.down.weight",
        "norm.weight",
        "head.weight",
        "head.bias",
    }


def test_only_adapters_get_gradients(net, x, draw_adapters):
    draw_adapters(lorafast.adapt(net, 2))
    net(x).square().sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == ADAPTERS
    assert all(net.get_parameter(name).grad.count_nonzero() > 0 for name in ADAPTERS)


# Refusals: the model is as it was


REFUSED = [
    ({"r": 0}, ValueError, "r is 0, expected an integer of at least 1"),
    ({"r": -2}, ValueError, "r is -2, expected"),
    ({"r": True}, ValueError, "r is True, expected"),
    ({"r": 2.0}, ValueError, "r is 2.0, expected"),
    ({"r": "2"}, ValueError, "r is '2', expected"),
    ({"dropout": -0.1}, ValueError, "dropout is -0.1, expected a probability"),
    ({"dropout": 1.5}, ValueError, "dropout is 1.5, expected a probability"),
    ({"dropout": math.nan}, ValueError, "dropout is nan, expected a probability"),
    ({"dropout": "0.1"}, (TypeError, ValueError), "dropout is '0.1', expected a probability"),
    ({"alpha": math.nan}, ValueError, "alpha is nan, expected"),
    ({"alpha": math.inf}, ValueError, "alpha is inf, expected"),
    ({"alpha": "high"}, (TypeError, ValueError), "alpha is 'high', expected"),
    ({"use_rslora": "yes"}, TypeError, "use_rslora is 'yes', expected True or False"),
    ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype is torch.int8, expected"),
    ({"adapter_dtype": torch.float8_e4m3fn}, TypeError, "adapter_dtype is torch.float8_e4m3fn"),
    ({"adapter_dtype": "float32"}, TypeError, "adapter_dtype is 'float32', expected"),
]


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    REFUSED,
    ids=["-".join(f"{name}={value}" for name, value in case[0].items()) for case in REFUSED],
)
def test_refuses_an_argument_and_leaves_the_model_unchanged(
    net, unchanged, options, error, sentence
):
    with unchanged(net), pytest.raises(error, match=sentence):
        lorafast.adapt(net, **{"r": 2} | options)


# PyTorch's encoder


def _encoder_layer():
    return nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True, dtype=torch.float64)


def _adapt_encoder(model, draw_adapters):
    with pytest.warns(UserWarning, match="self_attn.out_proj"):
        lorafast.adapt(model, 2)
    return draw_adapters(model)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_the_fast_path_of_an_encoder_layer_does_not_bypass_the_adapters(
    grad, assert_same, draw_adapters
):
    model = _adapt_encoder(_encoder_layer(), draw_adapters)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    # Training mode has no fast path, and there is no dropout: the same numbers.
    expected = model.train()(x).detach()
    with torch.set_grad_enabled(grad):
        assert_same(model.eval()(x).detach(), expected)


def test_the_fast_path_of_an_encoder_does_not_bypass_the_adapters(assert_same, draw_adapters):
    model = nn.TransformerEncoder(_encoder_layer(), 2)
    _adapt_encoder(model, draw_adapters)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model.train()(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        actual = model.eval()(x, src_key_padding_mask=padding)
    assert_same(actual[~padding], expected[~padding])
