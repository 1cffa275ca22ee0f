"""Every way that is served fast, against stock PEFT: outputs, every gradient by name, saved files."""

import pytest
import torch

pytest.importorskip("peft")

from helpers import covering
from peft.tuners.lora.layer import Embedding, Linear
from peft_twins import TOKENS, K, N, assert_equal, peft_model, twins

import lorafast
from lorafast.reference import contract

DTYPES = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "bf16, fp32 adapters": (torch.bfloat16, True),
    "fp16, fp32 adapters": (torch.float16, True),
}
# Kind of base layer, whether it has a bias, whether B has. Conv1D always has one.
LAYERS = {
    "Linear, no bias": ("linear", False, False),
    "Linear": ("linear", True, False),
    "Linear, lora_bias": ("linear", True, True),
    "Conv1D": ("conv1d", True, False),
    "Conv1D, lora_bias": ("conv1d", True, True),
}


@pytest.fixture(autouse=True)
def never_stock(request, monkeypatch):
    """PEFT's own forward must not be what made a fast model right."""

    def refuse(self, *_, **__):
        if type(self).__module__.startswith("lorafast"):
            raise AssertionError("served by PEFT")
        return stock[type(self).__name__](self, *_, **__)

    stock = {"Linear": Linear.forward, "Embedding": Embedding.forward}
    for cls in (Linear, Embedding):
        monkeypatch.setattr(cls, "forward", refuse)


def rows(dtype, *leading, size=K):
    return torch.randn(*leading, size).to(dtype)


@pytest.mark.parametrize(
    ("layer", "dtype", "dropout", "adapters"),
    covering(list(LAYERS), list(DTYPES), (0.0, 0.4), (1, 2, 3)),
)
def test_linear(layer, dtype, dropout, adapters):
    dtype, upcast = DTYPES[dtype]
    kind, bias, lora_bias = LAYERS[layer]
    model = peft_model(
        kind, dtype, bias=bias, adapters=adapters, upcast=upcast,
        lora_dropout=dropout, lora_bias=lora_bias,
    )  # fmt: skip
    apart = upcast and adapters > 1  # by nn.Dropout, all of them
    pair = twins(model, ["default"] if dropout and not apart else [])
    assert_equal(pair, rows(dtype, 3, 5), rows(dtype, 3, 5, size=N), dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids="dropout {}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layer", [name for name, (*_, lora_bias) in LAYERS.items() if not lora_bias]
)
def test_dora(layer, dtype, dropout):
    dtype, upcast = DTYPES[dtype]
    kind, bias, _ = LAYERS[layer]
    model = peft_model(kind, dtype, bias=bias, upcast=upcast, lora_dropout=dropout, use_dora=True)
    pair = twins(model, ["default"] if dropout else [])
    assert_equal(pair, rows(dtype, 3, 5), rows(dtype, 3, 5, size=N), dtype)


@pytest.mark.parametrize("adapters", [1, 2], ids="{} active".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [None, 3], ids="padding {}".format)
def test_embedding(dtype, adapters, padding):
    dtype, upcast = DTYPES[dtype]
    model = peft_model("embedding", dtype, adapters=adapters, upcast=upcast)
    model.base_model.model.layer.base_layer.padding_idx = padding
    tokens = torch.randint(TOKENS, (3, 9))
    tokens[0, :2] = 3
    assert_equal(twins(model), tokens, rows(dtype, 3, 9, size=N), dtype)
    assert_equal(twins(model), tokens[0], rows(dtype, 9, size=N), dtype)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "dora"])
def test_evaluation(kind):
    """Dropout is for training."""
    options = {"lora_dropout": 0.5} if kind != "embedding" else {}
    if kind == "dora":
        kind, options = "linear", options | {"use_dora": True}
    for dtype, upcast in DTYPES.values():
        pair = twins(peft_model(kind, dtype, upcast=upcast, **options).eval())
        x = torch.randint(TOKENS, (3, 5)) if kind == "embedding" else rows(dtype, 3, 5)
        with torch.no_grad():
            assert_equal(pair, x, rows(dtype, 3, 5, size=N), dtype)


def test_only_the_second_of_two_adapters_drops():
    model = peft_model(adapters=2, lora_dropout=0.4)
    model.base_model.model.layer.lora_dropout["default"].p = 0.0
    dtype = torch.float32
    assert_equal(twins(model), rows(dtype, 3, 5), rows(dtype, 3, 5, size=N), dtype)


def test_many_rows():
    """Beyond what goes through the fewest calls."""
    dtype = torch.float32
    for options in ({}, {"adapters": 2}, {"use_dora": True}):
        x, dy = rows(dtype, 2, 300), rows(dtype, 2, 300, size=N)
        assert_equal(twins(peft_model(**options)), x, dy, dtype)


def test_no_tokens():
    pair = twins(peft_model("embedding"))
    tokens = torch.zeros((2, 0), dtype=torch.int64)
    assert_equal(pair, tokens, rows(torch.float32, 2, 0, size=N), torch.float32)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4)], ids=str)
def test_leading_dimensions(shape):
    model = peft_model()
    dtype = torch.float32
    assert_equal(twins(model), rows(dtype, *shape), rows(dtype, *shape, size=N), dtype)


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/sqrt r"])
@pytest.mark.parametrize("scaling", [0.3, 2, torch.tensor(0.7)], ids=["float", "int", "tensor"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_scaling_of_any_kind(rslora, scaling, dora):
    model = peft_model(use_rslora=rslora, use_dora=dora)
    dtype = torch.float32
    x, dy = rows(dtype, 6), rows(dtype, 6, size=N)
    assert_equal(twins(model), x, dy, dtype)
    model.base_model.model.layer.scaling["default"] = scaling
    assert_equal(twins(model), x, dy, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_whose_scaling_is_a_tensor(dtype):
    """Half precision doesn't round its product with B, of which the norm is made too."""
    dtype, upcast = DTYPES[dtype]
    model = peft_model(dtype=dtype, upcast=upcast, use_dora=True)
    model.base_model.model.layer.scaling["default"] = torch.tensor(0.7)
    assert_equal(twins(model), rows(dtype, 6), rows(dtype, 6, size=N), dtype)


def test_of_a_view_of_other_strides():
    dtype = torch.float32
    x = torch.randn(K, 7).t()
    assert_equal(twins(peft_model()), x, torch.randn(N, 7).t(), dtype)


@pytest.mark.parametrize("trained", ["A", "B", "weight", "bias"])
def test_a_subset_of_gradients(trained):
    model = peft_model()
    parts = {"A": "lora_A", "B": "lora_B", "weight": "base_layer.weight", "bias": "base_layer.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[trained] in name)
    dtype = torch.float32
    assert_equal(twins(model), rows(dtype, 6), rows(dtype, 6, size=N), dtype)


@pytest.mark.parametrize(
    ("kind", "dora"),
    [
        ("linear", False),
        ("linear", True),
        ("conv1d", False),
        ("conv1d", True),
        ("embedding", False),
    ],
)
def test_autocast(kind, dora):
    model = peft_model(kind, use_dora=dora)
    pair = twins(model)
    x = torch.randint(TOKENS, (5,)) if kind == "embedding" else torch.randn(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        stock, fast = pair.stock(x), pair.fast(x)
    assert stock.dtype == fast.dtype
    exact = pair.exact(x if kind == "embedding" else x.double())
    # Rounded to the nearest bfloat16: half of its eps.
    assert contract.why_broken(fast, stock, exact, exact / 2, torch.bfloat16) is None


def test_no_copy_of_x_in_float32_is_kept():
    """Saved for the backward of float32 adapters over a bfloat16 layer: x and s as they are."""
    model = lorafast.accelerate(peft_model(dtype=torch.bfloat16, upcast=True), quiet=True)
    saved = []
    x = rows(torch.bfloat16, 640).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large if t.dtype == torch.float32] == []
    assert {t.data_ptr() for t in large} == {x.data_ptr()}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_saved_files_are_the_same_byte_for_byte(tmp_path, dora):
    pair = twins(peft_model(dtype=torch.bfloat16, upcast=True, use_dora=dora))
    for name in ("stock", "fast"):
        getattr(pair, name).save_pretrained(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "stock").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "fast").iterdir())
    for name in files:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
