"""Checkpointed blocks of a model of which only adapters and a head are trained."""

import copy
import io
import warnings

import pytest
import torch
from models import llama_config

import lorafast
from lorafast.nn import LoRALinear

transformers = pytest.importorskip("transformers")


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).double()


def checkpointed(model, use_reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Transformers is renaming the method
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def adapted(model, draw_adapters):
    with pytest.warns(UserWarning, match="classifier"):
        lorafast.adapt(model, 2)
    model.classifier.requires_grad_(True)
    return draw_adapters(model).train()


def gradients(model):
    images = torch.randn(
        2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    model.zero_grad()
    model(images).logits.square().sum().backward()
    return {
        f"{name}.{half}": getattr(layer, half).grad
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
        for half in ("lora_A", "lora_B")
    }


@pytest.fixture
def expected(draw_adapters):
    return gradients(adapted(vit(), draw_adapters))


def assert_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name] is not None, name
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-hooks"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_all_adapters_are_trained(when, use_reentrant, expected, draw_adapters):
    model = vit()
    if when == "before":
        checkpointed(model, use_reentrant)
    adapted(model, draw_adapters)
    if when == "after":
        checkpointed(model, use_reentrant)
    assert_gradients(gradients(model), expected)


class Wrapped(torch.nn.Module):
    """A user's own module around the model, and a head."""

    def __init__(self, model):
        super().__init__()
        self.vit = model.vit
        self.head = model.classifier

    def forward(self, images):
        state = self.vit(images).last_hidden_state[:, 0]
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.head(state))


def test_adapters_are_trained_of_a_model_in_a_module_of_ones_own(expected, draw_adapters):
    model = vit()
    checkpointed(model.vit, True)
    wrapped = lorafast.adapt(Wrapped(model), 2, ["q_proj", "fc1"])
    wrapped.head.requires_grad_(True)
    draw_adapters(wrapped).train()
    plain = lorafast.adapt(Wrapped(vit()), 2, ["q_proj", "fc1"])
    plain.head.requires_grad_(True)
    draw_adapters(plain).train()
    actual = gradients(wrapped)
    assert len(actual) == 8
    assert_gradients(actual, gradients(plain))


def test_a_part_without_adapters_gets_no_gradient():
    model = Wrapped(checkpointed(vit(), True))
    lorafast.adapt(model, 2, ["head"])
    assert not model.vit.get_input_embeddings()._forward_hooks


def test_a_loaded_adapter_is_trained(tmp_path, expected, draw_adapters):
    with pytest.warns(UserWarning, match="trained but not saved"):
        lorafast.save_adapter(adapted(vit(), draw_adapters), tmp_path)
    model = lorafast.load_adapter(checkpointed(vit(), True), tmp_path)
    assert_gradients(gradients(model.train()), expected)


def _pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_looks_at_its_own_blocks(make, expected, draw_adapters):
    model = adapted(vit(), draw_adapters)
    copied = make(model)
    checkpointed(copied, True)
    assert_gradients(gradients(copied), expected)


def embeddings_require_grad(model):
    seen = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
    gradients(model)
    handle.remove()
    return seen[0]


def test_without_reentrant_blocks_no_gradient_flows_to_the_embeddings(draw_adapters):
    model = adapted(vit(), draw_adapters)
    assert not embeddings_require_grad(model)
    assert not embeddings_require_grad(checkpointed(model, False))
    assert embeddings_require_grad(checkpointed(model, True))


def test_adapting_twice_adds_one_hook_and_merging_takes_it_away(draw_adapters):
    model = vit()
    lorafast.adapt(model, 2, r".*\.0\..*")
    hooks = model.get_input_embeddings()._forward_hooks
    assert len(hooks) == 1
    lorafast.adapt(model, 2, r".*\.1\..*")
    assert len(hooks) == 1
    lorafast.merge(model)
    assert len(hooks) == 0


def test_a_model_of_token_ids_is_left_to_transformers():
    model = lorafast.adapt(transformers.LlamaForCausalLM(llama_config()), 2)
    assert not model.get_input_embeddings()._forward_hooks
    checkpointed(model, True).train()
    model(torch.tensor([[3, 1, 4]])).logits.sum().backward()
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    assert len(layers) == 7
    assert all(layer.lora_B.grad is not None for layer in layers)


def test_a_model_that_hides_its_embeddings_is_spoken_of(monkeypatch):
    model = checkpointed(vit(), True)

    def hidden(self):
        raise NotImplementedError

    for kind in {type(module) for module in model.modules()}:
        if hasattr(kind, "get_input_embeddings"):
            monkeypatch.setattr(kind, "get_input_embeddings", hidden)
    with pytest.warns(UserWarning, match=r"ViT\w+ doesn't name its input embeddings"):
        lorafast.adapt(model, 2)
