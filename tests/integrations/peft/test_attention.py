"""PEFT's attention, accelerated: the same numbers, gradients by name, and what is left to PEFT."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from helpers import covering
from peft import LoraConfig, get_peft_model
from peft_twins import assert_near, hooked
from torch import nn

import lorafast
from lorafast.integrations.peft.attention import _seen

E, N, L, S = 12, 3, 5, 4
DTYPES = (torch.float32, torch.bfloat16)


class Net(nn.Module):
    """One attention, called with arguments of its own."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, 2, **options)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def peft_model(dtype=torch.float32, *, adapters=1, attention=None, seed=1, **options):
    torch.manual_seed(seed)
    settings = {"lora_alpha": 6, "target_modules": ["attn"], "init_lora_weights": False} | options
    network = Net(**attention or {}).to(dtype)
    model = get_peft_model(network, LoraConfig(r=4, **settings), autocast_adapter_dtype=False)
    names = ["default"]
    for i in range(1, adapters):
        names.append(f"other{i}")
        model.add_adapter(names[-1], LoraConfig(r=3, **settings), autocast_adapter_dtype=False)
    if adapters > 1:
        model.base_model.set_adapter(names)
    return model.to(dtype)


def attn(model):
    return model.base_model.model.attn


def accelerated(model):
    return lorafast.accelerate(copy.deepcopy(model), quiet=True)


def call(model, kind, dtype, arguments, seed=0):
    """Outputs, and the gradients of the inputs and of the adapters, by name."""
    torch.manual_seed(2)
    first, *others = (
        torch.randn(length, N, E, dtype=torch.float64).to(dtype).requires_grad_()
        for length in (L, S, S)
    )
    inputs = {"self": [first] * 3, "kv": [first, others[0], others[0]], "three": [first, *others]}[
        kind
    ]
    model.zero_grad()
    torch.manual_seed(seed)
    y, weights = model(*inputs, **arguments)
    found = {"y": y} if weights is None else {"y": y, "weights": weights}
    torch.manual_seed(3)
    loss = sum((one * torch.randn(one.shape).to(one.dtype)).sum() for one in found.values())
    loss.backward()
    found = {name: one.detach() for name, one in found.items()}
    found |= {f"d{i}": one.grad for i, one in enumerate(dict.fromkeys(inputs))}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def mask(length):
    return torch.ones(L, length, dtype=torch.bool).triu(1)


ARGUMENTS = {
    "weights": lambda length: {},
    "output": lambda length: {"need_weights": False},
    "causal": lambda length: {
        "need_weights": False, "attn_mask": mask(length), "is_causal": True
    },
    "padding": lambda length: {
        "key_padding_mask": torch.tensor([[False] * (length - 1) + [True]] * N),
        "average_attn_weights": False,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype", "named", "options", "attention"),
    covering(
        ["self", "kv", "three"],
        DTYPES,
        list(ARGUMENTS),
        [{}, {"use_rslora": True}],
        [{}, {"bias": False, "add_bias_kv": True}, {"add_zero_attn": True}],
    ),
    ids=str,
)
def test_the_same_numbers_and_gradients(served_by_peft, kind, dtype, named, options, attention):
    arguments = ARGUMENTS[named](L if kind == "self" else S)
    found = [], [], []
    for seed in range(6):  # the error of one is luck
        stock = peft_model(dtype, attention=attention, seed=seed, **options)
        fast, exact = accelerated(stock), copy.deepcopy(stock).double()
        assert list(lorafast.explain(fast).layers.values()) == [None]
        for results, model in zip(found, (fast, stock, exact), strict=True):
            wide = torch.float64 if model is exact else dtype
            results.append(call(model, kind, wide, arguments))
    for results in found:
        assert results[0].keys() >= {"y", "d0"}
        assert sum("lora_" in name for name in results[0]) == 4
    assert_near(*({n: torch.stack([one[n] for one in r]) for n in r[0]} for r in found), dtype)
    assert not served_by_peft


def test_dropout_is_ignored_as_PEFT_does_and_that_of_attention_is_the_same(served_by_peft):
    stock = peft_model(lora_dropout=0.5, attention={"dropout": 0.3})
    fast = accelerated(stock)
    exact = copy.deepcopy(stock).double()
    results = [
        call(model, "self", torch.float64 if model is exact else torch.float32, {})
        for model in (fast, stock, exact)
    ]
    assert_near(*({n: one for n, one in r.items() if n == "y"} for r in results), torch.float32)
    assert not served_by_peft
    for model in (fast, stock):
        model.eval()
    x = torch.randn(L, N, E)
    torch.testing.assert_close(fast(x, x, x), stock(x, x, x))


def test_float32_adapters_over_bfloat16_and_autocast(served_by_peft):
    stock = peft_model()
    exact, half = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    base = attn(half).base_layer
    for p in (base.in_proj_weight, base.in_proj_bias, *base.out_proj.base_layer.parameters()):
        p.data = p.data.bfloat16()
    x = torch.randn(L, N, E).bfloat16()
    expected = exact(*[x.double()] * 3)[0]
    fast = accelerated(half)(x, x, x)[0]
    assert_near({"y": fast}, {"y": half(x, x, x)[0]}, {"y": expected}, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        fast, theirs = (m(*[x.float()] * 3)[0] for m in (accelerated(stock), stock))
    assert fast.dtype is torch.float32
    assert_near({"y": fast}, {"y": theirs}, {"y": expected}, torch.bfloat16)
    assert not served_by_peft


LEFT = {
    "disabled": ("are disabled", {}, lambda layer: layer.enable_adapters(False)),
    "merged": ("are merged", {}, lambda layer: layer.merge()),
    "two": ("several adapters are active", {"adapters": 2}, None),
    "bias": ("has a bias of B", {"lora_bias": True}, None),
    "hooks": ("has hooks", {}, lambda layer: hooked(layer.lora_A["default"])),
    "out_proj": (
        "its out_proj is no lora.Linear, or one that is disabled or merged",
        {},
        lambda layer: layer.base_layer.out_proj.enable_adapters(False),
    ),
    "trained": (
        "its weights are trained",
        {},
        lambda layer: layer.base_layer.out_proj.base_layer.requires_grad_(),
    ),
    "class": (
        "not exactly an nn.MultiheadAttention",
        {},
        lambda layer: setattr(
            layer.base_layer, "__class__", type("Own", (nn.MultiheadAttention,), {})
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_PEFT(served_by_peft, case):
    reason, options, change = LEFT[case]
    stock = peft_model(**options)
    fast = accelerated(stock)
    for model in (stock, fast):
        if change is not None:
            change(attn(model))
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    x = torch.randn(L, N, E)
    theirs, found = stock(x, x, x), fast(x, x, x)
    assert torch.equal(found[0], theirs[0])
    assert served_by_peft


@pytest.mark.parametrize("case", ["shape", "dtype", "surplus", "nested mask"])
def test_calls_that_are_left_to_PEFT_raise_what_it_raises(served_by_peft, case):
    model = accelerated(peft_model())
    x = torch.randn(L, N, E)
    calls = {
        "shape": lambda: model(x[..., 1:], x, x),
        "dtype": lambda: model(x.double(), x, x),
        "surplus": lambda: model(x, x, x, own=1),
        "nested mask": lambda: model(x, x, x, attn_mask=torch.zeros(3, 3)),
    }
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        calls[case]()
    assert len(served_by_peft) == 1


def test_life(served_by_peft, tmp_path):
    stock = peft_model(attention={"batch_first": True})
    x = torch.randn(N, L, E)
    expected = stock(x, x, x)[0]
    fast = lorafast.accelerate(stock, quiet=True)
    torch.testing.assert_close(copy.deepcopy(fast)(x, x, x)[0], expected)
    whole = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x, x, x)[0], expected)
    with fast.disable_adapter():
        plain = fast(x, x, x)[0]
    assert not torch.allclose(plain, expected)
    assert len(served_by_peft) == 1
    torch.testing.assert_close(fast(query=x, key=x, value=x)[0], expected)
    assert len(served_by_peft) == 1
    lorafast.restore(fast)
    assert type(attn(fast)).__module__.startswith("peft")
    assert torch.equal(fast(x, x, x)[0], expected)
    with lorafast.accelerated():
        made = peft_model()
    assert type(attn(made)).__module__.startswith("lorafast")
    attn(made).merge()
    merged = made.merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "encoder"])
def test_pytorchs_encoders_call_it(stacked):
    model = nn.TransformerEncoderLayer(E, 2, 7, dropout=0.0, batch_first=True)
    if stacked:
        model = nn.TransformerEncoder(model, 2)
    settings = {"target_modules": ["self_attn"], "init_lora_weights": False}
    torch.manual_seed(1)
    model = accelerated(get_peft_model(model, LoraConfig(r=2, **settings)))
    x = torch.randn(2, L, E)
    padding = torch.tensor([[False] * L, [False] * (L - 2) + [True] * 2])
    expected = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        found = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_padding_in_eval_with_gradients(served_by_peft):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 7, batch_first=True), 2)
    settings = {"target_modules": ["self_attn"], "init_lora_weights": False}
    torch.manual_seed(1)
    model = accelerated(get_peft_model(model, LoraConfig(r=2, **settings)).eval())
    x = torch.randn(3, L, E)
    padding = torch.arange(L) >= torch.tensor([[L], [L - 2], [0]])
    found = []
    for nested in (True, False):
        model.base_model.model.use_nested_tensor = nested
        y = model(x, src_key_padding_mask=padding)[~padding]
        model.zero_grad()
        (y * torch.arange(E)).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"y": y} | grads)
    assert len(found[0]) == 1 + 2 * 4
    torch.testing.assert_close(*found)
    merged = model.merge_and_unload()(x, src_key_padding_mask=padding)[~padding]
    torch.testing.assert_close(found[0]["y"], merged)
    assert not served_by_peft


def test_a_share_of_the_gradient_and_the_same_values():
    values = torch.tensor([6e-8, 1.8e-7, 3e-7, 6.02e-6, -0.3, 65504], dtype=torch.float16)
    parameter = values.clone().requires_grad_()
    seen = _seen(parameter, 0.5)
    assert torch.equal(seen, values)
    seen.sum().backward()
    assert torch.equal(parameter.grad, torch.full_like(values, 0.5))
