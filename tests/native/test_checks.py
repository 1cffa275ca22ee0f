"""``csrc/checks.h``: one header for every device, and for both compilers."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).with_name("throwaway")
TORCH = Path(torch.__file__).parent
FLAGS = [
    "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(TORCH / "include"),
    "-I", str(ROOT / "csrc"),
]  # fmt: skip
HOST = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
CPU, CUDA, META = 0, 1, 14  # DeviceType
# Marked slow so that they come first in a process: loaded after thousands of other tests, the library
# of operators has crashed the process inside PyTorch's registration. Why isn't known.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """``check(kernels, x, lora_A, seed, s)`` for tensors of any device."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("checks") / "checks.so"
    subprocess.run(
        [
            "c++", *FLAGS, *HOST, "-shared", str(SOURCES / "checks.cpp"),
            f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    torch.ops.load_library(library)
    return torch.ops.lorafast_checks.check


def tensors(x="cpu", lora_A="cpu", seed="cpu", s="cpu"):
    return (
        torch.ones(4, 6, device=x),
        torch.ones(2, 6, device=lora_A),
        torch.ones(1, device=seed, dtype=torch.int64),
        torch.ones(4, 2, device=s),
    )


@pytest.mark.parametrize(("kernels", "device"), [(CPU, "cpu"), (CPU, "cpu:0"), (META, "meta")])
def test_any_device_will_do_if_it_is_one(check, kernels, device):
    check(kernels, *tensors(device, device, device, device))


@pytest.mark.parametrize(
    ("kernels", "devices", "said"),
    [
        (CUDA, {}, "x is on the CPU, expected cuda"),
        (META, {}, "x is on the CPU, expected meta"),
        (CPU, {"x": "meta"}, "x is on meta, expected the CPU"),
        (12, {}, "x is on the CPU, expected xpu"),
        (13, {}, "x is on the CPU, expected mps"),
        (15, {}, "x is on the CPU, expected a device of type 15"),
        (CPU, {"lora_A": "meta"}, "lora_A is on meta and x on the CPU, expected one device"),
        (CPU, {"s": "meta"}, "s is on meta and x on the CPU, expected one device"),
        (CPU, {"seed": "meta"}, "seed is on meta and x on the CPU, expected one device"),
        (META, dict.fromkeys(("x", "s", "seed"), "meta"), "lora_A is on the CPU and x on meta"),
    ],
)  # fmt: skip
def test_another_device_is_named(check, kernels, devices, said):
    with pytest.raises(RuntimeError, match=said):
        check(kernels, *tensors(**devices))


def test_the_header_names_no_device_that_must_be():
    """But for the sentences' own names of devices."""
    text = (ROOT / "csrc" / "checks.h").read_text(encoding="utf-8")
    assert "is_cpu" not in text
    assert "is_cuda" not in text


@pytest.mark.gpu
def test_another_gpu_is_named(check):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(CUDA, *tensors("cuda:1", "cuda:1", "cuda:1", "cuda:1"))
    with pytest.raises(
        RuntimeError, match="lora_A is on cuda:0 and x on cuda:1, expected one device"
    ):
        check(CUDA, *tensors("cuda:1", "cuda:0", "cuda:1", "cuda:1"))
