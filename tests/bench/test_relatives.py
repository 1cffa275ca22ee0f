import pytest

pytest.importorskip("peft")

import torch
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import Shape
from lorafast.bench.relatives import drawing, job, kinds

from lorafast.integrations.peft import family, known, low_rank

CPU = torch.device("cpu")
SHAPE = Shape("", 6, 64, 64)


def timed_kinds():
    """Those whose layers lorafast knows in this release of PEFT."""
    return [k for k in kinds.KINDS if k not in family.METHODS or known.why_changed(k) is None]


def test_every_kind_is_checked_and_timed(tmp_path):
    record = Record(CPU, ["test"], tmp_path / "run.json")
    names = timed_kinds()
    rows = job.run([(SHAPE, 2)], ["bf16"], device=CPU, record=record, seconds=0.001, kinds=names)
    assert [row.kind for row in rows] == ["", *(k for k in names for _ in "12")]
    # VeRA's rank is that of PEFT's default, more than this layer is wide.
    assert {row.kind for row in rows if row.unavailable} <= {"VeRA"}
    there = [row for row in rows if row.unavailable is None]
    assert [row.wrong for row in there] == [None] * len(there)
    assert all(len(row.samples) >= 5 and row.peak_bytes > 0 for row in there)
    assert [job.Row(**row).name for row in record.rows("relatives")] == [row.name for row in rows]
    said, header_and_lines = job.paragraphs(rows)[1:]
    assert said == "M=6, 64 → 64, bf16, forward + backward with dx:"
    assert len(header_and_lines.splitlines()) == 2 + len(names)


def test_what_is_wrong_has_no_time_and_what_is_left_to_peft_is_said(monkeypatch):
    right = low_rank._added  # which a small call takes its terms by

    def doubled(y, x, terms):
        return 2 * right(y, x, terms)

    monkeypatch.setattr(low_rank, "_added", doubled)
    rows = job.measure(SHAPE, 32, "fp32", device=CPU, seconds=0.001, kinds=["AdaLoRA", "LoHa"])
    by_name = {f"{row.kind} {row.contender}": row for row in rows}
    assert by_name["AdaLoRA accelerated"].samples == []
    assert by_name["AdaLoRA peft"].wrong is None
    assert by_name["LoHa accelerated"].unavailable.startswith("left to PEFT: ")
    text = job.format_rows(rows)
    assert "WRONG: y is off by" in text
    assert "not run: left to PEFT" in text


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = {"M": 6, "K": 64, "N": 64, "r": 2, "dtype": "fp32", "frozen_samples": [1.0, 1.0]}
    rows = [
        job.Row(contender=name, kind=kind, samples=samples, **sizes)
        for name, kind, samples in (
            ("frozen", "", [1.0, 1.0]), ("peft", "LoKr", [3.0, 4.0]), ("accelerated", "LoKr", []),
        )
    ]  # fmt: skip
    written = drawing.plot(rows, tmp_path / "of_kinds.png")
    assert [path.name for path in written] == ["of_kinds.png", "of_kinds-dark.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    with pytest.raises(ValueError, match="nothing to draw"):
        drawing.plot(rows[:1], tmp_path / "none.png")
