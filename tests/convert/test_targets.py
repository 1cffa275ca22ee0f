from functools import partial

import pytest
import torch
from models import adapted, llama_config
from torch import nn
from torch.nn.utils import parametrizations, prune

import lorafast
from lorafast.nn import LoRALinear

# Which layers


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        pytest.param({}, {"block.up", "block.down", "head"}, id="default"),
        pytest.param(
            {"targets": "all-linear"}, {"block.up", "block.down", "head"}, id="all-linear"
        ),
        pytest.param({"targets": ["up"]}, {"block.up"}, id="ending"),
        pytest.param({"targets": ("block.down",)}, {"block.down"}, id="full-name"),
        pytest.param({"targets": {"up", "head"}}, {"block.up", "head"}, id="set"),
        pytest.param({"targets": iter(["up", "head"])}, {"block.up", "head"}, id="iterator"),
        pytest.param({"targets": r"block\..*"}, {"block.up", "block.down"}, id="regex"),
        pytest.param({"targets": r"head|.*\.up"}, {"block.up", "head"}, id="regex-alternatives"),
        pytest.param({"exclude": ["head"]}, {"block.up", "block.down"}, id="exclude-name"),
        pytest.param({"exclude": r"block\..*"}, {"head"}, id="exclude-regex"),
        pytest.param({"exclude": iter(["up", "head"])}, {"block.down"}, id="exclude-iterator"),
        pytest.param({"targets": r"block\..*", "exclude": ["block.up"]}, {"block.down"}, id="both"),
    ],
)
def test_selects_layers(net, selection, expected):
    assert lorafast.adapt(net, 2, **selection) is net
    assert adapted(net) == expected


def test_an_ending_is_a_whole_component():
    model = nn.ModuleDict({"q": nn.Linear(3, 3), "sub": nn.ModuleDict({"kq": nn.Linear(3, 3)})})
    lorafast.adapt(model, 1, ["q"])
    assert adapted(model) == {"q"}


# Refusals: the model is as it was


@pytest.mark.parametrize(
    ("selection", "sentence"),
    [
        pytest.param({"targets": ["q_proj"]}, "targets has 'q_proj'.*there are", id="unknown"),
        pytest.param({"targets": ["donw"]}, "'donw'.*did you mean 'down'?", id="misspelt"),
        pytest.param({"targets": ["up", "q_proj"]}, "targets has 'q_proj'", id="one-of-two"),
        pytest.param({"targets": ["nrm"]}, r"'nrm'.*\('norm' is a LayerNorm\)", id="misspelt-norm"),
        pytest.param({"targets": r"n.*m"}, "n.*m'.*norm is a LayerNorm, expected", id="regex-norm"),
        pytest.param({"targets": "upp"}, r"no module, did you mean 'up'\?$", id="regex-nothing"),
        pytest.param(
            {"targets": r"block\.donw"}, r"did you mean 'block\.down'", id="regex-misspelt"
        ),
        pytest.param({"targets": "up"}, r"'up', a regex.*pass \['up'\]", id="ending-as-regex"),
        pytest.param({"targets": "*.up"}, r"targets is '\*\.up'.*regex", id="glob-as-regex"),
        pytest.param({"exclude": "*.up"}, r"exclude is '\*\.up'.*regex", id="exclude-glob"),
        pytest.param({"targets": []}, r"targets is \[\]", id="no-targets"),
        pytest.param({"targets": None}, "targets is None", id="none"),
        pytest.param({"targets": ["norm"]}, "norm.*LayerNorm", id="not-a-linear"),
        pytest.param({"exclude": ".*"}, "all-linear.*no nn.Linear left", id="all-excluded"),
        pytest.param({"targets": ["up"], "exclude": ["up"]}, "'up'.*exclude", id="up-excluded"),
    ],
)
def test_refuses_a_selection_and_leaves_the_model_unchanged(net, unchanged, selection, sentence):
    with unchanged(net), pytest.raises((ValueError, TypeError), match=sentence):
        lorafast.adapt(net, 2, **selection)


@pytest.mark.parametrize("name", ["haed", "block"], ids=["misspelt", "holds-linears"])
def test_refuses_an_exclusion_that_leaves_out_no_layer(net, unchanged, name):
    with unchanged(net), pytest.raises(ValueError, match=f"exclude has '{name}'"):
        lorafast.adapt(net, 2, exclude=[name])


def test_refuses_to_adapt_twice(net, unchanged):
    lorafast.adapt(net, 2)
    with unchanged(net), pytest.raises(ValueError, match=r"block\.up is adapted already"):
        lorafast.adapt(net, 2, ["up"])
    with unchanged(net), pytest.raises(ValueError, match=r"no nn\.Linear left to adapt"):
        lorafast.adapt(net, 2)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _with_own_forward():
    linear = nn.Linear(3, 3)
    linear.forward = lambda x: x
    return linear


def _pruned():
    linear = nn.Linear(3, 3)
    prune.l1_unstructured(linear, "weight", 0.5)
    return linear


class Int8Tensor(torch.Tensor):
    """Says that it is float32 and holds integers, as torchao's tensors do."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.view.default, aten.alias.default):
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{function} of {cls.__name__}")


def _with_weight(weight):
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(weight)
    return linear


def _quantized():
    return _with_weight(Int8Tensor(torch.ones(3, 3, dtype=torch.int8), torch.ones(3)))


UNADAPTABLE = [
    pytest.param(partial(nn.LazyLinear, 3), "LazyLinear", id="lazy"),
    pytest.param(partial(ScaledLinear, 3, 3), r"its forward.*ScaledLinear", id="subclass"),
    pytest.param(_with_own_forward, "its forward", id="patched-forward"),
    pytest.param(_pruned, "its weight is computed", id="pruned"),
    pytest.param(
        lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
        "its forward|its weight is computed by a parametrization",
        id="parametrized",
    ),
    pytest.param(
        lambda: nn.Linear(3, 3, dtype=torch.complex64),
        "its weight is torch.complex64",
        id="complex",
    ),
    pytest.param(
        lambda: nn.Linear(3, 3).to(torch.float8_e4m3fn),
        "its weight is torch.float8_e4m3fn",
        id="float8",
    ),
    pytest.param(_quantized, r"its weight is of class Int8Tensor \(quantized", id="quantized"),
    pytest.param(
        lambda: _with_weight(torch.eye(3).to_sparse()),
        "its weight is torch.sparse_coo, expected a dense one",
        id="sparse",
    ),
]


@pytest.mark.parametrize(("make", "reason"), UNADAPTABLE)
def test_a_layer_asked_for_by_name_that_cannot_be_adapted_is_refused(make, reason):
    model = nn.Sequential(nn.Linear(3, 3), make())
    types = [type(module) for module in model]
    with pytest.raises(TypeError, match=f"1 can't be adapted.*{reason}"):
        lorafast.adapt(model, 2, ["0", "1"])
    assert [type(module) for module in model] == types
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("make", "reason"), UNADAPTABLE)
def test_all_linear_leaves_a_layer_that_cannot_be_adapted_and_says_so(make, reason):
    model = nn.Sequential(nn.Linear(3, 3), make())
    left = model[1]
    with pytest.warns(UserWarning, match=f"left as they are: 1: .*{reason}"):
        lorafast.adapt(model, 2)
    assert adapted(model) == {"0"}
    assert model[1] is left


# Transformers


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


PROJECTIONS = {
    *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_all_linear_leaves_out_the_output_head_of_a_language_model(transformers, tied):
    model = transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=tied))
    lorafast.adapt(model, 2)
    assert adapted(model) == PROJECTIONS
    assert not model.lm_head.weight.requires_grad
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_the_output_head_can_be_asked_for(transformers):
    model = transformers.LlamaForCausalLM(llama_config())
    lorafast.adapt(model, 2, ["lm_head"])
    assert adapted(model) == {"lm_head"}


def test_all_linear_leaves_out_a_classification_head(transformers):
    # It starts at random and isn't in the adapter's file: over another draw the adapter is worthless.
    model = transformers.LlamaForSequenceClassification(llama_config(num_labels=3))
    with pytest.warns(UserWarning, match="score: part of the classifier"):
        lorafast.adapt(model, 2)
    assert adapted(model) == PROJECTIONS


def test_all_linear_leaves_out_every_layer_of_a_classification_head(transformers):
    config = transformers.RobertaConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    model = transformers.RobertaForSequenceClassification(config)
    with pytest.warns(UserWarning, match=r"classifier\.dense, classifier\.out_proj: part of"):
        lorafast.adapt(model, 2)
    # Query, key, value and three called dense in the encoder; classifier.dense and .out_proj not.
    assert len(adapted(model)) == 6
    assert all(name.startswith("roberta.encoder.") for name in adapted(model))


# Weights of classes of PyTorch's own


class Marked(torch.Tensor):
    """A subclass that computes as any tensor does."""


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_weight_is_adapted_and_a_quantized_one_in_shards_is_not(one_process):
    tensor = pytest.importorskip("torch.distributed.tensor")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))

    def sharded(values):
        return _with_weight(tensor.DTensor.from_local(values, mesh, run_check=False))

    assert type(lorafast.adapt(sharded(torch.eye(3)), 2)) is LoRALinear
    with pytest.raises(TypeError, match="Int8Tensor"):
        LoRALinear.from_linear(sharded(_quantized().weight.data), 2)


def test_weights_that_compute_as_any_other_are_adapted():
    with torch._subclasses.FakeTensorMode():
        assert type(lorafast.adapt(nn.Linear(3, 3), 2)) is LoRALinear
    marked = _with_weight(torch.eye(3).as_subclass(Marked))
    assert type(lorafast.adapt(marked, 2)) is LoRALinear


# PEFT's models


@pytest.fixture
def peft_net(net):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["up"]))


@pytest.mark.parametrize(
    "targets", ["all-linear", ["up"], ["down"], ["base_layer"], r".*\.lora_A\.default"], ids=str
)
def test_a_model_with_peft_s_adapters_is_refused(peft_net, unchanged, targets):
    sentence = r"block\.up has PEFT's adapter, expected.*lorafast\.accelerate"
    with unchanged(peft_net), pytest.raises(ValueError, match=sentence):
        lorafast.adapt(peft_net, 2, targets)


def test_a_model_that_peft_has_left_can_be_adapted(peft_net):
    net = peft_net.unload()
    lorafast.adapt(net, 2)
    assert adapted(net) == {"block.up", "block.down", "head"}


def test_explain_says_how_to_get_adapters(net):
    with pytest.raises(ValueError, match=r"lorafast\.adapt\(model\).*lorafast\.accelerate"):
        lorafast.explain(net)


def test_loading_into_a_layer_of_peft_s_is_refused(make_net, unchanged, tmp_path):
    peft = pytest.importorskip("peft")
    lorafast.save_adapter(lorafast.adapt(make_net(), 2, ["up"]), tmp_path)
    net = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up"]), make_net())
    with unchanged(net), pytest.raises(ValueError, match=r"block\.up can't take.*PEFT's adapter"):
        lorafast.load_adapter(net, tmp_path)


def test_a_regex_that_matches_transposed_convolutions_says_so(unchanged):
    model = nn.ModuleDict(
        {"conv": nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), "fc": nn.Linear(3, 3)}
    )
    sentence = r"targets is 'conv\.\*', and conv\.0 is a ConvTranspose2d, expected an nn\.Linear"
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        lorafast.adapt(model, 2, "conv.*")


def test_a_linear_layer_is_suggested_before_any_other():
    model = nn.ModuleDict({"up_projj": nn.ConvTranspose1d(3, 3, 1), "up_proj": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"did you mean 'up_proj'\?"):
        lorafast.adapt(model, 2, ["up_prjj"])


def test_a_class_that_is_only_called_linear_is_named_in_full():
    foreign = type("Linear", (nn.Module,), {"__module__": "other.library"})
    model = nn.ModuleDict({"q_proj": foreign(), "fc": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"q_proj is a other\.library\.Linear, expected an nn\.Li"):
        lorafast.adapt(model, 2, ["q_proj"])


def test_all_linear_says_what_a_model_has_instead(unchanged):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    sentence = r"no nn\.Linear left to adapt: 100 % of.*1 Conv2d, 224 parameters"
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        lorafast.adapt(model, 2)


def test_many_layers_left_for_one_reason_are_one_sentence():
    model = nn.ModuleList(nn.MultiheadAttention(4, 2) for _ in range(9)).append(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="left as they are") as caught:
        lorafast.adapt(model, 2)
    (warning,) = caught
    assert str(warning.message).count("without calling it") == 1
    assert "5.out_proj and 3 more: MultiheadAttention reads" in str(warning.message)


def test_loading_other_layers_would_freeze_those_of_peft_and_is_refused(
    make_net, unchanged, tmp_path
):
    peft = pytest.importorskip("peft")
    lorafast.save_adapter(lorafast.adapt(make_net(), 2, ["up"]), tmp_path)
    net = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["down"]), make_net())
    with unchanged(net), pytest.raises(ValueError, match=r"block\.down has PEFT's adapter"):
        lorafast.load_adapter(net, tmp_path)


@pytest.mark.parametrize("call", [lorafast.adapt, lorafast.freeze, lorafast.quantize])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"model is a str, expected an nn\.Module"):
        call("x")
