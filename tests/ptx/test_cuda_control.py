"""What nvcc makes of branches, loops, calls, arguments and places."""

import struct

import numpy as np
import pytest

from ptx.cuda_cases import archs, launch, needs_nvcc
from ptx.launch import Fault, In, Out

pytestmark = needs_nvcc


@archs(75, 90)
def test_switch(arch):
    x = np.random.default_rng(24).integers(-2, 18, 100).astype(np.int32)
    out, i = np.zeros_like(x), np.arange(100)
    launch("control", "choose", arch, 1, 128, [In("x", x), Out("out", out), 100])
    cases = {
        0: i * 3, 1: i - 7, 2: i ^ 21, 3: (3 + i) ** 2, 4: 16, 5: i // 5, 6: i % 5, 7: -i, 9: i << 4,
        10: [k.bit_count() for k in range(100)], 11: [32 - k.bit_length() for k in range(100)],
        12: i & 13, 13: i | 19, 14: np.minimum(i, 11), 15: i * i,
    }  # fmt: skip
    expected = np.select(
        [x == case for case in cases], [v + 0 * i for v in cases.values()], 1000 + x
    )
    np.testing.assert_array_equal(out, expected)


def test_jump_through_a_table():
    x = np.random.default_rng(25).integers(0, 4, 100).astype(np.int32)
    out, i = np.zeros_like(x), np.arange(100)
    launch("control", "jump", 80, 1, 128, [In("x", x), Out("out", out), 100])
    np.testing.assert_array_equal(out, np.choose(x, [i + 100, 50 - i, i * i, i + 100]))


def steps_to_one(a):
    return 0 if a == 1 else 1 + steps_to_one(a // 2 if a % 2 == 0 else 3 * a + 1)


def test_lanes_leave_a_loop_one_by_one():
    x = np.random.default_rng(26).integers(1, 400, 50).astype(np.int32)
    out = np.zeros_like(x)
    launch("control", "steps_to_one", 80, 1, 64, [In("x", x), Out("out", out), 50])
    steps = [steps_to_one(int(a)) for a in x]
    most = [max(steps[:32]), max(steps[32:])]
    assert list(out) == [s + (most[i // 32] << 16) for i, s in enumerate(steps)]


def divisors(a, y):
    """As the kernel goes through y: Euclid's rest of each, left early."""
    j = 0
    while j < len(y) and a > 1:
        b = y[j]
        while b:
            a, b = b, a % b
        if a % 7 and j > 5 and a < 3:
            break
        j += 1
    return a * 1000 + j


@archs(75, 90)
def test_loops_in_loops(arch):
    x, y = (
        np.random.default_rng(s).choice([2, 6, 7, 12, 14, 28, 84, 126, 5], 60) for s in (27, 28)
    )
    x = x * 420
    out = np.zeros(60, np.int32)
    arguments = [In("x", x.astype(np.int32)), In("y", y.astype(np.int32)), Out("out", out), 60]
    launch("control", "divisors", arch, 1, 64, arguments)
    assert list(out) == [divisors(a, y.tolist()) for a in x.tolist()]


@archs(75, 90)
def test_calls_with_structs(arch):
    n = 50
    x = (np.random.default_rng(29).integers(-20, 20, (n, 3)) / 8).astype(np.float32)
    out = np.zeros((5, n))
    launch("control", "boxes", arch, 1, 64, [In("x", x), Out("out", out), n])
    i = np.arange(n)
    high = x + np.float32(2)
    grows = i % 3 == 1
    high[i[grows], i[grows] % 2] += np.float32(0.5)
    sides = np.minimum(high, 1.5) - np.maximum(x, 0)
    by = np.where(i % 2, 250 + i - i, 250 + i) % 256
    expected = [
        np.maximum(sides, 0).prod(1), (sides <= 0).any(1), i * 100 - 3, np.where(grows, 2.5, 0), by,
    ]  # fmt: skip
    np.testing.assert_array_equal(out, expected)


def test_arguments_of_every_size():
    n = 20
    x = np.arange(n, dtype=np.int32)
    settings = struct.pack("<d3ihb", 0.5, 10, -20, 30, -300, 7).ljust(24, b"\0")
    out = np.zeros(n)
    arguments = [-5, settings, 60000, -(1 << 40), 0.25, 1e-3, In("x", x), Out("out", out), n]
    launch("control", "arguments", 80, 1, 32, arguments)
    shift = np.array([10, -20, 30])[x % 3]
    expected = 0.5 * x + shift - 300 + 7 - 5 + 60000 - float(1 << 40) + 0.25 + 1e-3
    np.testing.assert_allclose(out, expected, rtol=1e-15)


@archs(75, 90)
def test_where_threads_stand(arch):
    grid, block = (2, 3, 2), (5, 3, 4)
    blocks, threads = 12, 60
    out = np.zeros((9, blocks * threads), np.uint32)
    launch("control", "stands", arch, grid, block, [Out("out", out)])
    b, t = np.repeat(np.arange(blocks), threads), np.tile(np.arange(threads), blocks)
    lane = (t % 32).astype(np.uint64)
    one = np.uint64(1) << lane
    expected = [
        b, t, t % 5 | t // 5 % 3 << 10 | t // 15 << 20, b % 2 | b // 2 % 3 << 10 | b // 6 << 20,
        lane, one - 1, 2 * one - 1, one, np.full(len(b), 32),
    ]  # fmt: skip
    np.testing.assert_array_equal(out, expected)


def test_clocks_go_forwards():
    out = np.zeros(64, np.int32)
    launch("control", "clocks", 80, 1, 64, [Out("out", out)])
    assert all(out == 1)


def test_a_trap_is_a_fault():
    x, out = np.arange(50, dtype=np.int32), np.zeros(50, np.int32)
    launch("control", "stop_at_negative", 80, 1, 64, [In("x", x), Out("out", out), 50])
    np.testing.assert_array_equal(out, x)
    x[37] = -1
    with pytest.raises(Fault, match=r"stop_at_negative.*thread \(37"):
        launch("control", "stop_at_negative", 80, 1, 64, [In("x", x), Out("out", out), 50])
