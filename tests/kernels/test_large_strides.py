"""Elements beyond 2**31 of their storage: offsets need 64 bits.

The storage is reserved and, but for two pages, never touched.
"""

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.bottleneck import bottleneck, bottleneck_backward
from lorafast.kernels.weight_norm import weight_norm
from small_tiles import on_kernels

from lorafast import reference

FAR = 2**31


@pytest.fixture
def far_apart(device):
    """A matrix of two rows that lie 2**31 elements apart."""

    def make(K):
        storage = torch.empty(FAR + K, dtype=torch.float16, device=device)
        matrix = storage.as_strided((2, K), (FAR, 1))
        matrix.copy_(torch.randn(2, K))
        return matrix

    return make


def draw(*size, device):
    return torch.randn(size, device=device).half()


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_shrink(far_apart, device):
    x, lora_A = far_apart(24), draw(3, 24, device=device)
    assert_same(on_kernels().shrink(x, lora_A), reference.shrink(x, lora_A))
    x, lora_A = draw(5, 24, device=device), far_apart(24)
    assert_same(on_kernels().shrink(x, lora_A), reference.shrink(x, lora_A))


def test_expand(far_apart, device):
    s, lora_B = far_apart(24).float(), draw(5, 24, device=device)
    expected = reference.expand(s, lora_B, 0.5, dtype=torch.float16)
    assert_same(on_kernels().expand(s, lora_B, 0.5, dtype=torch.float16), expected)
    s, lora_B = draw(5, 24, device=device).float(), far_apart(24)
    for factor in (lora_B, far_apart(5).t()):
        given = s if factor is lora_B else s[:, :2]
        expected = reference.expand(given, factor, 0.5, dtype=torch.float16)
        assert_same(on_kernels().expand(given, factor, 0.5, dtype=torch.float16), expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("far", [0, 1, 2], ids=["weight", "lora_A", "lora_B"])
def test_weight_norm(far_apart, device, far, transposed):
    sizes = ((24, 2), (2, 2), (24, 2)) if transposed else ((2, 24), (2, 24), (2, 2))
    given = [draw(*size, device=device) for size in sizes]
    rows, columns = sizes[far]
    given[far] = far_apart(rows).t() if columns == 2 and transposed else far_apart(columns)
    assert_same(weight_norm(*given, 0.5), reference.weight_norm(*given, 0.5))


@pytest.mark.parametrize("far", ["h", "down", "up", "residual"])
def test_bottleneck(far_apart, device, far):
    sizes = {"h": (2, 24), "down": (2, 24), "up": (2, 24), "residual": (2, 24)}
    t = {name: draw(*size, device=device) for name, size in sizes.items()} | {far: far_apart(24)}
    t["up"] = t["up"].t()
    given = (t["h"], t["down"], t["up"], None, None, 0.5, "silu", t["residual"])
    y, a = bottleneck(*given)
    assert_same(y, reference.bottleneck(*given))
    dy = far_apart(24) if far == "h" else draw(2, 24, device=device)
    given = (dy, t["h"], a, t["down"], t["up"], 0.5, "silu")
    found, expected = bottleneck_backward(*given), reference.bottleneck_backward(*given)
    for one, two in zip(found, expected, strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("far", ["x", "weight", "weight transposed"])
def test_linear_expand(far_apart, device, far):
    x, weight = draw(2, 24, device=device), draw(2, 24, device=device)
    if far == "x":
        x = far_apart(24)
    elif far == "weight":
        weight = far_apart(24)
    else:
        x, weight = draw(5, 2, device=device), far_apart(24).t()
    s, lora_B = draw(x.shape[0], 3, device=device).float(), draw(weight.shape[0], 3, device=device)
    arguments = (x, weight, s, lora_B, 0.5)
    expected = reference.linear_expand(*arguments)
    assert_same(on_kernels().linear_expand(*arguments), expected)
    transposed = (x, weight.t(), s, lora_B, 0.5)
    assert_same(on_kernels().linear_expand(*transposed, transposed=True), expected)


def test_linear_expand_with_a_strided_bias(device):
    storage = torch.empty(2**31 + 1, dtype=torch.float16, device=device)
    bias = storage.as_strided((3,), (2**30,))
    bias.copy_(torch.randn(3))
    x, weight = draw(2, 4, device=device), draw(3, 4, device=device)
    s, lora_B = draw(2, 1, device=device).float(), draw(3, 1, device=device)
    arguments = (x, weight, s, lora_B, 0.5, bias)
    assert_same(on_kernels().linear_expand(*arguments), reference.linear_expand(*arguments))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_expand_backward(far_apart, device, transposed):
    dy = far_apart(24).t() if transposed else far_apart(24)
    s, lora_B = draw(dy.shape[0], 3, device=device).float(), draw(dy.shape[1], 3, device=device)
    found = on_kernels().expand_backward(dy, s, lora_B, 0.5, dbias=True)
    expected = (*reference.expand_backward(dy, s, lora_B, 0.5), dy.sum(0))
    for one, two in zip(found, expected, strict=True):
        assert_same(one, two)


def test_shrink_backward(far_apart, device):
    x, ds = far_apart(24), draw(2, 3, device=device).float()
    assert_same(on_kernels().shrink_backward(ds, x), reference.shrink_backward(ds, x))
