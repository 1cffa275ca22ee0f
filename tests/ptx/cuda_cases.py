"""Calls of our kernels in CUDA C++, each on a machine of its own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from .launch import In, InOut, Machine, Out, Program
from .nvcc import ptx_of, why_no_nvcc
from .tensormap import TensorMap

CUDA = Path(__file__).parent / "cuda"
EVERY = (75, 80, 90, 100, 120)
BF16, F16 = torch.bfloat16, torch.float16
RESIDENT = (4, 1, 2)
TILE = 64

needs_nvcc = pytest.mark.skipif(bool(why_no_nvcc()), reason=str(why_no_nvcc()))
_slow = pytest.mark.slow
schedules = pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=_slow) for n in (1, 2))])


def archs(*numbers):
    """``arch``, each: of quick tests 80 and 90, so that nvcc compiles a source twice at most."""
    quick = (80, 90)
    given = [n if n in quick else pytest.param(n, marks=_slow) for n in numbers]
    return pytest.mark.parametrize("arch", given)


def launch(source, kernel, arch, grid, block, arguments, *, seed=0, edit=None, **options):
    """Executes a kernel of one of our sources on a machine of its own; its PTX may be edited before."""
    text = ptx_of(CUDA / f"{source}.cu", arch)
    program = Program.from_text(edit(text) if edit else text, kernel)
    machine = Machine(seed=seed, resident=options.pop("resident", RESIDENT[seed % 3]))
    grid, block = ((n,) if isinstance(n, int) else n for n in (grid, block))
    return machine.launch(program, grid, block, list(arguments), **options)


def integers(rng, shape, dtype, most=3):
    """A tensor of small integers, which every format holds."""
    return torch.from_numpy(rng.integers(-most, most + 1, shape)).to(dtype)


def exact(tensor):
    return tensor.to(torch.float64)


def pitched(tensor, columns, fill):
    """The same matrix in rows of ``columns``; what it lies in, filled, and the matrix there."""
    whole = torch.full((tensor.shape[0], columns), fill, dtype=tensor.dtype)
    whole[:, : tensor.shape[1]] = tensor
    return whole, whole[:, : tensor.shape[1]]


def up(n, step):
    return -(-n // step) * step


def boxed(tensor, rows, columns, swizzle=0):
    """A tensor map with boxes of so many rows and columns."""
    return TensorMap(tensor, box=(columns, rows), swizzle=swizzle)


def tiles(M, N, rows=TILE, cols=TILE):
    return (-(-N // cols), -(-M // rows))


def sum_of(x, seed, arch=80, **options):
    """Its sum by five blocks, of which the last to arrive adds up."""
    partial, found = np.zeros(5, np.float32), np.zeros(1, np.float32)
    arrived = np.zeros(1, np.uint32)
    arguments = [
        In("x", x), len(x), Out("partial", partial), InOut("arrived", arrived), Out("sum", found),
    ]  # fmt: skip
    launch("reduce", "sum", arch, 5, 128, arguments, seed=seed, **options)
    assert arrived[0] == 0
    return found[0]


def running_sum(seed, arch=80, **options):
    x = np.random.default_rng(3).integers(-99, 100, 256).astype(np.int32)
    out = np.zeros_like(x)
    arguments = [In("x", x), Out("out", out)]
    launch("reduce", "running_sum", arch, 1, 256, arguments, seed=seed, **options)
    np.testing.assert_array_equal(out, np.cumsum(x))


def cluster_sum(kernel, seed, **options):
    clusters, ctas, n = 3, 4, 75
    x = np.random.default_rng(5).integers(-9, 10, (clusters, ctas, n)).astype(np.float32)
    by_cluster = x.sum((1, 2))
    expected = by_cluster if kernel == "cluster_sum" else np.repeat(by_cluster, ctas)
    found = np.zeros_like(expected)
    arguments = [In("x", x), n, Out("sum", found)]
    options |= {"cluster": (ctas,), "seed": seed}
    launch("reduce", kernel, 90, clusters * ctas, 64, arguments, **options)
    np.testing.assert_array_equal(found, expected)


def wmma(kernel, dtype, arch, shape, seed, **options):
    M, N, K = shape
    rng = np.random.default_rng(7)
    A, B = integers(rng, (M, K), dtype), integers(rng, (K, N), dtype)
    C = torch.empty(M, N)
    arguments = [In("A", A), In("B", B), Out("C", C), M, N, K]
    launch("wmma", kernel, arch, tiles(M, N), 128, arguments, seed=seed, **options)
    assert torch.equal(exact(C), exact(A) @ exact(B))


def scale_bulk(n, seed, arch=90, **options):
    x = np.random.default_rng(13).standard_normal(n).astype(np.float32)
    y = np.zeros_like(x)
    arguments = [In("x", x), Out("y", y), n, 1.5]
    launch("copy", "scale_bulk", arch, 3, 160, arguments, seed=seed, **options)
    np.testing.assert_array_equal(y, x * np.float32(1.5))


def transpose(M, N, seed, arch=90, **options):
    rng = np.random.default_rng(14)
    x = rng.standard_normal((M, up(N, 4))).astype(np.float32)[:, :N]
    whole = np.full((N, up(M, 4)), 77, np.float32)
    y = whole[:, :M]
    maps = boxed(In("x", x), 32, 32, 128), boxed(InOut("y", y), 32, 32)
    launch("copy", "transpose_tensor", arch, 2, 256, [*maps, M, N, -2.0], seed=seed, **options)
    np.testing.assert_array_equal(y, -2 * x.T)
    assert (whole[:, M:] == 77).all()


def multicast(M, N, seed, arch=90, **options):
    x = np.random.default_rng(15).standard_normal((M, N)).astype(np.float32)
    y = np.zeros((2, M, N), np.float32)
    arguments = [boxed(In("x", x), 16, 32), Out("y", y), M, N]
    launch("copy", "copy_multicast", arch, 4, 160, arguments, cluster=(2,), seed=seed, **options)
    np.testing.assert_array_equal(y, [x, 2 * x])


def mma(A, B, plain, arch, seed, **options):
    """A · B (``plain``) or A · Bᵀ; rows are longer than they must be, NaN beyond the matrices."""
    (M, K), N = A.shape, B.shape[1 if plain else 0]
    pitches = [up(A.shape[1], 8) + 8, up(B.shape[1], 8), N + 3 + N % 2]
    (whole_A, _), (whole_B, _) = (
        pitched(x, p, float("nan")) for x, p in zip((A, B), pitches, strict=False)
    )
    whole_C, C = pitched(torch.zeros(M, N, dtype=A.dtype), up(pitches[2], 2), 77)
    arguments = [In("A", whole_A), In("B", whole_B), InOut("C", whole_C), M, N, K]
    arguments += [pitches[0], pitches[1], whole_C.shape[1]]
    kernel = "product_mma_fp16_plain" if plain else "product_mma_bf16"
    shared = 3 * 2 * TILE * 128
    launch("wmma", kernel, arch, tiles(M, N), 128, arguments, seed=seed, shared=shared, **options)
    assert (whole_C[:, N:] == 77).all()
    return C


def wgmma(M, N, K, seed, registers=False, fractions=False, **options):
    """The product, and what it should be in float64."""
    rng = np.random.default_rng(16)
    shapes = (M, K), ((K, N) if registers else (N, K))
    if fractions:
        A, B = (torch.from_numpy(rng.standard_normal(s)).to(BF16) for s in shapes)
    else:
        A, B = (integers(rng, s, BF16) for s in shapes)
    _, C = pitched(torch.zeros(M, N, dtype=BF16), up(N, 8), 77)
    padded = [pitched(x, up(x.shape[1], 8), float("nan"))[1] for x in (A, B)]
    maps = [
        boxed(kind(name, x), 64, 64, 128)
        for kind, name, x in zip((In, In, InOut), "ABC", (*padded, C), strict=True)
    ]
    kernel = "product_wgmma_registers" if registers else "product_wgmma"
    launch("wgmma", kernel, 90, 2, 256, [*maps, M, N, K], seed=seed, shared=58368, **options)
    if registers:
        return C, exact(A).clamp(min=0) @ exact(B)
    return C, exact(A) @ exact(B).T


def tcgen05(M, N, K, seed, biased=True, **options):
    rng = np.random.default_rng(17)
    A, B = integers(rng, (M, K), BF16), integers(rng, (N, K), BF16)
    bias, C = integers(rng, N, torch.float32, 99), torch.empty(M, N)
    padded = [pitched(x, up(K, 8), float("nan"))[1] for x in (A, B)]
    arguments = [
        boxed(In("A", padded[0]), 128, 64, 128), boxed(In("B", padded[1]), 64, 64, 128),
        In("bias", bias) if biased else 0, Out("C", C), M, N, K,
    ]  # fmt: skip
    grid = tiles(M, N, 128, 64)
    launch(
        "tcgen05", "product_tcgen05", 100, grid, 128, arguments, seed=seed, shared=74752, **options
    )
    return C, exact(A) @ exact(B).T + (exact(bias) if biased else 0)


def hand_over(kernel, factor, seed, arch=80, **options):
    n = 150
    x = np.random.default_rng(23).integers(-99, 100, n).astype(np.int32)
    between, out, flag = np.zeros_like(x), np.zeros_like(x), np.zeros(1, np.int32)
    arguments = [In("in", x), Out("between", between), InOut("flag", flag), Out("out", out), n]
    launch("memory", kernel, arch, 2, 64, arguments, seed=seed, resident=2, **options)
    np.testing.assert_array_equal(out, x * factor + (1 if factor == 3 else -1))
