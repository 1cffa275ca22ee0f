import torch
from lorafast.bench.bottlenecks import job
from lorafast.bench.common import steps
from lorafast.bench.common.record import Record

from lorafast.nn import Bottleneck

CPU = torch.device("cpu")
SIZE = job.Size(9, 24, 40)


def test_every_arm_is_checked_and_timed(tmp_path):
    record = Record(CPU, ["test"], tmp_path / "run.json")
    rows = job.run([5], ["bf16"], device=CPU, record=record, sizes=[SIZE], seconds=0.001)
    assert [row.contender for row in rows] == 2 * list(job.ARMS)
    assert [row.activation for row in rows] == ["gelu"] * 5 + ["relu"] * 5
    there = [row for row in rows if row.unavailable is None]
    assert {"adapters"} >= {row.contender for row in rows if row.unavailable is not None}
    assert [row.wrong for row in there] == [None] * len(there)
    assert all(len(row.samples) >= 5 and row.peak_bytes > 0 for row in there)
    assert len(record.rows("bottlenecks")) == len(rows)


def test_what_is_wrong_has_no_time(monkeypatch):
    forward = Bottleneck.forward

    def without_scaling(self, h, residual=None):
        before, self.scaling = self.scaling, self.scaling / 2
        y = forward(self, h, residual)
        self.scaling = before
        return y

    monkeypatch.setattr(Bottleneck, "forward", without_scaling)
    found = job.measure(SIZE, 5, "gelu", "fp32", device=CPU, seconds=0.001)
    rows = {row.contender: row for row in found}
    assert rows["lorafast"].samples == []
    assert "WRONG" in steps.format_rows([rows["lorafast"]])
    assert rows["torch"].wrong is None
