"""AdapterHub's layout of Houlsby's adapters: a file as ``adapters`` 1.3.0 writes it, there and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafast
from lorafast.convert import load_adapterhub, save_adapterhub
from lorafast.convert.bottlenecks import bottlenecks

transformers = pytest.importorskip("transformers")

# What DoubleSeqBnConfig(reduction_factor=4) of adapters 1.3.0 wrote for this model.
CONFIG = {
    "config": {
        "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0,
        "factorized_phm_W": True, "factorized_phm_rule": False,
        "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
        "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None,
        "is_parallel": False, "learn_phm": True, "leave_out": [], "ln_after": False,
        "ln_before": False, "mh_adapter": True, "non_linearity": "swish", "original_ln_after": True,
        "original_ln_before": False, "output_adapter": True, "phm_bias": True,
        "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False,
        "phm_rank": 1, "reduction_factor": 4, "residual_before_ln": True, "scaling": 1.0,
        "shared_W_phm": False, "shared_phm_rule": True, "stochastic_depth": 0.0,
        "use_gating": False,
    },
    "hidden_size": 16, "model_class": "BertModel", "model_name": "", "model_type": "bert",
    "name": "houlsby", "version": "adapters.1.3.0",
}  # fmt: skip
OWNERS = [f"encoder.layer.{i}.{where}" for i in (0, 1) for where in ("attention.output", "output")]
SHAPES = {
    "adapter_down.0.weight": (4, 16), "adapter_down.0.bias": (4,), "adapter_up.weight": (16, 4),
    "adapter_up.bias": (16,),
}  # fmt: skip


def model_of(kind="BertModel"):
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=20,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def written(folder):
    tensors = {
        f"{owner}.adapters.houlsby.{name}": torch.randn(shape)
        for owner in OWNERS
        for name, shape in SHAPES.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return tensors


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_there_and_back(tmp_path, kind):
    tensors = written(tmp_path / "theirs")
    model = load_adapterhub(model_of(kind), tmp_path / "theirs")
    prefix = "" if kind == "BertModel" else "bert."
    assert list(bottlenecks(model)) == [f"{prefix}{owner}.dropout" for owner in OWNERS]
    one = bottlenecks(model)[f"{prefix}{OWNERS[1]}.dropout"]
    assert torch.equal(one.down, tensors[f"{OWNERS[1]}.adapters.houlsby.adapter_down.0.weight"])
    assert (one.activation, one.scaling) == ("silu", 1.0)
    save_adapterhub(model, tmp_path / "ours", "houlsby")
    back = load_file(tmp_path / "ours" / "adapter.safetensors")
    assert back.keys() == {prefix + name for name in tensors}
    assert all(torch.equal(back[prefix + name], tensor) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["config"] == CONFIG["config"]
    load_adapterhub(model_of(), tmp_path / "ours")  # into the model without its head too


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"original_ln_after": False},
            "residual_before_ln True, original_ln_after False: no adapter",
        ),
        (
            {"original_ln_before": True, "residual_before_ln": "post_add"},
            "original_ln_before True, residual_before_ln 'post_add', original_ln_after True: no",
        ),
        ({"is_parallel": 1}, "has is_parallel 1, original_ln_before False"),
        ({"scaling": "learned"}, "scaling is 'learned' in"),
        ({"non_linearity": "elu"}, "non_linearity is 'elu' in"),
        ({"dropout": 0.1}, "dropout is 0.1 in"),
        ({"use_gating": 1}, "use_gating is 1 in"),
        ({"more": 1}, "has the unknown field 'more'"),
        ({"scaling": 10**400}, "scaling is 1000"),
        ({"leave_out": [0]}, "has an adapter at encoder.layer.0.attention.output, unlike"),
        ({"leave_out": 0}, "leave_out is 0 in"),
        (
            {"leave_out": [1, 2, -1]},
            "leave_out has -1, 2 in the config, and the model has 2 layers",
        ),
        ({"mh_adapter": False}, "has an adapter at encoder.layer.0.attention.output, unlike"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_other_configurations_are_refused(tmp_path, fields, says):
    written(tmp_path)
    other = CONFIG | {"config": CONFIG["config"] | fields}
    (tmp_path / "adapter_config.json").write_text(json.dumps(other))
    model = model_of()
    with pytest.raises(ValueError, match=says):
        load_adapterhub(model, tmp_path)
    assert not bottlenecks(model)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [("roberta", "was trained in a 'roberta', its model_type, and .* is a 'bert'"), (3, "is 3 in")],
)
def test_an_adapter_of_another_family_is_refused(tmp_path, model_type, says):
    written(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(CONFIG | {"model_type": model_type}))
    model = model_of()
    with pytest.raises(ValueError, match=says):
        load_adapterhub(model, tmp_path)
    assert not bottlenecks(model)
    path.write_text(json.dumps({key: CONFIG[key] for key in CONFIG if key != "model_type"}))
    load_adapterhub(model, tmp_path)  # a file that doesn't say


def test_other_files_are_refused(tmp_path):
    tensors = written(tmp_path)
    name = f"{OWNERS[0]}.adapters.houlsby."

    def refused(changed, says):
        save_file(changed, tmp_path / "adapter.safetensors")
        with pytest.raises(ValueError, match=says):
            load_adapterhub(model_of(), tmp_path)

    refused(
        tensors | {"x": torch.ones(1)}, "the file has x, which is no part of a bottleneck adapter"
    )
    refused(tensors | {name + "adapter_up.bias": torch.ones(3)}, r"of shape \[3\] in the file")
    refused(tensors | {name + "adapter_down.0.weight": torch.ones(4, 8)}, "a hidden size of 8")
    refused({n: t for n, t in tensors.items() if n != name + "adapter_up.bias"}, "has no up_bias")
    refused(
        {n.replace("r.1.", "r.9."): t for n, t in tensors.items()}, "at encoder.layer.9.attention"
    )
    half = {n: t for n, t in tensors.items() if "r.1." not in n}
    refused(half, "has no adapter at encoder.layer.1.attention.output, unlike what")
    half = {n: t for n, t in tensors.items() if "attention" not in n}
    refused(half, "has no adapter at encoder.layer.0.attention.output, unlike what")
    refused(
        tensors | {f"bert.{n}": t.clone() for n, t in tensors.items()},
        "twice, under names that reach",
    )
    (tmp_path / "adapter.safetensors").unlink()
    (tmp_path / "pytorch_adapter.bin").touch()
    with pytest.raises(FileNotFoundError, match="is a pickle and is never read"):
        load_adapterhub(model_of(), tmp_path)
    with pytest.raises(
        ValueError, match="the model is a Linear, and AdapterHub's layout is known of"
    ):
        load_adapterhub(torch.nn.Linear(2, 2), tmp_path)


def test_what_the_layout_does_not_have_is_not_written(tmp_path):
    model = lorafast.adapt(model_of(), kind="houlsby", layer_norm=True, bottleneck=3)
    with pytest.raises(ValueError, match="a bottleneck is parallel or has a LayerNorm"):
        save_adapterhub(model, tmp_path)
    lorafast.remove_bottlenecks(model)
    lorafast.adapt(model, kind="pfeiffer", targets=["intermediate.dense"], bottleneck=3)
    with pytest.raises(ValueError, match=r"intermediate\.dense has a bottleneck, and AdapterHub's"):
        save_adapterhub(model, tmp_path)
    lorafast.remove_bottlenecks(model)
    with pytest.raises(ValueError, match="the model has no bottleneck adapter"):
        save_adapterhub(model, tmp_path)
    assert not any(tmp_path.iterdir())


PFEIFFER = {"original_ln_before": True, "mh_adapter": False, "non_linearity": "relu"}
PARALLEL = {"is_parallel": True, "init_weights": "mam_adapter", "scaling": 4.0, "mh_adapter": False}
AFTER = PFEIFFER | {"original_ln_after": False, "residual_before_ln": False}


def formula(fields, output, tensors):
    """A BertOutput's forward with the adapter of such a config, as ``adapters`` 1.3.0 computes it."""
    D, d, U, u = tensors
    act = torch.nn.functional.silu if fields["non_linearity"] == "swish" else torch.relu

    def adapter(h):
        return fields["scaling"] * (act(h @ D.T + d) @ U.T + u)

    def forward(hidden_states, input_tensor):
        o, t, ln = output.dense(hidden_states), input_tensor, output.LayerNorm
        if fields["is_parallel"]:
            return ln(o + adapter(t) + t)
        if fields["original_ln_after"]:
            return ln(o + adapter(ln(o + t)) + t)
        return ln(o + t) + adapter(ln(o + t))

    return forward


@pytest.mark.parametrize("fields", [PFEIFFER, AFTER, PARALLEL], ids=["pfeiffer", "after", "par"])
def test_what_reads_a_norm_or_the_residual(tmp_path, fields):
    tensors = {
        name: t for name, t in written(tmp_path / "theirs").items() if "attention" not in name
    }
    save_file(tensors, tmp_path / "theirs" / "adapter.safetensors")
    fields = CONFIG["config"] | fields
    (tmp_path / "theirs" / "adapter_config.json").write_text(
        json.dumps(CONFIG | {"config": fields})
    )
    model = load_adapterhub(model_of(), tmp_path / "theirs").double()
    ids = torch.arange(14).view(2, 7)
    expected = model_of().double()
    expected.load_state_dict({n: t for n, t in model.state_dict().items() if "bottleneck" not in n})
    with lorafast.disabled(model):
        assert torch.equal(model(ids).last_hidden_state, expected(ids).last_hidden_state)
    leaves = []
    for i in (0, 1):
        output, name = (
            expected.encoder.layer[i].output,
            f"encoder.layer.{i}.output.adapters.houlsby.",
        )
        leaves += [tensors[name + key].double().requires_grad_() for key in SHAPES]
        output.forward = formula(fields, output, leaves[-4:])
    y, right = model(ids).last_hidden_state, expected(ids).last_hidden_state
    torch.testing.assert_close(y, right)
    own = [
        getattr(one, name)
        for one in bottlenecks(model).values()
        for name in ("down", "down_bias", "up", "up_bias")
    ]
    found = torch.autograd.grad(y.sin().sum(), own)
    torch.testing.assert_close(found, torch.autograd.grad(right.sin().sum(), leaves))
    # AdapterHub's file again, and one of our own
    save_adapterhub(model.float(), tmp_path / "ours", "houlsby")
    back = load_file(tmp_path / "ours" / "adapter.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["config"]
    assert config | {"init_weights": fields["init_weights"]} == fields
    lorafast.save_adapter(model, tmp_path / "own")
    again = model_of()
    again.load_state_dict({n: t for n, t in model.state_dict().items() if "bottleneck" not in n})
    lorafast.load_adapter(again, tmp_path / "own")
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)
    lorafast.remove_bottlenecks(model)
    assert not any("bottleneck" in name for name in model.state_dict())


@pytest.mark.parametrize("flow", ["houlsby", "pfeiffer"])
def test_llama(tmp_path, flow):
    def made():
        return transformers.LlamaModel(
            transformers.LlamaConfig(
                vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
                intermediate_size=20,
            )
        ).eval()  # fmt: skip

    model, places = made(), {"houlsby": ("self_attn", "mlp"), "pfeiffer": ("",)}[flow]
    targets = [f"layers.{i}.{place}".strip(".") for i in (0, 1) for place in places]
    lorafast.adapt(model, kind="houlsby", targets=targets, bottleneck=4, init="bert")
    save_adapterhub(model, tmp_path, "a")
    keys = load_file(tmp_path / "adapter.safetensors").keys()
    assert ("layers.0.attention_adapters.adapters.a.adapter_up.bias" in keys) == (flow == "houlsby")
    assert "layers.1.output_adapters.adapters.a.adapter_down.0.weight" in keys
    other = made()
    other.load_state_dict({n: t for n, t in model.state_dict().items() if "bottleneck" not in n})
    ids = torch.arange(14).view(2, 7)
    expected = model(ids).last_hidden_state
    assert torch.equal(load_adapterhub(other, tmp_path)(ids).last_hidden_state, expected)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    raw["config"] |= {"original_ln_before": True, "mh_adapter": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match="mh_adapter and original_ln_before are true in the config"
    ):
        load_adapterhub(made(), tmp_path)
    raw["config"] |= {"is_parallel": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="is_parallel is true in the config"):
        load_adapterhub(made(), tmp_path)


def test_mixed_places_are_not_written(tmp_path):
    model = lorafast.adapt(
        model_of(), kind="houlsby", bottleneck=3,
        targets=["encoder.layer.0.output.dropout", "encoder.layer.1.output.LayerNorm"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="bottlenecks stand at modules of different kinds"):
        save_adapterhub(model, tmp_path)
