"""Adapters in files: what is loaded, and what is refused."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from adapter_files import (
    CONFIG,
    DOWN_A,
    DOWN_B,
    HEAD_W,
    UP_A,
    UP_B,
    WEIGHTS,
    HEAD_b,
    good_tensors,
    lora_layers,
    trained,
    write_adapter,
)
from torch import nn

import lorafast

safetensors = pytest.importorskip("safetensors.torch")


def test_loads_into_plain_layers(net, x, tmp_path, assert_same):
    base_up = net.block.up
    tensors = {key: tensor.double() for key, tensor in good_tensors().items()}
    hidden = base_up(x) + x @ tensors[UP_A].T @ tensors[UP_B].T * (5 / 2)
    hidden = torch.tanh(hidden)
    hidden = net.block.down(hidden) + hidden @ tensors[DOWN_A].T @ tensors[DOWN_B].T * (5 / 2)
    expected = net.head(net.norm(hidden)).detach()

    net.eval()
    assert lorafast.load_adapter(net, write_adapter(tmp_path)) is net
    assert_same(net(x).detach(), expected)
    assert net.block.up.weight is base_up.weight
    assert lora_layers(net) == {"block.up", "block.down"}
    assert (net.block.up.r, net.block.up.alpha, net.block.up.dropout) == (2, 5.0, 0.25)


def test_freezes_the_rest_when_it_adapts(net, tmp_path):
    lorafast.load_adapter(net, write_adapter(tmp_path))
    assert trained(net) == {f"block.{n}.lora_{half}" for n in ("up", "down") for half in "AB"}


def test_replaces_the_values_of_an_adapted_model(net, make_net, x, tmp_path, assert_same):
    folder = write_adapter(tmp_path, config={"use_rslora": True})
    lorafast.adapt(net, 2, ["up", "down"], alpha=1)
    net.head.requires_grad_(True)
    up = net.block.up
    lorafast.load_adapter(net, str(folder))
    assert net.block.up is up
    assert up.scaling == 5 / 2**0.5
    assert net.head.weight.requires_grad
    expected = lorafast.load_adapter(make_net(), folder).eval()(x)
    assert_same(net.eval()(x).detach(), expected.detach())


def test_layers_in_merged_state_take_the_loaded_values(net, make_net, x, tmp_path, assert_same):
    folder = write_adapter(tmp_path)
    lorafast.adapt(net, 2, ["up", "down"])
    net.block.up.merge()
    lorafast.load_adapter(net, folder)
    assert net.block.up.merged
    expected = lorafast.load_adapter(make_net(), folder).eval()(x)
    assert_same(net.eval()(x).detach(), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_takes_adapters_in_another_float_dtype(net, tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in good_tensors().items()}
    lorafast.load_adapter(net, write_adapter(tmp_path, tensors))
    assert torch.equal(net.block.up.lora_A, tensors[UP_A].double())


def test_loads_modules_stored_whole(net, tmp_path):
    head = {HEAD_W: torch.randn(2, 3), HEAD_b: torch.randn(2)}
    lorafast.load_adapter(net, write_adapter(tmp_path, head, {"modules_to_save": ["head"]}))
    assert torch.equal(net.head.weight, head[HEAD_W].double())
    assert torch.equal(net.head.bias, head[HEAD_b].double())
    assert type(net.head) is nn.Linear


@pytest.mark.parametrize("has", ["nothing", "no-embedding"])
def test_a_model_without_embeddings_loads_modules_stored_whole(net, tmp_path, has):
    def none():
        raise NotImplementedError

    if has == "no-embedding":
        net.get_input_embeddings = net.get_output_embeddings = none
    head = {HEAD_W: torch.randn(2, 3), HEAD_b: torch.randn(2)}
    lorafast.load_adapter(net, write_adapter(tmp_path, head, {"modules_to_save": ["head"]}))
    assert torch.equal(net.head.weight, head[HEAD_W].double())


def test_names_in_the_config_that_the_model_lacks_are_harmless(net, tmp_path):
    # PEFT writes both "classifier" and "score", of which a model has one.
    folder = write_adapter(tmp_path, config={"modules_to_save": ["classifier", "score"]})
    lorafast.load_adapter(net, folder)
    assert lora_layers(net) == {"block.up", "block.down"}


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": None},
        {"r": None, "rank_pattern": {".*": 2}},
        {"lora_dropout": None},
        {"bias": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"a_field_of_the_future": None},
    ],
    ids=str,
)
def test_missing_and_harmless_fields_have_pefts_defaults(net, tmp_path, config):
    lorafast.load_adapter(net, write_adapter(tmp_path, config=config))
    layer = net.block.up
    alpha = 8 if "lora_alpha" in config else 5
    dropout = 0 if "lora_dropout" in config else 0.25
    assert (layer.r, layer.scaling, layer.dropout) == (2, alpha / 2, dropout)


def test_the_fast_path_of_an_encoder_layer_does_not_bypass_loaded_adapters(tmp_path, assert_same):
    def make():
        layer = nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True)
        return layer.double()

    x = torch.randn(2, 3, 6, dtype=torch.float64)
    model = lorafast.adapt(make(), 2, ["linear1"])
    nn.init.normal_(model.linear1.lora_B)
    lorafast.save_adapter(model, tmp_path)
    other = make()
    lorafast.load_adapter(other, tmp_path)
    expected = other.train()(x).detach()
    with torch.no_grad():
        assert_same(other.eval()(x), expected)


# Files that don't fit: refused in a sentence, and the model is as it was


def case(sentence, tensors=None, config=None, *, id):
    return pytest.param(tensors, config, sentence, id=id)


MISFITS = [
    case(
        r"lora_A of block\.up has shape \[2, 6\] in the file, expected \[2, 5\]",
        {UP_A: torch.ones(2, 6)},
        id="wrong-shape-A",
    ),
    case(
        r"lora_B of block\.down has shape \[4, 2\] in the file, expected \[3, 2\]",
        {DOWN_B: torch.ones(4, 2)},
        id="wrong-shape-B",
    ),
    case(
        r"lora_A of block\.down has shape \[2, 7, 1\]",
        {DOWN_A: torch.ones(2, 7, 1)},
        id="three-dimensions",
    ),
    case(
        r"lora_B of block\.up has shape \[2, 7\] in the file, expected \[7, 2\]",
        {UP_B: torch.ones(2, 7)},
        id="transposed",
    ),
    case(
        r"of block\.(up|down) has.*r is 3|block\.(up|down) is adapted with r = 2.*r = 3",
        config={"r": 3},
        id="rank-unlike-config",
    ),
    case(
        r"of block\.down has.*r is 4|block\.down is adapted with r = 2.*r = 4",
        config={"rank_pattern": {"down": 4}},
        id="rank-unlike-pattern",
    ),
    case(r"block\.down has no lora_B", {DOWN_B: None}, id="no-lora_B"),
    case(r"block\.down has no lora_A", {DOWN_A: None}, id="no-lora_A"),
    case(
        r"block\.side, which the model doesn't have",
        {
            key.replace("up", "side"): tensor
            for key, tensor in good_tensors().items()
            if "up" in key
        },
        id="unknown-layer",
    ),
    case(
        r"block\.down, and the file has no adapter for it|block\.down is adapted, and the file",
        {DOWN_A: None, DOWN_B: None},
        id="target-missing-in-file",
    ),
    case(
        r"norm can't take the file's adapter: it is a LayerNorm",
        {
            "base_model.model.norm.lora_A.weight": torch.ones(2, 3),
            "base_model.model.norm.lora_B.weight": torch.ones(3, 2),
        },
        id="not-a-linear",
    ),
    case(
        r"head.*doesn't target|doesn't target.*head",
        {
            "base_model.model.head.lora_A.weight": torch.ones(2, 3),
            "base_model.model.head.lora_B.weight": torch.ones(2, 2),
        },
        id="layer-not-targeted",
    ),
    case(r"head\.weight.*modules_to_save", {HEAD_W: torch.ones(2, 3)}, id="extra-tensor"),
    case(
        r"block\.up\.lora_magnitude_vector",
        {"base_model.model.block.up.lora_magnitude_vector": torch.ones(7)},
        id="extra-tensor-of-an-adapter",
    ),
    case(
        r"head\.weight has shape \[3, 2\] in the file, expected \[2, 3\]",
        {HEAD_W: torch.ones(3, 2), HEAD_b: torch.ones(2)},
        {"modules_to_save": ["head"]},
        id="stored-module-of-another-shape",
    ),
    case(
        r"head\.gain, which the model doesn't have",
        {
            HEAD_W: torch.ones(2, 3),
            HEAD_b: torch.ones(2),
            HEAD_b.replace("bias", "gain"): torch.ones(2),
        },
        {"modules_to_save": ["head"]},
        id="stored-module-with-an-extra",
    ),
    case(
        r"modules_to_save.*head|head.*modules_to_save",
        config={"modules_to_save": ["head"]},
        id="stored-module-missing",
    ),
    case(
        r"head\.bias",
        {HEAD_W: torch.ones(2, 3)},
        {"modules_to_save": ["head"]},
        id="half-a-stored-module",
    ),
    case(
        r"head\.weight is torch\.int32 in the file",
        {HEAD_W: torch.ones(2, 3, dtype=torch.int32), HEAD_b: torch.ones(2)},
        {"modules_to_save": ["head"]},
        id="stored-module-of-integers",
    ),
    case(r"'block\.up\.bias' doesn't begin with", {"block.up.bias": torch.ones(7)}, id="no-prefix"),
    case("no LoRA tensors", dict.fromkeys(good_tensors()), id="no-tensors"),
    case(
        r"lora_A of block\.up is torch\.int32",
        {UP_A: torch.ones(2, 5, dtype=torch.int32)},
        id="int32",
    ),
    case(
        r"lora_B of block\.down is torch\.bool",
        {DOWN_B: torch.ones(3, 2, dtype=torch.bool)},
        id="bool",
    ),
    case(
        r"lora_A of block\.up is torch\.complex64",
        {UP_A: torch.ones(2, 5, dtype=torch.complex64)},
        id="complex",
    ),
    case(
        r"(up|down) has no lora_magnitude|is adapted without DoRA, and use_dora is True",
        config={"use_dora": True},
        id="dora",
    ),
    case("bias in .* is 'all'", config={"bias": "all"}, id="bias-all"),
    case("bias in .* is 'lora_only'", config={"bias": "lora_only"}, id="bias-lora_only"),
    case("lora_bias in .* is True", config={"lora_bias": True}, id="lora_bias"),
    case("peft_type in .* is 'LOHA', expected 'LORA'", config={"peft_type": "LOHA"}, id="loha"),
    case("peft_type in .* is None, expected 'LORA'", config={"peft_type": None}, id="no-type"),
    case("target_parameters in", config={"target_parameters": ["up.weight"]}, id="parameters"),
    case("trainable_token_indices in", config={"trainable_token_indices": [1]}, id="tokens"),
    case("layer_replication in", config={"layer_replication": [[0, 1]]}, id="replication"),
    case("use_bdlora in", config={"use_bdlora": {"nblocks": 1}}, id="block-diagonal"),
    case("kasa_config in", config={"kasa_config": {"beta": 1e-4}}, id="kasa"),
    case("fan_in_fan_out in .* is 'yes'", config={"fan_in_fan_out": "yes"}, id="fan_in_fan_out"),
    case("layers_to_transform in .* is 'x'", config={"layers_to_transform": "x"}, id="layers-text"),
    case("target_modules in .* is None", config={"target_modules": None}, id="no-targets"),
    case(r"target_modules in .* is \[\]", config={"target_modules": []}, id="empty-targets"),
    case(r"target_modules in .* is '\*\.up'", config={"target_modules": "*.up"}, id="glob"),
    case("target_modules in .* is 5", config={"target_modules": 5}, id="targets-5"),
    case("exclude_modules in .* is 5", config={"exclude_modules": 5}, id="exclude-5"),
    case(r"exclude_modules in .* is '\('", config={"exclude_modules": "("}, id="exclude-regex"),
    case("r in .* is 0", config={"r": 0}, id="r-0"),
    case("r in .* is '2'", config={"r": "2"}, id="r-text"),
    case("r in .* is 2.5", config={"r": 2.5}, id="r-fraction"),
    case("r in .* is inf", config={"r": float("inf")}, id="r-infinite"),
    case("lora_alpha in .* is '5'", config={"lora_alpha": "5"}, id="alpha-text"),
    case("lora_alpha in .* is nan", config={"lora_alpha": float("nan")}, id="alpha-nan"),
    case("lora_dropout in .* is 1.5", config={"lora_dropout": 1.5}, id="dropout"),
    case("use_rslora in .* is 'no'", config={"use_rslora": "no"}, id="rslora-text"),
    case(r"rank_pattern in .* is \[2\]", config={"rank_pattern": [2]}, id="rank_pattern-list"),
    case("rank_pattern in .*'two'", config={"rank_pattern": {"down": "two"}}, id="rank-text"),
    case(
        "rank_pattern in .* 0",
        {DOWN_A: torch.ones(0, 7), DOWN_B: torch.ones(3, 0)},
        {"rank_pattern": {"down": 0}},
        id="rank-0",
    ),
    case(r"rank_pattern in .*'\('", config={"rank_pattern": {"(": 2}}, id="rank-regex"),
    case(
        "alpha_pattern in .*'high'",
        config={"alpha_pattern": {"down": "high"}},
        id="alpha-text-of-a-layer",
    ),
    case(
        "alpha_pattern in .* None",
        config={"alpha_pattern": {"down": None}},
        id="alpha-none-of-a-layer",
    ),
]


@pytest.mark.parametrize(("tensors", "config", "sentence"), MISFITS)
@pytest.mark.parametrize("before", ["plain", "adapted"])
def test_refuses_a_file_that_does_not_fit(
    net, unchanged, tmp_path, before, tensors, config, sentence
):
    if before == "adapted":
        lorafast.adapt(net, 2, ["up", "down"])
    folder = write_adapter(tmp_path, tensors, config)
    with unchanged(net), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(net, folder)


# PEFT takes a part of W away when it makes such an adapter, so B·A over W is another model.
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_refuses_an_adapter_that_goes_with_another_base(net, unchanged, tmp_path, start):
    folder = write_adapter(tmp_path, config={"init_lora_weights": start})
    with unchanged(net), pytest.raises(ValueError, match=f"init_lora_weights in .* is '{start}'"):
        lorafast.load_adapter(net, folder)


def test_refuses_an_adapter_for_fewer_layers_than_are_adapted(net, unchanged, tmp_path):
    lorafast.adapt(net, 2)
    with unchanged(net), pytest.raises(ValueError, match="head is adapted, and the file has no"):
        lorafast.load_adapter(net, write_adapter(tmp_path))


def test_refuses_an_adapter_of_another_rank_than_the_model(net, unchanged, tmp_path):
    lorafast.adapt(net, 3, ["up", "down"])
    sentence = r"block\.(up|down) is adapted with r = 3, and the file has r = 2"
    with unchanged(net), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(net, write_adapter(tmp_path))


def test_refuses_an_adapter_for_the_output_projection_of_attention(unchanged, tmp_path):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)})
    key = "base_model.model.attention.out_proj.lora_{}.weight"
    tensors = dict.fromkeys(good_tensors()) | {
        key.format("A"): torch.ones(2, 6),
        key.format("B"): torch.ones(6, 2),
    }
    folder = write_adapter(tmp_path, tensors, {"target_modules": ["out_proj"]})
    with unchanged(model), pytest.raises(ValueError, match=r"attention\.out_proj.*without calling"):
        lorafast.load_adapter(model, folder)


def test_names_the_missing_layer_also_with_an_empty_layers_to_transform(net, unchanged, tmp_path):
    changes = {DOWN_A: None, DOWN_B: None}
    folder = write_adapter(tmp_path, changes, {"layers_to_transform": []})
    with unchanged(net), pytest.raises(ValueError, match=r"config targets block\.down"):
        lorafast.load_adapter(net, folder)


def test_refuses_a_model_without_memory(make_net, tmp_path):
    # Copying to the meta device does nothing: the adapter would be lost.
    net = make_net().to("meta")
    folder = write_adapter(tmp_path)
    types = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match=r"block\.(up|down).* meta"):
        lorafast.load_adapter(net, folder)
    assert [type(module) for module in net.modules()] == types


# Files that can't be read


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2", b'{"r": }', b"\xff\xfe\x00"],
    ids=["empty", "brace", "list", "no-value", "not-utf8"],
)
def test_refuses_a_config_that_is_not_json(net, unchanged, tmp_path, content):
    (write_adapter(tmp_path) / CONFIG).write_bytes(content)
    with unchanged(net), pytest.raises(ValueError, match=f"{CONFIG} is not JSON"):
        lorafast.load_adapter(net, tmp_path)


@pytest.mark.parametrize(
    ("content", "kind"), [("[]", "list"), ('"r"', "str"), ("null", "NoneType")]
)
def test_refuses_a_config_that_is_not_an_object(net, unchanged, tmp_path, content, kind):
    (write_adapter(tmp_path) / CONFIG).write_text(content)
    with unchanged(net), pytest.raises(ValueError, match=f"{CONFIG} holds a {kind}, expected"):
        lorafast.load_adapter(net, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 0.5, -1], ids=["empty", "4-bytes", "half", "all-but-one"])
def test_refuses_a_truncated_file(net, unchanged, tmp_path, kept):
    path = write_adapter(tmp_path) / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    with unchanged(net), pytest.raises(ValueError, match=f"{WEIGHTS} is not a safetensors file"):
        lorafast.load_adapter(net, tmp_path)


class Bomb:
    """Leaves a file behind when unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    ("file", "error", "sentence"),
    [
        ("adapter_model.bin", FileNotFoundError, r"adapter_model\.bin is a pickle.*never read"),
        ("adapter_model.pt", FileNotFoundError, r"adapter_model\.pt is a pickle.*never read"),
        (WEIGHTS, ValueError, "is not a safetensors file"),
    ],
)
def test_never_reads_a_pickle(net, unchanged, tmp_path, file, error, sentence):
    folder, trace = write_adapter(tmp_path / "adapter"), tmp_path / "unpickled"
    (folder / WEIGHTS).unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb(trace)))
    with unchanged(net), pytest.raises(error, match=sentence):
        lorafast.load_adapter(net, folder)
    assert not trace.exists()
    pickle.loads((folder / file).read_bytes())
    assert trace.exists(), "the bomb is a dud"


def test_a_missing_folder_or_file_is_named(net, unchanged, tmp_path):
    with unchanged(net), pytest.raises(FileNotFoundError, match="nowhere"):
        lorafast.load_adapter(net, tmp_path / "nowhere")
    folder = write_adapter(tmp_path)
    (folder / WEIGHTS).unlink()
    with (
        unchanged(net),
        pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}; it holds {CONFIG}$"),
    ):
        lorafast.load_adapter(net, folder)
    write_adapter(tmp_path)
    (folder / CONFIG).unlink()
    with unchanged(net), pytest.raises(FileNotFoundError, match=CONFIG):
        lorafast.load_adapter(net, folder)


def test_without_safetensors_says_what_to_install(net, unchanged, tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with unchanged(net), pytest.raises(ImportError, match="pip install"):
        lorafast.load_adapter(net, folder)
    lorafast.adapt(net, 2)
    with pytest.raises(ImportError, match="pip install"):
        lorafast.save_adapter(net, tmp_path / "new")
    assert not (tmp_path / "new").exists()
