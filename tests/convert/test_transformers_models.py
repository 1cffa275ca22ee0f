"""What Transformers and PEFT make of an adapted model's files, with their own loaders."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from adapter_files import CONFIG, read, trained
from test_peft_exchange import (
    LLAMA_EPS,
    distance,
    llama,
    loaded_by_peft,
    logits,
    roberta,
    saved,
    with_peft,
)

import lorafast
from lorafast.nn import LoRALinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def on_disk(tmp_path):
    """A tiny Llama on disk, loaded from there."""
    llama().save_pretrained(tmp_path / "base")
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").double().eval()


@pytest.mark.parametrize("auto", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_auto_classes_of_peft_find_the_base_model(
    on_disk, tmp_path, draw_adapters, assert_same, auto
):
    draw_adapters(lorafast.adapt(on_disk, 3, ["q_proj", "down_proj"]))
    lorafast.save_adapter(on_disk, tmp_path / "adapter")
    assert read(tmp_path / "adapter")[0]["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    theirs = getattr(peft, auto).from_pretrained(tmp_path / "adapter").double().eval()
    assert_same(logits(theirs).detach(), logits(on_disk).detach(), LLAMA_EPS)


# save_pretrained


def reloaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()


def test_save_pretrained_keeps_the_adapters(on_disk, tmp_path, draw_adapters, assert_same):
    base = logits(on_disk)
    draw_adapters(lorafast.adapt(on_disk, 3, ["q_proj", "down_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        on_disk.save_pretrained(tmp_path / "whole")
    expected = logits(on_disk).detach()
    assert distance(base, expected) > 1e-2
    assert_same(logits(reloaded(tmp_path / "whole")).detach(), expected, LLAMA_EPS)


def test_save_pretrained_keeps_what_is_trained_besides(
    on_disk, tmp_path, draw_adapters, assert_same
):
    draw_adapters(lorafast.adapt(on_disk, 3, ["q_proj"]))
    on_disk.lm_head.requires_grad_(True)
    torch.nn.init.normal_(on_disk.lm_head.weight)
    on_disk.save_pretrained(tmp_path / "whole")
    found = logits(reloaded(tmp_path / "whole")).detach()
    assert_same(found, logits(on_disk).detach(), LLAMA_EPS)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_save_pretrained_of_a_copy_keeps_the_copys_adapters(
    on_disk, tmp_path, draw_adapters, assert_same, copied
):
    draw_adapters(lorafast.adapt(on_disk, 3, ["q_proj"]))
    other = copied(on_disk)
    torch.nn.init.zeros_(on_disk.model.layers[0].self_attn.q_proj.lora_B)
    other.save_pretrained(tmp_path / "whole")
    found = logits(reloaded(tmp_path / "whole")).detach()
    assert_same(found, logits(other).detach(), LLAMA_EPS)


def test_save_pretrained_of_a_model_without_adapters_is_as_ever(on_disk, tmp_path):
    other = copy.deepcopy(on_disk)
    merged = lorafast.merge(lorafast.adapt(other, 3, ["q_proj"]))
    for model in (on_disk, merged):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.save_pretrained(tmp_path / "plain")
        assert not (tmp_path / "plain" / CONFIG).exists()


def test_save_pretrained_warns_of_an_adapter_that_would_be_added_twice(on_disk, tmp_path):
    lorafast.adapt(on_disk, 3, ["q_proj"]).save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"holds an adapter.*if it is merged, delete adapter_conf"):
        lorafast.merge(on_disk).save_pretrained(tmp_path / "whole")


def test_save_pretrained_warns_of_adapters_that_it_can_not_keep(on_disk, tmp_path):
    lorafast.adapt(on_disk, 3, ["q_proj"], dropout=0.5)
    lorafast.adapt(on_disk, 3, ["k_proj"])
    with pytest.warns(UserWarning, match=r"from_pretrained drops them \(dropout is 0\.5 in"):
        on_disk.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / CONFIG).exists()
    assert (tmp_path / "whole" / "model.safetensors").exists()


def test_save_pretrained_is_silent_of_a_model_with_pefts_own_adapter(on_disk, tmp_path):
    from lorafast.convert import save_pretrained

    lorafast.save_adapter(lorafast.adapt(copy.deepcopy(on_disk), 3, ["q_proj"]), tmp_path)
    on_disk._hf_peft_config_loaded = True  # as add_adapter of Transformers leaves it
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_pretrained._save_beside(on_disk, tmp_path)


def test_save_pretrained_goes_on_where_the_adapter_can_not_be_written(on_disk, tmp_path):
    lorafast.adapt(on_disk, 3, ["q_proj"])
    (tmp_path / "whole" / CONFIG).mkdir(parents=True)
    with pytest.warns(UserWarning, match=rf"from_pretrained drops them \(.*{CONFIG} is a folder"):
        on_disk.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()


def test_save_pretrained_says_what_the_adapters_file_loses(on_disk, tmp_path):
    on_disk.model.layers[0].mlp.up_proj = on_disk.model.layers[0].mlp.gate_proj
    lorafast.adapt(on_disk, 3, ["gate_proj"])
    on_disk.lm_head.requires_grad_(True)  # in the model's own file
    # Transformers itself refuses tensors that it doesn't know as tied, after the adapter is written.
    with (
        pytest.warns(UserWarning, match=r"gate_proj and .*up_proj are one layer") as caught,
        pytest.raises(RuntimeError, match="shared tensors"),
    ):
        on_disk.save_pretrained(tmp_path / "whole")
    assert not any("trained but not saved" in str(one.message) for one in caught)


def test_save_pretrained_warns_where_peft_is_not_installed(on_disk, tmp_path, monkeypatch):
    from lorafast.convert import save_pretrained

    monkeypatch.setattr(save_pretrained.importlib.util, "find_spec", lambda name: None)
    lorafast.adapt(on_disk, 3, ["q_proj"])
    with pytest.warns(UserWarning, match=r"drops the adapters where PEFT isn't installed"):
        on_disk.save_pretrained(tmp_path / "whole")


class OfAnotherLibrary(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(5, 7)

    def save_pretrained(self, path):
        return path


def test_save_pretrained_of_another_library_is_left_alone(tmp_path):
    stock = vars(OfAnotherLibrary)["save_pretrained"]
    model = lorafast.adapt(OfAnotherLibrary(), 2)
    assert model.save_pretrained(path=tmp_path / "w") == tmp_path / "w"
    assert vars(OfAnotherLibrary)["save_pretrained"] is stock
    assert not (tmp_path / "w").exists()


def test_save_pretrained_keeps_the_adapters_of_a_part(
    on_disk, tmp_path, draw_adapters, assert_same
):
    draw_adapters(lorafast.adapt(on_disk.model, 3, ["q_proj"]))
    on_disk.save_pretrained(save_directory=tmp_path / "whole")
    found = logits(reloaded(tmp_path / "whole")).detach()
    assert_same(found, logits(on_disk).detach(), LLAMA_EPS)


INSIDE = """
import sys
import lorafast
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=19,
    )
)
lorafast.adapt(nn.ModuleDict({"inner": model}), 2, ["q_proj"])
model.save_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_save_pretrained_of_a_model_that_was_adapted_within_a_module_of_ones_own(tmp_path):
    # In a process of its own: the class remembers that one of its models was adapted.
    subprocess.run(
        [sys.executable, "-c", INSIDE, tmp_path], check=True, timeout=120, capture_output=True
    )
    assert len(read(tmp_path)[1]) == 2


def test_save_pretrained_of_another_process_writes_nothing(on_disk, tmp_path):
    lorafast.adapt(on_disk, 3, ["q_proj"]).save_pretrained(tmp_path / "w", is_main_process=False)
    assert not (tmp_path / "w" / CONFIG).exists()


# Embeddings beside the adapter


def tied():
    return llama(tie_word_embeddings=True)


def changed(model):
    """``model`` with other embeddings, as after training or resizing them."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            model.get_output_embeddings().weight.add_(0.1)
    return model


@pytest.mark.parametrize("make", [llama, tied])
def test_loads_embeddings_that_peft_stored(tmp_path, assert_same, make):
    theirs = with_peft(changed(make()), target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = lorafast.load_adapter(make(), tmp_path)
    expected = logits(theirs).detach()
    assert_same(logits(loaded_by_peft(make(), tmp_path)).detach(), expected, LLAMA_EPS)
    assert_same(logits(model).detach(), expected, LLAMA_EPS)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (make is tied)
    assert all("lora_" in name for name in trained(model))


@pytest.mark.parametrize("stored", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("is_trainable", [True, False])
def test_weights_that_peft_kept_tied_stay_tied(tmp_path, assert_same, stored, is_trainable):
    theirs = with_peft(
        tied(), target_modules=["q_proj"], modules_to_save=stored, ensure_weight_tying=True
    )
    model = tied()
    lorafast.load_adapter(model, saved(theirs, tmp_path), is_trainable=is_trainable)
    assert_same(logits(model).detach(), logits(theirs).detach(), LLAMA_EPS)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad == is_trainable


def test_names_embeddings_of_another_size(tmp_path, unchanged):
    bigger = llama()
    bigger.resize_token_embeddings(23)
    theirs = with_peft(bigger, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = llama()
    sentence = r"weight has shape \[23, 32\] in the file, expected \[19, 32\]: call model\.resize"
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(model, tmp_path)
    model.resize_token_embeddings(23)
    lorafast.load_adapter(model, tmp_path)
    assert torch.equal(model.lm_head.weight, bigger.lm_head.weight)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_trains_what_peft_trains(tmp_path, is_trainable):
    theirs = with_peft(roberta(), target_modules=["query"], task_type="SEQ_CLS")
    folder = saved(theirs, tmp_path)
    again = peft.PeftModel.from_pretrained(roberta(), folder, is_trainable=is_trainable)
    model = lorafast.load_adapter(roberta(), folder, is_trainable=is_trainable)
    names = {
        name.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace(".default.weight", "")
        for name in trained(again)
    }
    assert trained(model) == names
    assert len(names) == (8 if is_trainable else 0)
    assert {type(m) for n, m in model.named_modules() if n.endswith("query")} == {LoRALinear}
