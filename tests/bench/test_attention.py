import pytest

pytest.importorskip("peft")

import torch
from lorafast.bench.attention import job
from lorafast.bench.common import steps
from lorafast.bench.common.record import Record

from lorafast.nn import LoRAMultiheadAttention

CPU = torch.device("cpu")
SIZE = job.Size(batch=3, tokens=33, width=128, blocks=2)


def test_every_arm_is_checked_and_timed(tmp_path):
    record = Record(CPU, ["test"], tmp_path / "run.json")
    rows = job.run(8, "fp32", device=CPU, record=record, size=SIZE, seconds=0.01)
    assert [row.contender for row in rows] == list(job.ARMS)
    assert [(row.wrong, row.unavailable) for row in rows] == [(None, None)] * len(rows)
    assert all(len(row.samples) >= 5 and row.peak_bytes > 0 for row in rows)
    assert len(record.rows("attention")) == len(rows)


def test_what_is_wrong_has_no_time(monkeypatch):
    forward = LoRAMultiheadAttention.forward

    def without_scaling(self, *args, **kwargs):
        before, self._scaling = self._scaling, self._scaling / 2
        y = forward(self, *args, **kwargs)
        self._scaling = before
        return y

    monkeypatch.setattr(LoRAMultiheadAttention, "forward", without_scaling)
    rows = {r.contender: r for r in job.measure(SIZE, 8, "fp32", device=CPU, seconds=0.01)}
    assert rows["lorafast"].samples == []
    assert "WRONG" in steps.format_rows([rows["lorafast"]])
    assert rows["peft"].wrong is None
