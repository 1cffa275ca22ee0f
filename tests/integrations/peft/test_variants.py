"""PEFT's variants of LoRA over linear layers, against PEFT: outputs, gradients, what it keeps."""

import warnings

import peft
import pytest
import torch

pytest.importorskip("peft")

from helpers import covering
from peft_twins import (
    K,
    N,
    assert_equal,
    assert_near,
    config,
    layer_of,
    peft_model,
    run,
    twins,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafast
from lorafast.integrations.peft import known, variants, velora

DTYPES = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "bf16, fp32 adapters": (torch.bfloat16, True),
    "fp16, fp32 adapters": (torch.float16, True),
}
# Over a layer of K = 24 by N = 40 at the rank 4.
OPTIONS = {
    "MiCA": lambda: {"init_lora_weights": "mica"},
    "KaSA": lambda: {"kasa_config": peft.tuners.lora.config.KasaConfig()},
    "BD-LoRA, A": lambda: bd("a"),
    "BD-LoRA, B": lambda: bd("b"),
    "BD-LoRA, neither": lambda: bd("a", match_strict=False, of="another"),
    "MonteCLoRA": lambda: {
        "monteclora_config": peft.tuners.lora.config.MontecloraConfig(
            num_samples=3, sample_scaler=0.3, buffer_size=2
        )
    },
    "VeLoRA": lambda: compressed("batch_average"),
    "VeLoRA, once": lambda: compressed("batch_average_once", num_groups=5, scale=0.7),
    "VeLoRA, random": lambda: compressed("random", num_groups=1),
}
ONE_OF_EACH = ["MiCA", "KaSA", "BD-LoRA, A", "BD-LoRA, B", "MonteCLoRA", "VeLoRA, once"]


def bd(letter, of="layer", **options):
    settings = {f"target_modules_bd_{letter}": [of], "nblocks": 2} | options
    return {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(**settings)}


def compressed(init_type, **options):
    settings = {"num_groups": 6, "init_type": init_type} | options
    return {"velora_config": peft.tuners.lora.config.VeloraConfig(**settings)}


def options_of(kind):
    """Its settings, where this release of PEFT has it as lorafast knows it."""
    name = kind.partition(",")[0]
    if name not in known.METHODS:
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    if known.why_changed(name) is not None:
        pytest.skip(known.why_changed(name))
    return OPTIONS[kind]()


def made(kind, dtype=torch.float32, *, layer="linear", upcast=False, adapters=1, **options):
    """A model of one layer, with factors that are drawn, not what they begin as."""
    options |= options_of(kind)
    model = peft_model(layer, dtype, upcast=upcast, **options)
    for i in range(1, adapters):
        other = config(kind=layer, r=4 + 2 * i, **options)
        model.add_adapter(f"other{i}", other, autocast_adapter_dtype=upcast)
    model.base_model.set_adapter(["default", *(f"other{i}" for i in range(1, adapters))])
    return with_drawn_factors(model, dtype, upcast)


def with_drawn_factors(model, dtype=torch.float32, upcast=False):
    """Those of a sampler, whose few gradients are sums over that of A, have a test of their own."""
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(tensor.requires_grad and "sampler" not in name)
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(tensor)
        elif "magnitude" in name:
            nn.init.uniform_(tensor, 0.5, 2.0)
    return model if upcast else model.to(dtype)


def drawn(dtype, *leading):
    return (torch.randn(*(leading or (3, 5)), size).to(dtype) for size in (K, N))


@pytest.mark.parametrize(
    ("kind", "dtype", "adapters", "mode"),
    covering(list(OPTIONS), list(DTYPES), (1, 2), ("training", "no gradient of A", "eval")),
)
def test_outputs_and_gradients(kind, dtype, adapters, mode, served_by_peft):
    dtype, upcast = DTYPES[dtype]
    if kind == "MonteCLoRA" and mode != "eval":
        upcast = True  # its sampler multiplies by float32
    model = made(kind, dtype, upcast=upcast, adapters=adapters).train(mode != "eval")
    for name, parameter in model.named_parameters():
        if mode == "no gradient of A" and "lora_A" in name:
            parameter.requires_grad_(False)
    pair = twins(model)
    for _ in range(2):  # what the first call leaves is there in the second
        assert_equal(pair, *drawn(dtype), dtype)
    assert_state(pair)
    assert served_by_peft == []


def assert_state(pair):
    """What PEFT keeps between calls is as near to float64's as its own is."""
    fast, stock, exact = (dict(m.named_buffers()) for m in (pair.fast, pair.stock, pair.exact))
    assert fast.keys() == stock.keys()
    dtypes = {tensor.dtype for tensor in stock.values()}
    if dtypes:
        assert_near(fast, stock, exact, *dtypes)


@pytest.mark.parametrize("kind", ["MiCA", "MonteCLoRA", "VeLoRA, once"])
def test_over_a_transposed_weight(kind, served_by_peft):
    """Where PEFT has them: not BD-LoRA, nor KaSA."""
    dtype = torch.bfloat16
    assert_equal(twins(made(kind, dtype, layer="conv1d", upcast=True)), *drawn(dtype), dtype)
    assert served_by_peft == []


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("adapters", [1, 2], ids="{} active".format)
def test_dropout(kind, adapters, served_by_peft):
    """The first one's mask is that of the pass; VeLoRA's are PEFT's own."""
    model = made(kind, adapters=adapters, lora_dropout=0.4)
    pair = twins(model, [] if kind.startswith("VeLoRA") else ["default"])
    assert_equal(pair, *drawn(torch.float32), torch.float32)
    for model in (pair.stock, pair.fast, pair.exact):
        model.eval()
    assert_equal(pair, *drawn(torch.float32), torch.float32)
    assert served_by_peft == []


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_under_autocast_and_without_gradients(kind, served_by_peft):
    pair = twins(made(kind))
    x, dy = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(pair, x, dy, torch.bfloat16)
    with torch.no_grad():
        assert_equal(pair, x, dy, torch.float32)
    assert served_by_peft == []


@pytest.mark.parametrize("kind", ["BD-LoRA, A", "KaSA", "MonteCLoRA", "VeLoRA"])
def test_lora_bias_and_a_scaling_that_is_a_tensor(kind, served_by_peft):
    model = made(kind, lora_bias=True, bias=False)
    layer_of(model).scaling["default"] = torch.tensor(0.3)
    assert_equal(twins(model), *drawn(torch.float32, 7), torch.float32)
    assert served_by_peft == []


def with_another(first, second, dtype=torch.float32, dropout=0.0, upcast=False):
    """Two active adapters, each of its kind; None is plain LoRA."""
    each = [
        {"use_dora": True} if kind == "DoRA" else {} if kind is None
        else {"alora_invocation_tokens": [1]} if kind == "aLoRA" else options_of(kind)
        for kind in (first, second)
    ]  # fmt: skip
    model = peft_model(dtype=dtype, lora_dropout=dropout, upcast=upcast, **each[0])
    other = config(r=2, lora_alpha=5, lora_dropout=dropout, **each[1])
    model.add_adapter("other", other, autocast_adapter_dtype=upcast)
    model.base_model.set_adapter(["default", "other"])
    return with_drawn_factors(model, dtype, upcast)


PAIRS = [
    ("DoRA", None), (None, "DoRA"), ("DoRA", "DoRA"), ("DoRA", "VeLoRA"), ("BD-LoRA, B", "DoRA"),
    ("VeLoRA", None), ("MonteCLoRA", "BD-LoRA, A"), ("BD-LoRA, B", "aLoRA"), ("MiCA", "aLoRA"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "dtype", "dropout", "training"),
    covering(PAIRS, ["fp32", "bf16", "fp16, fp32 adapters"], (0.0, 0.4), (True, False)),
    ids=str,
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_two_kinds_at_once(kinds, dtype, dropout, training, served_by_peft):
    """In PEFT's order: DoRA scales what those before it have made."""
    dtype, upcast = DTYPES[dtype]
    upcast |= "MonteCLoRA" in kinds
    model = with_another(*kinds, dtype, dropout, upcast).train(training)
    in_turn = bool({"DoRA", "VeLoRA"} & set(kinds))
    wider = upcast and dtype is not torch.float32
    masked = dropout and training and not (in_turn or wider)
    pair = twins(model, ["default"] if masked else [])
    arguments = {"alora_offsets": [2, None, 5]} if "aLoRA" in kinds else {}
    assert_equal(pair, *drawn(dtype), dtype, **arguments)
    assert served_by_peft == []


def test_dora_that_drops_nothing_beside_others(served_by_peft):
    """A layer in training with a dropout of 0 is asked for the product again, as PEFT does."""
    model = with_another(None, "DoRA")
    layer_of(model).lora_dropout["other"] = nn.Dropout(0.0)
    assert_equal(twins(model), *drawn(torch.float32), torch.float32)
    assert served_by_peft == []


def test_mixed_batch(served_by_peft):
    """Each element has its own kind."""
    model = peft_model()
    for i, kind in enumerate(("MiCA", "BD-LoRA, B", "MonteCLoRA", "VeLoRA, once")):
        model.add_adapter(str(i), config(r=2 + 2 * i, **options_of(kind)))
    with_drawn_factors(model)
    names = ["0", "1", "default", "2", "__base__", "3", "1"]
    pair = twins(model.eval())
    assert_equal(pair, *drawn(torch.float32, 7, 5), torch.float32, adapter_names=names)
    assert served_by_peft == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_monteclora_under_activation_checkpointing(reentrant, served_by_peft):
    """PEFT's sampler draws anew where the forward is computed again, and as often here as there."""
    pair = twins(made("MonteCLoRA"))
    x, dy = drawn(torch.float32)
    found = []
    for model in (pair.stock, pair.fast, pair.exact):
        dtype = torch.float64 if model is pair.exact else torch.float32
        given = x.to(dtype, copy=True).requires_grad_()
        y = checkpoint(model, given, use_reentrant=reentrant)
        y.backward(dy.to(dtype))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": given.grad} | gradients)
    stock, fast, exact = found
    assert any("lora_A" in name for name in fast)
    assert_near(fast, stock, exact, torch.float32)
    samplers = [layer_of(m).lora_monteclora_sampler["default"] for m in (pair.stock, pair.fast)]
    assert len({one.sampler.index for one in samplers}) == 1
    assert served_by_peft == []


def test_kasa_in_a_mixed_batch(served_by_peft):
    model = made("KaSA", torch.float16, adapters=2).eval()
    names = ["default", "__base__", "other1"]
    assert_equal(twins(model), *drawn(torch.float16), torch.float16, adapter_names=names)
    assert served_by_peft == []


def test_what_velora_keeps_for_the_backward(served_by_peft):
    """Neither x nor a copy of it, where nothing else asks for x. Its output may be changed in place."""
    fast = lorafast.accelerate(made("VeLoRA"), quiet=True)
    kept = []
    x = torch.randn(640, K)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fast(x)
    assert max(t.numel() for t in kept) < x.numel()
    y.add_(1.0)
    y.sum().backward()
    assert layer_of(fast).lora_A["default"].weight.grad.count_nonzero() > 0
    assert served_by_peft == []


@pytest.mark.parametrize("groups", [1, 5, K, K + 3])
def test_the_gradient_of_a_compressed_input(groups):
    """As of an x made anew, ``x̂ = scale · c ⊗ v``, by PyTorch's own derivative."""
    model = made_velora(groups)
    layer, (x, dy) = layer_of(model), drawn(torch.float64, 7)
    found = run(lorafast.accelerate(model, quiet=True), x, dy).gradients
    v = layer.lora_velora_embed["default"]
    c = velora.compressed(x, v, groups)
    anew = 0.7 * (c.unsqueeze(-1) * v).flatten(1)[:, :K]
    A = layer.lora_A["default"].weight.detach().clone().requires_grad_()
    s = nn.functional.linear(anew, A)
    (nn.functional.linear(s, layer.lora_B["default"].weight) * 1.5).backward(dy)
    torch.testing.assert_close(found["base_model.model.layer.lora_A.default.weight"], A.grad)


def test_velora_twice_differentiated():
    """The gradient of A is made of B, which so has a gradient of it."""
    pair = twins(made_velora(4))
    x, found = torch.randn(7, K, dtype=torch.float64), []
    for model in (pair.stock, pair.fast):
        layer = layer_of(model)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        (dA,) = torch.autograd.grad((model(x) ** 3).sum(), A, create_graph=True)
        found.append(torch.autograd.grad((dA**2).sum(), (A, B)))
    torch.testing.assert_close(*found)


def made_velora(groups):
    options_of("VeLoRA")
    return peft_model(
        dtype=torch.float64, **compressed("batch_average", num_groups=groups, scale=0.7)
    )


def test_the_blocks():
    blocks = torch.randn(6, 5)
    expected = torch.block_diag(*blocks.chunk(3))
    assert torch.equal(variants.block_diagonal(blocks, 3), expected)


def test_the_samples_are_PEFTs(served_by_peft):
    """Drawn in its order: what is drawn after them is the same, and the losses of the sampler are."""
    pair = twins(made("MonteCLoRA"))
    found = []
    for model in (pair.stock, pair.fast):
        torch.manual_seed(0)
        for _ in range(3):  # the buffer has two
            model(torch.randn(2, K))
        loss = model.base_model._get_monteclora_loss()
        found.append((loss.detach(), torch.rand(())))
    assert found[0] == found[1]
    assert served_by_peft == []


@pytest.mark.parametrize(
    "dtype", ["fp32", pytest.param("bf16, fp32 adapters", marks=pytest.mark.slow)]
)
def test_the_gradients_of_the_sampler(dtype, served_by_peft):
    """Of several draws as one vector: a sampler has four elements and three, of which any may cancel."""
    dtype, upcast = DTYPES[dtype]
    every = {}
    for seed in range(8):
        torch.manual_seed(seed)
        model = made("MonteCLoRA", dtype, upcast=upcast)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("sampler" in name)
        pair, (x, dy) = twins(model), drawn(dtype)
        for which, found in (("fast", x), ("stock", x), ("exact", x.double())):
            for name, gradient in run(getattr(pair, which), found, dy).gradients.items():
                every.setdefault(which, {}).setdefault(name, []).append(gradient.flatten())
    joined = [
        {name: torch.cat(g) for name, g in every[which].items()}
        for which in ("fast", "stock", "exact")
    ]
    assert len(joined[0]) == 3
    assert_near(*joined, dtype)
    assert served_by_peft == []


def test_dropout_of_monteclora_follows_the_layer(served_by_peft):
    """Not the dropout's own mode, as PEFT has it."""
    model = made("MonteCLoRA", lora_dropout=0.5).eval()
    layer_of(model).lora_dropout.train()
    assert_equal(twins(model), *drawn(torch.float32), torch.float32)
    assert served_by_peft == []


def test_samples_that_are_NaN(served_by_peft):
    model = made("MonteCLoRA")
    for sample in layer_of(model).lora_monteclora_sampler["default"].sampler.buffer:
        sample["z_dirichlet"].fill_(torch.nan)
    pair = twins(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (pair.stock, pair.fast):
            with pytest.raises(UserWarning, match="produced NaNs, using base weights"):
                each(torch.randn(2, K))
        warnings.simplefilter("ignore")
        assert_equal(pair, *drawn(torch.float32), torch.float32)
    assert served_by_peft == []
