"""TRL's ``SFTTrainer``, which makes the PEFT model: two processes against one, and PEFT's layers; killed
and resumed."""

import importlib.util
import os
from functools import partial

import pytest
import torch
import trainer_runs as runs
from ranks import RankError, on_ranks
from trainer_runs import IMPORTS, ON_CPU, STEPS, be_rank, difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL"),
]
ROUNDING = 2.0**-18


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(120)}, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2"
    )


def _tuned(folder, world, callbacks, stop=None, resume=None, dropout=0.0, **options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    run = runs.Run()
    settings = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    torch.manual_seed(1)
    trainer = SFTTrainer(
        model=runs.llama(torch.float32),
        args=SFTConfig(**runs.arguments(folder, world, **settings | options)),
        train_dataset=Dataset.from_list(
            [{"input_ids": d["input_ids"].tolist()} for d in runs.data()]
        ),
        processing_class=_tokenizer(),
        callbacks=[runs.watching(run, stop), *callbacks],
        peft_config=runs.lora_config(dropout, init_lora_weights=False),
    )
    return runs.finish(trainer, run, resume)


def _as_one(rank, folder):
    from lorafast.integrations.transformers import Accelerate

    for options in ({}, {"packing": True, "max_length": 24, "gradient_checkpointing": True}):
        run = partial(_tuned, folder, save_strategy="no", **options)
        be_rank(rank, 2)
        two = run(2, [Accelerate(quiet=True)])
        be_rank(0, 1)
        stock = run(1, [])
        assert (two.by_peft, two.wrapped) == (0, "DistributedDataParallel")
        assert stock.by_peft > 0
        assert two.losses == pytest.approx(stock.losses, rel=ROUNDING)
        assert len(two.gradients) == STEPS
        for found, expected in zip(two.gradients, stock.gradients, strict=True):
            assert difference(found, expected) <= ROUNDING


def test_two_fast_processes_train_as_one_of_peft(tmp_path):
    on_ranks(_as_one, str(tmp_path), imports=IMPORTS, cpu_because=ON_CPU)


def _part(rank, folder, resume, dies):
    from lorafast.integrations.transformers import Accelerate

    be_rank(rank, 2)

    def stop(step):
        if dies and step == 2 and rank == 1:
            os._exit(9)

    run = _tuned(
        folder, 2, [Accelerate(quiet=True)], stop, resume, dropout=0.1, optim="adamw_torch"
    )
    assert (run.by_peft, run.wrapped) == (0, "DistributedDataParallel")
    return run.losses, [{n: g.tolist() for n, g in step.items()} for step in run.gradients]


def test_a_killed_run_is_resumed(tmp_path):
    """With dropout and AdamW, to the bit."""
    part = partial(on_ranks, _part, imports=IMPORTS, cpu_because=ON_CPU)
    whole = part(str(tmp_path / "whole"), None, False)
    with pytest.raises(RankError):
        part(str(tmp_path / "killed"), None, True)
    last = str(tmp_path / "killed" / "checkpoint-2")
    resumed = part(str(tmp_path / "killed"), last, False)
    for (losses, gradients), (again, gradients_again) in zip(whole, resumed, strict=True):
        assert again == losses
        assert gradients_again == gradients[2:]
        assert gradients[2] != gradients[3]
