"""Transformers' ``Trainer`` over an adapted model: its checkpoints have the adapter, and resume."""

import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import lorafast
from lorafast.integrations.transformers import Accelerate, SaveAdapter

TOKENS = torch.randint(3, 120, (8, 11), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def llama():
    settings = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=120, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(5)
    return LlamaForCausalLM(settings)


def adapted():
    torch.manual_seed(6)
    return lorafast.adapt(llama(), 4, ["q_proj", "down_proj"], alpha=16)


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, seed=0, disable_tqdm=True, save_steps=2,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=DATA, **options)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def assert_close(one, other):
    assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", [[], [SaveAdapter()]], ids=["", "callback"])
def test_a_checkpoint_has_the_adapter_and_is_resumed_from(tmp_path, callbacks):
    model = adapted()
    base = logits(llama())
    trainer(model, tmp_path, callbacks=callbacks).train()
    expected = logits(model)
    assert (expected - base).norm() > 0.01 * base.norm()
    last = tmp_path / "checkpoint-4"
    assert_close(logits(AutoModelForCausalLM.from_pretrained(last)), expected)
    assert_close(logits(lorafast.load_adapter(llama(), last)), expected)

    again = adapted()
    resumed = trainer(again, tmp_path, callbacks=callbacks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again), expected)


class Plain(nn.Module):
    """Not a Transformers model: the trainer knows nothing but its state."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(11, 11)
        self.head = nn.Linear(11, 3)

    def forward(self, input_ids, labels):
        y = self.head(self.inner(input_ids.float() / 120))
        return {"loss": nn.functional.cross_entropy(y, labels[:, 0] % 3)}


def plain():
    torch.manual_seed(7)
    return Plain()


def test_the_callback_saves_the_adapter_of_any_model_and_a_trained_head(tmp_path):
    model = lorafast.adapt(plain(), 4, ["inner"])
    model.head.requires_grad_(True)
    trainer(model, tmp_path, callbacks=[SaveAdapter(modules_to_save=["head"])]).train()
    other = lorafast.load_adapter(plain(), tmp_path / "checkpoint-4")
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert not torch.equal(other.head.weight, plain().head.weight)
    config = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]


def test_one_process_of_several_saves(tmp_path):
    class State:
        is_world_process_zero = False
        global_step = 1

    arguments = trainer(adapted(), tmp_path).args
    SaveAdapter().on_save(arguments, State, None, model=adapted())
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_hyperparameter_search_is_refused(tmp_path):
    class State:
        is_hyper_param_search = True

    with pytest.raises(ValueError, match="can't tell the folders of a hyperparameter search"):
        SaveAdapter().on_train_begin(trainer(adapted(), tmp_path).args, State, None)


def of_peft():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def test_accelerate_is_done_before_anything_runs_and_said_once(tmp_path, capsys):
    model = of_peft()
    made = trainer(model, tmp_path, callbacks=[Accelerate()])
    said = "lorafast: 4 of 4 adapter layers are fast"
    assert lorafast.explain(model).summary in said
    made.train()
    assert capsys.readouterr().out.count(said) == 1
    lorafast.restore(model)
    assert "0 of 4 adapter layers are fast" in lorafast.explain(model).summary


def test_accelerate_takes_what_model_init_makes(tmp_path, capsys):
    made = trainer(None, tmp_path, model_init=of_peft, callbacks=[Accelerate(quiet=True)])
    made.train()  # of another model than the one that was there when the trainer was made
    assert lorafast.explain(made.model).summary == "4 of 4 adapter layers are fast"
    assert "lorafast" not in capsys.readouterr().out


def test_accelerate_without_a_layer_of_peft(tmp_path):
    with pytest.raises(ValueError, match="none of PEFT's adapter layers"):
        trainer(adapted(), tmp_path, callbacks=[Accelerate()])
