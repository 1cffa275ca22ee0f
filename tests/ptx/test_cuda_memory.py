"""What nvcc makes of loads, stores, tables, local arrays and atomics."""

import functools

import numpy as np
import pytest

from ptx.cuda_cases import EVERY, archs, hand_over, launch, needs_nvcc, schedules
from ptx.launch import In, InOut, Out

pytestmark = needs_nvcc


@archs(*EVERY)
def test_widths(arch):
    n = 100
    given = np.random.default_rng(18).integers(0, 256, (n, 16)).astype(np.uint8)
    out = np.zeros_like(given)
    launch("memory", "widths", arch, 1, 128, [In("in", given), Out("out", out), n])
    b = given[::-1].copy()
    words, halves = b.view(np.uint32), b.view(np.uint16)
    expected = np.zeros_like(b)
    expected.view(np.uint32)[:, 0] = words[:, 3]
    expected.view(np.uint32)[:, 1] = words[:, 2] ^ words[:, 1]
    expected.view(np.uint16)[:, 4] = halves[:, 1]
    expected.view(np.uint16)[:, 5] = halves[:, 0] + halves[:, 3]
    expected[:, 12] = b[:, 7] + b[:, 3]
    expected[:, 13] = b[:, 4] - b[:, 5]
    expected[:, 14] = b[:, 3] >= 128
    expected[:, 15] = b[:, 7]
    np.testing.assert_array_equal(out, expected)


@archs(75, 90)
def test_caches_change_nothing(arch):
    n = 100
    rng = np.random.default_rng(19)
    x, wide = (rng.standard_normal(s).astype(np.float32) for s in (n, (n, 4)))
    out, seen = np.zeros((11, n), np.float32), np.zeros(n, np.float32)
    arguments = [In("in", x), In("wide", wide), Out("out", out), Out("seen", seen), n]
    launch("memory", "cached", arch, 1, 128, arguments)
    np.testing.assert_array_equal(out[:6], np.tile(x, (6, 1)))
    np.testing.assert_array_equal(out[6], 2 * x)
    np.testing.assert_array_equal(out[7:], wide.T)


@archs(75, 90)
def test_generic_addresses(arch):
    n = 90
    x = np.random.default_rng(20).integers(-99, 100, n).astype(np.int32)
    out = np.zeros_like(x)
    launch("memory", "generic", arch, 2, 64, [In("in", x), Out("out", out), n])
    for i in range(n):
        rotated = np.roll(x, -i)[:8] - 1
        constant = np.array([3, -1, 4, -1, 5, -9, 2, -6])
        chosen = (np.arange(100, 108), x[:8], constant, rotated)[i % 4]
        assert out[i] == chosen @ 3 ** np.arange(8)[::-1] + 1000000 * (i % 4 + 1)


@archs(75, 90)
def test_tables_of_the_module(arch):
    x = np.array([0, 1, 2, 3, 4, 5, 3, 1, 0, 2], np.int32)
    n = len(x)
    out = np.zeros((7, n))
    launch("memory", "tables", arch, 1, 32, [In("in", x), Out("out", out), n])
    fifths = [0, 5, 10, 15, 20]
    expected = [
        0.5**x,
        np.array([1 / 3, 2 / 3])[x % 2],
        [b"a table of letters"[3 * a] for a in x],
        [fifths[2 * (a % 2) + a // 2] for a in x],
        np.array([1 - 20, ord("x") + 5000, -7])[x % 3],
        np.array([3, -(2**40), 9])[x % 3],
        np.zeros(n),
    ]
    np.testing.assert_array_equal(out, expected)


@archs(75, 120)
def test_sorting_in_local_memory(arch):
    n = 40
    x = np.random.default_rng(21).integers(-50, 50, (n, 12)).astype(np.int32)
    out = np.zeros_like(x)
    launch("memory", "sort_rows", arch, 2, 32, [In("in", x), Out("out", out), n])
    np.testing.assert_array_equal(out, np.sort(x, 1))


@schedules
@archs(75, 90)
def test_atomics(arch, seed):
    n = 150
    i = np.arange(n)
    ints = np.array([5, 6, 100, -2000, -1, 0, 12, 0, 0, 0], np.int32)
    unsigneds = np.array([0, 0, 0xFFFFFFFF, 0, 0, 2, 3, 0, 0, 0, 0], np.uint32)
    wides = np.array([1 << 50, -(1 << 50)], np.int64)
    unsigned_wides = np.array([(1 << 64) - 1, 0, 99, 3, 0, 0, 1], np.uint64)
    total, wide_total = np.array([1], np.float32), np.array([2], np.float64)
    tensors = ints, unsigneds, wides, unsigned_wides, total, wide_total
    names = "ints", "unsigneds", "wides", "unsigned_wides", "sum", "wide_sum"
    arguments = [InOut(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
    launch("memory", "atomics", arch, 3, 64, [*arguments, n], seed=seed)
    some = [functools.reduce(lambda a, b: a | b, (1 << k % m for k in range(n))) for m in (29, 61)]
    summed = int(i.sum())
    assert ints[7] in i + 1
    assert ints[8] + ints[7] == summed + n  # all but the last were replaced, each once
    expected = [
        5 + summed, 6 - 2 * summed, 7 - (n - 1), n - 1 - 1000, ~some[0], some[0],
        12 ^ np.bitwise_xor.reduce(i * 77), ints[7], ints[8], n - 1 - 20,
    ]  # fmt: skip
    np.testing.assert_array_equal(ints, expected)
    # From 0 up to 9 and around; from 0 to 6 and down.
    expected = [
        n % 10, -n % 7, 4000000000 - (n - 1), 4000000000 + n - 1, (1 << 32) - n, 2 + 5 * n,
        3 + summed, n - 1, 3 * 64, 3 * 64, 3 * 22,
    ]  # fmt: skip
    np.testing.assert_array_equal(unsigneds, expected)
    np.testing.assert_array_equal(wides, [(7 << 40) - (n - 1), -(7 << 40) + n - 1])
    expected = [
        (1 << 64) - 1 & ~some[1], some[1], 99 ^ int(np.bitwise_xor.reduce(i)) << 33,
        3 + (n << 31), 5 << 40, 1 + (9 << 40), 1 + 7 * n,
    ]  # fmt: skip
    assert [int(word) for word in unsigned_wides] == expected
    assert (total[0], wide_total[0]) == (1 + 0.5 * summed, 2 + 0.25 * summed)


@schedules
@archs(75, 90)
def test_what_an_atomic_answers(arch, seed):
    n = 200
    following, taken = np.zeros(1, np.uint32), np.zeros(n, np.int32)
    arguments = [InOut("next", following), Out("taken", taken), n]
    launch("memory", "places", arch, 4, 64, arguments, seed=seed)
    assert following[0] == n
    np.testing.assert_array_equal(np.sort(taken), np.arange(n))


@archs(75, 90)
def test_shared_atomics(arch):
    x = np.random.default_rng(22).integers(0, 99, 200).astype(np.int32)
    out, sums = np.zeros(20, np.int32), np.zeros(2, np.float32)
    arguments = [In("in", x), Out("out", out), Out("sums", sums), len(x)]
    launch("memory", "shared_atomics", arch, 1, 64, arguments)
    hits = np.bincount(x & 15, minlength=16)
    np.testing.assert_array_equal(out, [*hits, np.bitwise_xor.reduce(x), x.min(), 12, x.sum()])
    np.testing.assert_array_equal(sums, [x.sum(), x.sum() * 0.125])


@archs(75, 90)
def test_half_atomics(arch):
    n = 100
    halves, single = np.zeros((4, 2), np.float16), np.ones(1, np.float16)
    arguments = [InOut("halves", halves), InOut("single", single), n]
    launch("memory", "half_atomics", arch, 2, 64, arguments)
    np.testing.assert_array_equal(halves, np.tile([25, -12.5], (4, 1)))
    assert single[0] == 1 + 0.25 * n


@schedules
@archs(75, 90)
@pytest.mark.parametrize(("kernel", "factor"), [("hand_over", 3), ("hand_over_fenced", 5)])
def test_one_block_hands_over_to_another(kernel, factor, arch, seed):
    hand_over(kernel, factor, seed, arch=arch)
