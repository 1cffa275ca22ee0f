"""``setup.py``: whatever the environment holds, it builds, or says in one sentence why not."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="native kernels are built on Linux only")


@pytest.fixture
def load(monkeypatch):
    """Runs ``setup.py`` under some variables and gives what it hands to setuptools."""
    for name in ("CXX", "CXXFLAGS", "MAX_JOBS", "LORAFAST_CPP", "LORAFAST_CUDA"):
        monkeypatch.delenv(name, raising=False)
    asked = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)

    def run(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location("lorafast_setup", ROOT / "setup.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return asked

    return run


IMPOSSIBLE = [
    ("CXX", "", "CXX is '', expected a C++ compiler"),
    ("CXX", " \t", "CXX is ' \\t', expected a C++ compiler"),
    ("CXX", "''", "CXX is \"''\", expected a C++ compiler"),
    ("CXX", "g++ '", 'CXX is "g++ \'": no closing quotation'),
    ("CXX", "false", "false doesn't compile C++17"),
    ("CXX", "false -O2", "false -O2 doesn't compile C++17"),
    ("CXX", "no-such-compiler", "there is no C++ compiler (no-such-compiler)"),
    ("CXX", "/", "there is no C++ compiler (/)"),
    ("CXXFLAGS", '-O2 "', "CXXFLAGS is '-O2 \"': no closing quotation"),
    ("MAX_JOBS", "0", "MAX_JOBS is '0', expected a whole number of at least 1"),
    ("MAX_JOBS", "-1", "MAX_JOBS is '-1', expected a whole number of at least 1"),
    ("MAX_JOBS", "abc", "MAX_JOBS is 'abc', expected a whole number of at least 1"),
    ("MAX_JOBS", "1.5", "MAX_JOBS is '1.5', expected a whole number of at least 1"),
]


@linux
@pytest.mark.parametrize(("name", "value", "said"), IMPOSSIBLE)
def test_what_can_not_build_is_one_line_and_no_binary_wheel(load, capfd, name, value, said):
    asked = load(**{name: value})
    assert asked["ext_modules"] == []
    assert asked["options"] == {}
    assert capfd.readouterr().err == f"lorafast: without native CPU kernels: {said}\n"


@linux
@pytest.mark.parametrize(("name", "value", "said"), IMPOSSIBLE)
def test_forced_it_is_an_error_in_a_sentence(load, name, value, said):
    with pytest.raises(SystemExit) as ended:
        load(**{name: value, "LORAFAST_CPP": "1"})
    assert ended.value.code == (
        f"LORAFAST_CPP is 1 and the native CPU kernels can't be built: {said}"
    )


@linux
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "variables", [{}, {"MAX_JOBS": ""}, {"MAX_JOBS": " 3 "}, {"CXX": "c++ -O1"}, {"CXXFLAGS": " "}],
    ids=str,
)  # fmt: skip
def test_what_can_build_does(load, capfd, variables):
    (extension,) = load(**variables)["ext_modules"]
    assert extension.name == "lorafast._C"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LORAFAST_CPP", "yes", "LORAFAST_CPP is 'yes', expected 0, 1 or nothing"),
        ("LORAFAST_CUDA", "2", "LORAFAST_CUDA is '2', expected 0, 1, auto or nothing"),
        ("LORAFAST_CUDA", "1", "LORAFAST_CUDA is 1: lorafast has no CUDA C++ sources yet"),
    ],
)
def test_a_wish_that_is_none_is_said(load, name, value, said):
    with pytest.raises(SystemExit) as ended:
        load(**{name: value})
    assert ended.value.code == said


def copied(folder):
    """The files of the repository that a distribution is made of."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("csrc", "kernels", "bench", "lorafast", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def setup_py(tree, *words, **variables):
    subprocess.run(
        [sys.executable, "setup.py", "-q", *words], cwd=tree, env=os.environ | variables, check=True,
        capture_output=True,
    )  # fmt: skip
    (made,) = (tree / "dist").iterdir()
    return made


@linux
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_wheel_without_the_binary_does_not_claim_to_have_it(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -c "*) exit 3;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    wheel = setup_py(copied(tmp_path), "bdist_wheel", CXX=str(compiler), LORAFAST_CPP="")
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_the_source_distribution_has_the_sources_and_no_tests(tmp_path):
    made = setup_py(copied(tmp_path), "sdist", LORAFAST_CPP="0")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/bindings.cpp", "kernels/shrink/kernel.py", "bench/layer/job.py"} <= names
    assert "lorafast/cli/verify.py" in names
    assert not [name for name in names if name.startswith("tests")]
