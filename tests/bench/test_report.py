"""The README says what the records say."""

import importlib.util
import json
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
    kinds = [rows for rows in content.values() if isinstance(rows, list)]
    assert any(isinstance(row, dict) for rows in kinds for row in rows)
    assert not any(isinstance(row, dict) and row.get("wrong") for rows in kinds for row in rows)


def test_a_changed_figure_is_seen(report, tmp_path):
    rendered = []
    for name, factor in (("same", 1.0), ("again", 1.0), ("slower", 2.0)):
        folder = tmp_path / name / "results"
        folder.mkdir(parents=True)
        for path in RECORDS:
            content = json.loads(path.read_text(encoding="utf-8"))
            for row in content.get("layer", ()):
                if row["contender"] == "peft":
                    row["samples"] = [factor * sample for sample in row["samples"]]
            (folder / path.name).write_text(json.dumps(content), encoding="utf-8")
        rendered.append(report.render(folder))
    assert rendered[0] == rendered[1]
    assert rendered[0] != rendered[2]


def test_without_records_it_says_so(report, tmp_path):
    assert report.render(tmp_path) == "No run on a GPU is recorded yet."


def test_a_readme_without_marks_is_refused(report):
    with pytest.raises(ValueError, match="the README lacks"):
        report.section_of("# lorafast")
