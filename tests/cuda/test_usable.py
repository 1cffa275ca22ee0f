"""Whether kernels can run on a device: nothing, or a sentence that names what is too old."""

import ctypes
import re
import subprocess
import sys

import pytest
from launchers import CSRC, FAKE_RUNTIME, FAKE_STREAM, HOST_FLAGS, _Device, _linked, launchers
from on_machine import needs_nvcc
from ptx import nvcc

from lorafast.backends.cuda import native

pytestmark = needs_nvcc

INSUFFICIENT_DRIVER, NO_IMAGE, UNSUPPORTED_PTX, OTHER = 35, 209, 222, 999


@pytest.fixture
def why_unusable():
    """Of a device of this architecture and driver, where functions of the runtime fail."""
    of = launchers()
    ask = of.library.lorafast_cuda_why_unusable
    ask.restype = ctypes.c_char_p

    def why(arch=90, driver=None, device=0, **failing):
        of.device(arch, 132, FAKE_STREAM, driver)
        for function, error in failing.items():
            of.fail(function, error)
        return ask(device).decode()

    yield why
    of.reset()


def built_with():
    """As 13000."""
    return launchers().library.fake_runtime_version()


def compiled_for():
    ask = launchers().library.lorafast_cuda_architectures
    ask.restype = ctypes.c_char_p
    return ask().decode()


def test_it_is_usable(why_unusable):
    for driver in (None, built_with() // 1000 * 1000, built_with() + 20):
        assert why_unusable(driver=driver) == ""
    assert launchers().guarded == 0
    assert why_unusable(device=3) == ""
    assert launchers().guarded == 3


CASES = [
    ({"driver": 0}, "there is no NVIDIA driver"),
    (
        {"driver": 11080},
        "they were built with CUDA {cuda}, and the driver is for CUDA 11.8: update the driver",
    ),
    ({"device": 5, "aoti_torch_create_device_guard": 1}, "there is no cuda:5"),
    (
        {"arch": 70, "cudaFuncGetAttributes": NO_IMAGE},
        "they are compiled for compute capability {compiled_for}, and cuda:0 has 7.0",
    ),
    (
        {"arch": 121, "device": 2, "cudaFuncGetAttributes": UNSUPPORTED_PTX},
        "they were built with CUDA {cuda}, and the driver is for CUDA {cuda}, too old for PTX of it "
        "(cuda:2 has 12.1): update the driver",
    ),
    (
        {"cudaFuncGetAttributes": INSUFFICIENT_DRIVER},
        "they were built with CUDA {cuda}, and the driver is for CUDA {cuda}, too old for PTX of it "
        "(cuda:0 has 9.0): update the driver",
    ),
    (
        {"cudaFuncGetAttributes": OTHER},
        "a kernel can't be loaded on cuda:0: unrecognized error code",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "said"), CASES)
def test_it_is_not(why_unusable, what, said):
    major, minor = divmod(built_with() // 10, 100)
    said = said.format(cuda=f"{major}.{minor}", compiled_for=compiled_for())
    assert why_unusable(**what) == said


def test_what_they_are_compiled_for():
    numbers = compiled_for().split(", ")
    assert numbers == sorted(numbers, key=float)
    assert all(re.fullmatch(r"\d+\.\d", number) for number in numbers)


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (
            12030,
            "their code is compressed, which drivers for CUDA 12.4 or later read, and the driver is for "
            "CUDA 12.3: update the driver",
        ),
        (12040, ""),
        (
            11080,
            "they were built with CUDA 12.8, and the driver is for CUDA 11.8: update the driver",
        ),
    ],
)
def test_compressed_code_needs_a_newer_driver(driver, said):
    """As nvcc 12.8 builds it, which is the first that compresses."""
    played = (*HOST_FLAGS, "-DLORAFAST_COMPRESSED", "-DLORAFAST_TOOLKIT=12080")
    files = (CSRC / "usable.cu", played), (FAKE_RUNTIME, HOST_FLAGS)
    library = ctypes.CDLL(
        _linked(tuple(nvcc.compiled(f, flags, "-host", ".o") for f, flags in files))
    )
    library.fake_device(ctypes.byref(_Device(8, 0, 108, 0, driver, FAKE_STREAM)))
    ask = library.lorafast_cuda_why_unusable
    ask.restype = ctypes.c_char_p
    assert ask(0).decode() == said


def test_no_error_is_left_behind(why_unusable):
    assert why_unusable(cudaFuncGetAttributes=NO_IMAGE)
    assert launchers().library.fake_last_error() == 0


def test_the_library_needs_no_symbol_of_pytorchs_cuda_library():
    """Which Python loads for itself alone: its symbols are in nobody's scope, with CUDA or without."""
    if not native.LIBRARY.path.is_file():
        pytest.skip("the CUDA kernels are not built")
    load = """
import ctypes, os
from lorafast.backends.cuda.native import LIBRARY
ctypes.CDLL(str(LIBRARY.path), mode=os.RTLD_NOW)
assert LIBRARY.why_not_loaded() is None, LIBRARY.why_not_loaded()
"""  # in a process of its own: here the tests' operations have its names
    ran = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
