"""A Llama of Transformers under ``torch.compile``: one graph of the whole, any batch and length."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

import lorafast

TOLERANCE = 1e-5
"""Of the norm: float32, in another order of sums."""


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def llama():
    settings = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(settings).train()


def accelerated():
    settings = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)
    return lorafast.accelerate(peft.get_peft_model(llama(), settings), quiet=True)


def checkpointed():
    model = lorafast.adapt(llama(), 4, dropout=0.3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Transformers' hook calls requires_grad_ on the embeddings' output: reentrant ones alone need it.
    model.disable_input_require_grads()
    return model


MODELS = {
    "adapted": lambda: lorafast.adapt(llama(), 4),
    "accelerated, dropout": accelerated,
    "checkpointed, dropout": checkpointed,
}
QUICK = ["adapted"]


def outputs(model, run, ids):
    torch.manual_seed(3)
    loss = run(input_ids=ids, labels=ids).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()))
    return {"loss": loss.detach()} | dict(zip(trained, found, strict=True))


@pytest.mark.parametrize(
    "kind", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in MODELS]
)
def test_one_graph_for_every_batch_and_length(kind):
    """No graph break, eager's loss and gradients; what varies is compiled at its second value alone."""
    model = MODELS[kind]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    counter = CompileCounterWithBackend("eager" if kind in QUICK else "aot_eager")
    run = torch.compile(model, fullgraph=True, backend=counter)
    for batch, length in ((2, 8), (3, 8), (3, 9), (5, 12)):
        ids = torch.randint(64, (batch, length))
        stance = "fail_on_recompile" if batch == 5 else "default"
        expected = outputs(model, model, ids)
        with torch.compiler.set_stance(stance):
            found = outputs(model, run, ids)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name] - tensor).norm() <= TOLERANCE * tensor.norm(), name
    assert counter.frame_count <= 3
