"""GPT-2, whose linear layers are ``Conv1D``: adapted, saved, loaded and merged as PEFT does it."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import lorafast
from lorafast.nn import LoRALinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
Conv1D = transformers.pytorch_utils.Conv1D

IDS = torch.tensor([[3, 1, 4, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7, 12]])
LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
# GPT-2 computes its softmax in the dtype of the model; some thousand roundings in float64.
EPS = 1e-12


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(17)
    return transformers.GPT2LMHeadModel(config).double().eval()


def mixed():
    """A ``Conv1D`` and an ``nn.Linear`` in one model."""
    torch.manual_seed(3)
    return nn.Sequential(Conv1D(6, 16), nn.Tanh(), nn.Linear(6, 5)).double()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(one, two):
    return (one - two).norm() <= EPS * two.norm()


def draw(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.normal_(generator=generator)
    return model


def by_peft(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set by layer
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **options))
    return draw(adapted).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], r".*\.(c_attn|c_fc)"], ids=str)
def test_the_layers_are_those_of_peft(targets):
    ours = lorafast.adapt(gpt2(), 3, targets)
    theirs = by_peft(gpt2(), target_modules=targets)
    found = {name for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert found == expected
    if targets == "all-linear":
        assert found == {f"transformer.h.{i}.{name}" for i in range(2) for name in LAYERS}


def test_a_plain_checkpoint_loads():
    base, ours = gpt2(), lorafast.adapt(gpt2(), 2)
    assert ours.load_state_dict(base.state_dict()) == ([], [])
    assert close(logits(ours), logits(base))


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_an_adapter_of_peft_loads(tmp_path, fan_in_fan_out):
    theirs = by_peft(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=fan_in_fan_out)
    theirs.save_pretrained(tmp_path)
    ours = lorafast.load_adapter(gpt2(), tmp_path)
    assert close(logits(ours), logits(theirs))
    again = lorafast.load_adapter(lorafast.adapt(gpt2(), 3, ["c_attn", "c_fc"]), tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_peft_loads_an_adapter_of_ours_without_a_warning(tmp_path):
    ours = draw(lorafast.adapt(gpt2(), 3, alpha=6))
    lorafast.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    assert close(logits(theirs), logits(ours))
    assert torch.equal(logits(lorafast.load_adapter(gpt2(), tmp_path)), logits(ours))


def test_gradients_are_those_of_peft(tmp_path):
    theirs = by_peft(gpt2(), target_modules="all-linear")
    theirs.save_pretrained(tmp_path)
    ours = lorafast.load_adapter(gpt2(), tmp_path)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    layers = {
        name: module for name, module in ours.named_modules() if isinstance(module, LoRALinear)
    }
    assert len(layers) == 8
    for name, layer in layers.items():
        other = theirs.base_model.model.get_submodule(name)
        for half in ("lora_A", "lora_B"):
            assert close(getattr(layer, half).grad, getattr(other, half)["default"].weight.grad), (
                name
            )


def test_merging_is_that_of_peft(tmp_path):
    theirs = by_peft(gpt2(), target_modules="all-linear")
    theirs.save_pretrained(tmp_path)
    ours = lorafast.merge(lorafast.load_adapter(gpt2(), tmp_path))
    merged = theirs.merge_and_unload()
    assert type(ours.transformer.h[0].mlp.c_fc) is Conv1D
    assert ours.state_dict().keys() == merged.state_dict().keys()
    for name, tensor in merged.state_dict().items():
        assert close(ours.state_dict()[name], tensor), name
    ours.save_pretrained(tmp_path / "merged")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert close(logits(loaded), logits(ours))


class TestMixed:
    def test_peft_and_we_read_each_other(self, tmp_path):
        x = torch.randn(4, 16, dtype=torch.float64)
        ours = draw(lorafast.adapt(mixed(), 3, alpha=6))
        assert [type(layer).__name__ for layer in ours] == ["LoRAConv1D", "Tanh", "LoRALinear"]
        lorafast.save_adapter(ours, tmp_path / "ours")
        with pytest.warns(UserWarning, match="fan_in_fan_out is set to"):
            theirs = peft.PeftModel.from_pretrained(mixed(), tmp_path / "ours")
        assert close(theirs(x), ours(x))
        theirs.save_pretrained(tmp_path / "theirs")
        again = lorafast.load_adapter(mixed(), tmp_path / "theirs")
        assert torch.equal(again(x), ours(x))

    def test_merging(self):
        x = torch.randn(4, 16, dtype=torch.float64)
        ours = draw(lorafast.adapt(mixed(), 3))
        expected = ours(x)
        lorafast.merge(ours)
        assert [type(layer) for layer in ours] == [Conv1D, nn.Tanh, nn.Linear]
        assert close(ours(x), expected)

    def test_a_file_of_another_shape_is_refused(self, tmp_path):
        lorafast.save_adapter(draw(lorafast.adapt(mixed(), 3)), tmp_path)
        other = mixed()
        other[0] = Conv1D(16, 6)
        with pytest.raises(ValueError, match=r"lora_A of 0 has shape \[3, 16\].*layer is 6 → 16"):
            lorafast.load_adapter(other, tmp_path)


def test_the_rest_of_what_a_user_does():
    ours = lorafast.adapt(gpt2(), 2)
    assert "transformer.h.0.attn.c_attn         16 → 48     2" in str(lorafast.summary(ours))
    assert "transformer.h.0.attn.c_attn" in str(lorafast.explain(ours, torch.randn(3, 16)))
    twin = copy.deepcopy(ours)
    assert torch.equal(logits(twin), logits(ours))
    generated = ours.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(
        generated, gpt2().generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    )


def test_a_peft_adapter_for_an_offloaded_model(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    theirs = by_peft(gpt2(), target_modules="all-linear")
    theirs.save_pretrained(tmp_path)
    ours = lorafast.load_adapter(accelerate.cpu_offload(gpt2()), tmp_path)
    assert ours.transformer.h[0].attn.c_attn.weight.is_meta
    assert close(logits(ours), logits(theirs))
    lorafast.merge(ours)
    assert ours.transformer.h[0].attn.c_attn.weight.is_meta
    assert close(logits(ours), logits(theirs))
