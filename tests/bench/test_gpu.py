"""``make gpu`` on a machine without one: what it says, and its stages at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import torch
from lorafast.bench.gpu.__main__ import main

ROOT = Path(__file__).parents[2]


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lorafast.bench.gpu", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    process = run()
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == "make gpu needs an NVIDIA GPU, and PyTorch sees none here\n"


@pytest.mark.slow
def test_every_stage_runs(tmp_path):
    pytest.importorskip("triton")
    more = {"LORAFAST_OUT": str(tmp_path), **interpreter.of_a_process()}
    process = run("--rehearse", "--skip", "tests", "--minutes", "5", **more)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = tmp_path.glob("rehearsal-*.json")
    record = json.loads(path.read_text())
    assert record["complete"] is True
    for kind in (
        "operations",
        "layer",
        "sweep",
        "decode",
        "call_overhead",
        "models",
        "accelerate",
        "traffic",
    ):
        assert record[kind], kind
    assert record["tune"]
    assert not record["skipped"]
    names = {p.suffix for p in tmp_path.iterdir()}
    assert names == {".json", ".log", ".png"}
    assert (tmp_path / "tuned-interpreter.json").is_file()
    assert path.with_suffix(".log").read_text() == process.stdout


@pytest.mark.parametrize("minutes", ["nan", "inf", "0", "-1"])
def test_minutes_that_are_none_are_refused(capsys, minutes):
    with pytest.raises(SystemExit) as ended:
        main(["--rehearse", "--minutes", minutes])
    assert ended.value.code == 2
    assert "expected a positive number" in capsys.readouterr().err


def test_a_folder_that_can_not_be_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("LORAFAST_OUT", "/dev/null/out")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # restored afterwards: the command sets it
    assert main(["--rehearse"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("make gpu: /dev/null/out/rehearsal-")
    assert line.endswith(".json can't be written: Not a directory")
