"""What a mixed batch is put into: one call of ``functional.grouped_lora_linear``."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft_twins import K, N, assert_equal, config, peft_model, twins

import lorafast
from lorafast import functional

NAMES = ["other", "default", "__base__", "other", "default"]


def some_with_bias():
    """Of two adapters, the one with ``lora_bias``."""
    model = peft_model(lora_bias=True)
    model.add_adapter("other", config(r=3, lora_alpha=5))
    return model.eval()


@pytest.mark.parametrize("leading", [(), (3,), (2, 4)], ids=str)
def test_one_adapter_has_a_bias_and_the_other_none(leading, served_by_peft):
    x, dy = torch.randn(5, *leading, K), torch.randn(5, *leading, N)
    assert_equal(twins(some_with_bias()), x, dy, torch.float32, adapter_names=NAMES)
    assert served_by_peft == []


def test_nobody_has_the_adapter_with_a_bias(served_by_peft):
    x, dy = torch.randn(3, 4, K), torch.randn(3, 4, N)
    names = ["other", "__base__", "other"]
    assert_equal(twins(some_with_bias()), x, dy, torch.float32, adapter_names=names)
    assert served_by_peft == []


def test_what_a_bias_holds_stays_with_its_adapter():
    model = lorafast.accelerate(some_with_bias(), quiet=True)
    torch.nn.init.constant_(model.base_model.model.layer.lora_B["default"].bias, torch.nan)
    y = model(torch.randn(5, 3, K), adapter_names=NAMES)
    assert [bool(element.isfinite().all()) for element in y] == [
        name != "default" for name in NAMES
    ]


@pytest.mark.parametrize("scalings", ["same", "different"])
def test_the_adapters_that_are_used_are_stacked(monkeypatch, scalings):
    model = peft_model(adapters=3).eval()
    layer = model.base_model.model.layer
    if scalings == "different":
        layer.scaling["other2"] = 0.25
    calls = []
    monkeypatch.setattr(
        functional,
        "grouped_lora_linear",
        lambda *arguments: calls.append(arguments) or torch.zeros(4, N),
    )
    names = ["other2", "__base__", "default", "other2"]
    lorafast.accelerate(model, quiet=True)(torch.randn(4, K), adapter_names=names)
    ((_, weight, lora_A, lora_B, scaling, adapter_of, bias),) = calls
    assert weight is layer.base_layer.weight
    assert bias is layer.base_layer.bias
    assert adapter_of == [0, -1, 1, 0]
    for i, name in enumerate(("other2", "default")):
        rank = layer.r[name]
        assert torch.equal(lora_A[i, :rank], layer.lora_A[name].weight)
        assert torch.equal(lora_B[i, :, :rank], layer.lora_B[name].weight)
        assert not lora_A[i, rank:].any()
        assert not lora_B[i, :, rank:].any()
        scale = scaling[i] if isinstance(scaling, torch.Tensor) else scaling
        assert float(scale) == layer.scaling[name]


def test_a_forced_backend_serves_it_or_says_why_not():
    stock = peft_model(adapters=2).eval()
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    x, names = torch.randn(2, 3, K), ["other1", "default"]
    usable = [name for name in ("reference", "cpu") if lorafast.backends()[name].usable]
    for backend in usable:
        with lorafast.use_backend(backend):
            found = fast(x, adapter_names=names)
        torch.testing.assert_close(found, stock(x, adapter_names=names))
    with (
        lorafast.use_backend("cuda"),
        pytest.raises(lorafast.BackendError, match="can't serve grouped_lora_linear: "),
    ):
        fast(x, adapter_names=names)


def test_a_term_beyond_float16_is_added_before_it_is_rounded():
    """What PEFT rounds to an infinity first."""
    fast = lorafast.accelerate(peft_model(dtype=torch.float16, upcast=True).eval(), quiet=True)
    layer = fast.base_model.model.layer
    with torch.no_grad():
        layer.base_layer.weight.fill_(-25.0)
        layer.base_layer.bias.zero_()
        for factor, value in ((layer.lora_A["default"], 1.0), (layer.lora_B["default"], 30.0)):
            factor.weight.zero_()
            factor.weight[:, :1] = value
    layer.scaling["default"] = 24.0
    y = fast(torch.full((2, K), 100.0).half(), adapter_names=["default", "__base__"])
    assert y[0].tolist() == [-60_000.0 + 72_000.0] * N
    assert y[1].tolist() == [-60_000.0] * N
