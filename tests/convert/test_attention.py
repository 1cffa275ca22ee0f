"""Adapted attention in a model: files with PEFT both ways, merging, encoders, refusals."""

import copy
import importlib

import pytest
import torch
from models import trained
from torch import nn

import lorafast
from lorafast.nn import LoRAMultiheadAttention

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors.torch")

ADAPTER = ["lora_A", "lora_B", "out_lora_A", "out_lora_B"]


class Net(nn.Module):
    """``[batch, length, 8]`` → the same, through attention over itself and over two other inputs."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 4, bias=False, add_bias_kv=True)
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.own(x, x, x, need_weights=False)[0]
        turned = x.transpose(0, 1)
        y, weights = self.other(turned, torch.tanh(turned), turned.flip(0))
        return self.head(x + y.transpose(0, 1)) * weights.sum()


@pytest.fixture
def make():
    def fresh():
        torch.manual_seed(7)
        return Net().double()

    return fresh


@pytest.fixture
def x():
    return torch.randn(3, 4, 8, dtype=torch.float64)


def draw(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    return model


def config(**options):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["own", "other", "head"]}
    return peft.LoraConfig(**settings | options)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "rank_pattern": {"own": 2}, "alpha_pattern": {"other": 3}}],
    ids=["plain", "patterns"],
)
def test_files_go_to_PEFT_and_back(make, x, options, tmp_path):
    theirs = draw(peft.get_peft_model(make(), config(**options))).eval()
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lorafast.load_adapter(make(), tmp_path / "theirs").eval()
    assert type(ours.own) is LoRAMultiheadAttention
    assert type(ours.own.out_proj) is type(make().own.out_proj)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(lorafast.merge(copy.deepcopy(ours))(x), theirs.merge_and_unload()(x))
    lorafast.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(x), expected)
    replaced = lorafast.load_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(replaced(x), expected)


def test_merging_gives_plain_attention_back(make, x):
    model = draw(lorafast.adapt(make(), 4, ["own", "other"], dropout=0.3)).eval()
    expected = model(x)
    lorafast.merge(model)
    assert type(model.own) is nn.MultiheadAttention
    assert list(model.state_dict()) == list(make().state_dict())
    torch.testing.assert_close(model.train()(x), expected)  # by PyTorch's calls one by one
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)  # by its fused kernel
    alone = draw(lorafast.adapt(make().own, 4, r".*(?<!out_proj)"))
    y = alone(x, x, x)[0]
    torch.testing.assert_close(lorafast.merge(alone)(x, x, x)[0], y)


def test_what_is_adapted_and_trained(make):
    model = lorafast.adapt(make(), 2, ["own", "head"], dropout=0.25)
    names = {f"own.{name}" for name in ADAPTER} | {"head.lora_A", "head.lora_B"}
    assert trained(model) == names
    assert model.own.dropout == 0.25
    summary = lorafast.summary(model)
    assert summary.layers[0].parameters == 2 * (8 + 24 + 8 + 8)
    assert summary.layers[0].remark == "attention, with out_proj"
    (left,) = [one for one in summary.left if one.kind == "MultiheadAttention"]
    assert left.by_name
    operations = [choice.operation for choice in lorafast.explain(model).layers["own"]]
    kinds = ("lora_linear", "lora_linear_backward")
    assert operations == [f"{kind} of {part}" for part in ("in_proj", "out_proj") for kind in kinds]
    lorafast.warm_up(model, [2])
    assert all(p.grad is None for p in model.parameters())
    assert model.load_state_dict(make().state_dict()) == ([], [])
    assert lorafast.restore(model) is model


def test_a_first_backward_without_a_gradient_is_noticed(make, x):
    model = lorafast.adapt(make(), 2, ["own", "other"])
    y = model.own(x, x, x)[0]
    with pytest.warns(UserWarning, match="other"):
        y.sum().backward()


@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "encoder"])
def test_the_fast_path_of_an_encoder_does_not_bypass_the_adapters(stacked, draw_adapters):
    model = nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True).double()
    if stacked:
        model = nn.TransformerEncoder(model, 2)
    draw_adapters(lorafast.adapt(model, 2, ["self_attn", "linear1"]))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=padding), expected)


def test_merging_gives_an_encoder_its_fast_path_back(monkeypatch):
    def fused(model):
        layers = [layer.activation_relu_or_gelu for layer in model.layers]
        return [model.use_nested_tensor, *layers]

    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 7, activation="gelu", batch_first=True), 2
    )
    with monkeypatch.context() as patched:
        room = importlib.import_module("lorafast.convert.adapt")
        patched.setattr(room, "watch", lambda model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lorafast.adapt(model, 2, ["self_attn"])
    assert fused(model) == [True, 2, 2]
    lorafast.adapt(lorafast.adapt(model, 2, ["0.self_attn"]), 2, ["0.linear1"])
    assert fused(model) == [False, 0, 2]
    assert fused(lorafast.merge(copy.deepcopy(model))) == [True, 2, 2]
    lorafast.quantize(lorafast.merge(model), targets=["1.linear1"])
    assert fused(model) == [False, 2, 0]
    lorafast.merge(lorafast.adapt(model, 2, ["0.linear2"]))
    assert fused(model) == [False, 2, 0]  # something is quantized still
    lorafast.merge(lorafast.adapt(model, 2, ["1.linear1"]))
    assert fused(model) == [True, 2, 2]
    assert not any("before" in name for module in model.modules() for name in vars(module))


def test_out_proj_is_no_layer_of_its_own(make):
    model = lorafast.adapt(make(), 2, ["own"])
    for again in (model, make()):
        with pytest.raises(TypeError, match="Attention reads its weight without calling it"):
            lorafast.adapt(again, 2, ["out_proj"])
    with pytest.warns(UserWarning, match=r"own\.out_proj: LoRA.* other\.out_proj: Multi"):
        lorafast.adapt(model, 2)
    assert type(model.own.out_proj) is type(make().own.out_proj)


@pytest.mark.parametrize(
    ("targets", "options", "error", "sentence"),
    [
        (["head", "odd"], {}, TypeError, "odd can't be adapted: its kdim is 4 and its vdim 8"),
        (["head", "own"], {"use_dora": True}, ValueError, "expected False for attention"),
    ],
    ids=["kdim", "DoRA"],
)
def test_refusals_leave_the_model(make, targets, options, error, sentence):
    model = make()
    model.odd = nn.MultiheadAttention(8, 2, kdim=4)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=sentence):
        lorafast.adapt(model, 2, targets, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_file_without_out_proj_is_refused(make, tmp_path):
    from safetensors.torch import load_file, save_file

    draw(peft.get_peft_model(make(), config())).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = "base_model.model.own.base_layer.out_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    with pytest.raises(
        ValueError, match=r"own has no base_layer\.out_proj\.lora_B\.weight in the f"
    ):
        lorafast.load_adapter(make(), tmp_path)


def test_a_layer_of_such_a_name_is_found_all_the_same(x, tmp_path):
    def make():
        torch.manual_seed(1)
        inner = nn.ModuleDict({"out_proj": nn.Linear(8, 8)})
        return nn.ModuleDict({"base_layer": inner}).double()

    ours = draw(lorafast.adapt(make(), 2, ["base_layer.out_proj"]))
    lorafast.save_adapter(ours, tmp_path)
    again = lorafast.load_adapter(make(), tmp_path)
    layers = [model["base_layer"]["out_proj"] for model in (ours, again)]
    assert torch.equal(layers[1](x), layers[0](x))
