"""``python -m tests.ptx``: what it prints, and its exit status where something is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptx import build, nvcc
from ptx.__main__ import main
from ptx.cuda_cases import needs_nvcc

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "tests" / "ptx" / "README.md").read_text(encoding="utf-8")
HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
DOUBLE = (
    HEAD
    + """.visible .entry twice(.param .u64 x, .param .u64 y, .param .u32 n) {
.reg .b64 %x, %y, %at; .reg .b32 %i, %n; .reg .f32 %v; .reg .pred %out;
ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; ld.param.u32 %n, [n];
mov.u32 %i, %tid.x; setp.ge.u32 %out, %i, %n;
@%out bra end;
mul.wide.u32 %at, %i, 4; add.u64 %x, %x, %at; add.u64 %y, %y, %at;
ld.global.f32 %v, [%x];
add.f32 %v, %v, %v;
st.global.f32 [%y], %v;
end:
ret;
}
"""
)
OTHER = """.visible .entry spin() { again: bra again; }
.visible .entry described(.param .align 64 .b8 desc[128]) .reqntid 4 { ret; }
.visible .entry strange() { .reg .b32 %r; add.s32.odd %r, %r, 1; ret; }
"""
X = "in:f32:4=1.5"


@pytest.fixture(scope="module", autouse=True)
def _machine():
    """Compiled, which says so."""
    build.library()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "double.ptx"
    path.write_text(DOUBLE + OTHER)
    return str(path)


def bare(*words, **environment):
    """The command in a process that knows nothing of the tests."""
    left = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-m", "tests.ptx", *words],
        cwd=ROOT, env=left | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


class TestInAProcessOfItsOwn:
    def test_kernels_and_parameters(self, file):
        done = bare(file)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split("\n")[:2] == ["twice", "    u64     8 bytes  x"]
        assert "described\n    b8    128 bytes  desc\n" in done.stdout

    def test_a_launch_and_its_trace(self, file):
        done = bare(file, "--kernel", "twice", "--trace", "0:3", X, "out:f32:4", "4")
        assert (done.returncode, done.stderr) == (0, "")
        shown = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.split("\n")]
        line = DOUBLE.split("\n").index("ld.global.f32 %v, [%x];") + 1
        assert [str(line), "ld.global.f32 %v, [%x];", "1.5 (0x3fc00000)"] in shown
        assert [str(line + 1), "add.f32 %v, %v, %v;", "3 (0x40400000)"] in shown
        assert [str(line + 2), "st.global.f32 [%y], %v;"] in shown
        assert "argument 1 = [3. 3. 3. 3.]" in done.stdout

    def test_a_fault_behind_its_trace(self, file):
        done = bare(file, "--kernel", "twice", "--trace", "0:3", X, "out:f32:5", "5")
        assert done.returncode == 1
        line = DOUBLE.split("\n").index("ld.global.f32 %v, [%x];") + 1
        said = re.sub(r"0x\w+", "0x…", done.stderr)
        assert said == (
            f"twice: line {line}: CTA (0, 0, 0), thread (4, 0, 0): ld.global.f32: reads 4 bytes at 0x…: "
            f"4 bytes past the end of argument 0 (element 4 of 4)\n  {line}: ld.global.f32 %v, [%x];\n"
        )
        assert f"{line - 1}  mul.wide.u32 %at, %i, 4; add.u64 %x" in done.stdout

    def test_no_compiler(self, file):
        done = bare(file, "--kernel", "spin", CXX="no-such-compiler")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "executing PTX needs a C++ compiler: there is no no-such-compiler (CXX names it)\n"
        )


def words_refused(file):
    """Words of the command, and the sentence."""
    twice = (file, "--kernel", "twice")
    rest = ("out:f32:4", "4")
    yield (), "the following arguments are required: file, ARGUMENT"
    yield ("nowhere.ptx",), "nowhere.ptx: No such file or directory"
    yield (str(ROOT),), f"{ROOT}: Is a directory"
    yield (
        (file, "--kernel", "thrice"),
        (
            f"{file}: there is no kernel thrice; the module's kernels: twice, spin, described, strange"
        ),
    )
    yield (file, X), "--kernel is missing, to be one of twice, spin, described, strange"
    yield twice, "twice takes 3 arguments, not 0: x (u64), y (u64), n (u32)"
    yield (*twice, X, *rest, "1"), "twice takes 3 arguments, not 4: x (u64), y (u64), n (u32)"
    yield (*twice, X, "out:f32:4", "half"), "argument 2 is 'half', expected a number or a tensor"
    yield (
        (*twice, X, "out:f32:4", "0.5"),
        ("twice: argument n is 0.5, expected an integer of 32 bits"),
    )
    yield (*twice, X, "out:f32:4", X), "twice: argument n is the tensor argument 2, expected u32"
    yield (
        (*twice, "in:f33:4", *rest),
        ("argument 0 is 'in:f33:4', expected in:TYPE:SHAPE, as in:f32:4x8"),
    )
    yield (*twice, "in:f32", *rest), "argument 0 is 'in:f32', expected in:TYPE:SHAPE, as in:f32:4x8"
    yield (*twice, "in:f32:4x", *rest), "argument 0 has shape '4x', expected sizes such as 4x8"
    yield (*twice, "in:u8:4=300", *rest), "argument 0 is filled with '300', expected a number of u8"
    yield (*twice, "in:s32:4=x", *rest), "argument 0 is filled with 'x', expected a number of s32"
    yield (*twice, "in:f32:4=", *rest), "argument 0 is filled with '', expected a number of f32"
    yield (
        (*twice, "in:f32:9999999999999999=1", *rest),
        ("argument 0 has shape 9999999999999999, too large for this machine"),
    )
    yield (
        (*twice, X, "out:f32:4=1", "4"),
        ("argument 1 is an out, which has no values before: 'out:f32:4=1'"),
    )
    run = (*twice, X, *rest)
    yield (*run, "--grid", "0"), ("twice: grid is (0,), expected one to three positive integers")
    yield (*run, "--grid", "2by2"), "argument --grid: '2by2', expected sizes such as 4 or 4x2x1"
    yield (
        (*run, "--block", "2000"),
        ("twice: a block of (2000, 1, 1) has 2000 threads, more than 1024"),
    )
    yield (
        (*run, "--cluster", "2"),
        "twice: a grid of (1, 1, 1) is not made of clusters of (2, 1, 1)",
    )
    yield (
        (*run, "--shared", "232449"),
        ("twice: needs 0 + 232449 bytes of shared memory, and the chip has 232448"),
    )
    yield (*run, "--shared", "much"), "argument --shared: invalid int value: 'much'"
    yield (*run, "--resident", "0"), "resident is 0, expected an integer from 1 to 2**31 - 1"
    yield (*run, "--seed", "-1"), "seed is -1, expected an integer from 0 to 2**64 - 1"
    yield (
        (*run, "--late", "never"),
        ("argument --late: invalid choice: 'never' (choose from late, random, soon)"),
    )
    yield (*run, "--trace", "0"), "argument --trace: '0', expected CTA:THREAD, as 0:37"
    yield (*run, "--trace", "1:0"), "trace is of CTA 1, and the grid has 1"
    yield (*run, "--fast"), "unrecognized arguments: --fast"
    yield (
        (file, "--kernel", "described", "5"),
        ("described: argument desc is 5, expected 128 bytes"),
    )
    yield (
        (file, "--kernel", "described", "--block", "8", "5"),
        ("described: a block of (8, 1, 1) is not what .reqntid says, 4"),
    )
    yield (file, "--kernel", "strange"), re.compile(r"line \d+: add\.s32\.odd: .* \.odd .*")


def test_what_is_refused(file, capsys):
    """In one sentence, and with status 2."""
    for words, sentence in words_refused(file):
        try:
            status = main(list(words))
        except SystemExit as ended:  # argparse's way
            status = ended.code
        printed, said = capsys.readouterr()
        said = re.sub(r"choose from (.*)\)", lambda m: m[0].replace("'", ""), said)
        assert (status, printed) == (2, ""), words
        if isinstance(sentence, str):
            assert said == f"{sentence}\n", words
        else:
            assert sentence.fullmatch(said.rstrip("\n")), (words, said)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "line 1: this is not PTX, which starts with .version: the text ends"),
        (b"#include <x>\n", "line 1: this is not PTX, which starts with .version: found '#'"),
        (HEAD.encode() + b".entry k() { ret", "line 4: the text ends in a statement"),
    ],
)
def test_text_that_is_not_ptx(tmp_path, capsys, content, sentence):
    path = tmp_path / "x.ptx"
    path.write_bytes(content)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: {sentence}\n"


def test_other_files(tmp_path, capsys):
    path = tmp_path / "x.cubin"
    path.write_bytes(b"\x7fELF\xff\xfe")
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == f"{path} is no text, so no PTX\n"
    path.write_text(HEAD)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == f"{path} has no kernel\n"


def test_a_kernel_that_does_not_end(file, capsys):
    assert main([file, "--kernel", "spin", "--block", "48", "--most-steps", "100"]) == 1
    said = capsys.readouterr().err.rstrip().split("\n")
    assert said[0] == "spin: has not ended after 100 steps"
    assert said[1].startswith("  48 threads at line ")
    assert len(said) == 2


@needs_nvcc
def test_the_readme(tmp_path, monkeypatch):
    """Its kernel, compiled as it says, gives what it prints."""
    section = README.split("\n## Run a kernel by hand\n", 1)[1].split("\n## ", 1)[0]
    source, commands, printed = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)
    monkeypatch.setattr(nvcc, "BUILD", tmp_path)
    (tmp_path / "add.cu").write_text(source)
    (tmp_path / "add.ptx").write_text(nvcc.ptx_of(tmp_path / "add.cu", 90))
    words = commands.replace("\\\n", "").split("\n")
    command = next(line for line in words if "--kernel" in line).split()
    assert command[:3] == ["python", "-m", "tests.ptx"]
    done = bare(*(str(tmp_path / word) if word == "add.ptx" else word for word in command[3:]))
    assert (done.returncode, done.stderr) == (0, "")
    lines = iter([line.rstrip() for line in done.stdout.split("\n")])
    for line in printed.strip("\n").split("\n"):
        shown = " *0x\\w+".join(map(re.escape, re.split(r" *0x…", line.rstrip())))
        assert line == "…" or any(re.fullmatch(shown, other) for other in lines), line
