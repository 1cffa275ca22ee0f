"""Steps of several ranks, small: every arm is right, and what it sends is counted."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from lorafast.bench.common.record import Record
from lorafast.bench.common.steps import paragraphs
from lorafast.bench.distributed import job
from lorafast.bench.distributed.layouts import LAYOUTS, Layout

SIZE = job.Size(
    hidden=64, intermediate=96, blocks=2, heads=4, vocabulary=128, sequences=4, tokens=8
)
LAYERS = SIZE.blocks * [*[(64, 64)] * 4, *[(64, 96)] * 3]
R = 4
OF_ADAPTERS = 4 * sum(R * (K + N) for K, N in LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arms_are_right_and_send(layout):
    pytest.importorskip("transformers.distributed")
    pytest.importorskip("peft")
    size = (
        dataclasses.replace(SIZE, blocks=1) if layout == "tp-fsdp2" else SIZE
    )  # it has most ranks
    rows = job.measure(layout, size, R, "fp32", device=torch.device("cpu"), seconds=0.1)
    found = {row.contender: row for row in rows}
    assert list(found) == list(job.arms_of(LAYOUTS[layout]))
    for name, row in found.items():
        assert row.wrong is None, row.wrong
        left_to_peft = name == "accelerated" and "tp" in layout
        assert ("a DTensor" in (row.unavailable or "")) == left_to_peft, row.unavailable
        assert bool(row.samples) == (not left_to_peft)
    frozen, ours, peft = (found[name] for name in ("frozen", "lorafast", "peft"))
    if layout == "ddp":
        assert (frozen.sent, ours.collectives["all_reduce"]) == (0, 1)
        assert OF_ADAPTERS <= ours.sent <= OF_ADAPTERS + 64
    if layout == "fsdp2":  # the frozen weights twice, the adapters twice and their gradients once
        assert ours.sent - frozen.sent == pytest.approx(3 / 2 * OF_ADAPTERS, rel=0.02)
        assert peft.sent == ours.sent
    if layout == "tp":
        assert frozen.collectives == {"all_reduce": 2 * 4}
        assert ours.sent < frozen.sent * 2
        # dx of q, k, v, gate and up one by one; of the adapters x Aᵀ, and its gradient of those five
        of_plan = found[job.BY_TRANSFORMERS]
        assert of_plan.collectives == {"all_reduce": 2 * (2 + 5)}
        assert peft.collectives == {"all_reduce": 2 * (2 + 5) + 2 * (2 + 5)}
        assert peft.sent - of_plan.sent == 14 * 4 * (R * SIZE.sequences * SIZE.tokens)
    if layout == "tp-fsdp2":
        assert all(row.ranks == 4 for row in rows)
        assert ours.collectives["reduce_scatter"] == peft.collectives["reduce_scatter"] == 1
    assert paragraphs(rows, job.describe)[0].startswith(job.describe(ours))


@pytest.fixture
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_wrong_arm_is_said():
    """An arm whose gradients aren't those of the whole batch has no time."""
    pytest.importorskip("transformers")
    own = job._Rank(0, Layout("alone", 1), SIZE, R, torch.float32, "cpu")
    arms = {name: job._adapted(name, SIZE.model(), R) for name in ("frozen", "lorafast")}
    bounds = {name: job._bounds(name, SIZE, R, torch.float32) for name in arms}
    for name, model in arms.items():
        assert own.why_wrong(model, bounds[name]) is None
    x, labels = own.batch
    own.batch = x, labels.flip(0)
    for name, model in arms.items():
        assert "dx is off" in own.why_wrong(model, bounds[name])
    of_adapters = {name: bound for name, bound in bounds["lorafast"].items() if name != "dx"}
    assert ".lora_A is off" in own.why_wrong(arms["lorafast"], of_adapters)


def test_too_few_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    record = Record(torch.device("cpu"))
    assert job.run(4, "fp32", device=torch.device("cuda"), record=record) == []
    said = capsys.readouterr().out
    assert "needs 2 GPUs" in said
    assert "needs 4 GPUs" in said
