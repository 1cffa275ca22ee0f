"""What about a layer over an embedding makes PEFT serve it."""

import pytest
import torch

pytest.importorskip("peft")

from peft_twins import TOKENS, OwnTensor, assert_same, hooked, peft_model, stock_and_fast
from torch import nn

import lorafast

EMBEDDINGS = {
    "max_norm": lambda layer: setattr(layer.base_layer, "max_norm", 1.0),
    "scale_grad_by_freq": lambda layer: setattr(layer.base_layer, "scale_grad_by_freq", True),
    "tensor parallel plan": lambda layer: setattr(layer.base_layer, "_hf_tp_plan", "rowwise"),
    "hooks": lambda layer: hooked(layer.base_layer),
    "a scaling of the shape [1]": lambda layer: layer.scaling.update(default=torch.ones(1)),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "not exactly an nn.Embedding": lambda layer: setattr(
        layer.base_layer, "__class__", type("ScaledEmbedding", (nn.Embedding,), {})
    ),
}


@pytest.mark.parametrize("reason", EMBEDDINGS)
def test_embedding(reason, served_by_peft):
    stock, fast = stock_and_fast(peft_model("embedding"), EMBEDDINGS[reason])
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    assert_same(stock, fast, torch.randint(TOKENS, (3, 4)))
    assert len(served_by_peft) == 1


def own_factor(layer):
    lora_A = layer.lora_embedding_A["default"].detach().as_subclass(OwnTensor)
    layer.lora_embedding_A["default"] = nn.Parameter(lora_A)


FACTORS = {
    "none of its adapters is active": lambda layer: setattr(layer, "_active_adapter", []),
    "has a OwnTensor, not a plain tensor": own_factor,
    "has the shapes [4, 34] and [40, 4]": lambda layer: layer.lora_embedding_A.update(
        {"default": nn.Parameter(torch.ones(4, TOKENS + 3))}
    ),
    "is torch.float64, the weight torch.float32": lambda layer: layer.lora_embedding_A.double(),
}


@pytest.mark.parametrize("reason", FACTORS)
def test_embedding_of_other_factors(reason, served_by_peft):
    stock, fast = stock_and_fast(peft_model("embedding"), FACTORS[reason])
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    tokens = torch.randint(TOKENS, (3, 4))
    outcomes = []
    for model in (stock, fast):
        try:
            outcomes.append(model(tokens).sum().item())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert len(served_by_peft) == 1


def test_embedding_with_sparse_gradients(served_by_peft):
    stock, fast = stock_and_fast(
        peft_model("embedding"), lambda layer: setattr(layer.base_layer, "sparse", True)
    )
    tokens = torch.randint(TOKENS, (3, 4))
    torch.testing.assert_close(fast(tokens), stock(tokens), rtol=0, atol=0)
    assert len(served_by_peft) == 1


def test_embedding_of_a_parametrized_factor(served_by_peft):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def parametrize(layer):
        nn.utils.parametrize.register_parametrization(layer.lora_embedding_A, "default", Twice())

    stock, fast = stock_and_fast(peft_model("embedding", adapters=2), parametrize)
    assert "adapter 'default' has a NoneType" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randint(TOKENS, (3, 4)))
    assert len(served_by_peft) == 1


def test_tokens_of_a_subclass(served_by_peft):
    stock, fast = stock_and_fast(peft_model("embedding"), lambda layer: None)
    tokens = torch.randint(TOKENS, (3, 4)).as_subclass(OwnTensor)
    torch.testing.assert_close(fast(tokens), stock(tokens), rtol=0, atol=0)
    assert len(served_by_peft) == 1


def test_embedding_of_dora_with_a_magnitude_of_another_shape(served_by_peft):
    stock, fast = stock_and_fast(
        peft_model("embedding", use_dora=True),
        lambda layer: setattr(layer.lora_magnitude_vector["default"], "weight", one_magnitude()),
    )
    assert "a magnitude of another shape or device" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randint(TOKENS, (3, 4)))
    assert len(served_by_peft) == 1


def one_magnitude():
    return nn.Parameter(torch.ones(1))
