"""The README says what the records say."""

import importlib.util
from pathlib import Path

import pytest
from lorafast.bench.common.record import read

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "bench" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_and_records_agree(report):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.section_of(readme) == report.render(), "run python bench/report.py"


def test_there_is_a_record():
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_kept_record_is_whole_and_of_a_commit(path):
    content = read(path)
    assert content["complete"] is True
    assert content["machine"]["commit"]
    assert not content["machine"]["commit"].endswith("-dirty")
    assert not any(row["wrong"] for row in content["layer"])


def test_a_changed_figure_is_seen(report, tmp_path):
    for path in RECORDS:
        text = path.read_text(encoding="utf-8")
        (tmp_path / path.name).write_text(
            text.replace('"contender": "peft"', '"contender": "PEFT"')
        )
    assert report.render(tmp_path) != report.render()


def test_without_records_it_says_so(report, tmp_path):
    assert report.render(tmp_path) == "No run on a GPU is recorded yet."


def test_a_readme_without_marks_is_refused(report):
    with pytest.raises(ValueError, match="the README lacks"):
        report.section_of("# lorafast")
