import sys

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from lorafast.bench.common.bases import stored_bytes
from lorafast.bench.common.contenders import FROZEN, FULL, SIBLINGS
from lorafast.bench.common.shapes import MODELS, Model
from lorafast.bench.models import arms, job
from lorafast.bench.models.arms import Size, fitting

from lorafast.bench import models
from lorafast.ops import siblings

CPU = torch.device("cpu")
TINY = Model("tiny", 32, 4, 2, 8, 48, layers=4, vocabulary=512)
# Rows of whole blocks: bitsandbytes 0.50 misreads others on a CPU.
IN_BLOCKS = Model("tiny", 64, 4, 2, 16, 128, layers=4, vocabulary=512)


class FakeClock:
    def round(self, turns, first):
        for index, (_, turn) in enumerate(turns, first):
            with turn(index) as call:
                call()
        return {name: 2.0 if name == FROZEN else 3.0 for name, _ in turns}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(job, "clock_for", lambda device: FakeClock())

    def measure(against, dtype="fp32", base="dense"):
        size = Size(TINY if base == "dense" else IN_BLOCKS, 2, 16, dtype, base)
        return models.measure(size, 4, against, device=CPU, seconds=0.0)

    return measure


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_arm_computes_the_same_step(measured, dtype, monkeypatch):
    monkeypatch.setattr(siblings, "FEWEST_ROWS", 1)
    monkeypatch.setattr(siblings, "FEWEST_ELEMENTS", 1)
    others = ["peft", "aten", "reference", SIBLINGS, FULL]
    rows = measured(others, dtype)
    assert [row.contender for row in rows] == [FROZEN, "lorafast", *others]
    for row in rows:
        assert row.wrong is None
        assert row.unavailable is None
        assert row.overhead.median == (1.0 if row.contender == FROZEN else 1.5)
        assert row.peak_bytes > 0
    text = job.format_rows(rows)
    assert " 8 " in text  # tokens a second: 16 in 2 s


def test_full_fine_tuning_trains_a_copy_of_all_weights():
    frozen = arms.build(Size(TINY, 2, 16, "fp32"), CPU)
    arm = arms.make(FULL, frozen, 4)
    (group,) = arm.optimizer.param_groups
    assert len(group["params"]) == len(list(frozen.parameters()))
    assert all(p.requires_grad for p in group["params"])
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen_at = {p.data_ptr() for p in frozen.parameters()}
    assert not frozen_at & {p.data_ptr() for p in group["params"]}


@pytest.mark.parametrize("base", ["nf4", "int8", "fp8"])
def test_every_arm_over_quantized_weights_computes_the_same_step(measured, base):
    rows = {row.contender: row for row in measured(["peft", "aten"], "bf16", base)}
    if base == "fp8":
        assert rows.pop("peft").unavailable == "bitsandbytes has no layer for fp8"
    for row in rows.values():
        assert row.wrong is None
        assert row.unavailable is None
        assert row.base == base
    adapters = sum(
        2 * 4 * 4 * (K + N) for K, N in IN_BLOCKS.linears.values()
    )  # two blocks, r, float32
    codes = sum(2 * stored_bytes(N, K, torch.bfloat16, base) for K, N in IN_BLOCKS.linears.values())
    dense = sum(2 * 2 * K * N for K, N in IN_BLOCKS.linears.values())
    held = rows[FROZEN].weights_bytes - dense + codes + adapters
    assert rows["lorafast"].weights_bytes == held
    if "peft" in rows:  # each layer has the 16 numbers too, and no two share an offset or a map
        assert rows["peft"].weights_bytes == held


def test_a_wrong_arm_has_no_time(measured, monkeypatch):
    right = arms._lorafast

    def wrong(name, model, r, operands):
        arm = right(name, model, r, operands)
        if name == "lorafast":
            layer = next(m for m in model.modules() if isinstance(m, arms.LoRALinear))
            layer.scaling *= 2
        return arm

    monkeypatch.setattr(arms, "_lorafast", wrong)
    rows = {row.contender: row for row in measured(["peft"])}
    assert "off by" in rows["lorafast"].wrong
    assert not rows["lorafast"].samples
    assert rows["peft"].wrong is None
    assert "WRONG" in job.format_rows(list(rows.values()))


def test_without_transformers_nothing_runs_and_says_why(measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = measured(["peft"])
    assert {row.unavailable for row in rows} == {
        "transformers is not installed (pip install transformers)"
    }


def test_without_peft_the_others_run(measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = {row.contender: row for row in measured(["peft"])}
    assert rows["peft"].unavailable == "PEFT is not installed (pip install peft)"
    assert rows["lorafast"].samples


def test_blocks_and_vocabulary_are_cut_by_the_same_factor():
    size = Size(MODELS["llama-8b"], 8, 1, "bf16")
    assert size.vocabulary == 128256 // 4
    assert Size(MODELS["llama-8b"], 32, 1, "bf16").vocabulary == 128256


def test_a_model_is_cut_to_what_fits(monkeypatch):
    model = MODELS["qwen-0.6b"]
    monkeypatch.setattr(arms, "_free_memory", lambda device: 1 << 60)
    by_time = [fitting(model, tokens, "bf16", CPU).layers for tokens in (1 << 20, 256, 1)]
    assert by_time[0] == 1  # a block alone is more than a second's arithmetic
    assert 1 < by_time[1] < model.layers
    assert by_time[2] == model.layers
    monkeypatch.setattr(arms, "_free_memory", lambda device: 1 << 20)
    assert fitting(model, 1, "bf16", CPU).layers == 1
