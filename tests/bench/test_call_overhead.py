import pytest
import torch
from lorafast.bench.call_overhead import PASSES, measure
from lorafast.bench.call_overhead.job import format_rows
from lorafast.bench.common.contenders import FROZEN


@pytest.mark.parametrize("which", PASSES)
def test_every_pass_has_its_rows(which):
    rows = measure(which, ["aten"], device=torch.device("cpu"), rounds=2)
    assert [row.contender for row in rows] == [FROZEN, "lorafast", "aten"]
    for row in rows:
        assert len(row.samples) == 2
        assert row.wrong is None
    text = format_rows(rows)
    assert "µs a call" in text
