"""Loading changes all of a model or nothing, also where tensors are of an odd kind."""

import gc
import importlib

import pytest
import torch
from adapter_files import (
    DOWN_A,
    HEAD_W,
    UP_A,
    UP_B,
    HEAD_b,
    good_tensors,
    trained,
    write_adapter,
)
from torch import nn

import lorafast
from lorafast.nn import LoRALinear

HEAD = {HEAD_W: torch.ones(2, 3), HEAD_b: torch.ones(2)}
STORED = {"modules_to_save": ["head"]}


@pytest.fixture
def adapted(net):
    """Adapted with another alpha than the file's, one layer merged, one factor frozen."""
    lorafast.adapt(net, 2, ["up", "down"], alpha=9, use_rslora=True)
    net.block.down.merge()
    net.block.up.lora_A.requires_grad_(False)
    net.head.bias.requires_grad_(True)
    return net.eval()


def test_a_model_made_in_inference_mode(make_net, x, tmp_path, assert_same):
    folder = write_adapter(tmp_path, HEAD, STORED)
    with torch.inference_mode():
        net = make_net()
    lorafast.load_adapter(net, folder)
    expected = lorafast.load_adapter(make_net(), folder).eval()(x).detach()
    with torch.inference_mode():
        assert_same(net.eval()(x), expected)


def test_an_adapted_model_made_in_inference_mode(make_net, x, tmp_path, assert_same):
    folder = write_adapter(tmp_path, HEAD, STORED)
    with torch.inference_mode():
        net = lorafast.adapt(make_net(), 2, ["up", "down"])
        net.block.up.merge()
    lorafast.load_adapter(net, folder)
    expected = lorafast.load_adapter(make_net(), folder).eval()(x).detach()
    with torch.inference_mode():
        assert_same(net.eval()(x), expected)


def test_what_is_loaded_in_inference_mode_can_be_trained(make_net, x, tmp_path):
    folder = write_adapter(tmp_path, HEAD, STORED)
    plain, there = make_net(), lorafast.adapt(make_net(), 2, ["up", "down"])
    there.block.up.merge()
    with torch.inference_mode():
        lorafast.load_adapter(plain, folder)
        lorafast.load_adapter(there, folder)
    for net in (plain, there):
        net(x).sum().backward()
        assert net.block.down.lora_B.grad.norm() > 0
    assert plain.head.weight.grad.norm() > 0


# float8 has no scale in the file: nobody knows what the numbers stand for.
LOW = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2"]


def low(tensor, dtype):
    if dtype.startswith("float4"):
        return torch.zeros(tensor.shape, dtype=torch.uint8).view(getattr(torch, dtype))
    return tensor.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("before", ["plain", "adapted"])
def test_refuses_factors_of_few_bits(request, net, unchanged, tmp_path, dtype, before):
    model = request.getfixturevalue("adapted") if before == "adapted" else net
    try:
        folder = write_adapter(tmp_path, {DOWN_A: low(good_tensors()[DOWN_A], dtype)})
        if dtype.startswith("float4"):  # two elements a byte
            folder = write_adapter(tmp_path, {DOWN_A: low(torch.ones(2, 7), dtype)})
    except (KeyError, ValueError):
        pytest.skip(f"safetensors doesn't write {dtype}")
    sentence = rf"lora_A of block\.down (is torch\.{dtype} in the file, expected float16|has shape)"
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(model, folder)


def test_refuses_a_stored_module_of_few_bits(net, unchanged, tmp_path):
    head = HEAD | {HEAD_W: torch.ones(2, 3).to(torch.float8_e4m3fn)}
    sentence = r"head\.weight is torch\.float8_e4m3fn in the file, expected torch\.float64"
    with unchanged(net), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(net, write_adapter(tmp_path, head, STORED))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: t.data[:1].expand(2, 3), "it is expanded"),
        (lambda t: t.data.to_sparse(), r"its layout is torch\.sparse_coo"),
    ],
    ids=["expanded", "sparse"],
)
@pytest.mark.parametrize("before", ["plain", "adapted"])
def test_refuses_to_copy_into_an_odd_parameter(
    request, net, unchanged, tmp_path, before, make, reason
):
    model = request.getfixturevalue("adapted") if before == "adapted" else net
    model.head.weight = nn.Parameter(make(model.head.weight))
    folder = write_adapter(tmp_path, HEAD, STORED)
    sentence = rf"head\.weight can't be replaced: {reason}"
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(model, folder)


def test_refuses_to_copy_into_an_odd_factor(adapted, unchanged, tmp_path):
    adapted.block.down.lora_A = nn.Parameter(torch.ones(2, 1).double().expand(2, 7))
    folder = write_adapter(tmp_path)
    sentence = r"lora_A of block\.down can't be replaced: it is expanded"
    with unchanged(adapted), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(adapted, folder)


class UnforeseenError(Exception):
    """What nobody foresaw."""


@pytest.mark.parametrize(
    ("before", "where"),
    [
        *(("plain", where) for where in ("make", "copy", "freeze", "put_in_place")),
        *(("adapted", where) for where in ("copy", "merge", "put_in_place")),
        *(("half", where) for where in ("make", "copy", "merge", "freeze", "put_in_place")),
    ],
)
def test_undoes_everything_on_an_error_that_nobody_foresaw(
    request, net, unchanged, tmp_path, monkeypatch, before, where
):
    from lorafast.convert import exchange

    model = net
    if before == "adapted":
        model = request.getfixturevalue("adapted")
    elif before == "half":
        lorafast.adapt(model, 2, ["down"], alpha=9, use_rslora=True, freeze=False)
        model.block.down.merge()
    folder = write_adapter(tmp_path, HEAD, STORED)
    calls = []

    def explode_at(owner, name, call):
        real = getattr(owner, name)

        def replaced(*arguments, **options):
            calls.append(name)
            result = real(*arguments, **options)
            if len(calls) == call:
                raise UnforeseenError
            return result

        monkeypatch.setattr(owner, name, replaced)

    if where == "make":
        explode_at(exchange, "_make", 2 if before == "plain" else 1)
    elif where == "copy":
        explode_at(exchange, "copy_into", 2)
    elif where == "merge":
        explode_at(LoRALinear, "merge", 1)
    elif where == "freeze":
        explode_at(exchange, "freeze_base", 1)
    else:
        explode_at(exchange, "put_in_place", 1)
    with unchanged(model), pytest.raises(UnforeseenError):
        lorafast.load_adapter(model, folder)


@pytest.fixture
def hooked(net):
    """The net, and what the hooks of its layers were called with."""
    called = []
    for layer in (net.block.up, net.block.down):
        layer.register_load_state_dict_pre_hook(lambda module, *call: called.append(module))
    return net, called


@pytest.mark.parametrize("how", ["load", "adapt", "adapt-later-layer"])
def test_hooks_that_know_their_module_are_given_back(hooked, unchanged, tmp_path, monkeypatch, how):
    adapt = importlib.import_module("lorafast.convert.adapt")  # the package has the function
    exchange = importlib.import_module("lorafast.convert.exchange")

    def fail(*arguments, **options):
        raise UnforeseenError

    net, called = hooked
    folder = write_adapter(tmp_path)
    real, calls = LoRALinear.from_linear, []

    def fail_later(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options) if len(calls) == 1 else fail()

    with monkeypatch.context() as patch:
        if how == "adapt-later-layer":
            patch.setattr(LoRALinear, "from_linear", fail_later)
        else:
            patch.setattr(exchange if how == "load" else adapt, "put_in_place", fail)
        with unchanged(net), pytest.raises(UnforeseenError):
            lorafast.load_adapter(net, folder) if how == "load" else lorafast.adapt(net, 2)
    gc.collect()
    net.load_state_dict(net.state_dict())
    assert called == [net.block.up, net.block.down]


# What is trained afterwards


HEAD_NAMES = {"head.weight", "head.bias"}
FACTORS = {f"block.{name}.lora_{half}" for name in ("up", "down") for half in "AB"}


@pytest.mark.parametrize(
    ("is_trainable", "expected"),
    [(None, FACTORS | HEAD_NAMES), (True, FACTORS | HEAD_NAMES), (False, set())],
)
def test_what_a_plain_model_trains(net, tmp_path, is_trainable, expected):
    net.train()
    folder = write_adapter(tmp_path, HEAD, STORED)
    lorafast.load_adapter(net, folder, is_trainable=is_trainable)
    assert trained(net) == expected
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize(
    ("is_trainable", "expected"),
    [
        (None, FACTORS - {"block.up.lora_A"} | {"head.bias"}),
        (True, FACTORS | HEAD_NAMES),
        (False, set()),
    ],
)
def test_what_an_adapted_model_trains(adapted, tmp_path, is_trainable, expected):
    folder = write_adapter(tmp_path, HEAD, STORED)
    lorafast.load_adapter(adapted, folder, is_trainable=is_trainable)
    assert trained(adapted) == expected


def test_layers_adapted_before_keep_alpha_and_factors_of_the_file(adapted, tmp_path):
    lorafast.load_adapter(adapted, write_adapter(tmp_path))
    for layer in (adapted.block.up, adapted.block.down):
        assert (layer.alpha, layer.scaling, layer.use_rslora) == (5.0, 2.5, False)
    assert torch.equal(adapted.block.up.lora_A, good_tensors()[UP_A].double())
    assert torch.equal(adapted.block.up.lora_B, good_tensors()[UP_B].double())
