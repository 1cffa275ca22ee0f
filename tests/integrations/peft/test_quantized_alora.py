"""aLoRA over quantized weights, accelerated."""

import contextlib

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig
from peft_twins import assert_equal, assert_near, run
from quantized_twins import BASES, K, N, four_bit, in_float64, layer_of, twins

pytestmark = pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
INVOKED = {"alora_invocation_tokens": [1]}
OFFSETS = [2, None, 99]


def data(dtype):
    return torch.randn(3, 5, K).to(dtype), torch.randn(3, 5, N)


def left_to_peft(monkeypatch, model):
    """A list that gets the layer when its own forward is called."""
    calls, kind = [], type(layer_of(model))._stock

    def forward(self, *args, _forward=kind.forward, **kwargs):
        if type(self) is not kind:
            calls.append(self)
        return _forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return calls


@pytest.mark.parametrize(
    ("kind", "compute"),
    [("nf4", None), ("nf4", torch.bfloat16), ("int8", None), ("torchao int8 by row", None)],
    ids=["nf4", "nf4 that computes in bf16", "int8", "torchao int8 by row"],
)
def test_outputs_and_gradients(kind, compute, monkeypatch):
    """The outputs are as near as PEFT's. Gradients are compared over W made dense: PEFT adds in place to
    what a library gives, which autograd may refuse."""
    if compute is not None:
        monkeypatch.setitem(BASES, "nf4", four_bit("nf4", compute=compute))
    pair = twins(kind, torch.float32, **INVOKED)
    served_by_peft = left_to_peft(monkeypatch, pair.fast)
    x, dy = data(torch.float32)
    dtype = compute or torch.float32
    with torch.no_grad():
        assert_equal(pair, x, dy, dtype, alora_offsets=OFFSETS)
    eager = in_float64(kind, torch.float32, **INVOKED).float()
    found, eager = (run(m, x, dy, alora_offsets=OFFSETS) for m in (pair.fast, eager))
    exact = run(pair.exact, x.double(), dy, alora_offsets=OFFSETS)
    assert_near(*({"y": r.y} | r.gradients for r in (found, eager, exact)), dtype)
    assert served_by_peft == []


@pytest.mark.parametrize("others", ["plain", "aLoRA"])
def test_a_mixed_batch_over_bitsandbytes(others, monkeypatch):
    """Of two adapters of aLoRA PEFT gives the second one offsets of the first: it is left to do so."""
    pair = twins("nf4", torch.float32, **INVOKED)
    for model in (pair.stock, pair.fast, pair.exact):
        torch.manual_seed(1)
        settings = {"target_modules": ["layer"], "r": 3, "init_lora_weights": False}
        if others == "aLoRA":
            settings |= INVOKED
        model.add_adapter("other", LoraConfig(**settings))
        model.eval()
    pair.exact.double()
    for name in ("lora_A", "lora_B"):
        its = getattr(layer_of(pair.exact), name)["other"].weight
        its.data = getattr(layer_of(pair.stock), name)["other"].weight.double()
    served_by_peft = left_to_peft(monkeypatch, pair.fast)
    x, dy = data(torch.float32)
    arguments = {"adapter_names": ["other", "default", "default"], "alora_offsets": [1, 2, None]}
    with torch.no_grad():
        if others == "plain":
            assert_equal(pair, x, dy, torch.float32, **arguments)
        else:
            pair.fast(x, adapter_names=["other"] * 3, alora_offsets=OFFSETS)
            assert served_by_peft == []
            # Whether PEFT raises then goes by the order of a set of names.
            with contextlib.suppress(IndexError, RuntimeError):
                pair.fast(x, **arguments)
    assert bool(served_by_peft) is (others == "aLoRA")
