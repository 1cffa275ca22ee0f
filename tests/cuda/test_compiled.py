"""What csrc/cuda compiles to: nothing spills, the table is true, the library is small."""

import json
import random
import re
import subprocess
from pathlib import Path

import pytest
from launchers import PTX_FLAGS, ptx_of
from on_machine import needs_nvcc
from ptx.nvcc import path as path_of_nvcc

pytest.importorskip("triton")  # its cuobjdump

import compiled
from compiled import (
    FOLDER,
    LIBRARY,
    MOST_BYTES,
    MOST_INSTANCES,
    MOST_SECONDS,
    architectures_of,
    kernels_of,
    nvcc_of,
    seconds_of_build,
    summaries,
    write,
    written,
)

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.slow
def test_the_library_that_is_installed():
    """One test, since reading its machine code takes long: that for sm_90a and for one of the others,
    drawn by lot. A build with -Werror has none that spills."""
    if not LIBRARY.is_file():
        pytest.skip("the CUDA kernels are not built")
    newest = max(p.stat().st_mtime for p in (*CSRC.glob("*"), *(CSRC / "cuda").glob("*")))
    if LIBRARY.stat().st_mtime < newest:
        pytest.skip("the CUDA kernels were built before csrc/cuda was changed: make setup")
    assert LIBRARY.stat().st_size < MOST_BYTES
    others = [arch for arch in architectures_of(LIBRARY) if arch != "sm_90a"]
    made = {}
    for arch in ("sm_90a", random.choice(others)):
        made |= kernels_of(LIBRARY, arch)
    assert [f"{arch} {k}" for arch, kernels in made.items() for k in kernels if k.spills] == []
    names = {arch: [kernel.name for kernel in kernels] for arch, kernels in made.items()}
    assert all(found == names["sm_90a"] for found in names.values())
    nvcc = nvcc_of(LIBRARY)
    for arch, kernels in made.items():
        table = written(nvcc, arch)
        if table is None:
            pytest.skip(f"tests/cuda/compiled has no table of nvcc {nvcc} for {arch}")
        assert kernels == table, "after a kernel has changed: python tests/cuda/compiled.py --write"


@pytest.mark.slow
def test_the_build_took_no_longer_than_it_may():
    """Seconds of processors, not of a clock: a busy machine is as fast."""
    seconds = seconds_of_build()
    if not LIBRARY.is_file() or not seconds:
        pytest.skip("the CUDA kernels are not built, or by a setup.py that did not time it")
    assert {"shrink.cu", "linear_expand_sm90.cu"} <= set(seconds)
    print({name: took for name, took in seconds.items() if took > 30})
    assert sum(seconds.values()) < MOST_SECONDS


def test_there_are_no_more_instances_than_may_be():
    tables = sorted(FOLDER.glob("*/*.jsonl"))
    assert tables
    for table in tables:
        assert len(table.read_text().splitlines()) <= MOST_INSTANCES, table.name


def test_the_newest_record_is_of_a_small_and_short_build():
    """What it lacks: ``python tests/cuda/compiled.py --json bench/results/nvcc-<day>.json``."""
    results = Path(__file__).parents[2] / "bench" / "results"
    runs = [json.loads(path.read_text()) for path in results.glob("nvcc-*.json")]
    newest = max(runs, key=lambda run: run["started"])
    if "build" not in newest:
        pytest.skip("the newest record is of a build that was not timed")
    (build,) = newest["build"]
    assert build["bytes"] < MOST_BYTES
    assert build["seconds"] < MOST_SECONDS


def test_seconds_of_a_build(tmp_path):
    assert seconds_of_build(tmp_path) == {}
    for name, took in (("one.cu", 2.5), ("two.cpp", 0.25)):
        (tmp_path / f"{name}.o").touch()
        (tmp_path / f"{name}.seconds").write_text(str(took))
    assert seconds_of_build(tmp_path) == {"one.cu": 2.5, "two.cpp": 0.25}
    (tmp_path / "three.cu.o").touch()
    assert seconds_of_build(tmp_path) == {}


SPILLS = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < x[0]; ++k)
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i * 7) % 64] + x[k];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i];
}
template <int n>
__global__ void small_kernel(float* x) {
  __shared__ float y[n];
  y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = y[threadIdx.x ^ 1];
}
template __global__ void small_kernel<32>(float* x);
template __global__ void small_kernel<64>(float* x);
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "spills.cu").write_text(SPILLS)
    made = folder / "spills.o"
    flags = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run(["nvcc", *flags, "-c", folder / "spills.cu", "-o", made], check=True)
    return made


@needs_nvcc
@pytest.mark.slow
class TestReading:
    def test_kernels(self, library):
        made = kernels_of(library)
        assert list(made) == ["sm_80", "sm_90a"]
        small, large, spilling = made["sm_80"]
        assert (small.name, small.shared, small.spills) == ("small_kernel<32>(float*)", 128, 0)
        assert (large.name, large.shared) == ("small_kernel<64>(float*)", 256)
        assert small.instructions == {"LDG.32": 1, "STG.32": 1}
        assert spilling.registers == 32
        assert spilling.spills > 20
        rows = [row for row in summaries(made) if row["arch"] == "sm_80"]
        assert [(row["kernel"], row["instances"], row["shared"]) for row in rows] == [
            ("small_kernel", 2, 256), ("spilling_kernel(float*)", 1, 0),
        ]  # fmt: skip

    def test_spills_are_the_exit_status(self, library, capsys):
        assert compiled.main([str(library)]) == 1
        out = capsys.readouterr().out
        assert out.count("ok\n") == 4
        assert out.count("spills\n") == 2

    def test_what_is_written_is_read(self, library, tmp_path):
        made = kernels_of(library)
        nvcc = nvcc_of(library)
        assert written(nvcc, "sm_80", tmp_path) is None
        write(nvcc, made, tmp_path)
        assert {arch: written(nvcc, arch, tmp_path) for arch in made} == made
        write(nvcc, {"sm_80": made["sm_80"]}, tmp_path)
        assert written(nvcc, "sm_90a", tmp_path) is None

    def test_it_is_recorded(self, library, tmp_path):
        from lorafast.bench.common.record import read

        compiled.main([str(library), "--json", str(tmp_path / "nvcc.json")])
        run = read(tmp_path / "nvcc.json")
        assert run["complete"] is False
        assert run["nvcc"][0]["nvcc"] == nvcc_of(library)


def test_no_library(tmp_path, capsys):
    (tmp_path / "other.so").write_bytes(b"nothing")
    for name in ("missing.so", "other.so"):
        assert compiled.main([str(tmp_path / name)]) == 2
        assert "is no library that nvcc has made" in capsys.readouterr().err


def warnings(ptx, folder):
    """What ptxas says of code for sm_90a that it can't do as asked: its messages C7500 to C7599, of
    products that wait for themselves (C751x) and of registers that aren't handed over (C7508)."""
    file = folder / "code.ptx"
    file.write_text(ptx)
    command = [Path(path_of_nvcc()).with_name("ptxas"), "-v", "-arch=sm_90a"]
    done = subprocess.run(
        [*command, "-o", "/dev/null", file], capture_output=True, text=True, check=True
    )
    assert "registers" in done.stderr  # ptxas spoke
    return [line for line in done.stderr.splitlines() if re.search(r"\bC75\d\d\b", line)]


WAITS = """
#include "wgmma.cuh"
namespace lorafast::cuda {
__global__ void waiting_kernel(float* y, uint64_t a, uint64_t b) {
  float sums[2][4] = {};
  ptx::begin_products();
  ptx::multiply_add<bfloat16, 0>(sums, a, b, 1);
  sums[0][0] += 1.0f;  // before it is there
  ptx::multiply_add<bfloat16, 0>(sums, a, b, 1);
  ptx::commit_products();
  ptx::wait_for_products<0>();
  for (int i = 0; i < 8; ++i) y[i * 128 + threadIdx.x] = sums[i / 4][i % 4];
}
}
"""


@needs_nvcc
@pytest.mark.slow
def test_no_product_of_sm_90a_waits_for_itself(tmp_path):
    sources = sorted((CSRC / "cuda").glob("*_sm90.cu"))
    assert len(sources) >= 2
    for source in sources:
        assert warnings(ptx_of(source, 90), tmp_path) == []
    waiting = tmp_path / "waiting.cu"
    waiting.write_text(WAITS)
    made = tmp_path / "waiting.ptx"
    flags = ["-ptx", "-arch=sm_90a", *PTX_FLAGS, "-I", str(CSRC / "cuda")]
    subprocess.run([path_of_nvcc(), *flags, waiting, "-o", made], check=True)
    assert warnings(made.read_text(), tmp_path)
