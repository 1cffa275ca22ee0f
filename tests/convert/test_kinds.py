"""Another kind of adapter is its module and a row: nothing else in the room knows the kinds."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert import kinds
from lorafast.convert.kinds import Kind
from lorafast.nn import AdapterLayer, LoRALinear


class ScaledNorm(AdapterLayer):
    """``y = norm(x)·(1 + scaling · B·A)``: of rank r over the gain of a layer norm, ``[n]``."""

    peft_names = {"norm_A": "norm_A", "norm_B": "norm_B"}  # noqa: RUF012
    watched_parameter = "norm_B"
    operation = "scaled_norm"
    _plain_class = nn.LayerNorm

    @classmethod
    def of_plain(cls, plain, r, *, alpha=None, dropout=0.0, use_rslora=False, use_dora=False,
                 adapter_dtype=None):  # fmt: skip
        return cls._around(plain, r, alpha=alpha, use_rslora=use_rslora)

    @classmethod
    def why_not_adaptable(cls, plain):
        return None if plain.elementwise_affine else "it has no gain"

    @staticmethod
    def shapes_of(in_features, out_features, r, use_dora=False):
        return {"norm_A": (r, in_features), "norm_B": (r,)}

    def _build(self, plain, r, *, alpha, use_rslora):
        (n,) = plain.weight.shape
        self._plain_class = type(plain)
        self._set(n, n, r, alpha, use_rslora)
        self.weight, self.bias = plain.weight, plain.bias
        self._add_adapter(plain.weight.dtype, plain.weight.device, None)

    def _fill(self, plain):
        plain.bias = self.bias

    def reset_adapter(self):
        nn.init.normal_(self.norm_A)
        nn.init.zeros_(self.norm_B)

    def _delta_weight(self):
        return self.weight * (self._scaling * self.norm_B @ self.norm_A)

    def merged_weight(self):
        return self.weight + self._delta_weight()

    def forward(self, x):
        gain = self._merged_weight if self.merged else self.merged_weight()
        return nn.functional.layer_norm(x, self.normalized_shape, gain, self.bias, self.eps)

    def example_input(self, rows):
        return torch.zeros((rows, self.in_features), dtype=self.weight.dtype)


@pytest.fixture
def scaled_norm(monkeypatch):
    row = Kind(
        layer=ScaledNorm,
        plain="nn.LayerNorm",
        wraps=lambda module: isinstance(module, nn.LayerNorm),
        features=lambda plain: 2 * tuple(plain.weight.shape),
        frozen_tensor=lambda plain: plain.weight,
        in_all_linear=False,
    )
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, row))
    for name, ending in ScaledNorm.peft_names.items():
        monkeypatch.setitem(kinds.PEFT_NAMES, ending, name)


@pytest.fixture
def model(scaled_norm, net, draw_adapters):
    return draw_adapters(lorafast.adapt(net, 2, ["norm", "up"], alpha=3))


def test_adapt(model):
    assert (type(model.norm), type(model.block.up)) == (ScaledNorm, LoRALinear)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "norm.norm_A", "norm.norm_B", "block.up.lora_A", "block.up.lora_B",
    }  # fmt: skip


def test_all_linear_leaves_it_out(scaled_norm, net):
    lorafast.adapt(net, 2)
    assert type(net.norm) is nn.LayerNorm


def test_merge(model, x, assert_same):
    expected = model(x).detach()
    lorafast.merge(model)
    assert type(model.norm) is nn.LayerNorm
    assert_same(model(x).detach(), expected)


def test_files(model, make_net, x, assert_same, tmp_path):
    pytest.importorskip("safetensors")
    lorafast.save_adapter(model, tmp_path)
    other = lorafast.load_adapter(make_net(), tmp_path)
    assert type(other.norm) is ScaledNorm
    assert other.norm.scaling == 1.5
    assert_same(other(x).detach(), model(x).detach())


def test_summary_warm_up_and_explain(model):
    rows = {row.name: row for row in lorafast.summary(model).layers}
    assert rows["norm"].parameters == 2 * 3 + 2
    lorafast.warm_up(model, [3])
    (choice,) = lorafast.explain(model).layers["norm"]
    assert choice.operation == "scaled_norm"


def test_a_layer_that_nobody_calls(model, x):
    model.forward = lambda x: model.block(x)
    with pytest.warns(UserWarning, match=r"got no gradient in the first backward.*: norm \("):
        model(x).sum().backward()


def test_a_plain_checkpoint_leaves_it_alone(model, make_net):
    before = model.norm.norm_B.clone()
    assert model.load_state_dict(make_net().state_dict()) == ([], [])
    assert torch.equal(model.norm.norm_B, before)


def test_nobody_in_the_room_asks_for_one_kind():
    room = Path(kinds.__file__).parent
    asks = re.compile(r"\bisinstance\([^)]*\b(LoRALinear|LoRAEmbedding)\b")
    assert not [path.name for path in room.glob("*.py") if asks.search(path.read_text("utf-8"))]
    names = {name for kind in kinds.KINDS for name in kind.layer.peft_names}
    said = re.compile(rf"\.({'|'.join(names)})\b")
    assert not [path.name for path in room.glob("*.py") if said.search(path.read_text("utf-8"))]
