"""``new_head``: which layer is replaced, by what, and what the model is told."""

import copy

import pytest
import torch
from models import llama_config
from torch import nn

import lorafast


class Model(nn.Module):
    """Its last linear layer is called ``place``, within a module of that name or by itself."""

    def __init__(self, place, head):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.add_module(place, head)
        self.num_classes = 3

    def forward(self, x):
        *_, head = self.children()
        return head(self.body(x))


HEADS = {
    "classifier": ("classifier", nn.Linear(4, 3), "classifier"),
    "fc without bias": ("fc", nn.Linear(4, 3, bias=False), "fc"),
    "heads in a sequence": ("heads", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), "heads.1"),
    "dropout behind": ("head", nn.Sequential(nn.Linear(4, 3), nn.Dropout()), "head.0"),
    "bfloat16": ("score", nn.Linear(4, 3, dtype=torch.bfloat16), "score"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_replaces_the_classifier(kind):
    place, head, name = HEADS[kind]
    model = Model(place, copy.deepcopy(head)).requires_grad_(False).eval()
    old = model.get_submodule(name)
    torch.manual_seed(3)
    made = lorafast.new_head(model, 6)
    torch.manual_seed(3)
    expected = nn.Linear(4, 6, bias=old.bias is not None, dtype=old.weight.dtype)
    assert model.get_submodule(name) is made
    assert type(made) is nn.Linear
    assert made.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(made.state_dict()[key], value)
    assert not made.training
    assert all(p.requires_grad for p in made.parameters())
    assert not any(p.requires_grad for p in model.body.parameters())
    assert model.num_classes == 6


def test_of_a_sequence_and_under_two_names():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softmax(-1))
    made = lorafast.new_head(model, 2)
    assert model[2] is made
    model = Model("classifier", nn.Linear(4, 3))
    model.alias = model.classifier
    made = lorafast.new_head(model, 2)
    assert model.alias is made


def test_of_an_adapted_and_of_a_quantized_layer(draw_adapters):
    model = Model("classifier", nn.Linear(4, 3))
    draw_adapters(lorafast.adapt(model, 2, ["body", "classifier"]))
    made = lorafast.new_head(model, 2)
    assert type(made) is nn.Linear
    assert model(torch.randn(7, 5)).shape == (7, 2)
    model = nn.Sequential(nn.Linear(64, 64).bfloat16())
    lorafast.quantize(model)
    made = lorafast.new_head(nn.Sequential(nn.Sequential(*model)), 2)
    assert (made.in_features, made.weight.dtype) == (64, torch.bfloat16)


def test_transformers_config_follows(monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForSequenceClassification(llama_config(num_labels=1))
    model.config.problem_type = "regression"
    made = lorafast.new_head(model, 4)
    assert model.score is made
    assert (model.num_labels, model.config.num_labels, len(model.config.id2label)) == (4, 4, 4)
    tokens = torch.tensor([[3, 4, 5], [6, 7, 0]])
    found = model(tokens, labels=torch.tensor([1, 3]))
    assert found.logits.shape == (2, 4)
    expected = nn.functional.cross_entropy(found.logits, torch.tensor([1, 3]))
    torch.testing.assert_close(found.loss, expected)


def test_a_language_models_output_is_replaced_where_it_is_named(unchanged):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    with (
        unchanged(model),
        pytest.raises(ValueError, match="lm_head gives a language model's tokens"),
    ):
        lorafast.new_head(model, 4)
    table = model.get_input_embeddings().weight
    made = lorafast.new_head(model, 4, name="lm_head")
    model.tie_weights()
    assert model.lm_head.weight is made.weight
    assert model.get_input_embeddings().weight is table
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 4)


class LanguageModel(Model):
    """Its output embedding has the name of a classifier."""

    def get_output_embeddings(self):
        return self.head


class Two(Model):
    def __init__(self):
        super().__init__("fc", nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)


class Deep(nn.Module):
    """Its layers have names of several parts, and a norm is not one that can be a head."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 3)})


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        (Two(), {}, "fc and head may be the classifier: pass the name of one"),
        (LanguageModel("head", nn.Linear(4, 3)), {}, "head gives a language model's tokens"),
        (Model("last", nn.Linear(4, 3)), {}, "a Model has none of classifier, fc, head, "),
        (Model("head", nn.Identity()), {}, "head is a Identity without a linear layer"),
        (Model("fc", nn.Linear(4, 3)), {"name": "fx"}, r"no module \(there are body, fc\)"),
        (Model("fc", nn.Linear(4, 3)), {"name": "bodi"}, r"no module, did you mean 'body'\?"),
        (Deep(), {"name": "fc"}, r"no module, did you mean 'inner\.fc'\?"),
        (Deep(), {"name": "norm"}, r"no module \(there are inner\.fc\)"),
        (
            Model("fc", nn.Linear(4, 3)),
            {"name": 4},
            "name is 4, expected the full name of a linear",
        ),
        (Model("fc", nn.Linear(4, 3)), {"num_labels": 2**40}, r"1\.1e\+12, expected at most 2147"),
        (Model("fc", nn.Conv2d(4, 3, 1)), {"name": "fc"}, "it is a Conv2d, expected an nn.Linear"),
        (Model("fc", nn.Linear(4, 3)), {"num_labels": 0}, "num_labels is 0"),
        (Model("fc", nn.Linear(4, 3)), {"num_labels": True}, "num_labels is True"),
    ],
)
def test_refuses_in_a_sentence(model, arguments, sentence, unchanged):
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        lorafast.new_head(model, **({"num_labels": 2} | arguments))


def test_refuses_what_peft_has_wrapped(unchanged):
    peft = pytest.importorskip("peft")
    model = Model("classifier", nn.Linear(4, 3))
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["classifier"])
    wrapped = peft.PeftModel(model, config).base_model.model
    with pytest.raises(ValueError, match="ModulesToSaveWrapper: make the head before"):
        lorafast.new_head(wrapped, 2)
