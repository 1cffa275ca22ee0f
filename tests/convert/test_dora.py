"""DoRA in a model: ``adapt``, files with PEFT both ways, gradients, refusals, merging, resizing."""

import copy

import pytest
import torch
from models import trained
from test_peft_exchange import (
    IDS,
    LLAMA_EPS,
    config_of,
    distance,
    llama,
    loaded_by_peft,
    logits,
    roberta,
    saved,
    with_peft,
)
from torch import nn

import lorafast
from lorafast.convert import AdapterRow
from lorafast.nn import LoRALinear
from lorafast.reference import contract

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

Q = "base_model.model.model.layers.0.self_attn.q_proj."
PARAMETERS = ("lora_A", "lora_B", "lora_magnitude")


def test_adapt(net, x):
    expected = net(x)
    lorafast.adapt(net, 2, ["up", "head"], use_dora=True, alpha=3)
    torch.testing.assert_close(net(x), expected)
    assert trained(net) == {
        f"{name}.{parameter}" for name in ("block.up", "head") for parameter in PARAMETERS
    }
    summary = lorafast.summary(net)
    assert summary.layers[0] == AdapterRow(
        "block.up", 5, 7, 2, 1.5, 0.0, 2 * (5 + 7) + 7, merged=False, remark="DoRA"
    )
    assert str(summary).splitlines()[1].endswith("  DoRA")
    assert summary.adapter == summary.trainable == 2 * (5 + 7) + 7 + 2 * (3 + 2) + 2


def with_dora(linear):
    """PEFT's layer over ``linear`` in its dtype, with a random adapter and magnitudes near W's."""
    config = peft.LoraConfig(r=8, target_modules=["layer"], use_dora=True)
    model = peft.get_peft_model(
        nn.ModuleDict({"layer": linear}), config, autocast_adapter_dtype=False
    )
    layer = model.base_model.model["layer"]
    with torch.no_grad():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.mul_(torch.rand_like(magnitude) + 0.5)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_is_as_exact_as_pefts(dtype):
    linear = nn.Linear(96, 160, dtype=dtype)
    theirs = with_dora(linear)
    ours = LoRALinear.from_linear(linear, 8, use_dora=True, adapter_dtype=dtype)
    with torch.no_grad():
        ours.lora_A.copy_(theirs.lora_A["default"].weight)
        ours.lora_B.copy_(theirs.lora_B["default"].weight)
        ours.lora_magnitude.copy_(theirs.lora_magnitude_vector["default"].weight)
    x, dy = torch.randn(64, 96).to(dtype), torch.randn(64, 160).to(dtype)

    def run(layer, x):
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(dy.to(y.dtype))
        gradients = {n.split(".")[0]: p.grad for n, p in layer.named_parameters() if "lora" in n}
        return {"y": y.detach(), "dx": x.grad} | gradients

    found, eager = run(ours, x), run(theirs, x)
    exact = run(copy.deepcopy(theirs).double(), x.double())
    eager["lora_magnitude"] = eager.pop("lora_magnitude_vector")
    exact["lora_magnitude"] = exact.pop("lora_magnitude_vector")
    assert found.keys() == eager.keys()
    for name, tensor in found.items():
        assert contract.why_broken(tensor, eager[name], exact[name]) is None, name


CONFIGS = [
    pytest.param({"target_modules": ["q_proj", "v_proj"]}, id="plain"),
    pytest.param({"target_modules": "all-linear"}, id="all-linear"),
    pytest.param({"target_modules": ["o_proj"], "lora_dropout": 0.5}, id="dropout"),
    pytest.param(
        {"target_modules": ["up_proj"], "lora_alpha": 11, "use_rslora": True}, id="rslora"
    ),
    pytest.param(
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"k_proj": 1, r"layers\.1\.self_attn\.q_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9, "k_proj": 2},
        },
        id="patterns",
    ),
    pytest.param(
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 5}, "use_rslora": True},
        id="rank_pattern-rslora",
    ),
    pytest.param({"target_modules": ["lm_head", "q_proj"]}, id="lm_head"),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("config", CONFIGS)
def test_loads_what_peft_saved_and_peft_loads_what_is_saved(tmp_path, assert_same, config, tied):
    theirs = with_peft(llama(tie_word_embeddings=tied), use_dora=True, **config)
    folder = saved(theirs, tmp_path / "theirs")
    model = llama(tie_word_embeddings=tied)
    base = logits(model)
    lorafast.load_adapter(model, folder)
    expected = logits(theirs).detach()
    assert distance(base, expected) > 1e-3
    assert_same(logits(model).detach(), expected, LLAMA_EPS)
    lorafast.save_adapter(model, tmp_path / "ours")
    again = loaded_by_peft(llama(tie_word_embeddings=tied), tmp_path / "ours")
    assert_same(logits(again).detach(), expected, LLAMA_EPS)


def test_peft_loads_what_was_adapted_here(tmp_path, assert_same, draw_adapters):
    model = lorafast.adapt(llama(), 2, ["q_proj"], use_dora=True, alpha=5, dropout=0.25)
    lorafast.adapt(model, 3, ["down_proj"], use_dora=True, dropout=0.25)
    draw_adapters(model)
    lorafast.save_adapter(model, tmp_path)
    assert config_of(tmp_path)["use_dora"] is True
    stored = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    assert {key.removeprefix(Q) for key in stored if key.startswith(Q)} == {
        "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight",
    }  # fmt: skip
    theirs = loaded_by_peft(llama(), tmp_path)
    model.eval()
    assert_same(logits(model).detach(), logits(theirs).detach(), LLAMA_EPS)


@pytest.mark.parametrize(
    ("make", "eps"), [(llama, LLAMA_EPS), (roberta, 1e-12)], ids=["llama", "roberta"]
)
def test_gradients_are_pefts(tmp_path, assert_same, make, eps):
    theirs = with_peft(
        make(),
        target_modules=r".*layers?\.\d+\..*(proj|query|value|dense)",
        lora_alpha=5,
        use_dora=True,
    )
    ours = lorafast.load_adapter(make(), saved(theirs, tmp_path))
    for model in (ours, theirs):
        logits(model).square().sum().backward()
    layers = [name for name, m in ours.named_modules() if isinstance(m, LoRALinear)]
    assert len(layers) >= 10
    for name in layers:
        layer, layer_peft = (model.get_submodule(name) for model in (ours, theirs.base_model.model))
        assert_same(
            layer.lora_magnitude.grad, layer_peft.lora_magnitude_vector["default"].weight.grad, eps
        )
        for half in ("lora_A", "lora_B"):
            expected = getattr(layer_peft, half)["default"].weight.grad
            assert_same(getattr(layer, half).grad, expected, eps)


def test_gpt2_keeps_its_weights_transposed(tmp_path, assert_same):
    transformers = pytest.importorskip("transformers")

    def gpt2():
        torch.manual_seed(5)
        config = transformers.GPT2Config(
            vocab_size=19, n_positions=12, n_embd=16, n_layer=1, n_head=2
        )
        return transformers.GPT2LMHeadModel(config).double().eval()

    theirs = with_peft(gpt2(), target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    model = lorafast.load_adapter(gpt2(), saved(theirs, tmp_path / "theirs"))
    expected = logits(theirs).detach()
    assert_same(logits(model).detach(), expected)
    lorafast.save_adapter(model, tmp_path / "ours")
    assert_same(logits(loaded_by_peft(gpt2(), tmp_path / "ours")).detach(), expected)


def written(folder, change):
    """An adapter of DoRA for ``q_proj``, with other tensors."""
    lorafast.save_adapter(lorafast.adapt(llama(), 2, ["q_proj"], use_dora=True), folder)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    safetensors.save_file(change(tensors), path)
    return folder


def test_transformers_loads_it_beside_the_model(tmp_path, assert_same, draw_adapters):
    model = draw_adapters(lorafast.adapt(llama(), 2, ["q_proj"], use_dora=True))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_same(logits(again).detach(), logits(model).detach(), LLAMA_EPS)


def test_a_file_without_a_magnitude(tmp_path, unchanged):
    def dropped(tensors):
        return {key: t for key, t in tensors.items() if key != Q + "lora_magnitude_vector.weight"}

    model = llama()
    folder = written(tmp_path, dropped)
    with unchanged(model), pytest.raises(ValueError, match="q_proj has no lora_magnitude_vector"):
        lorafast.load_adapter(model, folder)


@pytest.mark.parametrize(
    ("dora", "sentence"),
    [
        (False, "q_proj is adapted with DoRA, and use_dora is False in the config"),
        (True, "q_proj is adapted without DoRA, and use_dora is True in the config"),
    ],
    ids=["into-dora", "from-dora"],
)
def test_the_other_kind_is_refused(tmp_path, unchanged, dora, sentence):
    lorafast.save_adapter(lorafast.adapt(llama(), 2, ["q_proj"], use_dora=dora), tmp_path)
    model = lorafast.adapt(llama(), 2, ["q_proj"], use_dora=not dora)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=sentence),
    ):
        lorafast.load_adapter(model, tmp_path)


def test_a_mixture_can_not_be_saved(tmp_path):
    model = lorafast.adapt(llama(), 2, ["q_proj"], use_dora=True)
    lorafast.adapt(model, 2, ["k_proj"])
    with pytest.raises(ValueError, match=r"use_dora is True in .*q_proj, False in .*one value"):
        lorafast.save_adapter(model, tmp_path)


@pytest.mark.parametrize("is_trainable", [True, False, None])
def test_what_is_trained_after_loading(tmp_path, is_trainable):
    lorafast.save_adapter(lorafast.adapt(llama(), 2, ["q_proj"], use_dora=True), tmp_path)
    model = lorafast.load_adapter(llama(), tmp_path, is_trainable=is_trainable)
    found = {name.rpartition(".")[2] for name in trained(model)}
    assert found == (set() if is_trainable is False else {*PARAMETERS})


def test_values_are_replaced_in_an_adapted_model(tmp_path, assert_same, draw_adapters):
    model = draw_adapters(lorafast.adapt(llama(), 2, ["q_proj"], use_dora=True))
    lorafast.save_adapter(model, tmp_path)
    other = lorafast.adapt(llama(), 2, ["q_proj"], use_dora=True, alpha=9)
    other.model.layers[0].self_attn.q_proj.merge()
    lorafast.load_adapter(other, tmp_path)
    assert_same(logits(other).detach(), logits(model).detach(), LLAMA_EPS)


def test_merging(assert_same, draw_adapters):
    model = draw_adapters(lorafast.adapt(llama(), 2, use_dora=True))
    expected = logits(model).detach()
    lorafast.merge(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert_same(logits(model).detach(), expected, LLAMA_EPS)


@pytest.mark.parametrize("size", [16, 23], ids=["smaller", "larger"])
def test_a_head_is_resized(assert_same, draw_adapters, size):
    model = draw_adapters(lorafast.adapt(llama(), 2, ["lm_head"], use_dora=True))
    expected = logits(model).detach()
    model.resize_token_embeddings(size, mean_resizing=False)
    head, kept = model.lm_head, min(size, 19)
    assert_same(logits(model).detach()[..., :kept], expected[..., :kept])
    added = head.weight[kept:].norm(dim=1)
    torch.testing.assert_close(head.lora_magnitude[kept:], added)
    model(IDS, labels=IDS).loss.backward()
    assert head.lora_magnitude.grad.shape == (size,)


def test_warm_up():
    model = lorafast.adapt(nn.Sequential(nn.Linear(7, 5)), 2, use_dora=True, dropout=0.5)
    lorafast.warm_up(model, [1, 5])
    assert all(p.grad is None for p in model.parameters())
