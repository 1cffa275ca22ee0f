"""Adapted convolutions: modules, which are adapted, files with PEFT both ways, merging, refusals."""

import copy

import pytest
import torch
from models import trained
from torch import nn

import lorafast
from lorafast.nn import LoRAConv, LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRALinear
from lorafast.reference import contract

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors.torch")

STOCK = {LoRAConv1d: nn.Conv1d, LoRAConv2d: nn.Conv2d, LoRAConv3d: nn.Conv3d}
CONVOLUTIONS = ["stem", "down", "grouped", "point", "wave", "voxels"]


class Net(nn.Module):
    """Images ``[batch, 4, 8, 8]`` → ``[batch, 3]`` through convolutions of every dimension."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding="valid")
        self.grouped = nn.Conv2d(8, 8, 3, padding=(1, 1), groups=2)
        self.point = nn.Conv2d(8, 6, 1)
        self.wave = nn.Conv1d(6, 6, 3, padding=2, stride=2)
        self.voxels = nn.Conv3d(1, 2, (1, 3, 2))
        self.head = nn.Linear(2 * 6 * 1 * 2, 3)

    def forward(self, x):
        x = torch.tanh(self.down(torch.tanh(self.stem(x))))
        x = torch.tanh(self.point(torch.tanh(self.grouped(x))))
        x = torch.tanh(self.wave(x.flatten(2)))  # [batch, 6, 6]
        x = self.voxels(x.view(len(x), 1, 6, 3, 2)[..., [0, 1, 0]])
        return self.head(x.flatten(1)[:, :24])


@pytest.fixture
def make():
    def fresh():
        torch.manual_seed(7)
        return Net().double()

    return fresh


@pytest.fixture
def x():
    return torch.randn(3, 4, 8, 8, dtype=torch.float64)


def draw(model):
    """Values for adapters, so that they change something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                p.normal_(std=0.3)
            elif "magnitude" in name:
                p.mul_(1.2)
    return model


def config(targets, **options):
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def use_dora(request):
    return request.param


@pytest.fixture
def targets(use_dora):
    return [name for name in [*CONVOLUTIONS, "head"] if not (use_dora and name == "grouped")]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_files_go_to_PEFT_and_back(make, x, targets, use_dora, tmp_path):
    theirs = draw(peft.get_peft_model(make(), config(targets, use_dora=use_dora))).eval()
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lorafast.load_adapter(make(), tmp_path / "theirs").eval()
    assert type(ours.stem) is LoRAConv2d
    assert (type(ours.wave), type(ours.voxels)) == (LoRAConv1d, LoRAConv3d)
    torch.testing.assert_close(ours(x), expected)
    lorafast.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(x), expected)


def test_merging_gives_plain_convolutions_back(make, x, targets, use_dora):
    names = [name for name in targets if name != "grouped"]
    model = draw(lorafast.adapt(make(), 4, names, use_dora=use_dora, dropout=0.3)).eval()
    model.stem.to(memory_format=torch.channels_last)
    expected = model(x)
    model.stem.merge()
    assert model.stem._merged_weight.stride() == model.stem.weight.stride()
    torch.testing.assert_close(model(x), expected)
    model.stem.unmerge()
    merged = lorafast.merge(copy.deepcopy(model))
    assert {type(getattr(merged, n)) for n in CONVOLUTIONS} == {nn.Conv1d, nn.Conv2d, nn.Conv3d}
    assert merged.down.padding == "valid"
    torch.testing.assert_close(merged(x), expected)


def test_what_is_adapted_and_trained(make, targets, use_dora):
    model = lorafast.adapt(make(), 2, targets, use_dora=use_dora, dropout=0.25)
    kinds = ["lora_A", "lora_B", *(["lora_magnitude"] if use_dora else [])]
    assert trained(model) == {f"{name}.{kind}" for name in targets for kind in kinds}
    assert isinstance(model.head, LoRALinear)
    assert model.point.dropout == 0.25
    rows = {row.name: row for row in lorafast.summary(model).layers}
    assert rows["stem"].parameters == 2 * 4 * 9 + 8 * 2 + (8 if use_dora else 0)
    (choice,) = lorafast.explain(model).layers["stem"]
    assert choice.operation == "lora_conv"
    lorafast.warm_up(model, [2])
    assert model.load_state_dict(make().state_dict()) == ([], [])


def test_all_linear_leaves_them_out(make):
    with pytest.warns(UserWarning, match="adapted where targets name them"):
        model = lorafast.adapt(make(), 2)
    assert not any(isinstance(module, LoRAConv) for module in model.modules())


def test_a_checkpoint_and_a_copy(make, x, targets, use_dora):
    model = draw(lorafast.adapt(make(), 4, targets, use_dora=use_dora)).eval()
    other = lorafast.adapt(make(), 4, targets, use_dora=use_dora).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_module_of_its_own():
    layer = LoRAConv2d(4, 6, 3, 2, stride=2, padding=1, groups=2, alpha=4, dropout=0.1)
    assert layer.scaling == 2
    assert repr(layer) == (
        "LoRAConv2d(4, 6, kernel_size=(3, 3), r=2, alpha=4, stride=(2, 2), padding=(1, 1), groups=2, "
        "dropout=0.1, bias=True)"
    )
    assert {name: list(t.shape) for name, t in layer.state_dict().items()} == {
        "weight": [6, 2, 3, 3],
        "bias": [6],
        "lora_A": [2, 4, 3, 3],
        "lora_B": [6, 1, 1, 1],
    }
    x = torch.randn(2, 4, 7, 7)
    plain = nn.Conv2d(4, 6, 3, 2, 1, groups=2)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("kind", STOCK, ids=lambda kind: kind.__name__)
def test_from_conv_shares_its_parameters(kind):
    plain = STOCK[kind](2, 4, 3)
    weight = plain.weight
    layer = LoRAConv.from_conv(plain, 2)
    assert type(layer) is kind
    assert layer.weight is weight
    assert not weight.requires_grad


class Own(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


@pytest.mark.parametrize(
    ("plain", "options", "error", "sentence"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), {}, ValueError, "a multiple of the groups of Conv2d"),
        (nn.Conv2d(4, 4, 3, groups=2), {"use_dora": True}, ValueError, "is True, expected False for"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), {}, TypeError, "mode is 'circular'"),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2), {}, TypeError, r"\(2, 2\) over a kernel"),
        (nn.Conv2d(4, 4, 3, stride=4, dilation=2), {}, TypeError, r"\(2, 2\) over a kernel"),
        (nn.Conv2d(4, 4, (3, 1), dilation=(2, 1)), {}, TypeError, r"\(2, 1\) over a kernel of \(3, 1"),
        (Own(4, 4, 3), {}, TypeError, "Own convolves in its own way"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), {}, TypeError, "parametrization"),
        (nn.LazyConv2d(4, 3), {}, TypeError, "whose shape is not known yet"),
        (nn.ConvTranspose2d(4, 4, 3), {}, ValueError, "expected an nn.Linear or nn.Embedding or"),
    ],
    ids=["groups", "DoRA", "padding_mode", "dilation", "strided", "one axis", "forward", "parametrized",
         "lazy", "transposed"],
)  # fmt: skip
def test_refusals_leave_the_model(plain, options, error, sentence):
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "conv": copy.deepcopy(plain)})
    before = {name: type(module) for name, module in model.named_modules()}
    needs = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=sentence):
        lorafast.adapt(model, 2, ["first", "conv"], **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == needs


def test_what_needs_no_padding_may_have_any_mode():
    layer = LoRAConv.from_conv(nn.Conv2d(4, 4, 1, padding_mode="reflect"), 2)
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(layer(x), layer.to_plain()(x))


def test_a_dilation_that_reaches_nothing_is_that_of_PEFT(tmp_path):
    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 4, (1, 3), padding="same", dilation=(2, 1)))

    theirs = draw(peft.get_peft_model(make(), config(["0"])))
    theirs.save_pretrained(tmp_path)
    ours = lorafast.load_adapter(make(), tmp_path)
    x = torch.randn(1, 4, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    lorafast.merge(ours)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_file_over_a_dilation_that_PEFT_lacks_is_refused(tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(6, 8, 3, stride=4, dilation=2))

    theirs = peft.get_peft_model(make(), config(["0"]))
    assert theirs(torch.randn(1, 6, 10, 10)).shape == (1, 8, 2, 2)  # PEFT's A, undilated
    theirs.save_pretrained(tmp_path)
    with pytest.raises((TypeError, ValueError), match=r"its dilation is \(2, 2\)"):
        lorafast.load_adapter(make(), tmp_path)


def test_a_class_wraps_convolutions_of_its_dimensions():
    with pytest.raises(TypeError, match=r"it is a Conv1d, expected an nn\.Conv2d for a LoRAConv2d"):
        LoRAConv2d.from_conv(nn.Conv1d(2, 4, 3), 2)


def test_explain_names_the_operations_of_backends(make):
    (choice,) = lorafast.explain(lorafast.adapt(make(), 2, ["point"])).layers["point"]
    assert "lora_linear" in choice.reason
    assert "expand_backward" in choice.reason


def test_a_convolution_in_groups_is_not_merged(make, x):
    model = draw(lorafast.adapt(make(), 4, ["stem", "grouped"])).eval()
    expected = model(x)
    with pytest.raises(ValueError, match=r"grouped can't be merged: .* in 2 groups"):
        lorafast.merge(model)
    assert torch.equal(model(x), expected)
    assert model.grouped.delta_weight().shape == (8, 8, 3, 3)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_a_training_step_is_PEFT_s(make, x, targets, use_dora):
    ours = draw(lorafast.adapt(make(), 4, targets, alpha=6, use_dora=use_dora))
    theirs = peft.get_peft_model(make(), config(targets, use_dora=use_dora))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                layer, _, kind = name.removeprefix("base_model.model.").partition(".")
                kind = kind.partition(".")[0].replace("lora_magnitude_vector", "lora_magnitude")
                p.copy_(getattr(getattr(ours, layer), kind))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    checked = 0
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            layer, _, kind = name.removeprefix("base_model.model.").partition(".")
            kind = kind.partition(".")[0].replace("lora_magnitude_vector", "lora_magnitude")
            torch.testing.assert_close(getattr(getattr(ours, layer), kind).grad, p.grad, msg=name)
            checked += 1
    assert checked == len(targets) * (3 if use_dora else 2)


WINDOWS = {
    "1d": (nn.Conv1d(4, 6, 3, 2, 1), {}),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), {}),
    "odd same": (nn.Conv2d(4, 6, (2, 4), padding="same"), {}),
    "valid": (nn.Conv2d(4, 6, (1, 3), padding="valid", dilation=(2, 1)), {}),
    "3d": (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 0)), {}),
    "DoRA": (nn.Conv2d(4, 6, (2, 3), padding="same"), {"use_dora": True}),
    "DoRA 1d": (nn.Conv1d(4, 6, 3, 2, 1), {"use_dora": True}),
}


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_and_its_gradients(windows):
    plain, options = WINDOWS[windows]
    layer = draw(LoRAConv.from_conv(copy.deepcopy(plain).double(), 2, **options))
    script = torch.jit.script(layer)
    batch = torch.randn(2, 4, *(5,) * (plain.weight.dim() - 2), dtype=torch.float64)
    torch.testing.assert_close(script(batch[0]), layer(batch[0]))
    found = []
    for one in (script, layer):
        x = batch.clone().requires_grad_()
        layer.zero_grad()
        y = one(x)
        y.square().sum().backward()
        found.append({name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad, "y": y})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, msg=name)
    layer.dropout = 0.5
    assert not torch.equal(torch.jit.script(layer.train())(batch), layer.eval()(batch))
    layer.half()
    half = batch.half()
    exact = copy.deepcopy(layer).double()(half.double())
    as_exact = contract.bounds({"y": layer(half)}, {"y": exact}, dtype=torch.float16)
    assert contract.why_any_broken({"y": torch.jit.script(layer)(half)}, as_exact) is None
