"""PEFT is the yardstick: the same numbers, the same gradients, and files that go both ways."""

import json
import re
import tempfile
import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import lorafast
from lorafast.nn import LoRALinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

# What Llama rounds to float32 on the way (norms, rotary embedding), whatever its own dtype.
LLAMA_EPS = 1e-6

IDS = torch.tensor([[3, 1, 4, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7, 12]])
HALVES = ("lora_A", "lora_B")


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    torch.manual_seed(17)
    return transformers.LlamaForCausalLM(config).double().eval()


def roberta():
    """A classifier whose head holds a layer called dense, as its encoder does."""
    config = transformers.RobertaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        num_labels=3,
    )
    torch.manual_seed(19)
    return transformers.RobertaForSequenceClassification(config).double().eval()


def logits(model):
    return model(IDS).logits


def with_peft(model, **config):
    """``model`` adapted by PEFT, with random adapters and random copies of stored modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3} | config)).eval()
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5, generator=generator)
    return model


def saved(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def loaded_by_peft(model, folder):
    with warnings.catch_warnings():
        # PEFT only warns where a tensor is missing.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# The same layer


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (5,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 7}, {"alpha": 7, "use_rslora": True}],
    ids=["alpha-is-r", "alpha-7", "rslora"],
)
def test_a_layer_has_pefts_output_and_gradients(assert_same, shape, bias, options):
    linear = nn.Linear(5, 9, bias=bias, dtype=torch.float64)
    ours = LoRALinear.from_linear(linear, 3, **options)
    theirs = with_peft(
        nn.ModuleDict({"layer": linear}),
        target_modules=["layer"],
        lora_alpha=options.get("alpha", 3),
        use_rslora=options.get("use_rslora", False),
    ).base_model.model["layer"]
    with torch.no_grad():
        for half in HALVES:
            getattr(ours, half).copy_(getattr(theirs, half)["default"].weight)
    dy = torch.randn(*shape[:-1], 9, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x_peft = x.detach().clone().requires_grad_()
    y, y_peft = ours(x), theirs(x_peft)
    y.backward(dy)
    y_peft.backward(dy)
    assert_same(y.detach(), y_peft.detach())
    assert_same(x.grad, x_peft.grad)
    for half in HALVES:
        assert_same(getattr(ours, half).grad, getattr(theirs, half)["default"].weight.grad)
    assert ours.weight.grad is None


@pytest.mark.parametrize(
    ("make", "eps"), [(llama, LLAMA_EPS), (roberta, 1e-12)], ids=["llama", "roberta"]
)
def test_a_model_has_pefts_output_and_gradients(tmp_path, assert_same, make, eps):
    theirs = with_peft(
        make(), target_modules=r".*layers?\.\d+\..*(proj|query|value|dense)", lora_alpha=5
    )
    ours = lorafast.load_adapter(make(), saved(theirs, tmp_path))
    y, y_peft = logits(ours), logits(theirs)
    y.square().sum().backward()
    y_peft.square().sum().backward()
    assert_same(y.detach(), y_peft.detach(), eps)
    layers = {name for name, m in ours.named_modules() if isinstance(m, LoRALinear)}
    assert len(layers) >= 10
    for name in layers:
        layer = ours.get_submodule(name)
        layer_peft = theirs.base_model.model.get_submodule(name)
        for half in HALVES:
            assert_same(
                getattr(layer, half).grad, getattr(layer_peft, half)["default"].weight.grad, eps
            )
    names = {f"{name}.{half}" for name in layers for half in HALVES}
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == names


# PEFT → lorafast


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"target_modules": ["q_proj", "v_proj"]}, id="plain"),
        pytest.param({"target_modules": ["q_proj"], "lora_alpha": 11}, id="alpha"),
        pytest.param(
            {"target_modules": ["up_proj"], "lora_alpha": 11, "use_rslora": True}, id="rslora"
        ),
        pytest.param({"target_modules": ["o_proj"], "lora_dropout": 0.5}, id="dropout"),
        pytest.param({"target_modules": "all-linear"}, id="all-linear"),
        pytest.param({"target_modules": r".*\.1\..*\.(k|down)_proj"}, id="regex"),
        pytest.param(
            {
                "target_modules": ["q_proj", "k_proj"],
                "rank_pattern": {"k_proj": 1, r"layers\.1\.self_attn\.q_proj": 5},
                "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9, "k_proj": 2},
            },
            id="rank_pattern-and-alpha_pattern",
        ),
        pytest.param(
            {
                "target_modules": ["q_proj", "k_proj"],
                "rank_pattern": {"self_attn.k_proj": 5},
                "use_rslora": True,
            },
            id="rank_pattern-rslora",
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "layers_to_transform": 1}, id="layers_to_transform-1"
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            id="layers_to_transform-list",
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "layers_to_transform": []},
            id="layers_to_transform-empty",
        ),
        pytest.param(
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [1],
                "layers_pattern": "layers",
            },
            id="layers_pattern",
        ),
        pytest.param(
            {
                "target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"],
                "layers_to_transform": [1],
            },
            id="layers_to_transform-and-a-full-name",
        ),
        pytest.param(
            {
                "target_modules": ["q_proj", "up_proj"],
                "exclude_modules": ["layers.0.self_attn.q_proj"],
            },
            id="exclude_modules-list",
        ),
        pytest.param(
            {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0\..*"},
            id="exclude_modules-regex",
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, id="gaussian"
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="stored-lm_head"
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            id="stored-embedding-and-lm_head",
        ),
        # PEFT stores every module whose name ends like this: input_layernorm too.
        pytest.param(
            {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, id="stored-norms"
        ),
        # PEFT puts the base weight of a language model's head into the file too.
        pytest.param({"target_modules": ["q_proj", "lm_head"]}, id="adapted-lm_head"),
    ],
)
def test_loads_what_peft_saved(tmp_path, assert_same, config):
    theirs = with_peft(llama(), **config)
    model = llama()
    base = logits(model)
    lorafast.load_adapter(model, saved(theirs, tmp_path))
    expected = logits(theirs).detach()
    assert distance(base, expected) > 1e-3
    assert_same(logits(model).detach(), expected, LLAMA_EPS)


@pytest.mark.parametrize(
    "targets",
    [["query"], ["query", "dense"], r".*\.(dense|key)", "all-linear"],
    ids=["query", "dense", "regex", "all-linear"],
)
def test_loads_a_classifier_that_peft_trained(tmp_path, assert_same, targets):
    theirs = with_peft(roberta(), target_modules=targets, task_type="SEQ_CLS")
    model = roberta()
    base = logits(model)
    lorafast.load_adapter(model, saved(theirs, tmp_path))
    expected = logits(theirs).detach()
    assert distance(base, expected) > 1e-2
    assert_same(logits(model).detach(), expected)
    assert type(model.classifier.dense) is nn.Linear


def _experts():
    """Two levels of numbered layers, at the top of the model and inside it."""

    def expert():
        return nn.ModuleDict({"up": nn.Linear(3, 3)})

    def layer():
        return nn.ModuleDict({"experts": nn.ModuleList(expert() for _ in range(2))})

    def layers():
        return nn.ModuleList(layer() for _ in range(3))

    return nn.ModuleDict({"layers": layers(), "model": nn.ModuleDict({"layers": layers()})})


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]], ids=str)
def test_layers_to_transform_counts_layers_as_peft_does(tmp_path, index, pattern):
    theirs = with_peft(
        _experts(), target_modules=["up"], layers_to_transform=[index], layers_pattern=pattern
    )
    model = lorafast.load_adapter(_experts(), saved(theirs, tmp_path))
    names = {
        name
        for name, module in theirs.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALinear)} == names


def test_loads_a_module_stored_by_the_end_of_its_name(tmp_path, net, make_net, x, assert_same):
    net.subhead, other = net.head, make_net()
    other.subhead = other.head
    del net.head, other.head
    net.forward = lambda x: net.subhead(net.norm(net.block(x)))
    other.forward = lambda x: other.subhead(other.norm(other.block(x)))
    theirs = with_peft(net, target_modules=["up"], modules_to_save=["head"])
    lorafast.load_adapter(other, saved(theirs, tmp_path))
    assert_same(other(x).detach(), theirs(x).detach())


def test_loads_the_base_weight_of_an_output_head_as_peft_does(tmp_path, assert_same):
    folder = saved(with_peft(llama(), target_modules=["lm_head"]), tmp_path)
    model, model_peft = llama(), llama()
    for each in (model, model_peft):
        nn.init.ones_(each.lm_head.weight)
    expected = logits(loaded_by_peft(model_peft, folder)).detach()
    assert_same(logits(lorafast.load_adapter(model, folder)).detach(), expected, LLAMA_EPS)


@pytest.mark.parametrize(
    "stored", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=" and ".join
)
def test_a_stored_module_does_not_change_what_it_was_tied_to(tmp_path, unchanged, stored):
    # PEFT trains a copy, so that the two differ from then on; in a tied model they can't.
    theirs = with_peft(
        llama(tie_word_embeddings=True), target_modules=["q_proj"], modules_to_save=stored
    )
    folder = saved(theirs, tmp_path)
    model = llama(tie_word_embeddings=True)
    with unchanged(model), pytest.raises(ValueError, match=rf"{stored[0]}\.weight.*shared"):
        lorafast.load_adapter(model, folder)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_refuses_an_adapter_that_goes_with_another_base(tmp_path, unchanged, start):
    theirs = with_peft(llama().float(), target_modules=["q_proj"], init_lora_weights=start)
    folder = saved(theirs, tmp_path)
    model = llama()
    with unchanged(model), pytest.raises(ValueError, match=f"init_lora_weights in .*'{start}'"):
        lorafast.load_adapter(model, folder)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        pytest.param({"bias": "all"}, "bias", id="bias-all"),
        pytest.param({"lora_bias": True}, "lora_bias", id="lora_bias"),
        pytest.param({"trainable_token_indices": [3]}, "trainable_token_indices", id="tokens"),
        pytest.param({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication", id="replicas"),
    ],
)
def test_refuses_what_it_does_not_compute(tmp_path, unchanged, config, sentence):
    theirs = with_peft(llama(), target_modules=["q_proj"], **config)
    folder = saved(theirs, tmp_path)
    model = llama()
    with unchanged(model), pytest.raises(ValueError, match=f"{sentence} in .* is "):
        lorafast.load_adapter(model, folder)


def test_refuses_another_method_of_peft(tmp_path, unchanged):
    theirs = peft.get_peft_model(
        llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    folder = saved(theirs, tmp_path)
    model = llama()
    with unchanged(model), pytest.raises(ValueError, match=r"peft_type in .* is 'IA3'"):
        lorafast.load_adapter(model, folder)


# lorafast → PEFT


@pytest.mark.parametrize(
    "adapters",
    [
        pytest.param([{}], id="all-linear"),
        pytest.param([{"targets": ["q_proj", "v_proj"], "alpha": 11}], id="alpha"),
        pytest.param([{"targets": ["q_proj"], "alpha": 11, "use_rslora": True}], id="rslora"),
        pytest.param([{"targets": ["q_proj"], "dropout": 0.5}], id="dropout"),
        pytest.param([{"targets": r".*\.1\..*\.(k|down)_proj"}], id="one-block"),
        pytest.param([{"exclude": r".*layers\.0\.mlp.*"}], id="exclude"),
        pytest.param([{"targets": ["lm_head"]}], id="lm_head"),
        pytest.param(
            [{"targets": ["k_proj"], "r": 1}, {"targets": [r"layers.1.mlp.up_proj"], "r": 9}, {}],
            id="ranks",
        ),
        pytest.param(
            [{"targets": ["k_proj"], "alpha": 0.25}, {"targets": ["down_proj"], "alpha": 8}, {}],
            id="alphas",
        ),
        pytest.param(
            [{"targets": ["k_proj"], "r": 1, "use_rslora": True}, {"use_rslora": True}],
            id="ranks-rslora",
        ),
    ],
)
def test_peft_loads_what_was_saved(tmp_path, assert_same, draw_adapters, adapters):
    model = llama()
    base = logits(model)
    for selection in adapters:
        lorafast.adapt(model, **{"r": 3} | selection)
    draw_adapters(model)
    lorafast.save_adapter(model, tmp_path)
    theirs = loaded_by_peft(llama(), tmp_path)
    expected = logits(model.eval()).detach()
    assert distance(base, expected) > 1e-2
    assert_same(logits(theirs).detach(), expected, LLAMA_EPS)
    ours = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    found = theirs.base_model.model.named_modules()
    assert {name for name, m in found if isinstance(m, peft.tuners.lora.LoraLayer)} == ours


def test_peft_loads_a_trained_classification_head(tmp_path, assert_same, draw_adapters):
    model = roberta()
    draw_adapters(lorafast.adapt(model, 3, ["query", "value"]))
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_()
    lorafast.save_adapter(model, tmp_path, modules_to_save=["classifier"])
    expected = logits(model).detach()
    assert_same(logits(loaded_by_peft(roberta(), tmp_path)).detach(), expected)
    assert_same(logits(lorafast.load_adapter(roberta(), tmp_path)).detach(), expected)


@pytest.mark.parametrize("odd", ["fc", "sub.fc"])
def test_peft_gives_a_layer_of_its_own_rank_and_alpha_these(tmp_path, draw_adapters, odd):
    def make():
        return nn.ModuleDict(
            {
                "fc": nn.Linear(3, 3),
                "gate": nn.Linear(3, 3),
                "sub": nn.ModuleDict({"fc": nn.Linear(3, 3), "gate": nn.Linear(3, 3)}),
            }
        )

    model = lorafast.adapt(make(), 1, odd.replace(".", r"\."), alpha=5)
    draw_adapters(lorafast.adapt(model, 2))
    lorafast.save_adapter(model, tmp_path)
    theirs = loaded_by_peft(make(), tmp_path).base_model.model
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            other = theirs.get_submodule(name)
            assert other.scaling["default"] == layer.scaling, name
            assert torch.equal(other.lora_B["default"].weight, layer.lora_B), name


def test_pefts_own_config_reads_the_file(tmp_path):
    model = lorafast.adapt(llama(), 3, ["q_proj"], alpha=11, dropout=0.25, use_rslora=True)
    lorafast.adapt(model, 5, ["layers.1.mlp.up_proj"], alpha=7, dropout=0.25, use_rslora=True)
    lorafast.save_adapter(model, tmp_path, modules_to_save=["model.norm"])
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft.LoraConfig)
    assert config.peft_type == peft.PeftType.LORA
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 11, 0.25)
    assert (config.use_rslora, config.use_dora, config.bias) == (True, False, "none")
    assert list(config.rank_pattern.values()) == [5]
    assert list(config.alpha_pattern.values()) == [7]
    assert config.modules_to_save == ["model.norm"]


def test_goes_to_peft_and_back_bit_for_bit(tmp_path, draw_adapters):
    model = lorafast.adapt(llama(), 3, ["q_proj", "down_proj"], alpha=11)
    draw_adapters(lorafast.adapt(model, 1, ["o_proj"]))
    lorafast.save_adapter(model, tmp_path / "ours")
    saved(loaded_by_peft(llama(), tmp_path / "ours"), tmp_path / "theirs")
    back = lorafast.load_adapter(llama(), tmp_path / "theirs")
    assert back.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key


# Any selection of layers, both ways

# Endings of one another, a layer at the top, numbers, and what means something in a regex.
NAMES = [
    "fc",
    "xfc",
    "sub.fc",
    "sub.sub.fc",
    "a+b",
    "a|b",
    "layers.0.fc",
    "layers.1.fc",
    "m.layers.1.q",
]


def tree():
    model = nn.ModuleDict()
    for name in NAMES:
        *parents, last = name.split(".")
        at = model
        for parent in parents:
            if parent not in at:
                at[parent] = nn.ModuleDict()
            at = at[parent]
        at[last] = nn.Linear(2, 2)
    model["norm"] = nn.LayerNorm(2)
    return model


# No shrinking: the examples are small, and PEFT is slow.
FEW = settings(phases=[Phase.explicit, Phase.generate])


def of_lorafast(model):
    return {
        name: (layer.r, layer.scaling)
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
    }


def of_peft(model):
    return {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


@FEW
@given(
    adapters=st.dictionaries(
        st.sampled_from(NAMES),
        st.tuples(st.integers(1, 3), st.sampled_from([1, 2.5])),
        min_size=1,
    ),
    use_rslora=st.booleans(),
)
def test_peft_adapts_the_layers_that_are_saved_and_no_others(adapters, use_rslora):
    model = tree()
    for name, (r, alpha) in adapters.items():
        lorafast.adapt(model, r, re.escape(name), alpha=alpha, use_rslora=use_rslora)
    with tempfile.TemporaryDirectory() as folder:
        lorafast.save_adapter(model, folder)
        assert of_peft(loaded_by_peft(tree(), folder)) == of_lorafast(model)
        assert of_lorafast(lorafast.load_adapter(tree(), folder)) == of_lorafast(model)


ENDINGS = ["fc", "sub.fc", "layers.0.fc", "a+b", "q"]


@FEW
@given(
    target_modules=st.lists(st.sampled_from(ENDINGS), min_size=1, unique=True)
    | st.sampled_from([".*fc", r"(sub\.)+fc", r"layers\.\d\.fc|xfc"]),
    exclude_modules=st.none() | st.sampled_from([["sub.fc"], ["layers.0.fc", "q"], r"sub\..*"]),
    rank_pattern=st.dictionaries(
        st.sampled_from([*ENDINGS, "^fc", "s.*", "f."]), st.integers(1, 4)
    ),
    alpha_pattern=st.dictionaries(st.sampled_from([*ENDINGS, "^fc", "s.*"]), st.integers(1, 4)),
)
def test_loads_any_selection_of_layers_that_peft_makes(**config):
    # The first pattern that matches counts, and PEFT sorts them when it saves.
    for pattern in ("rank_pattern", "alpha_pattern"):
        config[pattern] = dict(sorted(config[pattern].items()))
    try:
        theirs = with_peft(tree(), **config)
    except ValueError:  # PEFT found no layer
        return
    with tempfile.TemporaryDirectory() as folder:
        saved(theirs, folder)
        assert of_lorafast(lorafast.load_adapter(tree(), folder)) == of_peft(theirs)
