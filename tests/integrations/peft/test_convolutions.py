"""PEFT's convolutions, accelerated: the same numbers, gradients by name, and what is left to PEFT."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from helpers import covering
from peft import LoraConfig, get_peft_model
from peft_twins import Twins, assert_equal, assert_near, hooked, twins
from torch import nn

import lorafast
from lorafast.reference.dropout import dropout as masked

LAYERS = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (3, 6, 11)),
    "2d": (lambda: nn.Conv2d(6, 8, 3, padding="same"), (3, 6, 7, 5)),
    "2d, no bias": (lambda: nn.Conv2d(6, 8, (3, 2), 2, padding=(1, 0), bias=False), (3, 6, 7, 5)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1, dilation=3), (3, 6, 7, 5)),
    "one axis": (lambda: nn.Conv2d(6, 8, (1, 3), padding="same", dilation=(2, 1)), (3, 6, 7, 5)),
    "groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (3, 6, 7, 5)),
    "3d": (lambda: nn.Conv3d(3, 4, (1, 3, 2)), (2, 3, 2, 5, 4)),
}
DTYPES = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")


class SameMask(nn.Dropout):
    """A dropout with the mask that ``lora_conv`` draws from the same state of the generator."""

    def forward(self, x):
        if not self.training:
            return x
        seed = torch.randint(2**63 - 1, (1,))
        last = x.movedim(1, -1)
        rows = masked(last.reshape(-1, x.shape[1]), self.p, seed)
        return rows.view(last.shape).movedim(-1, 1)


def peft_model(case, dtype=torch.float32, *, adapters=1, **options):
    """One convolution, with ``adapters`` active ones."""
    torch.manual_seed(1)

    def config(r):
        settings = {"lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False} | options
        return LoraConfig(r=r, **settings)

    network = nn.Sequential(LAYERS[case][0]()).to(dtype)
    model = get_peft_model(network, config(4), autocast_adapter_dtype=False)
    names = ["default"]
    for i in range(1, adapters):
        names.append(f"other{i}")
        model.add_adapter(names[-1], config(4 + i), autocast_adapter_dtype=False)
    if adapters > 1:
        model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    return model.to(dtype)


def drawn(case, dtype=torch.float32, last=False):
    x = torch.randn(LAYERS[case][1]).to(dtype)
    dy = torch.randn(LAYERS[case][0]().to(dtype)(x).shape, dtype=torch.float64)
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    return x, dy


OPTIONS = {
    "plain": {},
    "lora_bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "two": {"adapters": 2},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize(
    ("case", "options", "dtype", "last"),
    [
        pytest.param(case, OPTIONS[name], dtype, last, id=f"{case}-{name}-{dtype}-{last}")
        for case, name, dtype, last in covering(
            list(LAYERS), list(OPTIONS), DTYPES, (False, True)
        )
        if not (case == "groups" and name in ("two", "dora"))
    ],
)  # fmt: skip
def test_the_same_numbers_and_gradients(served_by_peft, case, options, dtype, last):
    pair = twins(peft_model(case, dtype, **options))
    x, dy = drawn(case, dtype, last)
    assert list(lorafast.explain(pair.fast).layers.values()) == [None]
    assert_equal(pair, x, dy, dtype)
    assert not served_by_peft


@pytest.mark.parametrize(("case", "dtype"), [("2d", torch.float32), ("1d", torch.bfloat16)])
@pytest.mark.parametrize(
    "order", [("default", "other", "dora"), ("dora", "default", "last")], ids=str
)
def test_dora_together_with_others(served_by_peft, case, dtype, order):
    model = peft_model(case, dtype)
    for name in set(order) - {"default"}:
        settings = copy.copy(model.peft_config["default"])
        settings.use_dora = name != "other"
        model.add_adapter(name, settings, autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(order))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    pair = twins(model.to(dtype))
    assert list(lorafast.explain(pair.fast).layers.values()) == [None]
    assert_equal(pair, *drawn(case, dtype), dtype)
    assert not served_by_peft


@pytest.mark.parametrize(
    ("case", "dtype", "last", "lora_bias"),
    covering(list(LAYERS), DTYPES, (False, True), (False, True)),
)
def test_a_mixed_batch(served_by_peft, case, dtype, last, lora_bias):
    options = {"lora_bias": lora_bias, "lora_dropout": 0.3}
    groups = case == "groups"
    model = peft_model(case, dtype, adapters=1 if groups else 3, **options)
    if groups:  # of a rank that they divide
        settings = copy.copy(model.peft_config["default"])
        settings.r = 6
        model.add_adapter("other1", settings, autocast_adapter_dtype=False)
    pair = twins(model.to(dtype).eval())
    x, _ = drawn(case, dtype, last)
    x = torch.cat([x, x.flip(0), x[:1]])
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    names = ["default", "other1", "__base__", "other1", "default", "other1", "__base__"][: len(x)]
    y = pair.fast(x, adapter_names=names)
    assert_equal(pair, x, torch.randn(y.shape), dtype, adapter_names=names)
    assert not served_by_peft


def test_what_one_element_holds_stays_with_its_adapter(served_by_peft):
    pair = twins(peft_model("2d", adapters=2).eval())
    x, dy = drawn("2d")
    x[0] = torch.inf
    found = []
    for model in vars(pair).values():
        model.zero_grad()
        y = model(
            x.to(next(model.parameters()).dtype), adapter_names=["other1", "default", "__base__"]
        )
        y[1:].backward(dy[1:].to(y.dtype))
        gradients = {n: p.grad for n, p in model.named_parameters() if "default" in n}
        found.append({"y": y.detach()} | gradients)
    stock, fast, exact = found
    assert all(value.isfinite().all() for name, value in exact.items() if name != "y")
    assert_near(fast, stock, exact, torch.float32)
    assert not served_by_peft


@pytest.mark.parametrize(
    ("case", "options"),
    [("2d", {}), ("pointwise", {}), ("2d, no bias", {"lora_bias": True})],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_over_16_bits(served_by_peft, case, options, dtype):
    model = peft_model(case, **options)
    model.base_model.model[0].base_layer.to(dtype)
    x, dy = drawn(case, dtype, last=True)
    assert_equal(twins(model), x, dy, dtype)
    assert not served_by_peft


def test_the_gradient_of_lora_bias_that_float16_has_not(served_by_peft):
    model = peft_model("2d", lora_bias=True)
    model.base_model.model[0].base_layer.half()
    x, dy = drawn("2d", torch.float16)
    assert_equal(twins(model), x, dy.abs() * 1e4, torch.float16)
    assert not served_by_peft


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("case", ["2d", "pointwise"])
def test_dropout(served_by_peft, case, use_dora):
    model = peft_model(case, lora_dropout=0.4, use_dora=use_dora)
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = SameMask(0.4)
    x, dy = drawn(case)
    assert_equal(Twins(model, fast, copy.deepcopy(model).double()), x, dy, torch.float32)
    pair = Twins(model.eval(), fast.eval(), copy.deepcopy(model).double().eval())
    assert_equal(pair, x, dy, torch.float32)
    assert not served_by_peft


def own_windows(layer):
    layer.lora_A["default"].stride = (2, 2)


LEFT = {
    "padding_mode": (
        "its padding_mode is 'circular'",
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        None,
    ),
    "dilation": ("its dilation is", lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2), None),
    "strided dilation": (
        "its dilation is",
        lambda: nn.Conv2d(6, 8, (3, 1), stride=5, dilation=(2, 1)),
        None,
    ),
    "hooks": ("has hooks", None, lambda layer: hooked(layer.base_layer)),
    "hooks of A": ("'default' has hooks", None, lambda layer: hooked(layer.lora_A["default"])),
    "disabled": ("are disabled", None, lambda layer: layer.enable_adapters(False)),
    "merged": ("are merged", None, lambda layer: layer.merge()),
    "scaling": (
        "a scaling of the shape [1]",
        None,
        lambda layer: layer.scaling.update(default=torch.ones(1)),
    ),
    "class": (
        "not exactly an nn.Conv1d",
        None,
        lambda layer: setattr(
            layer.base_layer, "__class__", type("OwnConv", (nn.Conv2d,), {})
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_PEFT(monkeypatch, served_by_peft, case):
    reason, make, change = LEFT[case]
    if make is not None:
        monkeypatch.setitem(LAYERS, "2d", (make, LAYERS["2d"][1]))
    model = peft_model("2d")
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    for one in (model, fast):
        if change is not None:
            change(one.base_model.model[0])
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    x, _ = drawn("2d")
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
    assert len(served_by_peft) == 1


def test_shapes_and_dtypes_that_are_left_to_PEFT(served_by_peft):
    model = lorafast.accelerate(peft_model("2d"), quiet=True)
    x, _ = drawn("2d")
    served = model(x)
    torch.testing.assert_close(model(x[0]), served[0])  # without a batch
    assert len(served_by_peft) == 1
    with pytest.raises(RuntimeError):
        model(x.double())
    assert len(served_by_peft) == 2


def test_restored_compiled_and_under_autocast(served_by_peft):
    model = peft_model("2d")
    x, _ = drawn("2d")
    expected = model(x)
    lorafast.accelerate(model, quiet=True)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype is torch.bfloat16
    assert not served_by_peft
    lorafast.restore(model)
    assert type(model.base_model.model[0]).__module__.startswith("peft")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
