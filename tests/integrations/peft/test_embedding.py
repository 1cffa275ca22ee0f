"""PEFT's embeddings beyond plain LoRA: DoRA, those that scale what they give, mixed batches."""

import copy

import pytest
import torch

pytest.importorskip("peft")

import peft
from helpers import covering
from peft_twins import TOKENS, N, assert_equal, assert_near, layer_of, peft_model, run, twins
from torch import nn

import lorafast
from lorafast.integrations.peft import embedding_rules, known

NAMES = ["default", "__base__", "other1", "default", "other2", "other1", "__base__"]
KINDS = ("embedding", "embedding scaled by a buffer", "embedding scaled by a number")
DTYPES = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "bf16, fp32 adapters": (torch.bfloat16, True),
    "fp16, fp32 adapters": (torch.float16, True),
}


def drawn(dtype, *shape):
    return torch.randint(TOKENS, shape), torch.randn(*shape, N).to(dtype)


@pytest.mark.parametrize(
    ("kind", "dora", "adapters", "dtype"),
    covering(KINDS, (False, True), (1, 3), list(DTYPES)),
)
def test_outputs_and_gradients(served_by_peft, kind, dora, adapters, dtype):
    dtype, upcast = DTYPES[dtype]
    pair = twins(peft_model(kind, dtype, upcast=upcast, use_dora=dora, adapters=adapters))
    assert list(lorafast.explain(pair.fast).layers.values()) == [None]
    assert_equal(pair, *drawn(dtype, 5, 7), dtype)
    assert not served_by_peft


def test_lora_and_dora_together(served_by_peft):
    model = peft_model("embedding", adapters=2)
    settings = copy.copy(model.peft_config["default"])
    settings.use_dora = True
    model.add_adapter("dora", settings)
    model.base_model.set_adapter(["default", "dora", "other1"])
    nn.init.uniform_(layer_of(model).lora_magnitude_vector["dora"].weight, 0.5, 2.0)
    assert_equal(twins(model), *drawn(torch.float32, 5, 7), torch.float32)
    assert not served_by_peft


@pytest.mark.parametrize(
    ("kind", "dtype", "trailing"), covering(KINDS, list(DTYPES), ((), (1,), (9,), (0,)))
)
def test_a_mixed_batch(served_by_peft, kind, dtype, trailing):
    dtype, upcast = DTYPES[dtype]
    pair = twins(peft_model(kind, dtype, upcast=upcast, adapters=3).eval())
    assert_equal(pair, *drawn(dtype, len(NAMES), *trailing), dtype, adapter_names=NAMES)
    assert not served_by_peft


def test_what_one_element_holds_stays_with_its_adapter(served_by_peft):
    pair = twins(peft_model("embedding", adapters=3).eval())
    for model in vars(pair).values():
        with torch.no_grad():
            layer_of(model).lora_embedding_B["other1"].fill_(torch.inf)
    tokens, dy = drawn(torch.float32, 3, 4)
    names = ["default", "other1", "__base__"]
    found = [run(model, tokens, dy, adapter_names=names) for model in vars(pair).values()]
    stock, fast, exact = ({"y": one.y} | one.gradients for one in found)
    assert exact["y"][[0, 2]].isfinite().all()
    assert not exact["y"][1].isfinite().any()
    assert_near(fast, stock, exact, torch.float32)
    assert not served_by_peft


def with_mica(kind, dtype=torch.float32, upcast=False):
    """A model with an adapter of MiCA beside a plain one, both active, with factors that are drawn."""
    if known.METHODS.get("embedding's MiCA") is None or known.why_changed("embedding's MiCA"):
        pytest.skip(f"PEFT {peft.__version__} has no MiCA of embeddings that lorafast knows")
    model = peft_model(kind, upcast=upcast)
    settings = copy.copy(model.peft_config["default"])
    settings.init_lora_weights = "mica"
    model.add_adapter("mica", settings, autocast_adapter_dtype=upcast)
    model.base_model.set_adapter(["default", "mica"])
    layer = layer_of(model)
    for factors in (layer.lora_embedding_A, layer.lora_embedding_B):
        nn.init.normal_(factors["mica"])
    (layer.base_layer if upcast else model).to(dtype)
    return model


@pytest.mark.parametrize(("kind", "dtype"), covering(KINDS, list(DTYPES)))
def test_mica(served_by_peft, kind, dtype):
    dtype, upcast = DTYPES[dtype]
    pair = twins(with_mica(kind, dtype, upcast))
    assert not layer_of(pair.fast).lora_embedding_B["mica"].requires_grad
    assert_equal(pair, *drawn(dtype, 5, 7), dtype)
    names = ["mica", "__base__", "default", "mica"]
    pair = twins(pair.stock.eval())
    assert_equal(pair, *drawn(dtype, len(names), 3), dtype, adapter_names=names)
    assert not served_by_peft


def test_a_mica_of_another_release_is_left_to_peft(monkeypatch):
    model = lorafast.accelerate(with_mica("embedding"), quiet=True)
    monkeypatch.setattr(embedding_rules, "_MICA_CHANGED", "PEFT 9 has another forward")
    reasons = list(lorafast.explain(model).layers.values())
    assert reasons == ["adapter 'mica' is of MiCA, and PEFT 9 has another forward"]


def test_a_mixed_batch_of_dora_is_refused():
    model = lorafast.accelerate(peft_model("embedding", use_dora=True).eval(), quiet=True)
    with pytest.raises(ValueError, match="DoRA"):
        model(torch.zeros(2, 3, dtype=torch.int64), adapter_names=["default", "__base__"])


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
def test_compiled(served_by_peft, dora):
    model = peft_model("embedding scaled by a buffer", use_dora=dora)
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    tokens, _ = drawn(torch.float32, 3, 4)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), fast(tokens))
    torch.testing.assert_close(compiled(tokens), model(tokens))
    assert not served_by_peft
