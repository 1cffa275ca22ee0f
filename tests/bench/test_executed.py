"""What kernels execute, as a job: run in a process of its own, recorded, shown."""

import json
import os
import subprocess
import types
from pathlib import Path

import pytest
import torch
from lorafast.bench.common.record import Record, read
from lorafast.bench.executed import job

from lorafast.bench import executed
from lorafast.cli import main

AMOUNTS = {
    "issued": {"tensor": 8.0, "integer": 24.0}, "multiplies": 16.0 * 16 * 8 * 16, "sectors": 64.0,
    "wavefronts": 40.0, "conflicts": 3.0,
}  # fmt: skip
ROW = executed.Row(
    "linear_expand", "dx", 90, 8192, 4096, 1024, 16, AMOUNTS, AMOUNTS, AMOUNTS, steps=64, tiles=512,
    in_flight=65536.0, from_l2=True, registers=168,
    cycles={"tensor": 1234.0, "issue": 2500.0, "shared": 40960.0, "memory": 1.0}, bound="shared",
    exposed=99.5,
)  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """Stands in for the process that counts: what it prints, says, and ends with."""

    def stand_in(stdout="", stderr="", status=0):
        started = []

        def run(command, **options):
            started.append((command, options["env"]))
            return subprocess.CompletedProcess(command, status, stdout, stderr)

        monkeypatch.setattr(job, "subprocess", types.SimpleNamespace(run=run))
        return started

    return stand_in


def as_json(*rows):
    return json.dumps([vars(row) for row in rows])


def test_names_and_ratios():
    assert ROW.name == "linear_expand dx"
    assert ROW.issued_per_multiply == 2.0


def test_rows_are_recorded_and_read_back(counted, tmp_path, capsys):
    path = tmp_path / "executed.json"
    record = Record(torch.device("cpu"), ["lorafast", "bench", "--executed"], path)
    counted(as_json(ROW))
    assert executed.run(record=record) == [ROW]
    record.finish()
    assert [executed.Row(**row) for row in read(path)["executed"]] == [ROW]
    printed = capsys.readouterr().out
    *_, line = (line for line in printed.split("\n") if "8192 x 4096 -> 1024 r16" in line)
    assert line.split()[-11:] == [
        "90", "1.2", "2.5", "41.0", "0.0", "shared", "2.00", "3", "64", "KB", "168",
    ]  # fmt: skip


def test_the_process_does_not_interpret(counted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    started = counted(as_json())
    executed.run(record=Record(torch.device("cpu")))
    ((command, environment),) = started
    assert command[1:] == ["-m", "ptx.counts", "--json"]
    assert "TRITON_INTERPRET" not in environment
    root = Path(__file__).parents[2]
    expected = [root, root / "tests", root / "tests" / "kernels"]
    assert environment["PYTHONPATH"].split(os.pathsep) == list(map(str, expected))


@pytest.mark.parametrize(
    ("stderr", "status", "sentence"),
    [
        ("Traceback\n  File\nModuleNotFoundError: No module named 'triton'\n", 1,
         "--executed: ModuleNotFoundError: No module named 'triton'"),
        ("ptx.launch.Fault: k: line 3: CTA\n  3: ret;\n", 1,
         "--executed: ptx.launch.Fault: k: line 3: CTA"),
        ("", -9, "--executed: exit status -9"),
    ],
)  # fmt: skip
def test_what_cannot_be_executed_is_said(counted, capsys, stderr, status, sentence):
    counted("", stderr, status)
    assert main(["bench", "--executed"]) == 2
    assert capsys.readouterr().err.rstrip().endswith(sentence)


def test_outside_a_checkout(monkeypatch, tmp_path, capsys):
    """Nothing is measured before it is said."""
    monkeypatch.setattr(job, "_ROOT", tmp_path)
    assert main(["bench", "--layers", "--executed"]) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.rstrip().endswith(
        "--executed needs a checkout: what executes kernels lies in its tests/ptx"
    )
    with pytest.raises(executed.UnexecutedError, match="needs a checkout"):
        executed.run(record=Record(torch.device("cpu")))


def test_nothing_else_is_measured(counted, capsys):
    counted(as_json(ROW))
    assert main(["bench", "--executed"]) == 0
    assert "frozen" not in capsys.readouterr().out
