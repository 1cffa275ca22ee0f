"""What kernels execute, as a job: run in a process of its own, recorded, shown."""

import dataclasses
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


CYCLES = {"tensor": 4e3, "issue": 5e3, "shared": 6e3, "L2": 7e3, "memory": 8e3}
SHRINK = dataclasses.replace(
    ROW, operation="shrink", variant="", N=4096, launch_cycles=CYCLES, moved=3e6, least=2e6
)
OF_CUDA = dataclasses.replace(
    SHRINK, N=1024, backend="cuda", launch_cycles=CYCLES | {"issue": 9e3}, moved=2.4e6, registers=72
)


def as_json(*rows, without=None):
    return json.dumps({"rows": [vars(row) for row in rows], "without": without})


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


def test_cuda_beside_triton(counted, capsys):
    """A kernel is compared by the sizes that it has: shrink has no N."""
    counted(as_json(ROW, SHRINK, OF_CUDA))
    rows = executed.run(record=Record(torch.device("cpu")))
    ((cuda, triton),) = executed.beside(rows)
    assert (cuda, triton) == (OF_CUDA, [SHRINK])
    assert executed.alone(rows, executed.beside(rows)) == [ROW]
    assert executed.beside_cells(cuda, triton) == (
        "4.0 / 4.0", "9.0 / 5.0", "6.0 / 6.0", "7.0 / 7.0", "8.0 / 8.0", "issue / memory",
        "2.0 / 2.0", "1.20 / 1.50", "3 / 3", "64 / 64", "72 / 168", "1 / 1",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "shrink 8192 x 4096 -> 1024 r16" in printed
    assert "9.0 / 5.0" in printed
    assert "shrink 8192 x 4096 -> 4096 r16" not in printed


def test_a_layer_in_one_launch_stands_beside_two():
    layer = dataclasses.replace(OF_CUDA, operation="lora_linear", variant="decode")
    gemm = dataclasses.replace(
        SHRINK, operation="linear_expand", variant="forward", N=1024, launches=2
    )
    ((_, triton),) = executed.beside([SHRINK, gemm, layer])
    assert triton == [SHRINK, gemm]
    cells = executed.beside_cells(layer, triton)
    assert cells[:2] == ("4.0 / 8.0", "9.0 / 10.0")
    assert cells[5:8] == ("issue / memory", "2.0 / 2.0, 2.0", "1.20 / 3.00")
    assert cells[-1] == "1 / 3"
    ((_, none),) = executed.beside([SHRINK, layer])  # half of it is nothing to compare with
    assert none == []
    assert executed.beside_cells(layer, none)[:6:5] == ("4.0 / –", "issue / –")


def test_a_kernel_without_multiplies():
    nothing = AMOUNTS | {"multiplies": 0.0}
    mask = dataclasses.replace(
        OF_CUDA, operation="mask", step=nothing, r=0, N=0, in_flight=0.0, from_memory=0.0
    )
    assert mask.issued_per_multiply == 0.0
    assert mask.layer == "8192 x 4096"
    assert executed.beside_cells(mask, [])[6:] == (
        "– / –", "1.20 / –", "3 / –", "– / –", "72 / –", "1 / –"
    )  # fmt: skip


def test_without_nvcc_triton_alone_and_a_sentence(counted, tmp_path, capsys):
    path = tmp_path / "executed.json"
    record = Record(torch.device("cpu"), ["lorafast", "bench", "--executed"], path)
    counted(as_json(SHRINK, without="there is no nvcc"))
    assert executed.run(record=record) == [SHRINK]
    record.finish()
    content = read(path)
    assert (content["complete"], content["executed_without"]) == (
        True, [{"reason": "there is no nvcc"}]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("there is no nvcc")
    assert "shrink 8192 x 4096 -> 4096 r16" in printed


def test_a_record_from_before_has_triton_alone():
    old = {name: value for name, value in vars(ROW).items() if name not in (
        "backend", "launches", "from_memory", "launch_cycles", "moved", "least",
    )}  # fmt: skip
    assert executed.Row(**old).backend == executed.TRITON


def test_the_process_does_not_interpret(counted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    started = counted(as_json())
    executed.run(record=Record(torch.device("cpu")))
    ((command, environment),) = started
    assert command[1:] == ["-m", "ptx.counts", "--json"]
    assert (Path(__file__).parents[1] / "cuda" / "launchers.py").is_file()
    assert "TRITON_INTERPRET" not in environment
    root = Path(__file__).parents[2]
    expected = [root, *(root / "tests" / name for name in ("", "kernels", "cuda"))]
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


PLAIN = dataclasses.replace(
    ROW, variant="plain", r=0, backend="cuda", launch_cycles=CYCLES, moved=3e6, least=2e6,
    step_cycles={"tensor": 1024.0, "issue": 127.0, "shared": 1044.0, "memory": 512.0},
    tile_cycles={"tensor": 0.0, "issue": 968.0, "shared": 1036.0, "memory": 1024.0},
    stalls={"step": 153.0, "epilogue": 751.0},
    cycles={"tensor": 65536.0, "issue": 8000.0, "shared": 66000.0, "memory": 50000.0},
)  # fmt: skip
RANKED = dataclasses.replace(
    PLAIN, variant="forward", r=16,
    tile_cycles={"tensor": 256.0, "issue": 1500.0, "shared": 1292.0, "memory": 1408.0},
)  # fmt: skip


def test_a_gemm_stands_beside_itself_without_ranks():
    """By the unit that takes longest of all that is added: 532 cycles of issue."""
    rows = [ROW, RANKED, PLAIN, SHRINK]
    assert executed.gemms(rows) == [(RANKED, PLAIN), (PLAIN, PLAIN)]
    assert executed.added(RANKED, PLAIN) == 532 / 65536
    assert executed.added(PLAIN, PLAIN) is None
    assert executed.gemm_cells(RANKED, PLAIN) == (
        "1024 / 127 / 153", "2", "256", "1,500", "1,292", "1,408", "751", "0.8%", "–", "–",
    )  # fmt: skip
    # Of other tiles nothing is known.
    assert executed.added(dataclasses.replace(RANKED, tiles=256), PLAIN) is None


def test_where_there_is_a_timeline_it_says_what_is_added():
    line = {
        "clocks": 67170.0, "tensor": 65792.0, "added": 256.0, "idle: stores": 972.0,
        "idle: waits for stores": 216.0,
    }  # fmt: skip
    row = dataclasses.replace(RANKED, timeline=line)
    assert executed.added(row, None) == 256 / 66914
    assert executed.gemm_cells(row, None)[-3:] == ("0.4%", "97.9%", "stores 972")


def test_tiles_of_gemms_are_printed(counted, capsys):
    counted(as_json(RANKED, PLAIN))
    executed.run(record=Record(torch.device("cpu")))
    said = capsys.readouterr()
    assert "tensor / issued / stalls a step" in said.err + said.out
    assert "linear_expand plain 8192 x 4096 -> 1024 r0" in said.err + said.out
