"""PTX of sources: compiled once, and anew when what it depends on has changed; what is refused."""

import subprocess

import pytest

from ptx import nvcc
from ptx.cuda_cases import needs_nvcc

KERNEL = '#include "{}"\nextern "C" __global__ void store(int* x) {{ *x = kNumber; }}\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(nvcc, "BUILD", tmp_path / "built")
    (tmp_path / "deep").mkdir()
    (tmp_path / "number.cuh").write_text('#include "deep/number.cuh"\n')
    (tmp_path / "deep" / "number.cuh").write_text("constexpr int kNumber = 41;\n")
    file = tmp_path / "store.cu"
    file.write_text(KERNEL.format("number.cuh"))
    return file


@needs_nvcc
class TestPtxOf:
    def test_it_is_of_the_architecture(self, source):
        for arch, target in nvcc.TARGETS.items():
            assert f".target {target}\n" in nvcc.ptx_of(source, arch)

    def test_it_is_compiled_once(self, source, monkeypatch):
        first = nvcc.ptx_of(source, 80)
        monkeypatch.setattr(subprocess, "run", None)
        assert nvcc.ptx_of(source, 80) == first

    def test_a_header_of_a_header_has_changed(self, source):
        assert ", 41;" in nvcc.ptx_of(source, 80)
        (source.parent / "deep" / "number.cuh").write_text("constexpr int kNumber = 43;\n")
        assert ", 43;" in nvcc.ptx_of(source, 80)

    def test_a_warning_is_refused(self, source):
        source.write_text("static __device__ int unused() { return 1; }\n")
        with pytest.raises(RuntimeError, match=r"(?s)nvcc refuses store\.cu for sm_90a:.*unused"):
            nvcc.ptx_of(source, 90)

    def test_nothing_is_kept_of_a_failure(self, source):
        source.write_text("nonsense")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="nvcc refuses"):
                nvcc.ptx_of(source, 75)
        assert not list(nvcc.BUILD.iterdir())


def test_an_unknown_architecture(source):
    with pytest.raises(
        ValueError, match="arch must be one of 75, 80, 86, 89, 90, 100, 120, not 70"
    ):
        nvcc.ptx_of(source, 70)


def test_no_nvcc(source, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(RuntimeError, match=r"CUDA_HOME is '/nowhere', which has no bin/nvcc"):
        nvcc.ptx_of(source, 80)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    assert nvcc.why_no_nvcc() == "there is no nvcc (CUDA_HOME says where the CUDA toolkit is)"
