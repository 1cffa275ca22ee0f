"""Adapted embeddings in a model: which are, files with PEFT both ways, merging, resizing, gradients."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from models import adapted, trained
from test_peft_exchange import (
    IDS,
    LLAMA_EPS,
    config_of,
    distance,
    llama,
    loaded_by_peft,
    logits,
    saved,
    with_peft,
)
from torch import nn

import lorafast
from lorafast.convert import AdapterRow, LeftOut
from lorafast.nn import LoRAEmbedding, LoRALinear
from lorafast.nn.adaptable import _SCALED_FORWARD
from lorafast.reference import contract

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
EMBED = "model.embed_tokens"
PREFIX = f"base_model.model.{EMBED}."


class Tokens(nn.Module):
    """``[..., ]`` tokens → ``[..., 4]``."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 3)
        self.places = nn.Embedding(4, 3)
        self.up = nn.Linear(3, 4)

    def forward(self, x):
        return self.up(self.embed(x))


class Scaled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


# Which embeddings


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ["up"]),
        (["embed"], ["embed"]),
        (["embed", "up"], ["embed", "up"]),
        (r"embed|places", ["embed", "places"]),
    ],
    ids=str,
)
def test_embeddings_are_adapted_where_targets_name_them(targets, expected):
    model = lorafast.adapt(Tokens(), 2, targets)
    assert adapted(model) == set(expected)
    kinds = {"embed": LoRAEmbedding, "places": LoRAEmbedding, "up": LoRALinear}
    assert all(type(getattr(model, name)) is kinds[name] for name in expected)


def test_the_rest_is_frozen_and_dropout_is_of_linear_layers():
    model = lorafast.adapt(Tokens(), 2, ["embed", "up"], dropout=0.5, alpha=3)
    assert trained(model) == {
        "embed.lora_embedding_A", "embed.lora_embedding_B", "up.lora_A", "up.lora_B",
    }  # fmt: skip
    assert (model.embed.dropout, model.up.dropout) == (0.0, 0.5)
    assert model.embed.scaling == 1.5


@pytest.mark.parametrize(
    ("make", "options", "error", "sentence"),
    [
        (lambda: Scaled(9, 3), {}, TypeError, r"embed can't be adapted: its forward is not that"),
        (lambda: nn.Embedding(9, 3, max_norm=1), {}, TypeError, "its max_norm is 1"),
        (
            lambda: nn.EmbeddingBag(9, 3),
            {},
            ValueError,
            "EmbeddingBag, expected an nn.Linear or nn",
        ),
    ],
    ids=["forward", "max_norm", "bag"],
)
def test_refusals(unchanged, make, options, error, sentence):
    model = Tokens()
    model.embed = make()
    with unchanged(model), pytest.raises(error, match=sentence):
        lorafast.adapt(model, 2, ["up", "embed"], **options)


def test_a_name_that_is_misspelt():
    with pytest.raises(ValueError, match=r"the name of no nn\.Linear or nn\.Embedding.*'embed'"):
        lorafast.adapt(Tokens(), 2, ["embedd"])


def test_summary():
    model = lorafast.adapt(Tokens(), 2, ["embed", "up"])
    model.embed.merge()
    summary = lorafast.summary(model)
    row = AdapterRow("embed", 9, 3, 2, 1.0, 0.0, 2 * (9 + 3), merged=True, remark="embedding")
    assert summary.layers[0] == row
    assert summary.adapter == summary.trainable == 2 * (9 + 3) + 2 * (3 + 4)
    assert summary.left == (LeftOut("Embedding", 1, 12, by_name=True),)
    assert str(summary).splitlines()[1].endswith("  embedding  merged")


# Files


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_is_as_exact_as_pefts(dtype, use_dora):
    plain = nn.Embedding(50, 96, dtype=dtype)
    config = peft.LoraConfig(r=8, target_modules=["embed"], use_dora=use_dora)
    theirs = peft.get_peft_model(
        nn.ModuleDict({"embed": plain}), config, autocast_adapter_dtype=False
    ).base_model.model["embed"]
    nn.init.normal_(theirs.lora_embedding_A["default"])
    ours = LoRAEmbedding.from_embedding(plain, 8, use_dora=use_dora, adapter_dtype=dtype)
    with torch.no_grad():
        ours.lora_embedding_A.copy_(theirs.lora_embedding_A["default"])
        ours.lora_embedding_B.copy_(theirs.lora_embedding_B["default"])
        if use_dora:
            ours.lora_magnitude.copy_(theirs.lora_magnitude_vector["default"].weight)
    x, dy = torch.randint(50, (64,)), torch.randn(64, 96).to(dtype)

    def run(layer):
        y = layer(x)
        y.backward(dy.to(y.dtype))
        gradients = {
            name.split(".")[0].removesuffix("_vector"): p.grad
            for name, p in layer.named_parameters()
            if "lora" in name
        }
        return {"y": y.detach()} | gradients

    found, eager, exact = run(ours), run(theirs), run(copy.deepcopy(theirs).double())
    assert found.keys() == eager.keys()
    for name, tensor in found.items():
        assert contract.why_broken(tensor, eager[name], exact[name]) is None, name


CONFIGS = [
    pytest.param({"target_modules": ["embed_tokens"]}, id="alone"),
    pytest.param({"target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 5}, id="and-linear"),
    pytest.param(
        {"target_modules": ["up_proj", "embed_tokens"], "use_rslora": True, "lora_dropout": 0.5},
        id="rslora-and-dropout",
    ),
    pytest.param({"target_modules": r".*(embed_tokens|v_proj)"}, id="regex"),
    pytest.param(
        {
            "target_modules": ["q_proj", "embed_tokens"],
            "rank_pattern": {"embed_tokens": 5},
            "alpha_pattern": {"embed_tokens": 2},
        },
        id="patterns",
    ),
    pytest.param({"target_modules": ["embed_tokens"], "use_dora": True}, id="dora"),
    pytest.param(
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "use_rslora": True},
        id="dora-and-linear",
    ),
]


@TIED
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("config", CONFIGS)
def test_loads_what_peft_saved_and_peft_loads_what_is_saved(tmp_path, assert_same, config, tied):
    theirs = with_peft(llama(tie_word_embeddings=tied), **config)
    folder = saved(theirs, tmp_path / "theirs")
    model = llama(tie_word_embeddings=tied)
    base = logits(model)
    lorafast.load_adapter(model, folder)
    expected = logits(theirs).detach()
    assert distance(base, expected) > 1e-3
    assert_same(logits(model).detach(), expected, LLAMA_EPS)
    assert EMBED in adapted(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    lorafast.save_adapter(model, tmp_path / "ours")
    again = loaded_by_peft(llama(tie_word_embeddings=tied), tmp_path / "ours")
    assert_same(logits(again).detach(), expected, LLAMA_EPS)


@TIED
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_peft_loads_what_was_adapted_here(tmp_path, assert_same, draw_adapters, tied):
    model = llama(tie_word_embeddings=tied)
    lorafast.adapt(model, 2, ["embed_tokens", "down_proj"], alpha=3, dropout=0.25)
    draw_adapters(model)
    lorafast.save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert config["target_modules"] == ["down_proj", "embed_tokens"]
    assert (config["lora_dropout"], config["use_dora"]) == (0.25, False)
    stored = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in stored if key.startswith(PREFIX)} == {
        PREFIX + "lora_embedding_A", PREFIX + "lora_embedding_B",
    }  # fmt: skip
    theirs = loaded_by_peft(llama(tie_word_embeddings=tied), tmp_path)
    model.eval()
    assert_same(logits(model).detach(), logits(theirs).detach(), LLAMA_EPS)


@TIED
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_gradients_are_pefts(tmp_path, assert_same, tied, use_dora):
    theirs = with_peft(
        llama(tie_word_embeddings=tied),
        target_modules=["embed_tokens", "q_proj"],
        lora_alpha=5,
        use_dora=use_dora,
    )
    ours = lorafast.load_adapter(llama(tie_word_embeddings=tied), saved(theirs, tmp_path))
    for model in (ours, theirs):
        logits(model).square().sum().backward()
    layer = ours.model.embed_tokens
    layer_peft = theirs.base_model.model.model.embed_tokens
    for half in ("lora_embedding_A", "lora_embedding_B"):
        expected = getattr(layer_peft, half)["default"].grad
        assert_same(getattr(layer, half).grad, expected, LLAMA_EPS)
    if use_dora:
        expected = layer_peft.lora_magnitude_vector["default"].weight.grad
        assert_same(layer.lora_magnitude.grad, expected, LLAMA_EPS)
    assert layer.weight.grad is None


def test_values_are_replaced_in_an_adapted_model(tmp_path, assert_same, draw_adapters):
    model = draw_adapters(lorafast.adapt(llama(), 2, ["embed_tokens"]))
    lorafast.save_adapter(model, tmp_path)
    other = lorafast.adapt(llama(), 2, ["embed_tokens"], alpha=9)
    layer = other.model.embed_tokens
    lorafast.load_adapter(other, tmp_path)
    assert other.model.embed_tokens is layer
    assert_same(logits(other).detach(), logits(model).detach())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lora_embedding_A": None}, rf"{EMBED} has no lora_embedding_A in the file"),
        (
            {"lora_embedding_A": torch.zeros(2, 18)},
            rf"lora_embedding_A of {EMBED} has shape \[2, 18\] in the file, expected \[2, 19\]",
        ),
        (
            {
                "lora_embedding_A": None,
                "lora_embedding_B": None,
                "lora_A.weight": torch.zeros(2, 19),
                "lora_B.weight": torch.zeros(32, 2),
            },
            rf"the file has {EMBED}\.lora_A\.weight, expected lora_embedding_A and lora_embedding_B",
        ),
    ],
    ids=["half", "shape", "kind"],
)
def test_a_file_that_does_not_fit(tmp_path, unchanged, change, sentence):
    lorafast.save_adapter(lorafast.adapt(llama(), 2, ["embed_tokens"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    for ending, tensor in change.items():
        tensors.pop(PREFIX + ending, None)
        if tensor is not None:
            tensors[PREFIX + ending] = tensor
    safetensors.save_file(tensors, path)
    model = llama()
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(model, tmp_path)


@TIED
def test_transformers_loads_it_beside_the_model(tmp_path, assert_same, draw_adapters, tied):
    model = llama(tie_word_embeddings=tied)
    draw_adapters(lorafast.adapt(model, 2, ["embed_tokens", "q_proj"]))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_same(logits(again).detach(), logits(model).detach(), LLAMA_EPS)


# Embeddings that scale their output


def gemma():
    config = transformers.Gemma3TextConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24,
    )  # fmt: skip
    torch.manual_seed(29)
    return transformers.Gemma3ForCausalLM(config).double().eval()


def bart():
    config = transformers.BartConfig(
        vocab_size=19, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=20, scale_embedding=True, decoder_start_token_id=2,
    )  # fmt: skip
    torch.manual_seed(31)
    return transformers.BartModel(config).double().eval()


def output(model):
    found = model(IDS)
    return found.logits if "logits" in found else found[0]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:merged weights that other modules share")
@pytest.mark.parametrize("make", [gemma, bart])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_embedding_that_scales_its_output(tmp_path, assert_same, make, use_dora):
    theirs = with_peft(make(), target_modules=["embed_tokens"], lora_alpha=5, use_dora=use_dora)
    model = make()
    base = output(model).detach()
    lorafast.load_adapter(model, saved(theirs, tmp_path / "theirs"))
    expected = output(theirs).detach()
    assert distance(base, expected) > 1e-3
    assert_same(output(model).detach(), expected, LLAMA_EPS)
    lorafast.save_adapter(model, tmp_path / "ours")
    again = loaded_by_peft(make(), tmp_path / "ours")
    assert_same(output(again).detach(), expected, LLAMA_EPS)
    for name in adapted(model):
        model.get_submodule(name).merge()
    assert_same(output(model).detach(), expected, LLAMA_EPS)
    lorafast.merge(model)
    assert_same(output(model).detach(), expected, LLAMA_EPS)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("embed_tokens")}
    assert kinds == {f"{'Gemma3Text' if make is gemma else 'Bart'}ScaledWordEmbedding"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_script_of_one(assert_same, draw_adapters, use_dora):
    model = draw_adapters(lorafast.adapt(gemma(), 2, ["embed_tokens"], use_dora=use_dora))
    layer = model.model.embed_tokens
    assert_same(torch.jit.script(layer)(IDS).detach(), layer(IDS).detach())


def test_most_scaled_embeddings_of_transformers_are_known():
    # By their source, so that a release that writes them in another way is found.
    scaled = re.compile(
        r"^class (\w+ScaledWordEmbedding)\(nn\.Embedding\):\n(?:(?: .*)?\n)*?"
        r"(    def forward.*\n(?:(?:     .*)?\n)*)",
        re.M,
    )
    found = {
        name: _SCALED_FORWARD.fullmatch(forward) is not None
        for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
        for name, forward in scaled.findall(path.read_text(encoding="utf-8"))
    }
    others = {name for name, known in found.items() if not known}
    assert len(found) > 20
    # Which puts another row in for one of its tokens.
    assert others <= {"T5Gemma2TextScaledWordEmbedding"}


# In a model


@TIED
def test_merging(assert_same, draw_adapters, tied):
    model = llama(tie_word_embeddings=tied)
    head = model.lm_head.weight.detach().clone()
    draw_adapters(lorafast.adapt(model, 2, ["embed_tokens", "q_proj"]))
    expected = logits(model).detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorafast.merge(model)
    said = [str(one.message) for one in caught if "no longer shared" in str(one.message)]
    assert len(said) == tied
    if tied:
        assert f"{EMBED}.weight (set model.config.tie_word_embeddings = False" in said[0]
    assert type(model.model.embed_tokens) is nn.Embedding
    assert torch.equal(model.lm_head.weight, head)
    assert_same(logits(model).detach(), expected)


@TIED
@pytest.mark.parametrize("size", [16, 23], ids=["smaller", "larger"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=len)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_resize_token_embeddings(assert_same, draw_adapters, size, targets, tied, use_dora):
    model = llama(tie_word_embeddings=tied)
    draw_adapters(lorafast.adapt(model, 2, targets, use_dora=use_dora))
    expected, layer = logits(model).detach(), model.model.embed_tokens
    returned = model.resize_token_embeddings(size, mean_resizing=False)
    assert returned is layer is model.get_input_embeddings()
    assert (layer.num_embeddings, layer.in_features, *layer.weight.shape) == (size, size, size, 32)
    assert layer.lora_embedding_A.shape == (2, size)
    assert not layer.lora_embedding_A[:, 19:].any()
    assert (model.lm_head.weight is layer.weight) == tied
    kept = min(size, 19)
    assert_same(logits(model).detach()[..., :kept], expected[..., :kept])
    own = {name.removeprefix(f"{EMBED}.") for name in trained(model) if EMBED in name}
    assert own - {"lora_magnitude"} == {"lora_embedding_A", "lora_embedding_B"}
    model(IDS, labels=IDS).loss.backward()
    assert layer.lora_embedding_A.grad.shape == (2, size)


def test_a_dropout_that_no_embedding_has_must_be_a_probability():
    model = Tokens()
    with pytest.raises(ValueError, match=r"dropout is 1\.5, expected a probability"):
        lorafast.adapt(model, 2, ["embed"], dropout=1.5)
    assert type(model.embed) is nn.Embedding


def test_an_embedding_that_nobody_calls_is_named():
    model = lorafast.adapt(Tokens(), 2, ["embed", "places"])
    with pytest.warns(UserWarning, match=r"got no gradient in the first backward.*: places \("):
        model(torch.tensor([1, 2])).sum().backward()
    rows = {row.name: row.no_gradient for row in lorafast.summary(model).layers}
    assert rows == {"embed": False, "places": True}


def test_warm_up_and_explain():
    model = lorafast.adapt(Tokens(), 2, ["embed", "up"])
    lorafast.warm_up(model, [1, 5])
    assert all(p.grad is None for p in model.parameters())
    (choice,) = lorafast.explain(model).layers["embed"]
    assert (choice.operation, choice.backend) == ("lora_embedding", None)
    assert "PyTorch's own calls" in str(lorafast.explain(model))
