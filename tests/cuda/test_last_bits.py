"""float32 products on tensor cores keep every bit of their factors: sums of one term, or of a few equal
ones, whose errors don't average out.

Outer products are many such sums at once: each element is held to the contract as if it were all of an
output.
"""

import itertools

import pytest
import torch
from on_machine import launched, needs_nvcc

from lorafast import reference
from lorafast.backends.cost import Device
from lorafast.backends.cuda import skinny, small
from lorafast.core.problem import Problem
from lorafast.reference.contract import _FACTOR

pytestmark = needs_nvcc
F16, F32 = torch.float16, torch.float32
ARCH = 80
ARCHES = [ARCH, pytest.param(75, marks=pytest.mark.slow)]
SIZES = ((60, 63), (33, 64))
LAST_BITS = {
    "any": lambda n, g: torch.randint(1 << 23, 1 << 24, (n,), generator=g),
    "odd": lambda n, g: torch.randint(1 << 22, 1 << 23, (n,), generator=g) * 2 + 1,
    # The largest rests beside the smallest numbers.
    "just above 1": lambda n, g: (1 << 23) + torch.randint(1 << 14, (n,), generator=g),
}


def draw(kind, n, seed, dtype=F32):
    """Numbers of both signs and of several sizes."""
    g = torch.Generator().manual_seed(seed)
    bits = LAST_BITS[kind](n, g).double() * 2.0**-23
    bits *= torch.randint(2, (n,), generator=g) * 2 - 1
    return (bits * 2.0 ** torch.randint(-3, 4, (n,), generator=g)).to(dtype)


def planned(
    plan, operation, M, K, N, r, dtype=F32, adapter=F32, wants=(), dropout=False, arch=ARCH
):
    problem = Problem(
        operation, M, K, N, r, dtype, adapter, torch.device("cpu"), wants=wants, dropout=dropout
    )
    launch = plan(problem, Device.known_by("", arch, 8))
    assert not isinstance(launch, str), launch
    return launch.run


def hold(found, of, *given):
    """Each element to the contract: ``of`` is the reference, its arguments are ``given``."""
    assert found.dtype == F32
    exact = [tensor.double() for tensor in given]
    ref64, size64 = of(*exact), of(*(tensor.square() for tensor in exact)).abs().sqrt()
    eager = of(*given).to(F32).double()
    allowed = _FACTOR * (eager - ref64).abs() + torch.finfo(F32).eps * size64
    worst = ((found.double() - ref64).abs() / allowed).max().item()
    assert worst <= 1, f"an element is off by {worst:.2f} times what is allowed"


def columns(left, right, terms, alone):
    """Two matrices whose product over their columns has ``terms`` equal terms, or that many columns of
    which one counts."""
    x, a = left[:, None].expand(-1, terms).clone(), right[:, None].expand(-1, terms).clone()
    if alone:
        x[:, : terms - 1] = 0
    return x, a


CASES = [
    pytest.param(*case, id="-".join(str(part).replace(" ", "-") for part in case))
    for case in itertools.product(
        LAST_BITS, ((F32, F32), (F16, F32)), ((1, False), (3, False), (20, True))
    )
]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("kind", "dtypes", "terms"), CASES)
def test_shrink(kind, dtypes, terms, arch):
    (M, r), (dtype, adapter) = SIZES[0], dtypes
    x, A = columns(draw(kind, M, 1, dtype), draw(kind, r, 2, adapter), *terms)
    with launched(arch):
        s = planned(skinny.plan_shrink, "shrink", M, terms[0], 0, r, dtype, adapter, arch=arch)(
            x, A
        )
    hold(s, lambda x, A: x.to(A.dtype) @ A.t(), x, A)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("kind", "dtypes", "terms"), CASES)
def test_shrink_backward(kind, dtypes, terms, arch):
    (K, r), (dtype, adapter) = SIZES[1], dtypes
    x, ds = columns(draw(kind, K, 3, dtype), draw(kind, r, 4), *terms)
    run = planned(
        skinny.plan_shrink_backward, "shrink_backward", terms[0], K, 0, r, dtype, adapter, arch=arch
    )
    with launched(arch):
        dA = run(ds.t(), x.t())
    hold(dA, lambda ds, x: ds @ x.to(ds.dtype).t(), ds, x)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("kind", "dtypes", "terms"), CASES)
def test_expand_backward(kind, dtypes, terms, arch):
    """ds and dB of one launch: dy is one row and one column of numbers."""
    (n, r), (dtype, adapter) = SIZES[0], dtypes
    dy, B = columns(draw(kind, n, 5, dtype), draw(kind, r, 6, adapter), *terms)
    s = draw(kind, n * r, 7).reshape(n, r)
    run = planned(
        skinny.plan_expand_backward, "expand_backward", n, 0, terms[0], r, dtype, adapter,
        wants=("ds", "dB"), arch=arch,
    )  # fmt: skip
    with launched(arch):
        ds, _, _ = run(dy, s, B.t(), 1.0)
    hold(ds, lambda dy, B: dy.to(B.dtype) @ B.t(), dy, B)
    rows, s = columns(draw(kind, n, 8, dtype), draw(kind, r, 9), *terms)
    run = planned(
        skinny.plan_expand_backward, "expand_backward", terms[0], 0, n, r, dtype, adapter,
        wants=("ds", "dB", "dbias"), arch=arch,
    )  # fmt: skip
    with launched(arch):
        _, dB, dbias = run(rows.t(), s.t(), torch.zeros(n, r, dtype=adapter), 1.0)
    hold(dB, lambda dy, s: dy.to(s.dtype) @ s.t(), rows, s)
    assert dbias is not None


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("kind", "dtypes", "terms"), CASES)
def test_expand(kind, dtypes, terms, arch):
    """r is 1, or so small; a float32 y."""
    M, N = SIZES[0]
    s, B = columns(draw(kind, M, 10), draw(kind, N, 11, dtypes[0]), *terms)
    with launched(arch):
        y = planned(small.plan_expand, "expand", M, 0, N, terms[0], F32, dtypes[0], arch=arch)(
            s, B, 1.0
        )
    hold(y, lambda s, B: s @ B.to(s.dtype).t(), s, B)


def layer(x, W, A, B):
    """y and s of one launch."""
    (M, K), N, r = x.shape, len(W), len(A)
    problem = Problem(
        "lora_linear", M, K, N, r, x.dtype, A.dtype, torch.device("cpu"), wants=("y", "s")
    )
    device = Device.known_by("", ARCH, 8)
    assert small.why_not_in_one(problem, device) is None
    with launched(ARCH):
        return small._run_lora_linear(problem, 64, 3)(x, W, A, B, 1.0)


@pytest.mark.parametrize(("kind", "dtypes", "terms"), CASES)
def test_a_layer_in_one_launch(kind, dtypes, terms):
    (M, r), (dtype, adapter) = SIZES[0], dtypes
    x, A = columns(draw(kind, M, 12, dtype), draw(kind, r, 13, adapter), *terms)
    W = draw(kind, 40, 14, dtype)[:, None].expand(-1, terms[0]).contiguous()
    y, s = layer(x, W, A, torch.zeros(40, r, dtype=adapter))
    hold(s, lambda x, A: x.to(A.dtype) @ A.t(), x, A)
    if dtype == F32:
        hold(y, lambda x, W: x @ W.t(), x, W)
        exact = layer(torch.eye(M), torch.zeros(40, M), torch.eye(M), W[:, :1].expand(-1, M))
        assert exact[0].equal(W[:, 0].expand(M, -1))


def test_a_nan_whose_bits_tf32_does_not_read():
    """Cut off it would be infinity."""
    x = torch.tensor([[0x7F80_0001, 0x7F80_0000]], dtype=torch.int32).view(F32).t().contiguous()
    with launched(ARCH):
        s = planned(skinny.plan_shrink, "shrink", 2, 1, 0, 2)(x, torch.tensor([[1.5], [-1.5]]))
    assert s[0].isnan().all()
    assert s[1].equal(torch.tensor([torch.inf, -torch.inf]))


def test_the_largest_numbers():
    """Of which none is rounded to infinity on its way."""
    x = torch.full((2, 1), torch.finfo(F32).max)
    A = torch.tensor([[0.999999], [1.0 / 3]])
    with launched(ARCH):
        s = planned(skinny.plan_shrink, "shrink", 2, 1, 0, 2)(x, A)
    hold(s, lambda x, A: x @ A.t(), x, A)
    assert reference.shrink(x, A).isfinite().all()
