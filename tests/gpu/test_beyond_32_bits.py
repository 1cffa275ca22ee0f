"""M·K and M·N beyond 2**31: the rows behind that are right, and count in every sum."""

import gc

import pytest
import torch

from lorafast import ops, reference
from lorafast.ops import dispatch

pytestmark = pytest.mark.gpu

K, N, r = 8192, 8192, 16
M = 2**31 // K + 77
TAIL = 100  # rows on both sides of 2**31
BACKENDS = [name for name in dispatch.backend_names() if name != "reference"]


@pytest.fixture(autouse=True)
def _enough_memory():
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    yield
    gc.collect()
    torch.cuda.empty_cache()


def draw(*size, device, scale=1.0):
    return torch.randn(size, device=device, dtype=torch.bfloat16).mul_(scale)


def assert_near(found, expected):
    """To bf16's rounding, in norm; ``expected`` is the float64 reference."""
    distance = torch.linalg.vector_norm(found.double() - expected)
    assert distance <= 4e-3 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_shrink(backend, dropout_p, device):
    x, lora_A = draw(M, K, device=device), draw(r, K, device=device)
    seed = torch.tensor([7], device=device)
    with dispatch.use_backend(backend):
        s = ops.shrink(x, lora_A, dropout_p, seed)
    tail = x[-TAIL:].double()
    if dropout_p:
        keep = reference_mask_of_the_tail(dropout_p, seed)
        tail = tail * keep * reference.dropout.survivor_scale(dropout_p)
    assert_near(s[-TAIL:], tail @ lora_A.double().t())


def reference_mask_of_the_tail(dropout_p, seed):
    """The last rows of the mask; whole, its 64-bit words would take 200 GiB."""
    from lorafast.reference import dropout

    groups = K // 8
    first = (M - TAIL) * groups
    index = torch.arange(first, first + TAIL * groups, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    low = 0xFFFFFFFF
    words = dropout.philox_4x32(
        (index & low, index >> 32, zero, zero), (seed & low, (seed >> 32) & low)
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return (torch.stack(halves, dim=-1) >= dropout.threshold(dropout_p)).view(TAIL, K)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_expand(backend, device):
    x, weight = draw(M, K, device=device), draw(N, K, device=device, scale=K**-0.5)
    s, lora_B = draw(M, r, device=device), draw(N, r, device=device)
    with dispatch.use_backend(backend):
        y = ops.linear_expand(x, weight, s, lora_B, 0.5)
    tail = (t.double() for t in (x[-TAIL:], weight, s[-TAIL:], lora_B))
    assert_near(y[-TAIL:], reference.linear_expand(*tail, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expand_backward(backend, device):
    dy, lora_B = draw(M, N, device=device), draw(N, r, device=device)
    s = torch.zeros(M, r, device=device, dtype=torch.bfloat16)
    s[-TAIL:] = draw(TAIL, r, device=device)  # dB is a sum over the tail alone
    with dispatch.use_backend(backend):
        ds, dB = ops.expand_backward(dy, s, lora_B, 0.5)
    tail = (t.double() for t in (dy[-TAIL:], s[-TAIL:], lora_B))
    expected_ds, expected_dB = reference.expand_backward(*tail, 0.5)
    assert_near(ds[-TAIL:], expected_ds)
    assert_near(dB, expected_dB)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shrink_backward(backend, device):
    x = draw(M, K, device=device)
    ds = torch.zeros(M, r, device=device, dtype=torch.bfloat16)
    ds[-TAIL:] = draw(TAIL, r, device=device)
    with dispatch.use_backend(backend):
        dA = ops.shrink_backward(ds, x)
    assert_near(dA, reference.shrink_backward(ds[-TAIL:].double(), x[-TAIL:].double()))
