"""``setup.py``: whatever the environment holds, it builds, or says in one sentence why not."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="native kernels are built on Linux only")


@pytest.fixture
def load(monkeypatch):
    """Runs ``setup.py`` under some variables and gives what it hands to setuptools."""
    for name in (
        "CXX", "CXXFLAGS", "MAX_JOBS", "LORAFAST_CPP", "LORAFAST_CUDA", "LORAFAST_CUDA_ARCH",
        "CUDA_HOME", "TORCH_CUDA_ARCH_LIST",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    asked = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)

    def run(root=ROOT, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        spec = importlib.util.spec_from_file_location("lorafast_setup", root / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return asked | {"module": module}

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
    asked = load(**{name: value, "LORAFAST_CUDA": "0"})
    assert asked["ext_modules"] == []
    assert asked["options"] == {}
    assert capfd.readouterr().err == f"lorafast: without native CPU kernels: {said}\n"


@linux
@pytest.mark.parametrize(("name", "value", "said"), IMPOSSIBLE)
def test_forced_it_is_an_error_in_a_sentence(load, name, value, said):
    with pytest.raises(SystemExit) as ended:
        load(**{name: value, "LORAFAST_CPP": "1", "LORAFAST_CUDA": "0"})
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
    (extension,) = load(**variables, LORAFAST_CUDA="0")["ext_modules"]
    assert extension.name == "lorafast._C_cpu"
    assert "csrc/cpu/bindings.cpp" in extension.sources
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LORAFAST_CPP", "yes", "LORAFAST_CPP is 'yes', expected 0, 1, auto or nothing"),
        ("LORAFAST_CUDA", "2", "LORAFAST_CUDA is '2', expected 0, 1, auto or nothing"),
    ],
)
def test_a_wish_that_is_none_is_said(load, name, value, said):
    with pytest.raises(SystemExit) as ended:
        load(**{name: value})
    assert ended.value.code == said


@linux
def test_a_tree_without_sources(load, tmp_path, capfd):
    shutil.copy(ROOT / "setup.py", tmp_path)
    assert load(tmp_path)["ext_modules"] == []
    assert capfd.readouterr().err == ""
    with pytest.raises(SystemExit) as ended:
        load(tmp_path, LORAFAST_CUDA="1")
    assert ended.value.code == (
        "LORAFAST_CUDA is 1 and the native CUDA kernels can't be built: lorafast has no sources in "
        "csrc/cuda"
    )


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# Knows every flag but what is for compute_200, and compiles nothing.
NVCC = """case " $* " in *compute_200*) exit 1;; *" --dryrun "*) exit 0;; esac
exit 3"""


@pytest.fixture
def cuda_tree(tmp_path):
    """A tree whose only kernels are for CUDA, with a toolkit beside it."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "tests" / "native" / "throwaway" / "cuda", tree / "csrc" / "cuda")
    for header in ("checks.h", "tensor.h"):
        shutil.copy(ROOT / "csrc" / header, tree / "csrc")
    shutil.copy(ROOT / "setup.py", tree)
    script(tmp_path / "toolkit" / "bin" / "nvcc", NVCC)
    return tree


@linux
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
class TestCUDA:
    """The row of ``setup.py`` that is for CUDA, on sources that a test brings along."""

    @pytest.mark.parametrize(
        "asked", [{}, {"LORAFAST_CUDA": "auto"}, {"LORAFAST_CUDA": "1"}], ids=str
    )
    def test_it_is_built_where_nvcc_is(self, load, cuda_tree, capfd, asked):
        (extension,) = load(cuda_tree, CUDA_HOME=cuda_tree.parent / "toolkit", **asked)[
            "ext_modules"
        ]
        assert extension.name == "lorafast._C_cuda"
        assert extension.sources == ["csrc/cuda/bindings.cpp", "csrc/cuda/twice.cu"]
        assert extension.optional is (asked.get("LORAFAST_CUDA") != "1")
        assert capfd.readouterr().err == ""

    def test_not_wanted_it_is_not_built(self, load, cuda_tree, capfd):
        asked = load(cuda_tree, CUDA_HOME=cuda_tree.parent / "toolkit", LORAFAST_CUDA="0")
        assert asked["ext_modules"] == []
        assert capfd.readouterr().err == ""

    IMPOSSIBLE = (
        ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME is '/nowhere', which has no bin/nvcc"),
        ({"CUDA_HOME": "{}/failing"}, "{}/failing/bin/nvcc doesn't compile C++17 with c++"),
        (
            {"CUDA_HOME": "{}/toolkit", "LORAFAST_CUDA_ARCH": "90a 200"},
            "LORAFAST_CUDA_ARCH has '200', which {}/toolkit/bin/nvcc doesn't know",
        ),
        (
            {"CUDA_HOME": "{}/toolkit", "LORAFAST_CUDA_ARCH": "'90a"},
            'LORAFAST_CUDA_ARCH is "\'90a": no closing quotation',
        ),
        (
            {"CUDA_HOME": "{}/toolkit", "TORCH_CUDA_ARCH_LIST": "8.0;Hooper"},
            "TORCH_CUDA_ARCH_LIST has 'Hooper', expected compute capabilities such as 8.0 or 9.0+PTX, "
            "or generations such as Hopper",
        ),
        (
            {"CUDA_HOME": "{}/toolkit", "TORCH_CUDA_ARCH_LIST": "6.0;Volta"},
            "TORCH_CUDA_ARCH_LIST is '6.0;Volta', and they need 7.5 or newer",
        ),
        (
            {"CUDA_HOME": "{}/toolkit", "TORCH_CUDA_ARCH_LIST": "20.0"},
            "{}/toolkit/bin/nvcc knows no architecture of TORCH_CUDA_ARCH_LIST (200) that they could be "
            "compiled for",
        ),
        (
            {"CUDA_HOME": "{}/toolkit", "CXX": "no-such-compiler"},
            "there is no C++ compiler (no-such-compiler)",
        ),
    )

    @pytest.mark.parametrize(("variables", "said"), IMPOSSIBLE)
    def test_what_is_missing_is_one_line(self, load, cuda_tree, capfd, variables, said):
        folder = str(cuda_tree.parent)
        script(cuda_tree.parent / "failing" / "bin" / "nvcc", "exit 1")
        variables = {name: value.format(folder) for name, value in variables.items()}
        said = said.format(folder)
        assert load(cuda_tree, **variables)["ext_modules"] == []
        assert capfd.readouterr().err == f"lorafast: without native CUDA kernels: {said}\n"
        with pytest.raises(SystemExit) as ended:
            load(cuda_tree, **variables, LORAFAST_CUDA="1")
        assert ended.value.code == (
            f"LORAFAST_CUDA is 1 and the native CUDA kernels can't be built: {said}"
        )

    def test_no_nvcc_anywhere(self, load, cuda_tree, capfd, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda *_: None)
        assert load(cuda_tree)["ext_modules"] == []
        assert capfd.readouterr().err == (
            "lorafast: without native CUDA kernels: "
            "there is no nvcc (CUDA_HOME says where the CUDA toolkit is)\n"
        )

    def test_flags(self, load, cuda_tree):
        """All architectures that nvcc knows, PTX for the rest; the host's flags through nvcc."""
        asked = load(
            cuda_tree,
            CUDA_HOME=cuda_tree.parent / "toolkit",
            CXX="c++ -O1",
            CXXFLAGS="-Werror -Wa,-q",
        )
        setup_py = asked["module"]
        setup_py.CUDA_ARCHITECTURES.append("200")
        compiler = setup_py.nvcc()
        assert compiler[1:] == ["-ccbin", "c++", "-Xcompiler=-O1"]
        flags = setup_py.nvcc_flags(compiler)
        assert [flag for flag in flags if flag.startswith("arch=")] == [
            "arch=compute_75,code=sm_75",
            "arch=compute_80,code=sm_80",
            "arch=compute_80,code=compute_80",
            "arch=compute_90a,code=sm_90a",
            "arch=compute_100a,code=sm_100a",
            "arch=compute_120,code=sm_120",
        ]
        assert flags[-4:] == [
            "-Werror=all-warnings",
            "-Xptxas=--warn-on-spills",
            "-Xcompiler=-Werror",
            r"-Xcompiler=-Wa\,-q",
        ]
        assert {"-DUSE_CUDA", "-DLORAFAST_SM90A"} <= set(flags)
        assert {"--compress-mode=size", "-DLORAFAST_COMPRESSED"} <= set(flags)

    def test_an_older_nvcc_compresses_less(self, load, cuda_tree):
        older = 'case " $* " in *compress-mode*) exit 1;; esac\n' + NVCC
        script(cuda_tree.parent / "older" / "bin" / "nvcc", older)
        setup_py = load(cuda_tree, CUDA_HOME=cuda_tree.parent / "older")["module"]
        flags = setup_py.nvcc_flags(setup_py.nvcc())
        assert not {"--compress-mode=size", "-DLORAFAST_COMPRESSED"} & set(flags)

    @pytest.mark.parametrize(
        ("variables", "codes"),
        [
            ({"LORAFAST_CUDA_ARCH": "90a 80+PTX 90a"}, ["sm_90a", "sm_80", "compute_80"]),
            ({"LORAFAST_CUDA_ARCH": "86", "TORCH_CUDA_ARCH_LIST": "9.0"}, ["sm_86"]),
            (
                {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX;12.0"},
                ["sm_80", "sm_90a", "compute_90", "sm_120"],
            ),
            ({"TORCH_CUDA_ARCH_LIST": "5.0 7.0, 7.5 8.6"}, ["sm_75", "sm_86"]),
            ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, ["sm_90a", "compute_90"]),
            ({"TORCH_CUDA_ARCH_LIST": "Volta Ampere"}, ["sm_80", "sm_86", "compute_86"]),
            ({"TORCH_CUDA_ARCH_LIST": "10.0f;12.1"}, ["sm_100f", "sm_121"]),
            ({"TORCH_CUDA_ARCH_LIST": "9.0;20.0"}, ["sm_90a"]),
            (
                {"TORCH_CUDA_ARCH_LIST": " "},
                ["sm_75", "sm_80", "compute_80", "sm_90a", "sm_100a", "sm_120"],
            ),
        ],
        ids=str,
    )
    def test_architectures(self, load, cuda_tree, variables, codes):
        """Ours win; of PyTorch's what is too old, or too new for nvcc, is left out."""
        toolkit = cuda_tree.parent / "toolkit"
        setup_py = load(cuda_tree, CUDA_HOME=toolkit, **variables)["module"]
        flags = setup_py.nvcc_flags(setup_py.nvcc())
        assert [f.rpartition("=")[2] for f in flags if f.startswith("arch=")] == codes

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
    def test_nvcc_makes_an_object_that_loads(self, cuda_tree):
        """Without a GPU, and against a PyTorch that may have no CUDA."""
        (cuda_tree / "lorafast").mkdir()
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
        wished = {"LORAFAST_CUDA": "1", "LORAFAST_CUDA_ARCH": "80 90a", "CXXFLAGS": "-Werror"}

        def build():
            return subprocess.run(
                command, cwd=cuda_tree, env=os.environ | wished, check=True, capture_output=True,
                text=True,
            ).stdout  # fmt: skip

        said = build()
        assert said.count(" -c ") == said.count("code=sm_80 ") == said.count("code=sm_90a ") == 2
        (library,) = (cuda_tree / "built").rglob("*.so")
        assert library.name == "_C_cuda.abi3.so"
        kept = sorted(path.name for path in (cuda_tree / "build").rglob("*.ptx"))
        assert kept == ["twice.compute_80.ptx", "twice.compute_90a.ptx"]  # tests execute them
        code = library.read_bytes()
        assert b"libtorch_cpu.so" in code
        assert b"libcudart.so" not in code
        assert " -c " not in build()
        (cuda_tree / "csrc" / "checks.h").touch()
        assert build().count(" -c ") == 2

        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, str(library), str(cuda_tree)],
            capture_output=True, text=True, check=False, cwd=cuda_tree.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert loaded.returncode == 0, loaded.stderr


LOAD = """
import ctypes, pathlib, subprocess, sys
import torch
from lorafast.backends.library import Library

library = Library("cuda", ("twice",))
library.path = pathlib.Path(sys.argv[1])
if not torch.version.cuda:
    assert "undefined symbol: aoti_torch_get_current_cuda_stream" in library.why_not_loaded()
    folder = pathlib.Path(sys.argv[2])
    (folder / "stream.c").write_text("int aoti_torch_get_current_cuda_stream(void) { return 1; }")
    subprocess.run(["c++", "-x", "c", "stream.c", "-shared", "-o", "stream.so"], cwd=folder, check=True)
    ctypes.CDLL(str(folder / "stream.so"), ctypes.RTLD_GLOBAL)
    library.why_not_loaded.cache_clear()
assert library.why_not_loaded() is None, library.why_not_loaded()
x = torch.ones(2, 3)
try:
    torch.ops.lorafast_cuda.twice(x, x)
except RuntimeError as error:
    assert "x is on the CPU, expected cuda" in str(error), error
else:
    raise AssertionError("a tensor on the CPU was taken")
"""


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


def stale(tree):
    """Shared objects that an earlier build left wherever one may."""
    folders = ("lib", f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
    for folder in (*(tree / "build" / name / "lorafast" for name in folders), tree / "lorafast"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("_C.abi3.so", "_C_cpu.abi3.so", "_C_other.abi3.so"):
            (folder / name).touch()


def shared_objects(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith(".so")]


@linux
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_wheel_without_the_binary_does_not_claim_to_have_it(tmp_path):
    compiler = script(tmp_path / "c++", 'case " $* " in *" -c "*) exit 3;; esac\nexec c++ "$@"')
    tree = copied(tmp_path)
    stale(tree)
    wheel = setup_py(tree, "bdist_wheel", CXX=str(compiler), LORAFAST_CPP="", LORAFAST_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert shared_objects(wheel) == []


@linux
@pytest.mark.slow
def test_a_wheel_that_wants_no_binary_has_no_earlier_one(tmp_path):
    tree = copied(tmp_path)
    stale(tree)
    wheel = setup_py(tree, "bdist_wheel", LORAFAST_CPP="0", LORAFAST_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert shared_objects(wheel) == []


@linux
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_one_device_that_fails_leaves_the_other(tmp_path, cuda_tree):
    tree = copied(tmp_path / "all")
    shutil.rmtree(tree / "csrc")
    shutil.copytree(cuda_tree / "csrc", tree / "csrc")
    (tree / "csrc" / "cpu").mkdir()
    (tree / "csrc" / "cpu" / "bindings.cpp").write_text("int nothing() { return 0; }")
    stale(tree)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    variables = {"LORAFAST_CPP": "1", "CUDA_HOME": str(tmp_path / "toolkit")}
    process = subprocess.run(
        command, cwd=tree, env=os.environ | variables, check=True, capture_output=True, text=True
    )
    assert "lorafast: without native CUDA kernels: " in process.stderr
    assert "/toolkit/bin/nvcc failed with 3 to make twice.cu.o" in process.stderr
    assert [path.name for path in (tree / "lorafast").glob("*.so")] == ["_C_cpu.abi3.so"]
    wheel = setup_py(tree, "bdist_wheel", **variables)
    assert "-cp310-abi3-" in wheel.name
    assert shared_objects(wheel) == ["lorafast/_C_cpu.abi3.so"]


@pytest.mark.slow
def test_the_source_distribution_has_the_sources_and_no_tests(tmp_path):
    made = setup_py(copied(tmp_path), "sdist", LORAFAST_CPP="0", LORAFAST_CUDA="0")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/cuda/mask.cu", "csrc/cuda/ptx.cuh", "csrc/cuda/device.h"} <= names
    assert {"csrc/cpu/bindings.cpp", "kernels/shrink/kernel.py", "bench/layer/job.py"} <= names
    assert "lorafast/cli/verify.py" in names
    assert not [name for name in names if name.startswith("tests")]
