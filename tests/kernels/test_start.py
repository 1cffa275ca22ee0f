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


@pytest.mark.parametrize("why", ["no key", "hooks", "interpreted"])
def test_triton_looks_itself(why):
    kernel = Kernel(compiles=why != "interpreted")
    if why == "hooks":
        kernel.pre_run_hooks.append(print)
    begin = Start(kernel, (1, 2), {})
    for _ in range(3):
        begin(None if why == "no key" else "key", 0)
    assert (len(kernel.looked), kernel.direct) == (3, [])


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
    assert key_of("a", tensors=(x,)) == key_of("a", tensors=(other, None))
    assert key_of("a", tensors=(x,)) != key_of("b", tensors=(x,))
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
            "F.linear", "shrink", "linear_expand", "expand_backward", "shrink_backward", "dx",
        )
    ]  # fmt: skip
    assert launched == "['linear_expand_kernel']"
