"""PEFT's own tests of quantized layers, over LoRA, which they leave to GPUs, and of LoRA's relatives;
with ``accelerate`` and without.

They are in PEFT's source distribution alone: ``make test-peft-own``
brings it. Their model is one of the same layers, small and random, where they load it from the network.
"""

import contextlib
import importlib
import os
import sys
from pathlib import Path

import peft
import pytest
import torch
from own_calls import stand_in

import lorafast
from lorafast.integrations.peft import layers

FOLDER = Path(os.environ.get("PEFT_TESTS", "build/absent"))
THEIRS = (
    "test_forward_changes_output",
    "test_quantized_output_similar_to_non_quantized",
    "test_merge_unmerge_unload",
)
CONFIGS = {
    "lora": {"r": 8},
    "rslora, bias": {"r": 4, "use_rslora": True, "lora_alpha": 16, "bias": "lora_only"},
    "dora": {"r": 8, "use_dora": True},
    "dropout": {"r": 8, "lora_dropout": 0.1},
}
BACKENDS = (
    "bnb_8bit", "bnb_4bit", "torchao_int8_weight_only", "torchao_int8_dynamic_activation_int8"
)  # fmt: skip
RELATIVES = ("Vera", "AdaLora", "IA3", "LoHa", "LoKr", "OFT", "BOFT")
OF_RELATIVES = (
    "test_training_custom_models", "test_merge_layers", "test_disable_adapters",
    "test_forward_bfloat16", "test_forward_bfloat16_no_autocast",
)  # fmt: skip
MODEL = "peft-internal-testing/opt-125m"

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="PEFT's own tests are not here (make test-peft-own)"
)


@contextlib.contextmanager
def imported(name):
    """A module of theirs, imported as they import it."""
    absent = stand_in()
    names = ("tests", "tests.testing_common", "tests.testing_utils", f"tests.{name}")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(FOLDER.resolve()))
    try:
        yield importlib.import_module(f"tests.{name}")
    finally:
        sys.path.remove(str(FOLDER.resolve()))
        for name in (*names, *absent):
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def theirs():
    with imported("test_quantization") as module:
        yield module


@pytest.fixture(scope="module")
def of_models():
    with imported("test_custom_models") as module:
        yield module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Where their model's name is a folder."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=12, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=32, word_embed_proj_dim=64, init_std=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hub")
    OPTForCausalLM(config).save_pretrained(folder / MODEL)
    return folder


def backend(theirs, name):
    found = {one.name: one for one in theirs.QUANTIZATION_BACKENDS}
    if name not in found:
        pytest.skip(f"PEFT finds no {name} here: its library is missing")
    return found[name]


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("quantization", BACKENDS)
def test_theirs(theirs, model, monkeypatch, quantization, name, config, accelerated):
    if (quantization, config, name) == ("bnb_8bit", "dora", "test_forward_changes_output"):
        pytest.skip("PEFT's DoRA over int8 fails at inference on a CPU, within bitsandbytes")
    monkeypatch.chdir(model)
    served = []

    def get_peft_model(model, config):
        made = peft.get_peft_model(model, config)
        if accelerated:
            lorafast.accelerate(made, quiet=True)
            served.extend(lorafast.explain(made).layers.values())
        return made

    monkeypatch.setattr(theirs, "get_peft_model", get_peft_model)
    quant = backend(theirs, quantization)
    options = dict(CONFIGS[config], target_modules=["q_proj", "v_proj"])
    arguments = {"config_cls": peft.LoraConfig, "config_kwargs": options, "quant": quant}
    arguments["dummy_input"] = torch.arange(10).view(1, -1)
    torch.manual_seed(theirs.SEED)
    getattr(theirs.TestQuantization(), name)(**arguments)
    if accelerated:
        assert served


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("kind", RELATIVES)
def test_theirs_of_relatives(of_models, monkeypatch, kind, accelerated):
    """Every failure by name, so that one doesn't hide another."""
    failed, passed, calls = [], 0, []
    own = layers.FastKind.forward

    def forward(layer, *args, **kwargs):
        calls.append(layer)
        return own(layer, *args, **kwargs)

    monkeypatch.setattr(layers.FastKind, "forward", forward)
    tests = of_models.TestPeftCustomModel()
    config = getattr(peft, f"{kind}Config")
    for case in (one for one in of_models.TEST_CASES if one[2] is config):
        for name in OF_RELATIVES:
            torch.manual_seed(0)
            with lorafast.accelerated() if accelerated else contextlib.nullcontext():
                try:
                    getattr(tests, name)(*case)
                    passed += 1
                except pytest.skip.Exception:
                    continue
                except Exception as error:
                    failed.append(f"{name} of {case[0]}: {error}")
    assert not failed
    assert passed
    assert bool(calls) == accelerated
