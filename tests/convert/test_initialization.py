"""PiSSA and OLoRA: PEFT's numbers, the same function as before, files that fit, refusals."""

import copy

import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert.initialization import factors

peft = pytest.importorskip("peft")

STARTS = ["pissa", "pissa_niter_3", "olora"]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))


def with_peft(net, start, **options):
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=start, **options
    )
    torch.manual_seed(2)
    return peft.get_peft_model(copy.deepcopy(net), settings).base_model.model


def adapted(net, start, **options):
    torch.manual_seed(2)
    return lorafast.adapt(copy.deepcopy(net), 4, alpha=6, init_lora_weights=start, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "alpha/sqrt r"])
def test_numbers_are_those_of_peft(start, dtype, use_rslora):
    """PEFT rounds A and B to the dtype of W, even where they are kept in float32."""
    net = network().to(dtype)
    theirs = with_peft(net, start, use_rslora=use_rslora)
    ours = adapted(net, start, use_rslora=use_rslora)
    for i in (0, 2):
        A, B = theirs[i].lora_A["default"].weight, theirs[i].lora_B["default"].weight
        torch.testing.assert_close(ours[i].lora_A.to(dtype), A.to(dtype))
        torch.testing.assert_close(ours[i].lora_B.to(dtype), B.to(dtype))
        torch.testing.assert_close(ours[i].weight, theirs[i].base_layer.weight)


def test_numbers_of_the_randomised_start_are_those_of_peft():
    layer = with_peft(network(), True)[0]
    W = layer.base_layer.weight.detach().clone()
    torch.manual_seed(3)
    layer.pissa_init("default", "pissa_niter_3")
    torch.manual_seed(3)
    A, B = factors(W, 4, layer.scaling["default"], "pissa_niter_3")
    torch.testing.assert_close(A, layer.lora_A["default"].weight)
    torch.testing.assert_close(B, layer.lora_B["default"].weight)


@pytest.mark.parametrize("start", STARTS)
def test_the_function_stays(start):
    net = network().double()
    x = torch.randn(5, 12).double()
    before, weight = net(x), net[0].weight
    model = lorafast.adapt(net, 4, alpha=6, init_lora_weights=start, use_dora=start == "olora")
    torch.testing.assert_close(model(x), before)
    assert not model[0].weight.requires_grad
    assert not torch.equal(model[0].weight, weight)
    torch.testing.assert_close(lorafast.merge(model)(x), before)


def test_of_a_transposed_weight_and_of_a_shared_one():
    from transformers.pytorch_utils import Conv1D

    net = nn.ModuleList([Conv1D(20, 12), nn.Linear(12, 20), nn.Linear(12, 20)])
    net[2].weight = net[1].weight
    x = torch.randn(5, 12)
    before, shared = [layer(x) for layer in net], net[2].weight.clone()
    lorafast.adapt(net, 4, ["0", "1"], init_lora_weights="pissa")
    for layer, expected in zip(net, before, strict=True):
        torch.testing.assert_close(layer(x), expected)
    assert torch.equal(net[2].weight, shared)


def test_a_saved_adapter_goes_with_the_same_start(tmp_path):
    net, x = network(), torch.randn(5, 12)
    model = adapted(net, "pissa")
    with torch.no_grad():
        model[0].lora_B.add_(0.1)
    lorafast.save_adapter(model, tmp_path)
    again = adapted(net, "pissa")
    lorafast.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), model(x))
    # PEFT takes W apart again when it loads such an adapter.
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    for other in (copy.deepcopy(net), adapted(net, None), adapted(net, "olora")):
        with pytest.raises(
            ValueError, match="init_lora_weights in the config is 'pissa', and 0 was"
        ):
            lorafast.load_adapter(other, tmp_path)


def test_true_is_pefts_name_of_the_default():
    given = []
    for start in (True, None):
        torch.manual_seed(2)
        given.append(lorafast.adapt(network(), 4, init_lora_weights=start).state_dict())
    assert all(torch.equal(one, given[1][name]) for name, one in given[0].items())
    lorafast.adapt(network(), kind="houlsby", targets=["0"], init_lora_weights=True)


def _with_nan(net):
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            {"init_lora_weights": "mica"},
            None,
            "init_lora_weights is 'mica', expected 'pissa', 'pissa_n",
        ),
        ({"init_lora_weights": False}, None, "init_lora_weights is False, expected 'pissa', "),
        ({"r": 2**40}, None, "r is 1099511627776, expected at most 12"),
        (
            {"r": 2**40, "init_lora_weights": None},
            None,
            r"r is 1.1e\+12, expected at most 2147483647",
        ),
        ({"r": 13}, None, "r is 13, expected at most 12, the smaller side of the weight of 0"),
        ({"alpha": 0}, None, "alpha is 0, expected a finite number above 0"),
        ({"alpha": -4, "init_lora_weights": "pissa_niter_2"}, None, "alpha is -4, expected a fin"),
        ({}, _with_nan, "weight of 2 has NaN or infinity"),
        (
            {"targets": ["3"]},
            lambda net: net.append(nn.Conv1d(4, 4, 1)),
            "3 is a Conv1d, expected a d",
        ),
    ],
    ids=[
        "another start",
        "False",
        "far r",
        "far r of any start",
        "r",
        "alpha 0",
        "negative alpha",
        "NaN",
        "a convolution",
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(options, change, message):
    net = network()
    if change is not None:
        change(net)
    before = dict(net.named_modules())
    with pytest.raises((TypeError, ValueError), match=message):
        lorafast.adapt(net, **({"r": 4, "init_lora_weights": "pissa"} | options))
    assert dict(net.named_modules()) == before
