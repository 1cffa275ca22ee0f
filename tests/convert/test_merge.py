import warnings

import pytest
import torch
from torch import nn

import lorafast
from lorafast.nn import LoRALinear


def types(model):
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"r": 1}, id="r1"),
        pytest.param({"r": 3, "alpha": 8}, id="alpha"),
        pytest.param({"r": 3, "alpha": 8, "use_rslora": True}, id="rslora"),
        pytest.param({"r": 11}, id="r-above-both-sizes"),
        pytest.param({"r": 2, "targets": ["down"]}, id="one-layer"),
    ],
)
def test_equals_the_adapted_model(make_net, x, assert_same, draw_adapters, options):
    base, net = make_net(), make_net()
    plain = types(base)
    draw_adapters(lorafast.adapt(net, **options))
    expected = net(x)
    assert (expected - base(x)).norm() > 1e-2 * expected.norm()
    assert lorafast.merge(net) is net
    assert_same(net(x), expected.detach())
    assert types(net) == plain
    assert net.state_dict().keys() == base.state_dict().keys()


def test_the_weight_is_the_sum_and_the_rest_is_untouched(net, draw_adapters):
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    draw_adapters(lorafast.adapt(net, 2, ["up"], alpha=5))
    layer, head, bias = net.block.up, net.head, net.block.up.bias
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    lorafast.merge(net)
    update = torch.einsum("nr,rk->nk", B, A) * (5 / 2)
    torch.testing.assert_close(
        net.block.up.weight.detach(), base["block.up.weight"] + update, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(layer.weight, base["block.up.weight"])
    assert net.block.up.bias is bias
    assert net.head is head
    for name in base.keys() - {"block.up.weight"}:
        assert torch.equal(net.state_dict()[name], base[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounds_once_to_the_dtype_of_the_weight(dtype):
    layer = lorafast.adapt(nn.Linear(3, 5, dtype=dtype), 1, alpha=0.25)
    with torch.no_grad():
        # Powers of two: every product is exact, so one rounding of the sum is all there may be.
        layer.lora_A.copy_(2.0 ** torch.tensor([[-3, -6, -9]]))
        layer.lora_B.copy_(2.0 ** torch.tensor([[0], [-1], [-2], [1], [2]]))
    update = 0.25 * layer.lora_B.double() @ layer.lora_A.double()
    expected = (layer.weight.double() + update).to(dtype)
    assert torch.equal(lorafast.merge(layer).weight, expected)


def test_there_is_no_dropout_after_merging(net, x, assert_same, draw_adapters):
    draw_adapters(lorafast.adapt(net, 2, dropout=0.9))
    expected = net.eval()(x)
    lorafast.merge(net.train())
    assert_same(net(x), expected.detach())


def test_layers_in_merged_state_are_not_merged_twice(net, x, assert_same, draw_adapters):
    draw_adapters(lorafast.adapt(net, 2))
    expected = net(x)
    net.block.up.merge()
    net.head.merge()
    net.head.unmerge()
    lorafast.merge(net)
    assert_same(net(x), expected.detach())


def test_a_merged_model_can_be_adapted_again(net, x, assert_same, draw_adapters):
    lorafast.merge(draw_adapters(lorafast.adapt(net, 2)))
    expected = net(x)
    lorafast.adapt(net, 3)
    assert_same(net(x), expected)


def test_a_model_that_is_a_lora_layer_is_returned_merged():
    layer = lorafast.adapt(nn.Linear(5, 3), 2)
    linear = lorafast.merge(layer)
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features, linear.bias) == (5, 3, layer.bias)


def test_keeps_modes_and_leaves_everything_frozen(net):
    lorafast.adapt(net, 2)
    net.block.eval()
    lorafast.merge(net)
    assert (net.block.up.training, net.head.training) == (False, True)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_hooks_move_back(net, x):
    calls = []
    net.block.up.register_forward_hook(lambda *_: calls.append("before adapt"))
    lorafast.adapt(net, 2)
    handle = net.block.up.register_forward_hook(lambda *_: calls.append("after adapt"))
    lorafast.merge(net)
    net(x)
    assert calls == ["before adapt", "after adapt"]
    handle.remove()
    net(x)
    assert calls == ["before adapt", "after adapt", "before adapt"]


def test_a_layer_reached_by_two_names_stays_one_layer(assert_same, draw_adapters):
    model = nn.Module()
    model.first = nn.Linear(5, 5, dtype=torch.float64)
    model.second = model.first
    draw_adapters(lorafast.adapt(model, 2))
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = model.first(x).detach()
    lorafast.merge(model)
    assert type(model.first) is nn.Linear
    assert model.second is model.first
    assert_same(model.second(x), expected)


def test_warns_of_a_weight_that_another_module_shares(draw_adapters):
    model = nn.Module()
    model.embed = nn.Embedding(7, 5)
    model.head = nn.Linear(5, 7, bias=False)
    model.head.weight = model.embed.weight
    draw_adapters(lorafast.adapt(model, 2))
    embedding = model.embed.weight.clone()
    with pytest.warns(UserWarning, match=r"no longer shared: head\.weight"):
        lorafast.merge(model)
    assert torch.equal(model.embed.weight, embedding)
    assert not torch.equal(model.head.weight, embedding)


def test_warns_of_both_layers_that_share_a_weight():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match=r"0\.weight, 1\.weight"):
        lorafast.merge(lorafast.adapt(model, 2))


def test_does_not_warn_without_a_shared_weight(net):
    net.alias = net.block.up
    lorafast.adapt(net, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafast.merge(net)


def test_parametrized_layers_become_plain_ones(assert_same):
    model = nn.Sequential(LoRALinear(5, 5, 2, dtype=torch.float64)).eval()
    nn.init.normal_(model[0].lora_B)
    nn.utils.parametrizations.spectral_norm(model[0], "lora_A")
    nn.utils.parametrizations.weight_norm(model[0], "weight")
    model.eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = model(x).detach()
    lorafast.merge(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert_same(model(x), expected)


def test_refuses_a_model_without_adapters(net, unchanged):
    with unchanged(net), pytest.raises(ValueError, match="no adapted layer to merge"):
        lorafast.merge(net)


def test_an_encoder_layer_computes_the_same_after_merging(assert_same, draw_adapters):
    model = nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True, dtype=torch.float64)
    draw_adapters(lorafast.adapt(model, 2, ["linear1", "linear2"]))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = model.train()(x).detach()
    lorafast.merge(model)
    with torch.no_grad():
        assert_same(model.eval()(x), expected)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
