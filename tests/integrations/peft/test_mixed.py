"""Mixed batches (``adapter_names``) without a loop over adapters, against stock PEFT."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear
from peft_twins import K, N, assert_equal, assert_near, config, peft_model, twins
from torch.utils._python_dispatch import TorchDispatchMode

import lorafast
from lorafast.reference import contract

NAMES = ["default", "__base__", "other1", "default", "other2", "other1", "__base__", "other2"]


@pytest.fixture
def grouped(monkeypatch):
    """The mixed forward of PEFT must not be what served a fast layer."""
    stock = Linear._mixed_batch_forward

    def refuse(self, *args, **kwargs):
        assert type(self) is Linear, "served by PEFT"
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "_mixed_batch_forward", refuse)


def mixed_model(dtype=torch.float32, **options):
    return peft_model(dtype=dtype, adapters=3, **options).eval()


@pytest.mark.parametrize("leading", [(), (1,), (5,), (40,), (3, 9)], ids=str)
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize(
    ("dtype", "upcast"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
    ids=["fp32", "bf16", "bf16, fp32 adapters"],
)
def test_outputs_and_gradients(grouped, dtype, upcast, lora_bias, leading):
    pair = twins(mixed_model(dtype, upcast=upcast, lora_bias=lora_bias, lora_dropout=0.1))
    x = torch.randn(len(NAMES), *leading, K).to(dtype)
    dy = torch.randn(len(NAMES), *leading, N).to(dtype)
    assert_equal(pair, x, dy, dtype, adapter_names=NAMES)


def test_conv1d(grouped):
    pair = twins(peft_model("conv1d", adapters=2).eval())
    names = ["other1", "default", "__base__"]
    assert_equal(
        pair, torch.randn(3, 20, K), torch.randn(3, 20, N), torch.float32, adapter_names=names
    )


def test_scalings_that_are_tensors(grouped):
    model = mixed_model()
    model.base_model.model.layer.scaling["other1"] = torch.tensor(0.3)
    x = torch.randn(len(NAMES), 12, K)
    dy = torch.randn(len(NAMES), 12, N)
    assert_equal(twins(model), x, dy, torch.float32, adapter_names=NAMES)


@pytest.mark.parametrize("T", [1, 40])
def test_autocast(grouped, T):
    pair = twins(mixed_model())
    x = torch.randn(len(NAMES), T, K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stock, fast = (m(x, adapter_names=NAMES) for m in (pair.stock, pair.fast))
    assert stock.dtype is fast.dtype
    with torch.no_grad():
        exact = pair.exact(x.double(), adapter_names=NAMES)
    # Rounded to the nearest bfloat16: half of its eps.
    assert contract.why_broken(fast, stock, exact, exact / 2, torch.bfloat16) is None


@pytest.mark.parametrize("T", [1, 40])
def test_the_number_of_operations_does_not_grow_with_the_batch(T):
    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += any(word in str(func) for word in ("mm", "index", "linear"))
            return func(*args, **(kwargs or {}))

    counts = {}
    for kind, model in vars(twins(mixed_model())).items():
        for batch in (8, 32):
            with torch.no_grad(), Counting() as counting:
                x = torch.randn(batch, T, K, dtype=next(model.parameters()).dtype)
                model(x, adapter_names=(NAMES * 4)[:batch])
            counts[kind, batch] = counting.products
    assert counts["fast", 8] == counts["fast", 32] <= 7
    assert counts["stock", 8] > 12


FALLBACKS = {
    "dropout in training": lambda model: model.train(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_PEFT_serves(reason, monkeypatch):
    calls = []
    forward = Linear.forward

    def counted(self, *args, **kwargs):
        calls.append(type(self))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", counted)
    stock = mixed_model(lora_dropout=0.3)
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    x = torch.randn(len(NAMES), 4, K)
    found = []
    for model in (stock, fast):
        FALLBACKS[reason](model)
        torch.manual_seed(0)
        found.append(model.base_model.model.layer(x, adapter_names=NAMES))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert len(calls) == 2


def test_what_one_element_holds_stays_with_its_adapter(grouped):
    pair = twins(mixed_model())
    x = torch.randn(5, 3, K)
    x[0] = torch.inf  # has no adapter
    names = ["__base__", "default", "default", "other1", "default"]
    found = []
    for model in vars(pair).values():
        model.zero_grad()
        y = model(x.to(next(model.parameters()).dtype), adapter_names=names)
        assert not y[0].isfinite().any()
        y[1:].sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert any("lora_B" in name for name in gradients)
        found.append({"y": y.detach()} | gradients)
    stock, fast, exact = found
    assert all(gradient.isfinite().all() for name, gradient in exact.items() if name != "y")
    assert_near(fast, stock, exact, torch.float32)


def test_few_groups_are_filled_up(monkeypatch):
    """One adapter has nearly all: the batched product is at most about twice the batch."""
    fast = lorafast.accelerate(mixed_model(), quiet=True)
    sizes = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(a.shape) or bmm(a, b))
    names = ["default"] * 30 + ["other1", "other2"]
    fast(torch.randn(32, 4, K), adapter_names=names)
    groups, rows, _ = sizes[0]
    assert 32 * 4 <= groups * rows <= 2 * 32 * 4 + 4


def test_a_scaling_that_bfloat16_has_not(grouped):
    model = mixed_model(torch.bfloat16)
    for name in model.base_model.model.layer.scaling:
        model.base_model.model.layer.scaling[name] = 1 / 3
    x, dy = torch.randn(8, 40, K).bfloat16(), torch.randn(8, 40, N).bfloat16()
    assert_equal(twins(model), x, dy, torch.bfloat16, adapter_names=NAMES)


def test_names_that_are_no_list():
    stock = mixed_model()
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    x = torch.randn(2, 5, K)
    found = [m(x, adapter_names=np.array(["default", "other1"])) for m in (stock, fast)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("reason", ["length", "merged", "dora"])
def test_what_PEFT_refuses(reason):
    stock = peft_model(use_dora=reason == "dora")
    if reason == "merged":
        stock.merge_adapter()
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    names = ["default"] * (3 if reason == "length" else 4)
    messages = []
    for model in (stock, fast):
        with pytest.raises(ValueError, match="adapter_names") as raised:
            model.base_model.model.layer(torch.randn(4, K), adapter_names=names)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_an_adapter_that_the_layer_lacks(grouped):
    """As one of other layers: here it is none."""
    pair = twins(mixed_model())
    x = torch.randn(3, 20, K)
    found = [m.base_model.model.layer(x, adapter_names=["elsewhere", "default", "__base__"])
             for m in (pair.stock, pair.fast)]  # fmt: skip
    torch.testing.assert_close(*found)


def test_an_unknown_argument_beside_the_names():
    fast = lorafast.accelerate(mixed_model(), quiet=True).base_model.model.layer
    with pytest.raises(TypeError, match="unknown"):
        fast(torch.randn(2, K), adapter_names=["default", "other1"], unknown=1)


def test_adapters_of_the_same_rank(grouped):
    model = peft_model()
    model.add_adapter("twin", config())
    pair = twins(model.eval())
    names = ["twin", "default"]
    x, dy = torch.randn(2, 16, K), torch.randn(2, 16, N)
    assert_equal(pair, x, dy, torch.float32, adapter_names=names)
