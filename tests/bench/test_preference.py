import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from lorafast.bench.common.record import Record
from lorafast.bench.preference import job

CPU = torch.device("cpu")
SIZE = job.Size(sequences=2, tokens=8)


def test_every_arm_is_checked_and_timed(tmp_path):
    record = Record(CPU, ["test"], tmp_path / "run.json")
    rows = job.run(8, "fp32", device=CPU, record=record, size=SIZE, seconds=0.01)
    assert [(row.which, row.contender) for row in rows] == [
        (which, name) for which in job.WHICH for name in job.ARMS
    ]
    assert [(row.wrong, row.unavailable) for row in rows] == [(None, None)] * len(rows)
    assert all(len(row.samples) >= 5 and row.peak_bytes > 0 for row in rows)
    assert len(record.rows("preference")) == len(rows)


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_what_is_wrong_has_no_time(monkeypatch, dtype):
    both = job._both

    def the_wrong_way_round(name, model, x):
        policy, reference = both(name, model, x)
        return (reference, policy) if name == "mixed" else (policy, reference)

    monkeypatch.setattr(job, "_both", the_wrong_way_round)
    rows = job.measure(SIZE, 8, dtype, device=CPU, seconds=0.01)
    mixed = [row for row in rows if row.contender == "mixed"]
    assert all("the policy is off by" in row.wrong and row.samples == [] for row in mixed)
    assert all(row.wrong is None for row in rows if row.contender != "mixed")
