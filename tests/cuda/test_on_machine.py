"""The harness: launchers that are right pass, each mistake in one is a fault or one sentence."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from launchers import CSRC, FAKE_STREAM, Launchers, launchers, ptx_of
from on_machine import (
    Fault,
    _extent,
    _Known,
    _pieces,
    _without_overlaps,
    launched,
    needs_nvcc,
    planted,
    short_name,
)  # fmt: skip
from ptx.plant import change, drop

from lorafast.reference import keep_mask

pytestmark = needs_nvcc

RIGHT, EXCHANGED, ANOTHER_STREAM, NO_GUARD, NOT_ALLOWED, LARGE_CTA = range(6)
ARGUMENTS, CTA_MISSING, CLUSTER, LARGE_CLUSTER, MORE_SHARED, TOO_MUCH_SHARED = range(6, 12)
NO_IMAGE = 209
"""cudaErrorNoKernelImageForDevice"""


@pytest.fixture(scope="module")
def throwaway():
    return Launchers(Path(__file__).parent / "throwaway", CSRC / "device.cpp")


@pytest.fixture
def copy(throwaway):
    """Calls the operation in a block of its own, with an empty ``y``."""

    def call(how=RIGHT, shape=(5, 13), arch=90, partials=None, counters=None, **options):
        x = torch.randn(shape)
        with launched(arch, of=throwaway, **options) as run:
            y = torch.empty(shape)
            torch.ops.lorafast_cuda_throwaway.copy(x, how, y, partials, counters)
        call.x, call.y = x, y
        return run

    return call


def mask(arch, M=5, K=70, threshold=6554, **options):
    seed = torch.tensor([77 << 33])
    with launched(arch, **options) as run:
        bits = torch.empty(M, -(-K // 8), dtype=torch.uint8)
        torch.ops.lorafast_cuda.mask(seed, threshold, K, bits)
    return run, bits


class TestWhatIsRight:
    @pytest.mark.parametrize("arch", [75, 80, 90])
    def test_the_mask(self, arch):
        run, bits = mask(arch, seed=arch)
        kept = keep_mask(5, 70, 6554 / 65536, torch.tensor([77 << 33]))
        found = (bits[:, :, None] >> torch.arange(8)) & 1
        assert torch.equal(found.reshape(5, -1)[:, :70].bool(), kept)
        (launch,) = run.launches
        assert (launch.op, launch.kernel) == ("mask", "mask_kernel")
        assert (launch.grid, launch.block, launch.cluster) == ((1, 1, 1), (256, 1, 1), (0, 0, 0))
        assert launch.ran.issued("st.global") > 0

    @pytest.mark.slow
    def test_arguments_of_several_sizes(self, copy):
        copy(ARGUMENTS)
        assert torch.equal(copy.y, 2 * copy.x - 3)

    def test_a_cluster(self, copy):
        (launch,) = copy(CLUSTER, (4, 16)).launches
        assert (launch.grid, launch.cluster) == ((2, 1, 1), (2, 1, 1))
        assert torch.equal(copy.x, copy.y)

    def test_shared_memory_that_grows(self, copy):
        run = copy(MORE_SHARED)
        assert [launch.shared for launch in run.launches] == [40 << 10, 60 << 10]

    def test_schedules(self, copy):
        for seed in range(3):
            copy(seed=seed, resident=1 + seed)
            assert torch.equal(copy.x, copy.y)

    def test_another_stream(self, copy):
        (launch,) = copy(stream=0x77).launches
        assert launch.stream == 0x77
        (launch,) = copy().launches
        assert launch.stream == FAKE_STREAM

    def test_no_rows(self):
        run, _ = mask(80, M=0)
        assert run.launches == []

    def test_the_guard_is_of_the_tensors_device(self, copy, throwaway):
        copy()
        assert throwaway.guarded == -1  # the CPU's index


class TestMistakes:
    def test_arguments_exchanged(self, copy):
        with pytest.raises(Fault, match=r"copy_kernel.*line \d+.* undefined value"):
            copy(EXCHANGED)

    def test_an_output_that_is_an_input(self, throwaway):
        x, y = torch.randn(3, 8), torch.zeros(3, 8)
        with launched(90, of=throwaway), pytest.raises(Fault, match=r"stores to x.*, an input"):
            torch.ops.lorafast_cuda_throwaway.copy(x, EXCHANGED, y)

    @pytest.mark.parametrize(
        ("how", "says"),
        [
            (ANOTHER_STREAM, f"launched on stream 0x0, PyTorch's current one is {FAKE_STREAM:#x}"),
            (NO_GUARD, "copy_by_shared_kernel is launched without a device guard"),
            (NOT_ALLOWED, "with 49148 bytes of shared memory beside 8 of its own, without cudaFunc"),
            (LARGE_CTA, "a block of (2048, 1, 1) has 2048 threads, more than 1024"),
            (LARGE_CLUSTER, "a cluster of (16, 1, 1) is not portable, and was not allowed"),
            (CTA_MISSING, "bytes of y are never written, the first in [4, 12]; its shape is [5, 13]"),
        ],
    )  # fmt: skip
    def test_it_is_found(self, copy, how, says):
        with pytest.raises(Fault, match=re.escape(says)) as raised:
            copy(how)
        assert "\n" not in str(raised.value)

    def test_clusters_before_there_were_any(self, copy):
        with pytest.raises(Fault, match=r"a cluster of \(2, 1, 1\) on sm_80, which has none"):
            copy(CLUSTER, (4, 16), arch=80)

    def test_the_device_has_less_shared_memory(self, copy):
        with pytest.raises(
            RuntimeError, match="can't have 307200 bytes of shared memory: invalid arg"
        ):
            copy(TOO_MUCH_SHARED)

    def test_counters_that_are_not_left_zero(self, copy):
        with pytest.raises(Fault, match=r"copy leaves counters\[0\] = 1, expected zeros"):
            copy(counters=torch.zeros(3, dtype=torch.int32))
        with pytest.raises(Fault, match=r"copy is given counters\[1\] = 7, expected zeros"):
            copy(counters=torch.tensor([0, 7], dtype=torch.int32))

    def test_a_fault_is_not_one_of_the_next_block(self, copy):
        with pytest.raises(Fault):
            copy(EXCHANGED)
        copy()
        assert torch.equal(copy.x, copy.y)

    @pytest.mark.parametrize(
        "edit", [drop("st.global", -1), change(r"setp\.\w+\.s64", "setp.lt.s64", -1)]
    )
    def test_planted(self, copy, edit):
        with pytest.raises(Fault):
            copy(edit=planted("copy_kernel", edit))
        copy(edit=planted("another_kernel", edit))


class TestTensors:
    def test_scratch_need_not_be_written(self, throwaway):
        x = torch.randn(3, 8)
        with launched(80, of=throwaway):
            torch.ops.lorafast_cuda_throwaway.copy(x, RIGHT, torch.empty(3, 8), torch.empty(9))

    def test_what_was_made_before_may_be_read(self, throwaway):
        x, y = torch.randn(5, 8), torch.randn(5, 8)
        with launched(80, of=throwaway):
            torch.ops.lorafast_cuda_throwaway.copy(x, CTA_MISSING, y)
        with pytest.raises(Fault, match="never written"), launched(80, of=throwaway) as run:
            torch.ops.lorafast_cuda_throwaway.copy(x, CTA_MISSING, run.undefined(y))

    def test_an_output_is_the_next_input(self, throwaway):
        x = torch.randn(3, 8)
        op = torch.ops.lorafast_cuda_throwaway.copy
        with launched(80, of=throwaway) as run:
            y, z = torch.empty(3, 8), torch.empty_like(x)
            op(x, RIGHT, y)
            op(y, RIGHT, z)
            op(z, RIGHT, y)
        assert torch.equal(y, x)
        assert len(run.launches) == 3

    def test_an_unwritten_output_as_input(self, throwaway):
        op = torch.ops.lorafast_cuda_throwaway.copy
        with launched(80, of=throwaway):
            y, z = torch.empty(5, 8), torch.empty(5, 8)
            op(torch.randn(5, 8), CTA_MISSING, y)
            with pytest.raises(Fault, match=r"undefined value"):
                op(y, RIGHT, z)
            op(torch.randn(5, 8), RIGHT, y)
            op(y, RIGHT, z)

    def test_views_of_one_storage(self, throwaway):
        whole = torch.randn(8, 8)
        op = torch.ops.lorafast_cuda_throwaway.copy
        with launched(80, of=throwaway):
            made = torch.empty(8, 8)
            op(whole[:4], RIGHT, made[:4])
            op(whole[4:], RIGHT, made[4:])
            op(made, RIGHT, torch.empty(8, 8))
        assert torch.equal(whole, made)

    def test_beyond_the_view(self, throwaway):
        """Memory of the same storage, and no argument's."""
        x = torch.randn(8, 8)
        edit = planted("copy_kernel", change(r"setp\.\w+\.s64", "setp.lt.s64", -1))
        with launched(80, of=throwaway, edit=edit), pytest.raises(Fault, match="past the end of x"):
            torch.ops.lorafast_cuda_throwaway.copy(x[:5], RIGHT, torch.zeros(5, 8))

    def test_inputs_overlap(self, throwaway):
        whole = torch.randn(4, 24)
        given = [
            _Known(*_extent(t), t, name, False)
            for name, t in (("x", whole[:, :16]), ("z", whole[:, 8:]), ("x", whole[:, :16]))
        ]
        (known,) = _without_overlaps(given)
        assert (known.name, known.tensor.dtype, known.tensor.numel()) == (
            "x and z",
            torch.uint8,
            384,
        )
        (known,) = _without_overlaps([given[0], given[2]])
        assert known.tensor is given[0].tensor

    def test_rows_far_apart(self):
        rows = torch.empty(1 << 32, dtype=torch.uint8).as_strided((3, 4), (1 << 30, 1))
        names = [(at.name, at.end - at.begin) for at in _pieces("x", rows, False)]
        assert names == [("x[0]", 4), ("x[1]", 4), ("x[2]", 4)]


class TestSentences:
    def test_two_devices(self):
        seed, bits = torch.tensor([1]), torch.empty(2, 2, dtype=torch.uint8, device="meta")
        with launched(80), pytest.raises(RuntimeError, match="bits is on meta, expected the CPU"):
            torch.ops.lorafast_cuda.mask(seed, 5, 16, bits)
        with launched(80), pytest.raises(RuntimeError, match="seed is on meta and bits on the CPU"):
            torch.ops.lorafast_cuda.mask(
                seed.to("meta"), 5, 16, torch.empty(2, 2, dtype=torch.uint8)
            )

    def test_a_launch_that_fails(self, copy, throwaway):
        with launched(80, of=throwaway):
            throwaway.fail("cudaLaunchKernel", NO_IMAGE)
            with pytest.raises(
                RuntimeError, match="copy didn't start: no kernel image is available"
            ):
                torch.ops.lorafast_cuda_throwaway.copy(torch.ones(1, 1), RIGHT, torch.empty(1, 1))
        copy()

    def test_an_error_that_an_earlier_call_left(self):
        with launched(80):
            launchers().fail("cudaDriverGetVersion", NO_IMAGE)
            launchers().library.lorafast_cuda_why_unusable(0)
            assert launchers().library.fake_last_error() == NO_IMAGE
            bits = torch.empty(2, 2, dtype=torch.uint8)
            torch.ops.lorafast_cuda.mask(torch.tensor([1]), 5, 16, bits)

    def test_a_device_without_a_stream(self, copy, throwaway):
        """Its guard is gone when the launcher raises."""
        with launched(80, of=throwaway):
            throwaway.fail("aoti_torch_get_current_cuda_stream", NO_IMAGE)
            with pytest.raises(RuntimeError):
                torch.ops.lorafast_cuda_throwaway.copy(torch.ones(1, 1), RIGHT, torch.empty(1, 1))
        assert throwaway.library.fake_guards() == 0
        copy()

    @pytest.mark.parametrize(
        ("columns", "row_bytes", "taken"),
        [
            (16, 32, True),
            (16, 48, True),
            (15, 32, True),
            (17, 32, False),
            (16, 16, False),
            (8, 0, False),
        ],
    )
    def test_a_tensor_map_whose_rows_overlap(self, throwaway, columns, row_bytes, taken):
        """cuda.h: the first stride is the first dimension's bytes and a padding."""
        sizes = [ctypes.c_uint64(n) for n in (4, columns, row_bytes)]
        error = throwaway.library.fake_tensor_map(ctypes.c_void_p(1 << 20), *sizes)
        assert error == (0 if taken else 1)  # CUDA_ERROR_INVALID_VALUE

    def test_outside_of_a_block(self, throwaway):
        with pytest.raises(RuntimeError, match="copy didn't start: initialization error"):
            torch.ops.lorafast_cuda_throwaway.copy(torch.ones(1, 1), RIGHT, torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN8lorafast4cuda11mask_kernelENS0_10MaskParamsE", "mask_kernel"),
        ("_ZN8lorafast4cuda13shrink_kernelIfLi64EEEvNS0_6ParamsE", "shrink_kernel"),
        ("_Z3addPf", "add"),
        ("plain", "plain"),
    ],
)
def test_short_name(symbol, name):
    assert short_name(symbol) == name


def test_a_kernel_is_alone_in_its_text(throwaway):
    symbol = "_ZN8lorafast4cuda21copy_by_shared_kernelILi3EEEvNS0_10CopyParamsE"
    text = throwaway.ptx_of(symbol, 90)
    assert text.count(".entry") == 1
    assert symbol in text
    lines = text.split("\n")
    whole = ptx_of(Path(__file__).parent / "throwaway" / "copy.cu", 90).split("\n")
    entry = next(line for line in lines if ".entry" in line)
    assert lines.index(entry) == whole.index(entry) > 100


def test_an_unknown_kernel(throwaway):
    with pytest.raises(RuntimeError, match=r"another is not in the PTX of no \.cu for sm_90a"):
        throwaway.ptx_of("another", 90)


# What PyTorch's stable ABI may be asked for: what tensors are, where work goes, and to list operations.
ASKED = re.compile(
    r"torch_(get_(const|mutable)_data_ptr|dtype_\w+|library_impl)"
    r"|aoti_torch_(abi_version|device_type_\w+|dtype_\w+|is_contiguous|get_(dim|dtype|numel|size|stride)"
    r"|get_(device_(index|type)|storage_(offset|size)|current_cuda_stream)|(create|delete)_device_guard"
    r"|(new|delete)_tensor_(handle|object)|(library_(def|init_fragment|init_impl))"
    r"|delete_library_object)"
)


def test_launchers_allocate_nothing_and_call_no_operation():
    for path in launchers().objects.values():
        listed = subprocess.run(["nm", "-u", path], capture_output=True, text=True, check=True)
        names = [line.split()[-1] for line in listed.stdout.splitlines()]
        asked = [name for name in names if re.match("(aoti_)?torch_", name)]
        assert [name for name in asked if not ASKED.fullmatch(name)] == [], path.name


def test_launchers_are_made_once():
    assert launchers() is launchers()
