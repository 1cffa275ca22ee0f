"""aLoRA: each sequence has its adapter from some token on, in training and in generation."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft_twins import (
    K,
    N,
    assert_equal,
    assert_near,
    config,
    fast_layers,
    layer_of,
    peft_model,
    run,
    stock_and_fast,
    twins,
)
from torch import nn
from torch._subclasses import FakeTensorMode

import lorafast
from lorafast.backends import grouping
from lorafast.integrations.peft import alora

# That aLoRA is for causal language models, where a test needs a layer alone.
pytestmark = pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
B, T = 5, 7
INVOKED = {"alora_invocation_tokens": [1]}
OFFSETS = {
    "some": [None, 1, 3, 99, 0],
    "none": [None] * B,
    "all": [T, 99, T, T, T],
    "whole sequences": [T, None, T, 0, 99],
    "no argument": None,
}
DTYPES = {
    "fp32": (torch.float32, False),
    "bf16, fp32 adapters": (torch.bfloat16, True),
    "fp16, fp32 adapters": (torch.float16, True),
}
SOME = OFFSETS["some"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", OFFSETS)
def test_outputs_and_gradients(offsets, dtype, served_by_peft):
    dtype, upcast = DTYPES[dtype]
    pair = twins(peft_model(dtype=dtype, upcast=upcast, **INVOKED))
    x, dy = torch.randn(B, T, K).to(dtype), torch.randn(B, T, N).to(dtype)
    assert_equal(pair, x, dy, dtype, alora_offsets=OFFSETS[offsets])
    assert served_by_peft == []


@pytest.mark.parametrize("offsets", ["some", "none", "all"])
def test_one_token_a_step(offsets, served_by_peft):
    pair = twins(peft_model(lora_bias=True, **INVOKED))
    for shape in ((B, 1), (B,)):
        x, dy = torch.randn(*shape, K), torch.randn(*shape, N)
        assert_equal(pair, x, dy, torch.float32, alora_offsets=OFFSETS[offsets])
    assert served_by_peft == []


def several(second, **options):
    """Two active adapters: one of aLoRA, and one of ``second``."""
    model = peft_model(**INVOKED, **options)
    model.add_adapter("other", config(r=3, lora_alpha=5, **(options | second)))
    model.base_model.set_adapter(["default", "other"])
    return model


SEVERAL = {
    "dropout": lambda: peft_model(lora_dropout=0.4, **INVOKED),
    "bias": lambda: peft_model(lora_bias=True, **INVOKED),
    "conv1d": lambda: peft_model("conv1d", **INVOKED),
    "two of them": lambda: several(INVOKED, lora_bias=True),
    "two of them, dropout": lambda: several(INVOKED, lora_dropout=0.4),
    "another": lambda: several({}, lora_bias=True),
    "fp16, another": lambda: several({}).half(),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_kinds(kind, served_by_peft):
    """With dropout, too, the same numbers: over those tokens it is PEFT's own."""
    model = SEVERAL[kind]()
    dtype = next(model.parameters()).dtype
    x, dy = torch.randn(B, T, K).to(dtype), torch.randn(B, T, N).to(dtype)
    assert_equal(twins(model), x, dy, dtype, alora_offsets=SOME)
    assert served_by_peft == []


def test_dropout_over_all_tokens(served_by_peft):
    pair = twins(peft_model(lora_dropout=0.4, **INVOKED), ["default"])
    x, dy = torch.randn(B, T, K), torch.randn(B, T, N)
    assert_equal(pair, x, dy, torch.float32, alora_offsets=OFFSETS["all"])
    assert served_by_peft == []


def test_autocast_and_a_scaling_that_is_a_tensor(served_by_peft):
    model = peft_model(**INVOKED)
    layer_of(model).scaling["default"] = torch.tensor(0.3)
    pair, x = twins(model), torch.randn(B, T, K)
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            run(m, x, torch.ones(B, T, N), alora_offsets=SOME) for m in (pair.fast, pair.stock)
        ]
    found.append(run(pair.exact, x.double(), torch.ones(B, T, N), alora_offsets=SOME))
    assert found[0].y.dtype is found[1].y.dtype
    assert_near(*({"y": f.y.float()} | f.gradients for f in found), torch.bfloat16)
    assert served_by_peft == []


MIXED = ["default", "plain", "__base__", "second", "default"]


@pytest.mark.parametrize("offsets", ["some", "whole sequences", "no argument"])
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
def test_mixed_batch(lora_bias, offsets, served_by_peft):
    model = peft_model(lora_bias=lora_bias, **INVOKED)
    model.add_adapter("plain", config(r=3, lora_bias=lora_bias))
    model.add_adapter("second", config(r=6, lora_alpha=3, **INVOKED))
    pair = twins(model.eval())
    x, dy = torch.randn(B, T, K), torch.randn(B, T, N)
    arguments = {"adapter_names": MIXED, "alora_offsets": OFFSETS[offsets]}
    assert_equal(pair, x, dy, torch.float32, **arguments)
    assert served_by_peft == []


def test_what_a_token_holds_stays_with_those_that_have_the_adapter():
    fast = lorafast.accelerate(peft_model(**INVOKED), quiet=True)
    x = torch.randn(B, T, K)
    x[1, :-1] = torch.nan  # its last token alone has the adapter
    fast(x, alora_offsets=SOME).nan_to_num().sum().backward()
    for name, parameter in fast.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


def test_so_it_does_in_compiled_code():
    """With dropout, where the adapter is PyTorch's own calls over every token."""
    fast = lorafast.accelerate(peft_model(lora_dropout=0.4, **INVOKED), quiet=True)
    x = torch.randn(B, T, K)
    x[1, :-1] = torch.nan
    compiled = torch.compile(layer_of(fast), backend="aot_eager", fullgraph=True)
    compiled(x, alora_offsets=SOME)[:, -1].sum().backward()
    for name, parameter in fast.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [((2, 3, 4, K), [1, 1]), ((B, T, K), [1]), ((B, T, K), [])],
    ids=["4 dimensions", "of one sequence", "of none"],
)
def test_what_PEFT_refuses(shape, offsets, served_by_peft):
    messages = []
    for model in stock_and_fast(peft_model(**INVOKED), lambda layer: None):
        with pytest.raises((IndexError, RuntimeError)) as raised:
            model(torch.randn(shape), alora_offsets=offsets)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert len(served_by_peft) == 1


def test_a_layer_without_aLoRA_takes_no_notice(served_by_peft):
    pair = twins(peft_model())
    assert_equal(pair, torch.randn(B, K), torch.randn(B, N), torch.float32, alora_offsets=[1] * B)
    assert served_by_peft == []


def test_the_map_is_made_once_for_all_layers(monkeypatch):
    made = []
    monkeypatch.setattr(
        grouping,
        "_on_the_host",
        lambda *of, _make=grouping._on_the_host: made.append(of) or _make(*of),
    )
    network = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K))
    settings = LoraConfig(target_modules=["0", "1", "2"], **INVOKED)
    fast = lorafast.accelerate(get_peft_model(network, settings), quiet=True)
    for offsets in ([None, 6], [5, 6], [5, 6]):
        fast(torch.randn(2, 11, K), alora_offsets=offsets).sum().backward()
    assert len(made) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
def test_training_after_inference_mode(dropout, served_by_peft):
    """Whose tensors can't be kept for a backward."""
    pair = twins(peft_model(lora_dropout=dropout, **INVOKED))
    x, dy, offsets = torch.randn(2, 9, K), torch.randn(2, 9, N), [4, 8]
    with torch.inference_mode():
        pair.fast(x, alora_offsets=offsets)
    assert_equal(pair, x, dy, torch.float32, alora_offsets=offsets)
    assert served_by_peft == []


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("mode", ["fake", "functionalize"])
def test_after_a_mode_whose_tensors_are_its_own(mode, options):
    alora._assigned.cache_clear()
    layer = layer_of(lorafast.accelerate(peft_model(**INVOKED, **options), quiet=True))
    x = torch.randn(2, 9, K)
    if mode == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(x, alora_offsets=[3, 7])
    else:
        torch.func.functionalize(lambda x: layer(x, alora_offsets=[3, 7]))(x)
    y = layer(x, alora_offsets=[3, 7])
    assert type(y) is torch.Tensor
    assert not torch._is_functional_tensor(y)
    y.sum().backward()


def language_model(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.2,
        )
    )  # fmt: skip
    settings = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False,
        alora_invocation_tokens=[5, 6], **options,
    )  # fmt: skip
    return get_peft_model(network, settings)


PROMPTS = torch.tensor([[9, 5, 6, 8, 7], [9, 8, 5, 6, 7], [9, 8, 7, 7, 5]])


def test_generation(served_by_peft):
    """With a cache: the prompts, then one token a step. The last one doesn't invoke the adapter."""
    pair = twins(language_model().eval())
    assert len(fast_layers(pair.fast)) == 14
    found = []
    for model in (pair.fast, pair.stock, pair.exact):
        out = model.generate(
            input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=6,
            do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        found.append({"logits": torch.stack(out.logits), "tokens": out.sequences})
    fast, stock, exact = found
    assert torch.equal(fast.pop("tokens"), stock.pop("tokens"))
    del exact["tokens"]
    assert_near(fast, stock, exact, torch.float32)
    assert served_by_peft == []


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_of_training(checkpointing, served_by_peft):
    pair = twins(language_model())
    found = []
    for model in (pair.fast, pair.stock, pair.exact):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=PROMPTS, labels=PROMPTS).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) == 28
        found.append({"loss": loss.detach()} | gradients)
    assert_near(*found, torch.float32)
    assert served_by_peft == []


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
def test_compiled(dropout, served_by_peft):
    model = layer_of(lorafast.accelerate(peft_model(lora_dropout=dropout, **INVOKED), quiet=True))
    x, compiled = torch.randn(B, T, K), torch.compile(model, fullgraph=True)
    for training in (True, False):
        compiled.train(training)
        for offsets in (SOME, None):
            torch.manual_seed(0)
            y = compiled(x, alora_offsets=offsets)
            y.sum().backward()
            if not (dropout and training):  # whose mask is another
                torch.testing.assert_close(y, model._stock.forward(model, x, alora_offsets=offsets))
    before = len(served_by_peft)
    compiled(x, alora_offsets=SOME)
    assert len(served_by_peft) == before


def test_a_forced_backend_serves_it_or_says_why_not():
    stock = peft_model(**INVOKED)
    fast, x = lorafast.accelerate(copy.deepcopy(stock), quiet=True), torch.randn(B, T, K)
    for backend in ("reference", "aten"):
        with lorafast.use_backend(backend):
            torch.testing.assert_close(fast(x, alora_offsets=SOME), stock(x, alora_offsets=SOME))
    with lorafast.use_backend("cuda"), pytest.raises(lorafast.BackendError, match="cuda"):
        fast(x, alora_offsets=SOME)
