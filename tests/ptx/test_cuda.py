"""Kernels in CUDA C++, compiled by nvcc and executed: so that the machine isn't fitted to Triton.

Each against its definition in NumPy, in several schedules. Small integers have exact sums, in which no
error can hide; sums of fractions must have the same bits in every schedule.
"""

import numpy as np
import pytest
import torch

from ptx.cuda_cases import (
    BF16,
    EVERY,
    F16,
    archs,
    cluster_sum,
    exact,
    integers,
    launch,
    mma,
    multicast,
    needs_nvcc,
    running_sum,
    scale_bulk,
    schedules,
    sum_of,
    tcgen05,
    tiles,
    transpose,
    wgmma,
    wmma,
)
from ptx.launch import In, InOut, Out

pytestmark = needs_nvcc
WARP = np.arange(32)


# Reductions, warps, blocks, clusters


@schedules
@archs(*EVERY)
def test_sum(arch, seed):
    x = np.random.default_rng(0).integers(-9, 10, 1003).astype(np.float32)
    assert sum_of(x, seed, arch=arch) == x.sum(dtype=np.float64)


def test_the_last_block_adds_up_in_one_order():
    x = np.random.default_rng(1).standard_normal(3001).astype(np.float32)
    found = {sum_of(x, seed, resident=1 + seed % 5).tobytes() for seed in range(6)}
    assert len(found) == 1
    np.testing.assert_allclose(sum_of(x, 0), x.sum(dtype=np.float64), rtol=1e-5)


def mask(bits):
    return sum(1 << lane for lane in range(32) if bits[lane])


@pytest.mark.parametrize("alike", [False, True])
@archs(75, 90)
def test_warp_words(arch, alike):
    x = np.random.default_rng(2).integers(0, 1000 if alike else 3000, 32).astype(np.uint32)
    x[9] = x[7]
    out = np.zeros((13, 32), np.uint32)
    launch("reduce", "warp_words", arch, 1, 32, [In("x", x), Out("out", out)])
    peers = [mask(x % 5 == value % 5) for value in x]
    np.testing.assert_array_equal(
        out,
        [
            np.full(32, mask(x % 3 == 0), np.uint32),
            np.ones(32),
            np.full(32, all(x < 1000)),
            x[WARP * 5 % 32],
            np.where(WARP >= 3, x[WARP - 3], x),
            np.where(WARP % 8 < 6, x[(WARP + 2) % 32], x),
            x[WARP ^ 9],
            peers,
            [(p & (1 << lane) - 1).bit_count() for lane, p in enumerate(peers)],
            np.full(32, 0xFFFFFFFF if alike else 0),
            np.full(32, alike),
            np.where(WARP % 2 == 1, mask((WARP % 2 == 1) & (x > 50)), 0),
            np.ones(32),
        ],
    )


@schedules
@archs(75, 90)
def test_running_sum(arch, seed):
    running_sum(seed, arch)


@pytest.mark.parametrize("first", [-30, -110, 78])
def test_block_votes(first):
    x = np.arange(first, first + 128)
    out = np.zeros(128, np.int32)
    launch("reduce", "block_votes", 80, 1, 128, [In("x", x.astype(np.int32)), Out("out", out)])
    assert set(out) == {(x > 0).sum() * 4 + all(x > -100) * 2 + any(x == 77)}


@archs(80, 90)
def test_warp_reductions(arch):
    x = np.random.default_rng(4).integers(-(2**31), 2**31, 32).astype(np.int32)
    out = np.zeros((6, 32), np.int32)
    launch("reduce", "warp_reductions", arch, 1, 32, [In("x", x), Out("out", out)])
    bits = x.view(np.uint32)
    low, high = np.bitwise_or.reduce(bits[:20]), np.bitwise_and.reduce(bits[20:])
    thirds = WARP % 3 == 0
    with np.errstate(over="ignore"):
        expected = [
            np.full(32, x.sum(dtype=np.int32)).view(np.uint32),
            np.full(32, x.min()).view(np.uint32),
            np.full(32, bits.max()),
            np.full(32, np.bitwise_xor.reduce(bits)),
            np.where(WARP < 20, low, high),
            np.where(thirds, x[thirds].sum(dtype=np.int32), np.int32(0)).view(np.uint32),
        ]
    np.testing.assert_array_equal(out.view(np.uint32), expected)


@schedules
@pytest.mark.parametrize("kernel", ["cluster_sum", "cluster_sum_ptx"])
def test_sum_of_a_cluster(kernel, seed):
    cluster_sum(kernel, seed)


@schedules
def test_histogram_of_a_cluster(seed):
    x = np.random.default_rng(6).integers(0, 999, 300).astype(np.uint32)
    hits = np.zeros(32, np.uint32)
    arguments = [In("x", x), len(x), Out("hits", hits)]
    launch("reduce", "cluster_histogram", 90, 4, 64, arguments, cluster=(4,), seed=seed)
    np.testing.assert_array_equal(hits, np.bincount(x % 32, minlength=32))


@schedules
@archs(80, 90)
def test_copies_of_the_library(arch, seed):
    x = np.random.default_rng(30).standard_normal((3, 512)).astype(np.float32)
    y = np.zeros_like(x)
    launch("library", "fold", arch, 3, 128, [In("x", x), Out("y", y)], seed=seed)
    np.testing.assert_array_equal(y, x + x[:, ::-1])


@schedules
@archs(80, 90)
def test_barriers_of_the_library(arch, seed):
    x = np.random.default_rng(31).integers(-99, 100, (5, 64)).astype(np.int32)
    y = np.zeros_like(x)
    launch("library", "make_and_use", arch, 1, 128, [In("x", x), Out("y", y), 5], seed=seed)
    np.testing.assert_array_equal(y, 7 * x[:, ::-1] + np.arange(5)[:, None])


@schedules
def test_atomics_of_the_library(seed):
    x = np.arange(7, dtype=np.int32) ** 2
    sums, turn = np.zeros_like(x), np.zeros(1, np.uint32)
    launch(
        "library",
        "chain",
        80,
        7,
        32,
        [In("x", x), Out("sums", sums), InOut("turn", turn)],
        seed=seed,
    )
    np.testing.assert_array_equal(sums, np.cumsum(x))


@archs(80, 90)
def test_groups_of_the_library(arch):
    x = np.random.default_rng(32).integers(-50, 100, 64).astype(np.int32)
    out = np.zeros((5, 64), np.int32)
    launch("library", "groups", arch, 1, 64, [In("x", x), Out("out", out)])
    eights = x.reshape(8, 8)

    def each(values):
        return np.repeat(values, 8)

    expected = [
        each(eights.sum(1)), each(eights.max(1)), each((eights % 2 == 0) @ (1 << np.arange(8))),
        np.roll(eights, -3, 1).reshape(-1) * 100 + each(np.arange(8)), np.where(x > 10, 1, -1),
    ]  # fmt: skip
    np.testing.assert_array_equal(out, expected)


# Products


@schedules
@pytest.mark.parametrize("shape", [(64, 64, 32), (5, 8, 8), (70, 136, 72)], ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype", "arch"),
    [
        ("product_wmma_fp16", F16, 75),
        ("product_wmma_fp16", F16, 80),
        ("product_wmma_bf16", BF16, 90),
        ("product_wmma_tf32", torch.float32, 80),
    ],
)
def test_wmma(kernel, dtype, arch, shape, seed):
    wmma(kernel, dtype, arch, shape, seed)


@archs(75, 90)
def test_wmma_of_another_shape(arch):
    rng = np.random.default_rng(8)
    A, B = integers(rng, (32, 16), F16), integers(rng, (8, 16), F16)
    C = integers(rng, (32, 8), torch.float32)
    before = exact(C)
    launch("wmma", "product_wmma_tall", arch, 1, 32, [In("A", A), In("B", B), InOut("C", C)])
    assert torch.equal(exact(C), before + exact(A) @ exact(B).T)


@pytest.mark.parametrize("shape", [(64, 64, 64), (1, 1, 1), (70, 45, 37), (67, 130, 200)], ids=str)
@pytest.mark.parametrize("plain", [False, True])
@archs(80, 120)
def test_mma(plain, arch, shape):
    M, N, K = shape
    dtype = F16 if plain else BF16
    rng = np.random.default_rng(9)
    A = integers(rng, (M, K), dtype)
    B = integers(rng, (K, N) if plain else (N, K), dtype)
    expected = (exact(A) @ (exact(B) if plain else exact(B).T)).to(dtype)
    for seed in range(3):
        assert torch.equal(mma(A, B, plain, arch, seed), expected)


def test_mma_of_fractions():
    generator = torch.Generator().manual_seed(10)
    A, B = (torch.randn(n, 300, generator=generator).to(BF16) for n in (60, 70))
    found = [mma(A, B, False, 80, seed) for seed in range(3)]
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(exact(found[0]), exact(A) @ exact(B).T, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 8, 8), (37, 21, 19)], ids=str)
def test_mma_of_tf32(shape):
    M, N, K = shape
    generator = torch.Generator().manual_seed(11)
    A, B = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    C = torch.empty(M, N)
    arguments = [In("A", A), In("B", B), Out("C", C), M, N, K]
    launch("wmma", "product_mma_tf32", 80, tiles(M, N, 32, 8), 64, arguments)

    def rounded(x):  # to ten bits of mantissa, ties away from zero
        return exact(((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32))

    torch.testing.assert_close(exact(C), rounded(A) @ rounded(B), rtol=1e-6, atol=1e-5)
    assert not torch.allclose(exact(C), exact(A) @ exact(B), rtol=1e-6, atol=1e-5)


@archs(75, 80)
def test_mma_of_k8(arch):
    M, N, K = 21, 17, 29
    rng = np.random.default_rng(12)
    A, B = integers(rng, (M, K), F16), integers(rng, (N, K), F16)
    C = torch.empty(M, N)
    arguments = [In("A", A), In("B", B), Out("C", C), M, N, K]
    launch("wmma", "product_mma_k8", arch, tiles(M, N, 16, 8), 32, arguments)
    assert torch.equal(exact(C), exact(A) @ exact(B).T)


@schedules
@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("shape", [(64, 64, 64), (5, 3, 1), (100, 200, 330)], ids=str)
def test_wgmma(shape, registers, seed):
    found, expected = wgmma(*shape, seed, registers)
    assert torch.equal(found, expected.to(BF16))


@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
def test_wgmma_of_fractions(registers):
    found = [wgmma(100, 72, 200, seed, registers, fractions=True) for seed in range(3)]
    assert all(torch.equal(found[0][0], other) for other, _ in found)
    torch.testing.assert_close(exact(found[0][0]), found[0][1], rtol=2**-8, atol=1e-4)


@schedules
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(128, 64, 64), (3, 5, 1), (150, 130, 330)], ids=str)
def test_tcgen05(shape, biased, seed):
    found, expected = tcgen05(*shape, seed, biased)
    assert torch.equal(exact(found), expected)


# The copy engine


@schedules
@pytest.mark.parametrize("n", [4, 512, 5556])
@archs(90, 100, 120)
def test_bulk_copies(arch, n, seed):
    scale_bulk(n, seed, arch)


@schedules
@pytest.mark.parametrize("shape", [(32, 32), (1, 1), (100, 68), (33, 301)], ids=str)
@archs(90, 100, 120)
def test_tensor_copies(arch, shape, seed):
    transpose(*shape, seed, arch)


@schedules
@pytest.mark.parametrize("shape", [(32, 32), (100, 68), (40, 300)], ids=str)
@archs(90, 100)
def test_multicast_copies(arch, shape, seed):
    multicast(*shape, seed, arch)
