"""LoRA's relatives over convolutions against PEFT: outputs, gradients by name, what is left to it."""

import copy

import pytest
import torch

pytest.importorskip("peft")

import peft
from helpers import covering
from peft_twins import assert_equal, assert_near, relative_of_lora, run, twins
from torch import nn

import lorafast
from lorafast.integrations.peft import family, layers

LAYERS = {
    "1d": (lambda: nn.Conv1d(12, 18, 3, stride=2, padding=1), (3, 12, 11)),
    "2d": (lambda: nn.Conv2d(12, 18, 3, padding=1), (3, 12, 7, 5)),
    "2d, groups": (lambda: nn.Conv2d(12, 18, 3, padding=1, groups=2), (3, 12, 7, 5)),
    "2d, dilated": (lambda: nn.Conv2d(12, 18, (3, 2), padding="same", dilation=2), (3, 12, 7, 5)),
    "pointwise": (lambda: nn.Conv2d(12, 18, 1, stride=2, bias=False), (3, 12, 7, 5)),
}
_OF_LOKR = {"alpha": 3, "decompose_factor": 3}
KINDS = {
    "AdaLoRA": lambda **o: peft.AdaLoraConfig(init_r=6, lora_alpha=3, total_step=20, **o),
    "LoHa": lambda **o: peft.LoHaConfig(r=2, alpha=3, **o),
    "LoHa, kernels apart": lambda **o: peft.LoHaConfig(
        r=2, alpha=3, use_effective_conv2d=True, **o
    ),
    "LoKr": lambda **o: peft.LoKrConfig(r=8, **_OF_LOKR, **o),
    "LoKr, w2 of rank r": lambda **o: peft.LoKrConfig(r=2, **_OF_LOKR, **o),
    "LoKr, kernels apart": lambda **o: peft.LoKrConfig(
        r=1, use_effective_conv2d=True, decompose_both=True, **_OF_LOKR, **o
    ),
    "OFT": lambda **o: peft.OFTConfig(r=0, oft_block_size=6, **o),
    "BOFT": lambda **o: peft.BOFTConfig(boft_block_size=6, **o),
}
OF_2D = {"AdaLoRA": ("2d", "2d, dilated", "pointwise"), "BOFT": ("2d", "pointwise")}
OF_2D["OFT"] = ("pointwise",)
OF_2D["LoKr, kernels apart"] = ("2d", "2d, groups", "2d, dilated")  # PEFT's own fails of 1d
OF_FLOAT32 = ("LoKr", "LoKr, w2 of rank r", "LoKr, kernels apart", "LoHa, kernels apart")
CASES = [(kind, case) for kind in KINDS for case in OF_2D.get(kind, LAYERS)]
DTYPES = {
    "fp32": (torch.float32, False),
    "bf16, fp32 adapters": (torch.bfloat16, True),
    "fp16, fp32 adapters": (torch.float16, True),
}


def made(kind, case, dtype=torch.float32, *, upcast=False, adapters=1, **options):
    """A model of one convolution whose adapters are drawn, not what they begin as."""
    torch.manual_seed(0)
    network = nn.Sequential(LAYERS[case][0]()).to(dtype)
    settings = KINDS[kind](target_modules=["0"], **options)
    model = relative_of_lora(network, settings, autocast_adapter_dtype=upcast)
    names = ["default"]
    for i in range(1, adapters):
        names.append(f"other{i}")
        more = {"inference_mode": True} if kind == "AdaLoRA" else {}  # it trains one alone
        settings = KINDS[kind](target_modules=["0"], **options, **more)
        model.add_adapter(names[-1], settings, autocast_adapter_dtype=upcast)
    if adapters > 1:
        model.base_model.set_adapter(names)
    for name, tensor in model.named_parameters():
        if "ranknum" in name:
            tensor.requires_grad = False  # as PEFT means it
        elif "base_layer" not in name:
            nn.init.normal_(tensor, 0.0, 0.5)
            tensor.requires_grad = True
    return model


@pytest.fixture
def never_stock(monkeypatch):
    """PEFT's own forward must not be what made a fast model right."""
    for fast in list(layers.FAST.values()):
        if issubclass(fast, layers.FastKind):

            def refuse(self, *args, _forward=fast._stock.forward, **kwargs):
                assert type(self) not in layers.FAST.values(), "served by PEFT"
                return _forward(self, *args, **kwargs)

            monkeypatch.setattr(fast._stock, "forward", refuse)


def drawn(case, dtype, last=False):
    layer, shape = LAYERS[case]
    x = torch.randn(shape)
    dy = torch.randn(layer()(x).shape)
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    return x.to(dtype), dy


@pytest.mark.parametrize(
    ("what", "dtype", "adapters", "last"),
    [
        pytest.param((kind, case), *rest, id="-".join(map(str, (kind, case, *rest))))
        for (kind, case), *rest in covering(CASES, list(DTYPES), (1, 2), (False, True))
        if rest[0] == "fp32" or not (kind in OF_FLOAT32 or (kind, case) == ("LoHa", "2d, groups"))
    ],
)
def test_outputs_and_gradients(never_stock, what, dtype, adapters, last):
    dtype, upcast = DTYPES[dtype]
    pair = twins(made(*what, dtype, upcast=upcast, adapters=adapters))
    assert set(lorafast.explain(pair.fast).layers.values()) == {None}
    assert_equal(pair, *drawn(what[1], dtype, last), dtype)


OF_AUTOCAST = [("AdaLoRA", "2d"), ("LoHa", "1d"), ("OFT", "pointwise"), ("BOFT", "2d")]


@pytest.mark.parametrize("what", OF_AUTOCAST, ids=str)
def test_under_autocast_and_without_gradients(never_stock, what):
    pair = twins(made(*what))
    x, dy = drawn(what[1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(pair, x, dy, torch.bfloat16)
    with torch.no_grad():
        assert_equal(pair, x, dy, torch.float32)


@pytest.mark.parametrize("what", OF_AUTOCAST, ids=str)
def test_a_base_layer_that_asks_for_gradients(never_stock, what):
    """It gets one where PEFT gives it one."""
    pair = twins(made(*what))
    x, dy = drawn(what[1], torch.float32)
    for model in (pair.stock, pair.fast):
        model.get_submodule("base_model.model.0").base_layer.weight.requires_grad_(True)
    stock, fast = run(pair.stock, x, dy).gradients, run(pair.fast, x, dy).gradients
    assert fast.keys() == stock.keys()


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_dropout_of_ranks_and_modules_is_drawn_as_by_peft(never_stock, kind):
    more = {"rank_dropout_scale": True} if kind == "LoKr" else {}
    model = made(kind, "2d", rank_dropout=0.3, module_dropout=0.4, adapters=2, **more)
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    exact = copy.deepcopy(model).double()
    x, _ = drawn("2d", torch.float32)
    for seed in range(3):
        found, states = [], []
        for one, input in ((fast, x), (model, x), (exact, x.double())):
            torch.manual_seed(seed)
            found.append({"y": one(input)})
            states.append(torch.get_rng_state())
        assert_near(*found, torch.float32)
        assert all(torch.equal(state, states[0]) for state in states)


LEFT = {
    "windows that overlap": ("OFT", nn.Conv2d(12, 18, 3), "which overlap"),
    "groups": ("LoHa", nn.Conv2d(12, 18, 3, groups=2).bfloat16(), "in groups"),
    "16 bits": ("LoKr", nn.Conv2d(12, 18, 3).bfloat16(), "its weight is not float32"),
    "padding": ("LoHa", nn.Conv2d(12, 18, 3, padding=1, padding_mode="reflect"), "'reflect'"),
    "strides": ("BOFT", nn.Conv2d(12, 18, 3, stride=(1, 2)), "takes for square"),
    "a high rank": ("LoHa", nn.Conv2d(4, 4, 3).bfloat16(), "takes as long as ΔW itself"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_to_peft(what):
    kind, layer, reason = LEFT[what]
    stock = relative_of_lora(nn.Sequential(layer), KINDS[kind](target_modules=["0"]))
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    assert type(fast.base_model.model[0]).__module__ == family.family_conv.__name__
    (found,) = lorafast.explain(fast).layers.values()
    assert reason in found
    x = torch.randn(2, layer.in_channels, 6, 5).to(layer.weight.dtype)
    assert torch.equal(fast(x), stock(x))
