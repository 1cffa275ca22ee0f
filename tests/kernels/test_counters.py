"""Counters: which memory a launch gets. CUDA's answers are given by hand, its memory is the CPU's."""

import contextlib
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common import counters as module
from lorafast.kernels.common.counters import counters

from lorafast.core import device_memory

DEVICES = [torch.device("cuda", index) for index in range(2)]


def tensor_on(device):
    return SimpleNamespace(is_cuda=True, device=device)


X, OTHER = map(tensor_on, DEVICES)


class Cuda:
    """A device's state, as ``counters`` asks for it."""

    def __init__(self):
        self.capturing = False
        self.stream = 0
        self.made = []  # sizes of what was allocated and zeroed outside captures
        self.in_graph = []  # sizes of what a graph allocates and zeroes

    def zeros(self, device, count):
        assert not self.capturing
        self.made.append(count)
        return torch.zeros(count, dtype=torch.int32)

    def graphs_zeros(self, count, *, dtype, device):
        assert self.capturing
        self.in_graph.append(count)
        return TORCH_ZEROS(count, dtype=dtype)

    @contextlib.contextmanager
    def capture(self):
        self.capturing = True
        yield
        self.capturing = False


TORCH_ZEROS = torch.zeros


@pytest.fixture
def cuda(monkeypatch):
    state = Cuda()
    monkeypatch.setattr(module, "_slabs", {})
    monkeypatch.setattr(module, "_of_stream", {})
    monkeypatch.setattr(module, "_SLAB", 65536)
    monkeypatch.setattr(module, "_stream", lambda device: state.stream)
    monkeypatch.setattr(module, "_zeros", state.zeros)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(
        module, "torch", SimpleNamespace(
            cuda=torch.cuda, device=torch.device, int32=torch.int32, zeros=state.graphs_zeros
        ),
    )  # fmt: skip
    return state


def places(piece):
    begin = piece.data_ptr()
    return range(begin, begin + 4 * piece.numel())


def overlap(one, two):
    a, b = places(one), places(two)
    return a.start < b.stop and b.start < a.stop


def test_launches_of_a_stream_share_their_counters(cuda):
    first = counters(X, 100)
    assert first.numel() >= 100
    assert not first.any()
    assert counters(X, 4000).data_ptr() == first.data_ptr()
    assert cuda.made == [65536]


def test_streams_and_devices_do_not(cuda):
    first = counters(X, 100)
    cuda.stream = 7
    second = counters(X, 100)
    third = counters(OTHER, 100)
    assert not overlap(first, second)
    assert not overlap(first, third)
    assert not overlap(second, third)
    assert cuda.made == [65536, 65536]


def test_a_longer_piece_replaces_a_stream_s_own(cuda):
    first = counters(X, 100)
    longer = counters(X, first.numel() + 1)
    assert longer.numel() == 2 * first.numel()
    assert not overlap(first, longer)
    assert counters(X, 100).data_ptr() == longer.data_ptr()


def test_captured_launches_have_their_own_and_no_memset(cuda):
    eager = counters(X, 100)
    with cuda.capture():
        pieces = [counters(X, 100) for _ in range(5)]
    with cuda.capture():
        pieces += [counters(X, 33) for _ in range(5)]
    pieces += [eager, counters(X, 100)][:1]
    for i, one in enumerate(pieces):
        assert not one.any()
        for two in pieces[:i]:
            assert not overlap(one, two)
    assert cuda.in_graph == []
    # Replayed on another stream, beside an eager launch on the stream that it was captured on.
    assert counters(X, 100).data_ptr() == eager.data_ptr()


def test_no_two_launches_share_a_cache_line(cuda):
    counters(X, 1)
    with cuda.capture():
        one, two = counters(X, 3), counters(X, 3)
    assert two.data_ptr() - one.data_ptr() == 128


def test_a_capture_without_a_slab_or_room_zeroes_its_own(cuda):
    with cuda.capture():
        assert not counters(X, 100).any()
    assert cuda.in_graph == [100]
    counters(X, 100)
    with cuda.capture():
        counters(X, 40000)
        counters(X, 40000)
    assert cuda.in_graph == [100, 40000]


def test_there_is_room_again_after_a_capture_that_took_half(cuda):
    kept = counters(X, 100)
    with cuda.capture():
        counters(X, 40000)
    assert counters(X, 100).data_ptr() == kept.data_ptr()
    assert cuda.made == [65536, 65536]
    with cuda.capture():
        counters(X, 40000)
    assert cuda.in_graph == []


def test_captures_without_end_take_no_memory_without_end(cuda):
    for _ in range(100):
        counters(X, 100)
        with cuda.capture():
            counters(X, 60000)
    assert cuda.made == [65536] * module._MOST_SLABS
    assert len(cuda.in_graph) == 100 - module._MOST_SLABS


def test_more_than_a_slab_holds_is_a_stream_s_own_memory(cuda):
    assert counters(X, 100_000).numel() == 100_000
    assert cuda.made == [65536, 100_000]


def test_slabs_are_made_by_a_thread_of_their_own(monkeypatch):
    """Whose allocations go to no pool that the caller's go to."""
    by = []

    def zeros(count, *, dtype, device):
        by.append(threading.current_thread())
        return TORCH_ZEROS(count, dtype=dtype)

    seen = []
    fake = SimpleNamespace(
        cuda=SimpleNamespace(
            device=lambda device: contextlib.nullcontext(),
            current_stream=lambda device: SimpleNamespace(synchronize=lambda: seen.append(device)),
        ),
        int32=torch.int32,
        zeros=zeros,
    )
    monkeypatch.setattr(module, "torch", fake)
    monkeypatch.setattr(device_memory, "torch", fake)
    assert module._zeros(DEVICES[1], 5).tolist() == [0] * 5
    assert by[0] is not threading.current_thread()
    assert seen == [DEVICES[1]]  # other streams may use it at once


def test_the_error_of_that_thread_is_raised(monkeypatch):
    """Out of memory stays what it is: who catches it frees some and tries again."""

    def zeros(count, *, dtype, device):
        raise torch.OutOfMemoryError("no more")

    fake = SimpleNamespace(
        cuda=SimpleNamespace(device=lambda device: contextlib.nullcontext()),
        int32=torch.int32,
        zeros=zeros,
    )
    monkeypatch.setattr(module, "torch", fake)
    monkeypatch.setattr(device_memory, "torch", fake)
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        module._zeros(DEVICES[0], 5)


def test_threads_are_never_given_the_same(cuda):
    counters(X, 1)
    found = []

    def take():
        found.extend(counters(X, 32) for _ in range(100))

    with cuda.capture():
        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({piece.data_ptr() for piece in found}) == 800


WAITS = """
import triton
import triton.language as tl
from lorafast.kernels.common.device import wait_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(flag_ptr, out_ptr):
    tl.store(out_ptr, wait_for(flag_ptr, False))
    tl.store(out_ptr + 1, wait_for(flag_ptr + 1, False))

source = ASTSource(kernel, {"flag_ptr": "*i32", "out_ptr": "*i32"})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def test_a_wait_that_no_program_ends_is_ended(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ptx = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment
    ).stdout
    loops = ptx.split("again:")[1:]
    assert len(loops) == 2
    for loop in loops:
        timer, bound, trap = map(loop.index, ("%globaltimer", "2000000000", "trap;"))
        assert timer < bound < trap < loop.index("done:")
