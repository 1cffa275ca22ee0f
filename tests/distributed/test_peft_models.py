"""PEFT's models in two processes, accelerated: the losses and gradients of PEFT's own, or left to it."""

import os

import numpy as np
import pytest
import torch
from kinds_of_models import assert_near, part, plain_name
from ranks import device, on_ranks
from small_decoder import decoder, fill_adapters, loss_of, tokens

pytest.importorskip("peft")
pytestmark = pytest.mark.slow  # their ranks need PEFT imported
IMPORTS = (
    "peft", "lorafast.integrations.peft", "transformers.models.llama.modeling_llama",
)  # fmt: skip

CASES = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 6}),
    "dora": ("LoraConfig", {"r": 3, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 3, "alpha": 6}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 4}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
}
KEYS = [(case, how, first) for case in CASES for how, first in (
    ("ddp", "accelerate"), ("fsdp2", "accelerate"), ("fsdp2", "wrap"),
)] + [("lora", "ddp", "wrap")]  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]
CLOSE = 2.0**-18
"""Of float32 gradients, summed by two ranks, to those of float64, relative to the largest."""


def _model(case):
    import peft

    name, options = CASES[case]
    torch.manual_seed(5)
    config = getattr(peft, name)(target_modules=TARGETS, **options)
    model = peft.get_peft_model(decoder(), config)  # float64 is PEFT's own
    fill_adapters(model)
    return model.to(device())


def _gradients(model):
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[plain_name(name)] = grad.cpu().numpy()
    return found


def _wrapped(model, how):
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.base_model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _case(rank, case, how, first):
    """Gradients, logits without the adapter and of the frozen model, and what ``explain`` says."""
    import lorafast

    x = part(tokens(4), rank, 2)
    model = _model(case)
    if first == "accelerate":
        lorafast.accelerate(model, quiet=True)
    wrapped = _wrapped(model, how)
    if first == "wrap":
        lorafast.accelerate(wrapped, quiet=True)
    report = str(lorafast.explain(model))
    loss_of(wrapped, x).backward()
    gradients = _gradients(wrapped)
    with lorafast.disabled(wrapped):
        y = wrapped(x)
    frozen = decoder().requires_grad_(False).to(device())
    return gradients, y, frozen(x), report


def _all_cases(rank):
    return {key: _case(rank, *key) for key in KEYS}


@pytest.fixture(scope="module")
def found():
    """What both ranks found, of all cases in one run."""
    return on_ranks(_all_cases, seconds=400, imports=IMPORTS)


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_accelerated_is_what_peft_computes(found, key):
    model = _model(key[0]).double()
    loss_of(model, tokens(4)).backward()
    expected = _gradients(model)
    for of_rank in found:
        gradients, y, frozen, report = of_rank[key]
        assert_near(gradients, expected, CLOSE)
        np.testing.assert_array_equal(y, frozen)
        is_fast = "6 of 6 adapter layers are fast" if key[1] == "ddp" else "whole in its forward"
        assert is_fast in report


def _with_a_plan(rank, folder, fast):
    """A Llama that Transformers cuts by its own plan: the loss, the gradients, what ``explain`` says."""
    import peft
    from transformers import LlamaForCausalLM

    import lorafast

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    if fast:
        lorafast.accelerate(model, quiet=True)
    x = tokens(2)
    whole = model(input_ids=x, labels=x).loss
    whole.backward()
    return whole.item(), _gradients(model), str(lorafast.explain(model)) if fast else ""


def test_a_plan_of_transformers_is_left_to_peft(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    arms = [on_ranks(_with_a_plan, str(tmp_path), fast, imports=IMPORTS) for fast in (False, True)]
    stock, fast = arms
    for (whole, expected, _), (fast_whole, gradients, report) in zip(stock, fast, strict=True):
        assert fast_whole == whole
        assert_near(gradients, expected, 0.0)
        assert "served by PEFT, its base layer has a DTensor" in report
