"""torch.compile of an accelerated model: one graph, and none anew when a scaling changes."""

import pytest
import torch

pytest.importorskip("peft")

from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_twins import K, N, peft_model
from torch._dynamo.testing import CompileCounter

import lorafast

KINDS = {
    "linear": {},
    "no bias": {"bias": False},
    "dropout": {"lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
    "three adapters": {"adapters": 3},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "conv1d": {"kind": "conv1d"},
    "bf16, fp32 adapters": {"dtype": torch.bfloat16, "upcast": True},
}


QUICK = [("linear", "float"), ("three adapters", "tensor"), ("dora", "float")]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def fast_model(**options):
    return lorafast.accelerate(peft_model(**options), quiet=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_and_the_gradients_of_eager(kind):
    model = fast_model(**KINDS[kind])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    dtype = KINDS[kind].get("dtype", torch.float32)
    x, dy = torch.randn(6, K).to(dtype), torch.randn(6, N).to(dtype)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        run(leaf).backward(dy)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"x": leaf.grad} | gradients)
    tolerance = 4 * torch.finfo(dtype).eps
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert error < tolerance, name


@pytest.mark.slow
def test_inductor():
    model = fast_model()
    x = torch.randn(6, K)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        pytest.param(kind, scaling, marks=[pytest.mark.slow] * ((kind, scaling) not in QUICK))
        for kind in ("linear", "lora_bias", "three adapters", "dora", "conv1d")
        for scaling in ("float", "tensor")
    ],
)
def test_no_new_graph_for_another_scaling(kind, scaling):
    model = fast_model(**KINDS[kind])
    layer = model.base_model.model.layer
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(6, K)

    def scale(value):
        for name in layer.scaling:
            if scaling == "float":
                layer.scaling[name] = value
            elif isinstance(layer.scaling[name], torch.Tensor):
                layer.scaling[name].fill_(value)
            else:
                layer.scaling[name] = torch.tensor(value)

    # PyTorch takes the first value of a number for a constant, the second for a variable.
    for value in (0.5, 0.7):
        scale(value)
        compiled(x)
    before = counter.frame_count
    assert before <= (2 if scaling == "float" else 1)
    for value in (1.5, 3.0, -2.0):
        scale(value)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == before


def test_no_new_graph_for_a_hot_swapped_adapter(tmp_path):
    """Another adapter, of another rank and scaling, prepared for as PEFT says."""
    other = peft_model(r=7, lora_alpha=3)
    other.save_pretrained(tmp_path)
    model = fast_model()
    other.base_model.model.layer.base_layer = model.base_model.model.layer.base_layer
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    x = torch.randn(6, K)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        compiled(x)
        hotswap_adapter(model, tmp_path, "default")
        torch.testing.assert_close(compiled(x), other(x))
    assert counter.frame_count == 1


def test_mixed_batch():
    model = fast_model(adapters=2).eval().base_model.model.layer
    names = ["default", "other1", "__base__"]
    x = torch.randn(3, 12, K)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, adapter_names=names), model(x, adapter_names=names))


def test_embedding():
    model = fast_model(kind="embedding")
    tokens = torch.tensor([[1, 2, 3]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_what_is_served_by_PEFT_compiles_too():
    model = fast_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, K)
    with torch.no_grad():
        fast = compiled(x)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(x), model.base_model.model.layer.base_layer(x))
        torch.testing.assert_close(compiled(x), fast)
