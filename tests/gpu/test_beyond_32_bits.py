"""M·K and M·N beyond 2**31: the rows behind that are right, and count in every sum."""

import fcntl
import gc
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import skip_unless_usable

from lorafast import ops, reference
from lorafast.backends import forced
from lorafast.reference import contract
from lorafast.reference.dropout import philox_4x32, survivor_scale, threshold

pytestmark = pytest.mark.gpu

K, N, r = 8192, 8192, 16
M = 2**31 // K + 77
TAIL = 100  # rows on both sides of 2**31
BACKENDS = ["aten", "triton", "cuda"]


@pytest.fixture(autouse=True)
def _enough_memory(backend):
    skip_unless_usable(backend)
    lock = Path(tempfile.gettempdir()) / "lorafast-tests-gpu-memory.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other processes run the other tests of this file
        free, _ = torch.cuda.mem_get_info()
        if free < 40 << 30:
            pytest.skip(f"needs 40 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
        yield
        gc.collect()
        torch.cuda.empty_cache()


def draw(*size, device, scale=1.0):
    return torch.randn(size, device=device, dtype=torch.bfloat16).mul_(scale)


def assert_contract(found, function, *tensors):
    """``found`` is ``function(*tensors)`` as exactly as the contract asks."""
    exact = function(*(t.double() for t in tensors))
    eager = function(*tensors)
    size = function(*(t.double().square() for t in tensors)).abs().sqrt()
    reason = contract.why_broken(found, eager, exact, size)
    assert reason is None, reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_shrink(backend, dropout_p, device):
    x, lora_A = draw(M, K, device=device), draw(r, K, device=device)
    seed = torch.tensor([7], device=device)
    with forced.use_backend(backend):
        s = ops.shrink(x, lora_A, dropout_p, seed)
    tail = x[-TAIL:]
    if dropout_p:
        keep = mask_of_the_tail(dropout_p, seed)
        tail = torch.where(keep, tail, 0.0) * survivor_scale(dropout_p)
    assert_contract(s[-TAIL:], reference.shrink, tail, lora_A)


def mask_of_the_tail(dropout_p, seed):
    """The last rows of the mask; whole, its 64-bit words would take 200 GiB."""
    groups = K // 8
    first = (M - TAIL) * groups
    index = torch.arange(first, first + TAIL * groups, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    low = 0xFFFFFFFF
    words = philox_4x32((index & low, index >> 32, zero, zero), (seed & low, (seed >> 32) & low))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return (torch.stack(halves, dim=-1) >= threshold(dropout_p)).view(TAIL, K)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expand(backend, device):
    s, lora_B = draw(M, r, device=device), draw(N, r, device=device)
    with forced.use_backend(backend):
        y = ops.expand(s, lora_B, 0.5, dtype=torch.bfloat16)
    assert_contract(
        y[-TAIL:],
        lambda s, lora_B: reference.expand(s, lora_B, 0.5, dtype=s.dtype),
        s[-TAIL:],
        lora_B,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_expands_mask(backend, device):
    s, lora_B = (torch.ones(rows, r, device=device, dtype=torch.bfloat16) for rows in (M, N))
    seed = torch.tensor([7], device=device)
    with forced.use_backend(backend):
        y = ops.expand(s, lora_B, 0.5, 0.3, seed, dtype=torch.bfloat16)
    assert torch.equal(y[-TAIL:] != 0, mask_of_the_tail(0.3, seed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_expand(backend, device):
    x, weight = draw(M, K, device=device), draw(N, K, device=device, scale=K**-0.5)
    s, lora_B = draw(M, r, device=device), draw(N, r, device=device)
    with forced.use_backend(backend):
        y = ops.linear_expand(x, weight, s, lora_B, 0.5)
    assert_contract(
        y[-TAIL:],
        lambda x, weight, s, lora_B: reference.linear_expand(x, weight, s, lora_B, 0.5),
        x[-TAIL:],
        weight,
        s[-TAIL:],
        lora_B,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_expand_backward(backend, device):
    dy, lora_B = draw(M, N, device=device), draw(N, r, device=device)
    s = torch.zeros(M, r, device=device, dtype=torch.bfloat16)
    s[-TAIL:] = draw(TAIL, r, device=device)  # dB is a sum over the tail alone
    with forced.use_backend(backend):
        ds, dB = ops.expand_backward(dy, s, lora_B, 0.5)
    for index, found in enumerate((ds[-TAIL:], dB)):
        assert_contract(
            found,
            lambda dy, s, lora_B, i=index: reference.expand_backward(dy, s, lora_B, 0.5)[i],
            dy[-TAIL:],
            s[-TAIL:],
            lora_B,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_shrink_backward(backend, device):
    x = draw(M, K, device=device)
    ds = torch.zeros(M, r, device=device, dtype=torch.bfloat16)
    ds[-TAIL:] = draw(TAIL, r, device=device)
    with forced.use_backend(backend):
        dA = ops.shrink_backward(ds, x)
    assert_contract(dA, reference.shrink_backward, ds[-TAIL:], x[-TAIL:])
