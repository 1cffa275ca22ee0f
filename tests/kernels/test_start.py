"""A launch costs the host a look-up: what is kept of it, for which calls, and what is not."""

import os
import subprocess
import sys
import weakref

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common import start, tma
from lorafast.kernels.common.plan import shrink_launch
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.shrink.kernel import launcher
from lorafast.kernels.tables import find
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor


class Compiled:
    """Of one specialisation, as far as a launch looks at it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.direct.append((grid, arguments))


class Kernel:
    """Counts the launches for which Triton looks at every argument, and those for which it doesn't."""

    def __init__(self, compiles=True):
        self.looked, self.direct, self.pre_run_hooks, self.compiles = [], [], [], compiles

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.looked.append((grid, arguments, options))
            return Compiled(self) if self.compiles else None

        return run


def test_arguments_are_looked_at_once_for_a_key():
    kernel = Kernel()
    begin = Start(kernel, (3,), {"num_warps": 4})
    for value in range(4):
        begin("key", value, None)
    assert kernel.looked == [((3,), (0, None), {"num_warps": 4})]
    assert kernel.direct == [((3, 1, 1), (value, None)) for value in (1, 2, 3)]
    begin("other", 9)
    assert len(kernel.looked) == 2


@pytest.mark.parametrize("why", ["no key", "interpreted"])
def test_triton_looks_itself(why):
    kernel = Kernel(compiles=why != "interpreted")
    begin = Start(kernel, (1, 2), {})
    for _ in range(3):
        begin(None if why == "no key" else "key", 0)
    assert (len(kernel.looked), kernel.direct) == (3, [])


@pytest.mark.parametrize("how", ["hooks", "debug", "instrumentation"])
def test_a_launch_that_is_watched_is_triton_s(monkeypatch, how):
    """Also of a key that is kept already, and what is launched meanwhile is not kept."""
    kernel = Kernel()
    begin = Start(kernel, (1,), {})
    begin("known", 0)
    with monkeypatch.context() as watching:
        if how == "hooks":
            watching.setattr(kernel, "pre_run_hooks", [print])
        elif how == "debug":
            watching.setattr(knobs.runtime, "debug", True)
        else:
            watching.setattr(knobs.compilation, "instrumentation_mode", "default")
        for key in ("known", "other"):
            begin(key, 1)
    assert (len(kernel.looked), kernel.direct) == (3, [])
    for key in ("known", "other"):
        begin(key, 2)
    assert (len(kernel.looked), kernel.direct) == (4, [((1, 1, 1), (2,))])


def test_what_is_still_compiled_elsewhere_is_not_kept():
    """``triton.AsyncCompileMode`` answers a launch with a kernel to come, which has no grid."""
    kernel = Kernel()
    kernel_to_come = type("FutureKernel", (), {"result": lambda self: Compiled(kernel)})
    begin = Start({(1,): lambda *_: kernel_to_come()}, (1,), {})
    for _ in range(2):
        begin("key", 0)
    assert begin._known == {}


def test_no_more_are_kept_than_is_bounded():
    begin = Start(Kernel(), (1,), {})
    for key in range(1000):
        begin(key, 0)
    assert len(begin._known) <= start._MOST


@pytest.fixture
def kept_on_a_cpu(monkeypatch):
    monkeypatch.setattr(start, "_FIRST_DEVICE", -1)


def test_the_key_tells_what_a_kernel_is_compiled_for(kept_on_a_cpu):
    x, other = torch.zeros(64), torch.zeros(64)
    assert key_of("a", tensors=(x, None)) == key_of("a", tensors=(other, None))
    assert key_of("a", tensors=(x,)) != key_of("b", tensors=(x,))
    keys = {key_of("a", tensors=(x, y)) for y in (None, x, x.half(), x.long())}
    assert len(keys) == 4
    # An address between 16 bytes is compiled for otherwise.
    assert key_of("a", tensors=(x, other[1:])) is None


def test_kernels_that_are_interpreted_have_no_key():
    assert key_of("a", tensors=(torch.zeros(4),)) is None


def test_a_launchs_constants_are_made_once():
    config = find("shrink", 90, torch.float32, 32, 64, 64, 4)

    def made():
        launch = shrink_launch(config, 32, 64, 4, sms=4, precision="ieee", dropout=False)
        return launcher(launch)

    assert made() is made()


def matrix(rows=32, columns=64):
    return torch.zeros(rows, columns, dtype=torch.bfloat16)


def test_a_descriptor_is_looked_over_once_for_a_shape(monkeypatch):
    looked = []
    over = TensorDescriptor.__post_init__
    monkeypatch.setattr(
        TensorDescriptor, "__post_init__", lambda self: looked.append(self.shape) or over(self)
    )
    describe = tma.describer([16, 32])
    for _ in range(4):
        one = matrix()
        made = describe(one)
        assert made == TensorDescriptor.from_tensor(one, [16, 32])
        assert made.base is one
    assert len(looked) == 1 + 4  # those compared with
    describe(matrix(columns=128))
    assert looked[-1] == (32, 128)


def test_no_memory_is_kept():
    describe = tma.describer([16, 32])
    one = matrix()
    describe(one)
    gone = weakref.ref(one)
    del one
    assert gone() is None


@pytest.mark.parametrize(
    ("contradicts", "said"),
    [
        (lambda: matrix(33).view(-1)[1 : 1 + 32 * 64].view(32, 64), "begins between 16 bytes"),
        (lambda: matrix().t(), "no rows that TMA can read"),
        (lambda: matrix(32, 4), "no rows that TMA can read"),
        (lambda: matrix()[:1].expand(32, 64), "no rows that TMA can read"),
    ],
    ids=["address", "columns", "row", "stride 0"],
)
@pytest.mark.parametrize("before", [False, True])
def test_a_matrix_that_contradicts_its_plan_raises(contradicts, said, before):
    """Also under python -O, where Triton's own assertions are gone."""
    describe = tma.describer([16, 32])
    if before:
        describe(matrix())
    with pytest.raises(ValueError, match=said):
        describe(contradicts())


@pytest.mark.slow
def test_host_time_is_measured_without_a_gpu():
    """By a driver that does nothing; the kernels are compiled and Triton's own launcher runs."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = (
        "from lorafast.bench.call_overhead import launches as l\n"
        "with l.nothing_launched() as launched: l.calls()['linear_expand']()\n"
        "print(launched)\n"
        "for name, times in l.measure(rounds=2, calls_a_round=3).items(): print(name, len(times))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    launched, *timed = process.stdout.splitlines()
    assert timed == [
        f"{name} 2"
        for name in (
            "F.linear", "shrink", "expand", "linear_expand", "expand_backward", "shrink_backward", "dx",
        )
    ]  # fmt: skip
    assert launched == "['linear_expand_kernel']"


KEPT = """
import torch
import triton
from unittest import mock
from lorafast.bench.call_overhead.launches import nothing_launched
from lorafast.kernels.common import start
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.expand import expand
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.linear_expand import linear_expand
from lorafast.kernels.shrink import shrink
from lorafast.kernels.shrink_backward import shrink_backward

def without_ptxas(backend=None, stages=None, *given):
    # Nobody runs the machine code.
    if stages is None:
        return "no ptxas", "no ptxas"
    stages["cubin"] = lambda ptx, metadata: b""

triton.knobs.runtime.add_stages_inspection_hook = without_ptxas
direct, kept = 0, start.Start.__call__

def checked(self, key, *arguments):
    # What this launch runs, and what Triton itself finds for its arguments.
    global direct
    known = self._known.get(key)
    kept(self, key, *arguments)
    if known is not None:
        direct += 1
        names = known.__code__.co_freevars
        run = known.__closure__[names.index("self")].cell_contents
        assert run is self._kernel[self._grid](*arguments, **self._options), key

M, K, N, r = 32, 64, 64, 16
TYPES = (torch.bfloat16, torch.float32)

def matrices(rows, cols, dtype=torch.bfloat16):
    # Of one shape: at an address between 16 bytes, of other strides, transposed.
    zeros = lambda *size: torch.zeros(size, dtype=dtype)
    yield zeros(rows, cols)
    yield zeros(rows, cols + 1)[:, 1:]
    yield zeros(rows, cols + 1)[:, :-1]
    yield zeros(rows, cols + 16)[:, :cols]
    yield zeros(cols, rows).t()

x, dy, weight, s = (next(matrices(*size)) for size in ((M, K), (M, N), (N, K), (M, r)))
A, B = next(matrices(r, K)), next(matrices(N, r))
seed = torch.zeros(1, dtype=torch.int64)
pointers = LaunchConfig(32, 32, 32, 16, 4, 2)
with torch.no_grad(), nothing_launched(), mock.patch.object(start, "_FIRST_DEVICE", -1), \
        mock.patch.object(start.Start, "__call__", checked):
    for _ in range(2):
        for each in matrices(M, K):
            shrink(each, A)
            shrink_backward(s, each)
            linear_expand(each, weight, s, B, 2.0, config=pointers)
        for dtype in TYPES:
            for scale in (None, 0.5):
                shrink(x, A.to(dtype), scale=scale)
            shrink(x, A.to(dtype), 0.1, seed)
            for bias in (None, torch.zeros(N, dtype=dtype), torch.zeros(2 * N, dtype=dtype)[::2]):
                linear_expand(x, weight, s, B, 2.0, bias, config=pointers)
            linear_expand(x, weight, s, B.to(dtype), 2.0, config=pointers)
            for bias in (torch.zeros(N, dtype=dtype), torch.zeros(2 * N, dtype=dtype)[::2]):
                expand(s, B.to(dtype), 2.0, dtype=s.dtype, bias=bias)
            for each in matrices(N, r, dtype):
                expand(s, each, 2.0, dtype=s.dtype)
                expand(s, each, 2.0, 0.1, seed, dtype=s.dtype)
                expand(s.float(), each, 2.0, dtype=torch.float16)
                expand_backward(dy, s, each, 2.0)
            expand_backward(dy, s, B.to(dtype), 2.0, ds=False, dbias=True)
print(direct)
"""


@pytest.mark.slow
def test_what_is_kept_is_what_triton_would_launch(tmp_path):
    """Compiled on a driver that does nothing: whatever two calls of one launch may differ in."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = tmp_path / "kept.py"
    script.write_text(KEPT, encoding="utf-8")
    process = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 30
