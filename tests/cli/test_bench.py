import importlib.util
import json
import os
import socket
import stat
import subprocess
import sys
import threading

import pytest
import torch
from environment import bare, lorafast_command
from lorafast.bench.common.contenders import BUILDERS
from lorafast.bench.common.record import read

from lorafast.bench import layer
from lorafast.cli import main

TINY = [
    "--shapes",
    "8,16,24",
    "--rank",
    "2",
    "--dropout",
    "0",
    "--seconds",
    "0.01",
    "--device",
    "cpu",
]


def test_the_table_its_record_and_its_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    record, picture = tmp_path / "a.json", tmp_path / "b.png"
    words = ["bench", *TINY, "--pass", "fwd,both", "--against", "aten,frozen"]
    assert main([*words, "--json", str(record), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "M=8 K=16 N=24  r=2  fp32  no dropout  forward + backward with dx" in out
    for contender in ("frozen", "lorafast", "aten", "frozen again"):
        assert f"\n  {contender} " in out
    assert picture.is_file()
    assert picture.with_name("b-dark.png").is_file()
    content = json.loads(record.read_text())
    assert content["complete"] is True
    assert {row["which"] for row in content["layer"]} == {"fwd", "both"}
    assert content["sweep"]
    assert main(["bench", "compare", str(record), str(record)]) == 0
    assert "1.000" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_is_done(capsys, tmp_path, monkeypatch):
    measure = layer.measure
    done = []

    def interrupted(problem, *arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(problem)
        return measure(problem, *arguments, **options)

    monkeypatch.setattr("lorafast.bench.layer.job.measure", interrupted)
    record = tmp_path / "a.json"
    words = ["bench", *TINY, "--rank", "2,4", "--against", "aten", "--json", str(record)]
    assert main(words) == 130
    assert "what was done is kept" in capsys.readouterr().err
    content = json.loads(record.read_text())
    assert content["complete"] is False
    assert {row["problem"]["r"] for row in content["layer"]} == {2}
    assert all(row["samples"] for row in content["layer"])


def test_a_wrong_contender_fails_the_command(capsys, monkeypatch):
    def wrong(problem, tensors):
        contender = BUILDERS["lorafast"](problem, tensors)
        right = contender.layer
        contender.layer = lambda x: right(x) * 1.01
        return contender

    monkeypatch.setitem(BUILDERS, "aten", wrong)
    assert main(["bench", *TINY, "--against", "aten"]) == 1
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("  aten")]
    assert line.startswith("  aten  WRONG: y is off by")


def test_without_peft_and_matplotlib_the_rest_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture = tmp_path / "a.png"
    assert main(["bench", *TINY, "--against", "peft", "--plot", str(picture)]) == 0
    captured = capsys.readouterr()
    assert "  peft  not run: PEFT is not installed (pip install peft)" in captured.out
    assert captured.err == "no plot: matplotlib is not installed (pip install matplotlib)\n"
    assert not picture.exists()


def test_traffic_needs_no_gpu(capsys):
    assert main(["bench", "--traffic", "--against", "peft,aten"]) == 0
    out = capsys.readouterr().out
    (frozen,) = {" ".join(s.split()) for s in out.splitlines() if s.startswith("  frozen")}
    assert frozen == "frozen 1 1 168 168 336 1.00 1.00 × 336"


def test_a_shape_may_have_a_rank_of_its_own(tmp_path):
    path = tmp_path / "run.json"
    words = [
        "--shapes",
        "8,16,24,2",
        "8,16,32",
        "--rank",
        "3,4",
        "--dropout",
        "0",
        "--seconds",
        "0.01",
    ]
    assert main(["bench", *words, "--against", "frozen", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["layer"]
    found = [(row["problem"]["shape"]["N"], row["problem"]["r"]) for row in rows]
    assert list(dict.fromkeys(found)) == [(24, 2), (32, 3), (32, 4)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "llama-9b"], "shape 'llama-9b' is neither M,K,N[,R] nor one of minilm"),
        (["--dtype", "int8"], "'int8' is not one of fp32, bf16, fp16"),
        (["--against", "nobody"], "'nobody' is not one of frozen, lorafast"),
        (["--pass", "sideways"], "'sideways' is not one of fwd, bwd, both, infer"),
        *(
            (["--shapes", word], f"shape {word!r} is not M,K,N[,R]: whole numbers from 1")
            for word in (
                "8,8,8,0",
                "8,8,8,-1",
                "8,8,8,1000000",
                "8,8",
                "0,8,8",
                "8,-1,8",
                "8,,8",
                "",
                "8.5,8,8",
                "nan,8,8",
                "1e3,8,8",
                "8,8,8,8,8",
                f"8,8,{2**31}",
            )
        ),
        (["--shapes", f"8,8,{'9' * 5000}"], "shape '8,8,9999"),
        (["--shapes", "1000000,1000000,8"], "M=1000000 K=1000000 N=8  r=16  fp32  no dropout: its"),
        (["--dropout", "1.5"], "1.5 is not from 0 to below 1"),
        (["--rank", "0"], "0 is not at least 1"),
        (["--rank", "abc"], "'abc' is not a whole number"),
        (["--rank", ""], "'' is not a whole number"),
        (["--rank", "9" * 5000], "is not a whole number"),
        (["--rank", "100000"], "100000 is more than 65536"),
        (["--tokens", str(2**31)], "2147483648 is more than 1073741824"),
        (["--dropout", "nan"], "nan is not from 0 to below 1"),
        (["--dropout", "much"], "'much' is not a number"),
        (["--seconds", "nan"], "nan is not a positive number"),
        (["--seconds", "inf"], "inf is not a positive number"),
        (["--seconds", ""], "'' is not a number"),
        (["--against", ""], "'' is not one of frozen, lorafast"),
        (["--json", ""], ". can't be written: it is a folder"),
        (["--json", "/"], "/ can't be written: it is a folder"),
        (["--json", "/dev/null/a.json"], "/dev/null"),
        (["--plot", "/dev/null/a/b.png"], "/dev/null"),
        (["--models", "minilm"], "'minilm' is not one of qwen-0.6b"),
        *(
            (["--device", word], f"--device is {word!r}, expected cpu, cuda or cuda:<index>")
            for word in ("nowhere", "", "mps", "meta", "cpu:99999999999", "cuda:x", "cuda:-1")
        ),
        (["--device", "cuda:99"], "--device is 'cuda:99', and PyTorch sees"),
        (["compare", "missing.json", "missing.json"], "missing.json can't be read"),
    ],
)
def test_bad_options_are_named(capsys, words, said):
    try:
        status = main(["bench", *words])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "the picture is '.', expected a file of "),
        ("a.txt", "a.txt', expected a file of "),
        ("/dev/null", "a picture can't be written there: it is no file: '/dev/null'"),
        (".", "the picture is '.', expected a file of "),
    ],
)
def test_a_plot_that_can_not_be_is_refused_before_anything_is_measured(capsys, name, said):
    assert main(["bench", *TINY, "--plot", name]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def bench_into(path):
    return main(["bench", *TINY, "--against", "frozen", "--json", str(path)])


def test_a_link_stays_one_and_its_file_is_written(tmp_path):
    target, link = tmp_path / "folder" / "a.json", tmp_path / "link.json"
    target.parent.mkdir()
    link.symlink_to(target)
    assert bench_into(link) == 0
    assert link.is_symlink()
    assert read(target)["complete"] is True
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]


def test_a_pipes_reader_gets_the_record_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: texts.append(pipe.read_text(encoding="utf-8")))
    texts = []
    reader.start()
    assert bench_into(pipe) == 0
    reader.join(timeout=30)
    assert pipe.is_fifo()
    assert json.loads(texts[0])["complete"] is True


def test_a_device_stays_one():
    before = os.stat("/dev/null")
    assert bench_into("/dev/null") == 0
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode)
    assert after.st_ino == before.st_ino


@pytest.mark.slow
def test_the_record_may_follow_the_table_on_stdout(tmp_path):
    out = tmp_path / "out.txt"
    command = lorafast_command("bench", *TINY, "--against", "frozen", "--json", "/dev/stdout")
    with out.open("w") as stdout:
        subprocess.run(command, env=bare(tmp_path, "numpy"), stdout=stdout, check=True)
    text = out.read_text(encoding="utf-8")
    assert text.lstrip().startswith("time ")
    record, _, rest = text[text.index("\n{\n") :].partition("\n}\n")
    assert json.loads(record + "}")["complete"] is True
    assert rest == "recorded in /dev/stdout\n"


def test_a_socket_is_refused(tmp_path, capsys):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert bench_into(tmp_path / "s") == 2
    assert "can't be written: it is a socket" in capsys.readouterr().err


def test_a_disk_that_is_full_meanwhile_is_one_line(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.json"
    calls = []

    def full_later(path, content):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr("lorafast.bench.common.output.write_whole", full_later)
    assert bench_into(path) == 2
    assert capsys.readouterr().err.endswith(
        f"lorafast bench: {path} can't be written: No space left on device\n"
    )


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")],
    ids=["Python", "CUDA", "CPU"],
)  # fmt: skip
def test_out_of_memory_is_one_line_and_what_was_done_is_kept(tmp_path, capsys, monkeypatch, error):
    def measure(*arguments, **options):
        raise error

    monkeypatch.setattr("lorafast.bench.layer.job.measure", measure)
    assert bench_into(tmp_path / "a.json") == 2
    assert "\nlorafast bench: out of memory: " in "\n" + capsys.readouterr().err
    assert read(tmp_path / "a.json")["complete"] is False


def test_a_model_that_no_memory_holds_is_not_built(capsys):
    words = ["--models", "qwen-0.6b", "--model-layers", "100000000", "--against", "frozen"]
    assert main(["bench", *words, "--device", "cpu"]) == 0
    assert "frozen  not run: 100000000 blocks of qwen-0.6b and 256 tokens take" in (
        capsys.readouterr().out
    )
