"""Steps of two ranks, small: every arm is right, and what it sends is counted."""

import pytest
import torch
from lorafast.bench.common.record import Record
from lorafast.bench.common.steps import paragraphs
from lorafast.bench.distributed import job

SIZE = job.Size(
    hidden=64, intermediate=96, blocks=2, heads=4, vocabulary=128, sequences=4, tokens=8
)


@pytest.mark.slow
@pytest.mark.parametrize("layout", job.LAYOUTS)
def test_arms_are_right_and_send(layout):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    rows = job.measure(layout, SIZE, 4, "fp32", device=torch.device("cpu"), seconds=0.1)
    found = {row.contender: row for row in rows}
    assert list(found) == list(job.ARMS)
    without = {"peft", "accelerated"} if layout == "tp" else set()
    for name, row in found.items():
        assert row.wrong is None, row.wrong
        assert (row.unavailable is not None) == (name in without)
        assert bool(row.samples) == (name not in without)
    frozen, ours = found["frozen"], found["lorafast"]
    of_adapters = 4 * sum(4 * (K + N) for K, N in 2 * [*[(64, 64)] * 4, *[(64, 96)] * 3])
    if layout == "ddp":
        assert (frozen.sent, ours.collectives["all_reduce"]) == (0, 1)
        assert of_adapters <= ours.sent <= of_adapters + 64
    if layout == "fsdp2":  # the frozen weights twice, the adapters twice and their gradients once
        assert ours.sent - frozen.sent == pytest.approx(3 / 2 * of_adapters, rel=0.02)
        assert found["peft"].sent == ours.sent
    if layout == "tp":
        assert frozen.collectives == {"all_reduce": 2 * 4}
        assert ours.sent < frozen.sent * 2
    assert paragraphs(rows, job.describe)[0].startswith(job.describe(ours))


def test_a_wrong_arm_is_said(monkeypatch):
    """An arm whose gradients aren't those of the whole batch has no time."""
    own = job._Rank(0, "ddp", SIZE, 4, "fp32", "cpu")
    bounds = job._bounds(SIZE, 4, torch.float32)
    model = job._adapted("lorafast", SIZE.model(), 4)
    reason = own.why_wrong(model, bounds)  # of half of the batch
    assert reason is not None
    assert "lora_A" in reason or "lora_B" in reason
    own.batch = SIZE.batch(torch.float32)
    assert own.why_wrong(model, bounds) is None


def test_too_few_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    record = Record(torch.device("cpu"))
    assert job.run(4, "fp32", device=torch.device("cuda"), record=record) == []
    assert "needs 2 GPUs" in capsys.readouterr().out
