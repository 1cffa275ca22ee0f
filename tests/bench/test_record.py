import json

import pytest
import torch
from lorafast.bench.common.problem import Problem
from lorafast.bench.common.record import FORMAT, Record, read
from lorafast.bench.common.shapes import Shape
from lorafast.bench.compare import compare
from lorafast.bench.layer import Row

import lorafast

PROBLEM = Problem(Shape("tiny", 16, 24, 40), 4, "fp32", "fp32", 0.0)


def row(contender, samples, **fields):
    return Row(PROBLEM, "both", contender, samples=samples, frozen_samples=[1.0] * 5, **fields)


def written(path, *rows):
    record = Record(torch.device("cpu"), ["lorafast", "bench"], path)
    record.add("layer", rows)
    record.finish()
    return path


def test_a_record_says_where_and_how_it_was_taken(tmp_path):
    content = read(written(tmp_path / "folder" / "a.json", row("lorafast", [1.1] * 5)))
    assert content["command"] == "lorafast bench"
    assert content["complete"] is True
    assert content["machine"]["lorafast"] == lorafast.__version__
    assert content["machine"]["packages"]["torch"] == torch.__version__.split("+")[0] or (
        content["machine"]["packages"]["torch"] == torch.__version__
    )
    assert content["machine"]["device"]
    assert len(content["clock_state"]) == 3  # at the start, with the rows, at the end
    assert content["layer"][0]["samples"] == [1.1] * 5


def test_a_record_knows_whether_something_was_wrong():
    record = Record(torch.device("cpu"), [])
    record.add("layer", [row("lorafast", [1.0] * 5)])
    assert not record.any_wrong()
    record.add("layer", [row("peft", [], wrong="y is off")])
    assert record.any_wrong()


def test_a_record_is_on_disk_as_soon_as_it_is_added_to(tmp_path):
    path = tmp_path / "a.json"
    record = Record(torch.device("cpu"), [], path)
    record.add("layer", [row("lorafast", [1.0] * 5)])
    assert read(path)["complete"] is False
    assert len(read(path)["layer"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_is_skipped_makes_a_record_incomplete(tmp_path):
    record = Record(torch.device("cpu"), [], tmp_path / "a.json")
    record.skip("the last row")
    record.finish()
    content = read(tmp_path / "a.json")
    assert content["complete"] is False
    assert content["skipped"] == ["the last row"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", json.dumps({"format": FORMAT + "0"}), json.dumps({"format": FORMAT})],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="recorded run"):
        read(path)


def test_compare_sets_ratios_side_by_side(tmp_path):
    near = [1.1, 1.1, 1.2, 1.3, 1.3]
    a = written(tmp_path / "a.json", row("lorafast", near), row("peft", [1.5] * 5))
    b = written(tmp_path / "b.json", row("lorafast", [1.2] * 5), row("peft", [1.2] * 5))
    lines = compare(a, b).splitlines()
    (lorafast_line,) = [line for line in lines if " lorafast " in line]
    (peft_line,) = [line for line in lines if " peft " in line]
    assert lorafast_line.split()[-1] == "1.000"  # within the spread: no verdict
    assert peft_line.split()[-2:] == ["0.800", "faster"]


def test_compare_needs_a_row_in_common(tmp_path):
    a = written(tmp_path / "a.json", row("lorafast", [1.0] * 5))
    b = written(tmp_path / "b.json", row("peft", [1.0] * 5))
    with pytest.raises(ValueError, match="no row in common"):
        compare(a, b)
