import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from lorafast.bench.accelerate import job, models
from lorafast.bench.common.contenders import UnavailableError
from lorafast.bench.common.record import Record
from transformers import LlamaConfig, LlamaForCausalLM

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def very_tiny(monkeypatch):
    def make():
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=64,
            )
        )  # fmt: skip

    monkeypatch.setitem(models.MODELS, "tiny-llama", make)


@pytest.mark.parametrize("case", job.CASES, ids=lambda case: case.title)
def test_every_case_is_checked_and_timed(case):
    frozen, stock, fast = job.measure("tiny-llama", case, 4, "fp32", device=CPU, seconds=0.01)
    assert [row.contender for row in (frozen, stock, fast)] == ["frozen", "peft", "accelerated"]
    assert [row.wrong for row in (frozen, stock, fast)] == [None] * 3
    assert len(frozen.samples) == len(stock.samples) == len(fast.samples) >= 7
    assert frozen.overhead.median == stock.speedup.median == 1.0
    assert "accelerated" in job.format_rows([frozen, stock, fast])


@pytest.mark.parametrize("case", [job.CASES[0], job.CASES[2]], ids=lambda case: case.title)
def test_what_is_wrong_has_no_time(case, monkeypatch):
    forward = job.lorafast.functional.lora_linear

    def without_scaling(x, weight, lora_A, lora_B, scaling, bias=None, **options):
        return forward(x, weight, lora_A, lora_B, scaling / 2, bias, **options)

    monkeypatch.setattr(job.lorafast.functional, "lora_linear", without_scaling)
    *_, fast = job.measure("tiny-llama", case, 4, "fp32", device=CPU, seconds=0.01)
    assert fast.samples == []
    assert "WRONG" in job.format_rows([fast])


def test_a_model_that_is_not_there(monkeypatch):
    def missing():
        raise UnavailableError("its weights are not installed")

    monkeypatch.setitem(models.MODELS, "minilm", missing)
    rows = job.measure("minilm", job.CASES[0], 4, "fp32", device=CPU, seconds=0.01)
    assert {row.unavailable for row in rows} == {"its weights are not installed"}
    assert "not run" in job.format_rows(rows)


def test_a_run_is_recorded(tmp_path, capsys):
    record = Record(CPU, path=tmp_path / "run.json")
    rows = job.run(["tiny-llama"], 4, "fp32", device=CPU, record=record, seconds=0.01)
    kept = json.loads((tmp_path / "run.json").read_text())["accelerate"]
    assert [job.Row(**row).case for row in kept] == [row.case for row in rows]
    assert [len(row["samples"]) for row in kept] == [len(row.samples) for row in rows]
    assert len(rows) == 3 * len(job.CASES)
    assert "tiny-llama, training step, DoRA: 16 x 32 tokens, fp32" in capsys.readouterr().out
