"""Each command in a process of its own: PyTorch alone, no docstrings, spoilt variables, no reader."""

import importlib.util
import os
import subprocess
import sys

import pytest
from environment import bare, lorafast_command, run

TINY = ("bench", "--shapes", "8,16,24", "--rank", "2", "--seconds", "0.01", "--dropout", "0")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("info",), 0, "backend triton          not usable: Triton is not installed"),
        pytest.param(
            ("verify", "--dtype", "fp32"), 0, "triton: not run, Triton is not installed",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (*TINY, "--against", "peft,triton,frozen"), 0, "peft  not run: PEFT is not installed",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("bench", "--traffic", "--against", "triton"), 0, "not checked here: Triton is not",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("tune",), 2, "lorafast tune: nothing to tune here: Triton is not installed",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["info", "verify", "bench", "traffic", "tune"],
)  # fmt: skip
def test_pytorch_alone_is_enough(tmp_path, words, status, said):
    process = run(*words, env=bare(tmp_path, **NO_GPU))
    assert process.returncode == status, process.stderr
    assert said in process.stdout + process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_every_command_works_without_docstrings(tmp_path):
    tiny = [*TINY, "--against", "frozen"]
    code = (
        "from lorafast.cli import main\n"
        f"for words in (['info'], ['verify', '--dtype', 'fp32'], {tiny}, ['tune']):\n"
        "    print('status', main(words), flush=True)\n"
        "main(['--help'])"
    )
    process = subprocess.run(
        [sys.executable, "-OO", "-c", code], env=bare(tmp_path, **NO_GPU), capture_output=True, text=True
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = [line for line in process.stdout.splitlines() if line.startswith("status")]
    assert found == ["status 0", "status 0", "status 0", "status 2"]
    assert "versions, devices, and which backends" in process.stdout


@pytest.mark.slow  # a quick test of test_cli.py interprets too
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_verify_interprets_where_triton_is_there_and_no_gpu(tmp_path):
    code = (
        "import sys; from lorafast.cli import main, verify; "
        "verify._SHAPES = ((5, 33, 17, 3),); sys.exit(main(['verify', '--dtype', 'fp32']))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=bare(tmp_path, "numpy", "triton", **NO_GPU),
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "triton: run in Triton's interpreter" in process.stdout
    assert "\ntriton     shrink " in process.stdout
    assert process.stdout.endswith(" passed, 0 failed\n")


SPOILT = {"LORAFAST_BACKEND": "nonsense", "LORAFAST_PACK_MEMORY": "much"}
SENTENCES = {
    "LORAFAST_BACKEND": "LORAFAST_BACKEND is 'nonsense', expected one of auto, aten",
    "LORAFAST_PACK_MEMORY": "LORAFAST_PACK_MEMORY is 'much', expected a number of bytes",
}


def test_info_says_which_variables_are_nonsense(tmp_path):
    process = run("info", env=bare(tmp_path, "numpy", **SPOILT))
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    (chosen,) = (line for line in lines if line.startswith("chosen  "))
    (packed,) = (line for line in lines if line.startswith("packed weights "))
    assert SENTENCES["LORAFAST_BACKEND"] in chosen
    assert SENTENCES["LORAFAST_PACK_MEMORY"] in packed or "oneDNN" in packed


@pytest.mark.slow
@pytest.mark.parametrize("variable", SPOILT)
def test_other_commands_end_with_the_sentence(tmp_path, variable):
    env = bare(tmp_path, "numpy", **{variable: SPOILT[variable]})
    process = run("verify", env=env)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"lorafast verify: {SENTENCES[variable]}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.slow
@pytest.mark.parametrize("buffered", ["1", ""], ids=["unbuffered", "buffered"])
def test_a_full_disk_is_one_line(tmp_path, buffered):
    env = bare(tmp_path, "numpy", PYTHONUNBUFFERED=buffered)
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            lorafast_command("info"), env=env, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 1
    assert process.stderr == "lorafast info: [Errno 28] No space left on device\n"


@pytest.mark.slow
def test_who_closes_the_pipe_ends_the_command(tmp_path):
    env = bare(tmp_path, "numpy", PYTHONUNBUFFERED="1")
    with subprocess.Popen(
        lorafast_command("info"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.slow
def test_a_closed_output_is_no_error(tmp_path):
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *lorafast_command("info")]
    process = subprocess.run(command, env=bare(tmp_path, "numpy"), capture_output=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")


def test_no_command_imports_what_it_may_do_without(tmp_path):
    names = ("cli.info", "cli.verify", "cli.bench", "cli.tune", "bench.gpu.__main__")
    heavy = ("triton", "peft", "transformers", "matplotlib", "safetensors")
    code = f"import sys, {', '.join(f'lorafast.{name}' for name in names)}\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    env = bare(tmp_path, "numpy", *heavy)
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert process.stdout == "[]\n", process.stderr
