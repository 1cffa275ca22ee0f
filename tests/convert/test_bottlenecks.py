"""Bottleneck adapters in models: where they stand, what they compute there, and as files."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafast
from lorafast import reference
from lorafast.convert.bottlenecks import bottlenecks
from lorafast.nn import Bottleneck

transformers = pytest.importorskip("transformers")


class Block(nn.Module):
    def __init__(self, K):
        super().__init__()
        self.attention, self.mlp = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, h):
        h = h + self.attention(h)
        return h + self.mlp(h).relu()


class Model(nn.Module):
    def __init__(self, K=12):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(K) for _ in range(2)), nn.Linear(K, 3)

    def forward(self, h):
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def model_of(family):
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    size["intermediate_size"] = 20
    made = {
        "bert": lambda t: t.BertModel(t.BertConfig(vocab_size=30, **size)),
        "llama": lambda t: t.LlamaModel(t.LlamaConfig(vocab_size=30, **size)),
        "gpt2": lambda t: t.GPT2Model(
            t.GPT2Config(vocab_size=30, n_embd=16, n_head=2, n_layer=2, bos_token_id=0, eos_token_id=0)
        ),
        "vit": lambda t: t.ViTModel(t.ViTConfig(image_size=8, patch_size=4, **size)),
    }  # fmt: skip
    return made[family](transformers).eval()


def output_of(model):
    if model.config.model_type == "vit":
        return model(torch.linspace(-1, 1, 384).view(2, 3, 8, 8)).last_hidden_state
    return model(torch.arange(14).view(2, 7)).last_hidden_state


def shaken(model):
    """Values other than those of a start, from which a bottleneck changes what the model computes."""
    generator = torch.Generator().manual_seed(1)
    for one in bottlenecks(model).values():
        for parameter in one.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


FAMILIES = ("bert", "llama", "gpt2", "vit")


@pytest.mark.parametrize("family", FAMILIES)
def test_houlsby_and_pfeiffer_by_structure(family):
    model = model_of(family)
    before, keys = output_of(model), set(model.state_dict())
    lorafast.adapt(model, kind="houlsby", bottleneck=4)
    assert len(bottlenecks(model)) == 4
    assert torch.equal(output_of(model), before)  # U is zero
    assert keys <= set(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".bottleneck." in n}
    output_of(shaken(model)).square().sum().backward()
    for name, one in bottlenecks(model).items():
        for parameter in one.parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    with lorafast.disabled(model):
        assert torch.equal(output_of(model), before)
    assert not torch.equal(output_of(model), before)
    lorafast.remove_bottlenecks(model)
    assert torch.equal(output_of(model), before)
    assert set(model.state_dict()) == keys
    lorafast.adapt(model, kind="pfeiffer")
    assert len(bottlenecks(model)) == 2
    assert {one.bottleneck for one in bottlenecks(model).values()} == {1}  # 16 / 16


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_parallel_adapters_read_the_input_of_the_mlp(family):
    model = lorafast.adapt(model_of(family), kind="parallel")
    assert [name.endswith(".mlp") for name in bottlenecks(model)] == [True, True]
    (name, one), *_ = bottlenecks(shaken(model)).items()
    mlp, h = model.get_submodule(name), torch.randn(2, 5, 16)
    with lorafast.disabled(model):
        plain = mlp(h)
    assert (one.bottleneck, one.scaling) == (8, 4.0)
    expected = reference.bottleneck(
        h, one.down, one.up, one.down_bias, one.up_bias, 4.0, "relu", plain
    )
    torch.testing.assert_close(mlp(h), expected)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_at_named_modules(kind, layer_norm):
    model = Model()
    lorafast.adapt(
        model, kind=kind, targets=["mlp"], reduction_factor=4, activation="tanh", scaling=0.5,
        layer_norm=layer_norm, init="bert",
    )  # fmt: skip
    assert list(bottlenecks(model)) == ["blocks.0.mlp", "blocks.1.mlp"]
    mlp, h = shaken(model).blocks[0].mlp, torch.randn(5, 12)
    plain, one = nn.functional.linear(h, mlp.weight, mlp.bias), mlp.bottleneck
    read = h if kind == "parallel" else plain
    expected = reference.bottleneck(
        one.norm(read) if layer_norm else read,
        one.down, one.up, one.down_bias, one.up_bias, 0.5, "tanh", plain,
    )  # fmt: skip
    torch.testing.assert_close(mlp(h), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(h), model(h))
        lorafast.remove_bottlenecks(copied)
        assert not torch.equal(copied(h), model(h))
    text = str(lorafast.summary(model))
    assert f"{'parallel ' if kind == 'parallel' else ''}bottleneck, tanh" in text
    assert "2 adapted layers" in text


@pytest.mark.slow
def test_a_module_under_compile():
    torch._dynamo.reset()
    model = shaken(lorafast.adapt(Model(), kind="pfeiffer", targets=["mlp"], bottleneck=3))
    h = torch.randn(5, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), model(h))


def test_lora_and_bottlenecks_train_together():
    model = lorafast.adapt(Model(), kind="pfeiffer", targets=["mlp"], bottleneck=3)
    lorafast.adapt(model, r=2, targets=["attention"])
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"down", "down_bias", "up", "up_bias", "lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"kind": "series"}, ValueError, "kind is 'series', expected one of lora, houlsby, pfeiffer"),
        ({"r": 8}, ValueError, "r is 8, which adapters of the kind 'houlsby' don't have"),
        ({"kind": "lora", "bottleneck": 3}, ValueError, "bottleneck is 3, which adapters of the kind"),
        ({"targets": "all-linear"}, ValueError, "where houlsby adapters belong is known of bert"),
        ({"targets": ["mpl"]}, ValueError, "which is the name of no module, did you mean 'mlp'"),
        ({"targets": "x.*"}, ValueError, "a regex that matches the full name of no module"),
        ({"targets": "blocks.0.mpl"}, ValueError, r"no module, did you mean 'blocks\.0\.mlp'"),
        ({"targets": "mlp"}, ValueError, r"no module \(for a name or its ending pass \['mlp'\]\)"),
        ({"targets": []}, ValueError, r"targets is \[\], expected at least one name"),
        ({"targets": ["blocks"]}, TypeError, "it is a ModuleList, which has no output of its own"),
        ({"exclude": ["atention"]}, ValueError, "exclude has 'atention', which is the name of no mod"),
        ({"exclude": ["mlp"]}, ValueError, "exclude leaves out all that targets names"),
        ({"bottleneck": 0}, ValueError, "bottleneck is 0, expected an integer of at least 1"),
        ({"bottleneck": 2, "reduction_factor": 2}, ValueError, "are both given, expected one"),
        ({"reduction_factor": 0}, ValueError, "reduction_factor is 0, expected a number above 0"),
        ({"reduction_factor": 1e-320}, ValueError, "of which 12 is too large a multiple"),
        ({"activation": ""}, ValueError, "activation is '', expected one of gelu"),
        ({"layer_norm": "yes"}, TypeError, "layer_norm is 'yes', expected True or False"),
        ({"activation": "swish"}, ValueError, "activation is 'swish', expected one of gelu"),
        ({"init": "ones"}, ValueError, "init is 'ones', expected one of zero, bert"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype is torch.int8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_leave_the_model_as_it_was(arguments, error, says):
    model = Model()
    with pytest.raises(error, match=says):
        lorafast.adapt(model, **{"kind": "houlsby", "targets": ["mlp"]} | arguments)
    assert not bottlenecks(model)
    assert all(p.requires_grad for p in model.parameters())


def test_two_kinds_on_one_module_are_refused():
    model = lorafast.adapt(Model(), kind="pfeiffer", targets=["mlp"])
    with pytest.raises(
        TypeError, match=r"blocks\.0\.mlp can't have a bottleneck: it has one already"
    ):
        lorafast.adapt(model, kind="parallel", targets=["mlp"])
    lorafast.remove_bottlenecks(model)
    lorafast.adapt(model, targets=["mlp"])
    with pytest.raises(TypeError, match="it is a LoRALinear, which has an adapter of another kind"):
        lorafast.adapt(model, kind="parallel", targets=["mlp"])
    with pytest.raises(ValueError, match="bert model has no module that is its whole MLP"):
        lorafast.adapt(model_of("bert"), kind="parallel")


def saved(folder):
    torch.manual_seed(3)
    base = Model()
    model = shaken(
        lorafast.adapt(copy.deepcopy(base), kind="parallel", targets=["mlp"], layer_norm=True)
    )
    lorafast.save_adapter(model, folder, modules_to_save=["head"])
    return base, model


def test_files_give_back_what_was_saved(tmp_path):
    base, model = saved(tmp_path)
    h = torch.randn(5, 12)
    loaded = lorafast.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(h), model(h))
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n in loaded.state_dict() if ".bottleneck." in n or "head" in n}
    again = lorafast.adapt(copy.deepcopy(base), kind="parallel", targets=["mlp"], layer_norm=True)
    lorafast.load_adapter(again, tmp_path, is_trainable=False)
    assert torch.equal(again(h), model(h))
    assert not any(p.requires_grad for p in again.parameters())
    assert set(load_file(tmp_path / "adapter_model.safetensors")) >= {
        "blocks.0.mlp.bottleneck.down", "blocks.1.mlp.bottleneck.norm.weight", "head.bias",
    }  # fmt: skip


def edit_config(folder, change):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")  # without the digest
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def of_place(**fields):
    return lambda config: config["places"]["blocks.0.mlp"].update(fields)


DOWN = "blocks.0.mlp.bottleneck.down"


@pytest.mark.parametrize(
    ("edit", "change", "says"),
    [
        (edit_config, of_place(bottleneck=True), "bottleneck of blocks.0.mlp is True in"),
        (edit_config, of_place(activation=["relu"]), r"activation of blocks.0.mlp is \['relu'\] in"),
        (edit_config, of_place(scaling=float("nan")), "scaling of blocks.0.mlp is nan in"),
        (edit_config, of_place(scaling=10**400), "scaling of blocks.0.mlp is 1000"),
        (edit_config, of_place(bottleneck=7), r"has shape \[6, 12\] in the file, expected \[7, 12\]"),
        (edit_config, of_place(width=7), "must have the fields in_features, bottleneck"),
        (edit_config, lambda c: c.update(version=2), "version is 2 in"),
        (edit_config, lambda c: c.update(more=2), "has the unknown field 'more'"),
        (edit_config, lambda c: c.update(places={}), "places is {} in"),
        (edit_config, lambda c: c.update(modules_to_save="head"), "modules_to_save is 'head' in"),
        (edit_config, lambda c: c.update(modules_to_save=[]), "is no bottleneck's and not part of"),
        (edit_config, lambda c: c["places"].update(x=c["places"].pop("blocks.0.mlp")),
         "the file has no x.bottleneck.down"),
        (edit_tensors, lambda t: t.pop(DOWN), f"the file has no {DOWN}"),
        (edit_tensors, lambda t: t.update({DOWN: t[DOWN].int()}), f"{DOWN} is torch.int32"),
        (edit_tensors, lambda t: t.pop("head.bias"), "head.bias is part of modules_to_save"),
        (edit_tensors, lambda t: t.update(other=torch.ones(1)), "the file has other, which is no"),
    ],
    ids=[str(i) for i in range(16)],
)  # fmt: skip
def test_bad_files_are_refused_in_a_sentence(tmp_path, edit, change, says):
    base, _ = saved(tmp_path)
    edit(tmp_path, change)
    state = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=says):
        lorafast.load_adapter(base, tmp_path)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())


def test_files_that_do_not_fit_the_model_are_refused(tmp_path):
    base, model = saved(tmp_path)
    other = lorafast.adapt(copy.deepcopy(base), kind="parallel", targets=["mlp"])
    with pytest.raises(
        ValueError, match=r"layer_norm of the bottleneck at blocks\.0\.mlp is False"
    ):
        lorafast.load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=r"at blocks\.0\.mlp is 12 → 12 features wide, expected 8"):
        lorafast.load_adapter(Model(8), tmp_path)
    del base.blocks[1]
    with pytest.raises(
        ValueError, match=r"a bottleneck at blocks\.1\.mlp, which the model doesn't"
    ):
        lorafast.load_adapter(base, tmp_path)
    lorafast.adapt(model, targets=["attention"])
    with pytest.raises(ValueError, match="a folder holds adapters of one kind"):
        lorafast.save_adapter(model, tmp_path)


def test_lora_and_bottlenecks_are_saved_apart(tmp_path, recwarn):
    base = Model().double()
    model = lorafast.adapt(copy.deepcopy(base), kind="pfeiffer", targets=["mlp"], bottleneck=3)
    lorafast.adapt(model, r=2, targets=["attention"])
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    h = torch.randn(2, 12, dtype=torch.float64)
    read = copy.deepcopy(base)
    for kind in ("lora", "bottleneck"):
        lorafast.save_adapter(model, tmp_path / kind, kind=kind)
        lorafast.load_adapter(read, tmp_path / kind)
    assert not recwarn.list
    assert torch.equal(read(h), model(h))
    with pytest.raises(
        ValueError, match="kind is 'houlsby', expected 'lora', 'bottleneck' or None"
    ):
        lorafast.save_adapter(model, tmp_path / "none", kind="houlsby")
    lorafast.remove_bottlenecks(model)
    with pytest.raises(ValueError, match="has no adapter of the kind 'bottleneck'"):
        lorafast.save_adapter(model, tmp_path / "none", kind="bottleneck")


def test_a_checkpoint_of_the_plain_model_fits():
    """The bottlenecks stay as they are, on meta they begin afresh; a part of one is refused."""
    base = Model()
    options = {"kind": "houlsby", "targets": ["mlp"], "bottleneck": 2, "layer_norm": True}
    model = lorafast.adapt(Model(), **options)
    before = {n: p.clone() for n, p in model.named_parameters() if "bottleneck" in n}
    copy.deepcopy(model).load_state_dict(base.state_dict())
    model.load_state_dict(base.state_dict())
    for name, parameter in before.items():
        assert torch.equal(model.get_parameter(name), parameter), name
    part = {k: v for k, v in model.state_dict().items() if not k.endswith("bottleneck.up")}
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.mlp\.bottleneck\.up"):
        model.load_state_dict(part)
    meta = lorafast.adapt(Model().to("meta"), **options).to_empty(device="cpu")
    meta.load_state_dict(base.state_dict())
    h = torch.randn(2, 12)
    assert torch.equal(meta(h), base(h))
    with pytest.raises(RuntimeError, match="Missing key"):
        Bottleneck(6, 2).load_state_dict({})


def test_the_module_by_itself():
    one = Bottleneck(6, 2, activation="silu", dtype=torch.float64)
    h = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(one(h), h)
    assert str(one) == "Bottleneck(6 → 2 → 6, silu, scaling=1)"
    wide = Bottleneck(6, 2, 9, init="bert", dtype=torch.float64)
    assert wide(h, torch.zeros(3, 9, dtype=torch.float64)).shape == (3, 9)
    with pytest.raises(ValueError, match="up has 9 output features and h has 6"):
        wide(h)


class Broken(Model):
    """One that Transformers' checkpointing would be asked of, and that can't answer."""

    main_input_name = "pixel_values"
    gradient_checkpointing = False

    def get_input_embeddings(self):
        raise RuntimeError("there are none")


def test_what_fails_at_the_end_leaves_nothing_behind(tmp_path):
    base, _ = saved(tmp_path)
    broken = Broken()
    broken.load_state_dict(base.state_dict())
    for change in (
        lambda: lorafast.adapt(broken, kind="houlsby", targets=["mlp"]),
        lambda: lorafast.load_adapter(broken, tmp_path),
    ):
        with pytest.raises(RuntimeError, match="there are none"):
            change()
        assert broken.state_dict().keys() == base.state_dict().keys()
        assert not any(module._forward_hooks for module in broken.modules())
        assert all(p.requires_grad for p in broken.parameters())


def test_lora_at_a_module_with_a_bottleneck_is_refused(tmp_path):
    lorafast.save_adapter(lorafast.adapt(Model(), r=2, targets=["mlp"]), tmp_path)
    model = lorafast.adapt(Model(), kind="pfeiffer", targets=["mlp"])
    with pytest.raises(
        TypeError, match="a bottleneck stands at its output, and a layer has adapter"
    ):
        lorafast.adapt(model, targets=["mlp"])
    with pytest.raises(
        ValueError, match="a bottleneck stands at its output, and a layer has adapter"
    ):
        lorafast.load_adapter(model, tmp_path)


def test_parts_of_bottlenecks_are_no_places():
    model = lorafast.adapt(Model(), kind="pfeiffer", targets=["mlp"], layer_norm=True)
    with pytest.raises(
        ValueError, match=r"targets is '\.\*norm', a regex that matches the full name of"
    ):
        lorafast.adapt(model, kind="pfeiffer", targets=".*norm")


def test_loaded_ones_have_the_dtype_of_the_file(tmp_path):
    base, model = saved(tmp_path)
    loaded = lorafast.load_adapter(base.bfloat16(), tmp_path)
    for name, one in bottlenecks(model).items():
        assert torch.equal(bottlenecks(loaded)[name].down, one.down)
        assert bottlenecks(loaded)[name].norm.weight.dtype is torch.float32


class Parts(nn.Module):
    """Modules without parameters between others."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.output = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.0)).double()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.mlp(self.output(self.embed(x).double()).float())


def test_widths_and_dtypes_at_modules_without_parameters():
    model = lorafast.adapt(Parts(), kind="pfeiffer", targets=["output.2", "embed"], bottleneck=2)
    assert {name: one.down.shape[1] for name, one in bottlenecks(model).items()} == {
        "embed": 6, "output.2": 8,
    }  # fmt: skip
    assert model.output[2].bottleneck.down.dtype is torch.float64
    assert model(torch.tensor([1, 2])).shape == (2, 8)
    with pytest.raises(
        ValueError, match=r"mlp\.1's output can't be told.*outputs of 8 and 16 feat"
    ):
        lorafast.adapt(Parts(), kind="pfeiffer", targets=["mlp.1"])


class Places(nn.Module):
    """Modules of one width, so that what is beside them never tells it apart."""

    def __init__(self):
        super().__init__()
        self.fc, self.identity = nn.Linear(6, 6), nn.Identity()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.values, self.loss = nn.ParameterList([torch.ones(6)]), nn.CrossEntropyLoss()
        self.table, self.bag = nn.Embedding(5, 6), nn.EmbeddingBag(5, 6)
        self.rnn, self.cell = nn.LSTM(6, 4, bidirectional=True), nn.GRUCell(6, 3)
        self.own, self.rms = nn.Module(), nn.RMSNorm(7)
        self.own.register_buffer("scale", torch.ones(6))


NO_PLACES = {
    "conv": ("pfeiffer", TypeError, "it is a Conv2d, whose channels come second"),
    "norm": ("pfeiffer", TypeError, "it is a BatchNorm2d, whose channels come second"),
    "values": ("pfeiffer", TypeError, "it is a ParameterList, which gives no features"),
    "loss": ("pfeiffer", TypeError, "it is a CrossEntropyLoss, which gives no features"),
    "table": ("parallel", TypeError, "it is a Embedding, which reads indices"),
    "bag": ("parallel", TypeError, "it is a EmbeddingBag, which reads indices"),
    "rnn": ("parallel", TypeError, "it is a LSTM, whose states are of a width of their own"),
    "cell": ("parallel", TypeError, "it is a GRUCell, whose states are of a width of their own"),
    "own": ("pfeiffer", ValueError, "the width of own's output can't be told"),
}


@pytest.mark.parametrize("name", NO_PLACES)
def test_modules_that_cannot_carry_one_are_refused(name, unchanged):
    kind, error, sentence = NO_PLACES[name]
    model = Places()
    with unchanged(model), pytest.raises(error, match=sentence) as raised:
        lorafast.adapt(model, kind=kind, targets=["fc", name], bottleneck=2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "width"), [("identity", 6), ("bag", 6), ("rnn", 8), ("cell", 3), ("rms", 7)]
)
def test_widths_of_what_has_no_features_of_its_own(name, width):
    model = Places()
    del model.rnn, model.cell, model.rms  # beside it
    setattr(model, name, getattr(Places(), name))
    if name == "identity":
        del model.bag, model.table
    lorafast.adapt(model, kind="pfeiffer", targets=[name], bottleneck=2)
    assert bottlenecks(model)[name].out_features == width
    x = {"bag": torch.tensor([[1, 2]])}.get(name, torch.ones(2, 7 if name == "rms" else 6))
    y = getattr(model, name)(x)
    assert (y[0] if name == "rnn" else y).shape[-1] == width


def test_a_config_tells_the_width_of_a_module_that_has_it_alone():
    class Norm(nn.Module):
        def __init__(self, K):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(K))

    model = nn.ModuleDict({"fc": nn.Linear(12, 12), "norm": Norm(12), "heads_norm": Norm(4)})
    model.config = type("Config", (), {"hidden_size": 12})()
    lorafast.adapt(model, kind="houlsby", targets=["norm"], bottleneck=2)
    assert bottlenecks(model)["norm"].out_features == 12
    with pytest.raises(ValueError, match="the width of heads_norm's output can't be told"):
        lorafast.adapt(model, kind="houlsby", targets=["heads_norm"], bottleneck=2)


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
def test_a_model_with_pefts_adapters_is_refused(kind, unchanged, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["attention"]))
    for name in ("mlp", "attention"):
        with unchanged(model), pytest.raises(ValueError, match="attention has PEFT's adapter, exp"):
            lorafast.adapt(model, kind=kind, targets=[name], bottleneck=2)
    lorafast.save_adapter(
        lorafast.adapt(Model(), kind=kind, targets=["mlp"], bottleneck=2), tmp_path
    )
    inner = model.base_model.model
    with unchanged(inner), pytest.raises(ValueError, match="attention has PEFT's adapter, exp"):
        lorafast.load_adapter(inner, tmp_path)


class Shared(Model):
    def __init__(self):
        super().__init__()
        self.again = self.blocks[0].mlp


def test_a_second_name_selects_or_leaves_out():
    model = lorafast.adapt(Shared(), kind="pfeiffer", targets=["again"])
    assert list(bottlenecks(model)) == ["blocks.0.mlp"]
    model = lorafast.adapt(Shared(), kind="pfeiffer", targets=["mlp"], exclude=["again"])
    assert list(bottlenecks(model)) == ["blocks.1.mlp"]


def test_save_pretrained_warns(tmp_path):
    model = lorafast.adapt(model_of("bert"), kind="houlsby")
    with pytest.warns(
        UserWarning, match="drops the model's bottleneck adapters: save them with lora"
    ):
        model.save_pretrained(tmp_path)
