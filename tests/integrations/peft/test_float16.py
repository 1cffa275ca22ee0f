"""Float32 adapters over a float16 layer: what they make on the way is beyond float16."""

import pytest
import torch

pytest.importorskip("peft")

from peft_twins import (
    TOKENS,
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

pytestmark = pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
ROWS = ["default", "__base__", "other1", "other2", "other1"]
CASES = {
    "linear": {},
    "linear, three adapters": {"adapters": 3},
    "conv1d": {"kind": "conv1d"},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "dora, conv1d": {"use_dora": True, "kind": "conv1d"},
    "embedding": {"kind": "embedding"},
    "embedding, two adapters": {"kind": "embedding", "adapters": 2},
    "mixed batch": {"adapters": 3},
    "alora": {"alora_invocation_tokens": [1]},
    "alora, dropout": {"alora_invocation_tokens": [1], "lora_dropout": 0.3},
}


def made(case, factor):
    """The pair, an input and arguments; ``A`` is ``factor`` times as large and ``B`` as small."""
    model = peft_model(dtype=torch.float16, upcast=True, **CASES[case])
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "embedding_A" in name:
            parameter.data *= factor
        elif "lora_B" in name or "embedding_B" in name:
            parameter.data /= factor
    tokens = "embedding" in case
    x = torch.randint(TOKENS, (5, 4)) if tokens else torch.randn(5, 4, K).half()
    mixed = case == "mixed batch"
    pair = twins(model.eval() if mixed else model, ["default"] if case == "dora, dropout" else [])
    if "alora" in case:
        return pair, x, {"alora_offsets": [1, None, 4, 2, 0]}
    return pair, x, {"adapter_names": ROWS} if mixed else {}


@pytest.mark.parametrize("factor", [1e6, 1.0, 1e-6], ids="A x {}".format)
@pytest.mark.parametrize("case", CASES)
def test_an_activation_that_float16_has_not(case, factor, served_by_peft):
    pair, x, arguments = made(case, factor)
    assert_equal(pair, x, torch.randn(5, 4, N).half(), torch.float16, **arguments)
    assert served_by_peft == []


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_float16_has_not(case, served_by_peft):
    """``ds`` of a young adapter: what comes back through a small ``B``."""
    pair, x, arguments = made(case, 1e5)
    dy = (torch.randn(5, 4, N) * 1e-3).half()
    assert_equal(pair, x, dy, torch.float16, **arguments)
    assert served_by_peft == []


INVOKED = {"alora_invocation_tokens": [1]}
OFFSETS = {"alora_offsets": [1, None, 4, 2, 0]}
BIASED = {
    "linear": ({}, {}),
    "alora": (INVOKED, OFFSETS),
    "alora, all tokens": (INVOKED, {"alora_offsets": [99] * 5}),
    "mixed batch": ({}, {"adapter_names": ["default", "__base__", *["default"] * 3]}),
    "mixed batch, alora": (INVOKED, {"adapter_names": ["default"] * 5} | OFFSETS),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BIASED)
def test_the_gradient_of_lora_bias_is_a_sum_in_float32(case, dtype, served_by_peft):
    """Which float16 doesn't hold and bfloat16 would round."""
    options, arguments = BIASED[case]
    model = peft_model(dtype=dtype, upcast=True, lora_bias=True, **options)
    pair = twins(model.eval() if case.startswith("mixed") else model)
    x, dy = torch.randn(5, 4, K).to(dtype), (3e4 + 1e3 * torch.rand(5, 4, N)).to(dtype)
    found = []
    for m, inputs in ((pair.fast, x), (pair.stock, x), (pair.exact, x.double())):
        gradients = run(m, inputs, dy, **arguments).gradients
        found.append({n: g for n, g in gradients.items() if n.endswith("lora_B.default.bias")})
    assert min(g.min() for g in found[2].values()) > 65504
    assert_near(*found, torch.float32)
    assert served_by_peft == []


def summed(second, terms=(8e4, -7e4), **options):
    """Two adapters, each of which adds one of ``terms``, where float16 ends at 65,504."""
    model = peft_model(dtype=torch.float16, upcast=True, **options)
    model.add_adapter("other", config(**(options | second)), autocast_adapter_dtype=True)
    model.base_model.set_adapter(["default", "other"])
    layer = layer_of(model)
    for name, term in zip(("default", "other"), terms, strict=True):
        layer.lora_A[name].weight.data.fill_(0.25 / K)
        layer.lora_B[name].weight.data.fill_(term / layer.scaling[name])
    return model


def biased(**options):
    """``lora_bias`` adds 7e4 to a base layer of about -3e4."""
    model = peft_model(dtype=torch.float16, upcast=True, lora_bias=True, **options)
    layer = layer_of(model)
    layer.lora_B["default"].bias.data.fill_(7e4 / layer.scaling["default"])
    layer.base_layer.bias.data.fill_(-3e4)
    return model


LAST = {"alora_offsets": [3, 3, 3, 3, 3]}
DROPPED = {"lora_dropout": 1e-9}
SUMS = {
    "two": (lambda: summed({}), {}),
    "two, dropout": (lambda: summed({}, **DROPPED), {}),
    "alora after another": (lambda: summed(INVOKED), LAST),
    "alora after another, dropout": (lambda: summed(INVOKED, **DROPPED), LAST),
    "bias": (biased, {}),
    "bias, alora": (lambda: biased(**INVOKED), OFFSETS),
    "bias, mixed batch": (lambda: biased().eval(), {"adapter_names": ["default"] * 5}),
}


@pytest.mark.parametrize("case", SUMS)
def test_a_sum_whose_terms_float16_has_not(case, served_by_peft):
    make, arguments = SUMS[case]
    pair, x, dy = twins(make()), torch.ones(5, 4, K).half(), torch.ones(5, 4, N)
    found = [run(pair.fast, x, dy, **arguments), run(pair.stock, x, dy, **arguments)]
    found.append(run(pair.exact, x.double(), dy, **arguments))
    assert_near(*({"y": f.y} for f in found), torch.float16)
    assert served_by_peft == []
