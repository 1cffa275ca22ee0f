"""``adapt(..., fuse="siblings")``: which layers it finds, the numbers of a model, the way back."""

import copy
import warnings

import pytest
import torch
from models import llama_config
from torch import nn

import lorafast
from lorafast.convert.siblings import shared_calls
from lorafast.nn import LoRALinear
from lorafast.ops import siblings as shared_op


def groups(model):
    """The names of siblings, group by group."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and module._siblings is not None:
            found.setdefault(module._siblings[0], []).append(name.rpartition(".")[2])
    return list(found.values())


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
ENCODER_DECODER = {"vocab_size": 19, "d_model": 16}
QKV, GATED = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
FAMILIES = {
    "Llama": ({**SMALL, **HEADS, "vocab_size": 19}, [QKV, GATED]),
    "Qwen3": ({**SMALL, **HEADS, "vocab_size": 19, "head_dim": 8}, [QKV, GATED]),
    "Mistral": ({**SMALL, **HEADS, "vocab_size": 19, "num_key_value_heads": 1}, [QKV, GATED]),
    "Gemma2": ({**SMALL, **HEADS, "vocab_size": 19, "head_dim": 8}, [QKV, GATED]),
    "Bert": ({**SMALL, **HEADS, "vocab_size": 19}, [["query", "key", "value"]]),
    "ViT": ({**SMALL, **HEADS, "image_size": 8, "patch_size": 4}, None),
    "T5": (
        {**ENCODER_DECODER, "d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 1}
        | {"feed_forward_proj": "gated-gelu"},
        [["q", "k", "v"], ["wi_0", "wi_1"], ["q", "k", "v"], ["q", "k", "v"], ["wi_0", "wi_1"]],
    ),
    "GPT2": ({"vocab_size": 19, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}, []),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_by_their_source(family):
    transformers = pytest.importorskip("transformers")
    options, expected = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorafast.adapt(model, 2, fuse="siblings")
    found = groups(model)
    if expected is None:  # its layers have had other names
        assert [len(group) for group in found] == [3]
    else:
        assert found == expected
    # GPT-2's q, k and v are one layer.
    assert any("fuse is 'siblings'" in str(w.message) for w in caught) == (not found)


class Reading(nn.Module):
    """What a source shows: each method is one module's forward."""

    def aliased(self, x):
        y = x
        return self.a(x) + self.b(y)

    def either(self, x, other=None):
        y = x if other is None else other
        return self.a(x), self.b(y), self.c(other)

    def assigned_in_between(self, x):
        first = self.a(x)
        x = self.norm(x)
        return first, self.b(x)

    def one_after_another(self, x):
        x = self.a(x)
        return self.b(x)

    def in_a_branch(self, x):
        if self.flag:
            x = self.norm(x)
        first = self.a(x)
        return first + self.b(x)

    def only_in_a_branch(self, x):
        y = self.norm(x)
        if self.flag:
            y = x
        return self.a(x) + self.b(y)

    def in_a_loop(self, x):
        for _ in range(3):
            x = self.a(x)
        return self.b(x)

    def nested(self, x):
        return self.out(self.act(self.block.gate(x)) * self.block.up(x))

    def two_arguments(self, x, y):
        return self.a(x, y) + self.b(x) + self.c(y)

    def unpacked(self, pair):
        x, y = pair
        return self.a(x) + self.b(y) + self.c(x)

    def items(self, x):
        return self.a(x[0]) + self.b(x[0])


READINGS = {
    "aliased": [["a", "b"]],
    "either": [["a", "b", "c"]],
    "assigned_in_between": [["a", "norm"]],
    "one_after_another": [],
    "in_a_branch": [["norm", "a", "b"]],
    "only_in_a_branch": [["norm", "a", "b"]],
    "in_a_loop": [["a", "b"]],
    "nested": [["block.gate", "block.up"]],
    "two_arguments": [],
    "unpacked": [["a", "c"]],
    "items": [],
}


@pytest.mark.parametrize("method", READINGS)
def test_reading(method):
    kind = type(method, (nn.Module,), {"forward": getattr(Reading, method)})
    assert shared_calls(kind) == READINGS[method]


def test_a_forward_without_source():
    kind = type("Made", (nn.Module,), {"forward": eval("lambda self, x: self.a(x) + self.b(x)")})
    assert shared_calls(kind) == []


@pytest.fixture
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config()).double()


def losses(model, steps=3):
    """What training comes to, in which every gradient has its part."""
    tokens = torch.arange(24).view(2, 12) % 19
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(adapters, 1.0)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_model_trains_as_without(model, checkpointing, monkeypatch):
    monkeypatch.setattr(shared_op, "FEWEST_ROWS", 1)
    monkeypatch.setattr(shared_op, "FEWEST_ELEMENTS", 1)
    lorafast.adapt(model, 2, fuse="siblings")
    plain = copy.deepcopy(model)
    assert lorafast.restore(plain) is plain
    assert groups(model) == [QKV, GATED]
    assert groups(plain) == []
    if checkpointing:
        for one in (model, plain):
            one.train().gradient_checkpointing_enable()
    assert losses(model) == pytest.approx(losses(plain), rel=1e-9)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_merging_knows_no_siblings(model):
    lorafast.adapt(model, 2, fuse="siblings")
    merged = lorafast.merge(model)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert not hasattr(merged.model.layers[0].self_attn.q_proj, "_siblings")


def test_another_word(model):
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"fuse is 'qkv', expected 'siblings' or None"):
        lorafast.adapt(model, 2, fuse="qkv")
    assert dict(model.named_modules()) == before


def test_a_second_adapt_leaves_siblings_together(model):
    lorafast.adapt(model, 2, [*QKV, *GATED], fuse="siblings")
    before = groups(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that no module calls o_proj with another layer's x
        lorafast.adapt(model, 2, ["o_proj"], fuse="siblings")
    assert groups(model) == before


def test_quantized_layers_are_alone(model):
    lorafast.quantize(model.float(), "int8")
    with pytest.warns(UserWarning, match="LoRA layers over dense weights"):
        lorafast.adapt(model, 2, fuse="siblings")
    assert groups(model) == []


def test_summary_says_who_shares_x(model):
    lorafast.adapt(model, 2, fuse="siblings")
    rows = {row.name.rpartition(".")[2]: row for row in lorafast.summary(model).layers}
    prefix = "model.layers.0.self_attn."
    assert rows["k_proj"].siblings == (f"{prefix}q_proj", f"{prefix}v_proj")
    assert rows["o_proj"].siblings == ()
    lines = str(lorafast.summary(model)).splitlines()
    assert [line.partition("  shares x with ")[2] for line in lines if "shares x" in line] == [
        "k_proj, v_proj", "q_proj, v_proj", "q_proj, k_proj", "up_proj", "gate_proj"
    ]  # fmt: skip
    assert "shares x" not in str(lorafast.summary(lorafast.restore(model)))


def test_explain_says_who_shares_x_and_how_they_are_served(model):
    lorafast.adapt(model, 2, fuse="siblings")
    found = lorafast.explain(model)
    qkv, gated = found.sharing
    assert [name.rpartition(".")[2] for name in qkv.layers] == QKV
    assert qkv.alone == gated.alone == {}
    operations = {choice.operation for choice in qkv.choices}
    assert operations == {"shrink", "linear_expand", "expand_backward", "shrink_backward"}
    for name, choices in found.layers.items():
        shared = name in (*qkv.layers, *gated.layers)
        assert ["shares x with no sibling" in one.reason for one in choices] == [shared] * 2, name
    assert "self_attn.v_proj share x" in str(found)
    with torch.no_grad():
        qkv, _ = lorafast.explain(model).sharing
    assert {choice.operation for choice in qkv.choices} == {"shrink", "linear_expand"}
    assert lorafast.explain(lorafast.restore(model)).sharing == ()


def test_explain_says_why_x_is_not_shared(model):
    lorafast.adapt(model, 2, fuse="siblings")
    attention = model.model.layers[0].self_attn
    (few,) = lorafast.explain(attention, torch.zeros(7, 16).double()).sharing
    assert list(few.alone) == QKV
    assert few.choices == ()
    assert "x has 7 rows of 16" in str(few)
    attention.k_proj.merge()
    (two,) = lorafast.explain(attention).sharing
    assert two.alone == {"k_proj": "it is merged"}
    assert "together: q_proj, v_proj" in str(two)
    attention.q_proj.dropout = 0.5
    (none,) = lorafast.explain(attention.train()).sharing
    assert none.alone["q_proj"] == "its dropout has a mask of its own"
    assert none.alone["v_proj"] == "no other shares x"
    assert none.choices == ()
    (other,) = lorafast.explain(attention.eval(), torch.zeros(1, 16).expand(40_000, 16)).sharing
    assert "other dtypes" in other.alone["q_proj"]
