import pytest

pytest.importorskip("peft")

import torch
from lorafast.bench.common import steps
from lorafast.bench.common.record import Record
from lorafast.bench.convolutions import job

from lorafast.nn import LoRAConv

CPU = torch.device("cpu")
SIZE = job.Size(4, 64, (16, 16, 24, 24))


@pytest.mark.slow
def test_every_arm_is_checked_and_timed(tmp_path):
    record = Record(CPU, ["test"], tmp_path / "run.json")
    rows = job.run(8, "fp32", device=CPU, record=record, size=SIZE, seconds=0.01)
    assert [row.contender for row in rows] == 2 * list(job.ARMS)
    assert [(row.wrong, row.unavailable) for row in rows] == [(None, None)] * len(rows)
    assert all(len(row.samples) >= 5 and row.peak_bytes > 0 for row in rows)
    assert len(record.rows("convolutions")) == len(rows)


def test_what_is_wrong_has_no_time(monkeypatch):
    forward = LoRAConv.forward

    def without_scaling(self, x):
        before, self._scaling = self._scaling, self._scaling / 2
        y = forward(self, x)
        self._scaling = before
        return y

    monkeypatch.setattr(LoRAConv, "forward", without_scaling)
    rows = {r.contender: r for r in job.measure(SIZE, 8, "fp32", device=CPU, seconds=0.01)}
    assert rows["lorafast"].samples == []
    assert "WRONG" in steps.format_rows([rows["lorafast"]])
    assert rows["peft"].wrong is None
