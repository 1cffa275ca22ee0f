import json
import sys

import pytest
from lorafast.bench.common.contenders import BUILDERS

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
    assert frozen == "frozen 1 1 168 168 336 1.00 × 336"


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
        (["--shapes", "llama-9b"], "shape 'llama-9b' is neither M,K,N nor one of minilm"),
        (["--dtype", "int8"], "'int8' is not one of fp32, bf16, fp16"),
        (["--against", "nobody"], "'nobody' is not one of frozen, lorafast"),
        (["--pass", "sideways"], "'sideways' is not one of fwd, bwd, both, infer"),
        (["--shapes", "8,8,8,0"], "shape '8' is neither M,K,N nor one of minilm"),
        (["--dropout", "1.5"], "1.5 is not from 0 to below 1"),
        (["--rank", "0"], "0 is not at least 1"),
        (["--rank", "abc"], "invalid literal for int() with base 10: 'abc'"),
        (["--seconds", "nan"], "nan is not a positive number of seconds"),
        (["--json", "/dev/null/a.json"], "/dev/null"),
        (["--plot", "/dev/null/a/b.png"], "/dev/null"),
        (["--models", "minilm"], "'minilm' is not one of qwen-0.6b"),
        (["--device", "nowhere"], "--device is 'nowhere', expected cpu, cuda or cuda:<index>"),
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
