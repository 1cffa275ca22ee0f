import math

import pytest
import torch
import torch.nn.functional as F

from lorafast import reference

K, N, r, n = 7, 5, 3, 4
ADAPTER_OF = [2, -1, 0, 0, 3, -1]  # nobody has 1


def draw(*size):
    return torch.randn(size, dtype=torch.float64)


def layer(*leading):
    return draw(*leading, K), draw(N, K), draw(n, r, K), draw(n, N, r), draw(n), draw(N)


def merged(x, weight, lora_A, lora_B, scaling, g, bias):
    if g < 0:
        return F.linear(x, weight, bias)
    return F.linear(x, weight + scaling[g] * lora_B[g] @ lora_A[g], bias)


@pytest.mark.parametrize("rest", [(), (2,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_it_is_the_formula_element_by_element(rest, kind, with_bias):
    x, weight, lora_A, lora_B, scaling, bias = layer(len(ADAPTER_OF), *rest)
    bias = bias if with_bias else None
    y = reference.grouped_lora_linear(
        x, weight, lora_A, lora_B, scaling, kind(ADAPTER_OF), bias
    )  # fmt: skip
    for i, g in enumerate(ADAPTER_OF):
        expected = merged(x[i], weight, lora_A, lora_B, scaling, g, bias)
        torch.testing.assert_close(y[i], expected, rtol=1e-12, atol=1e-12)


def test_an_adapter_for_each_row():
    x, *others, bias = layer(2, 3)
    adapter_of = torch.tensor([[0, 3, -1], [1, 0, 2]])
    y = reference.grouped_lora_linear(x, *others, adapter_of, bias)
    for i in range(2):
        for j in range(3):
            expected = merged(x[i, j], *others, adapter_of[i, j], bias)
            torch.testing.assert_close(y[i, j], expected, rtol=1e-12, atol=1e-12)


def test_one_number_scales_all():
    x, weight, lora_A, lora_B, _, _ = layer(6)
    arguments = (x, weight, lora_A, lora_B)
    y = reference.grouped_lora_linear(*arguments, 0.5, ADAPTER_OF)
    each = reference.grouped_lora_linear(*arguments, torch.full((n,), 0.5).double(), ADAPTER_OF)
    assert torch.equal(y, each)


def test_what_one_adapter_holds_stays_with_its_elements():
    x, weight, lora_A, lora_B, scaling, _ = layer(6)
    x[4] = math.inf
    lora_A[2, 0, 0] = lora_B[1, 0, 0] = math.nan
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = reference.grouped_lora_linear(x, weight, lora_A, lora_B, scaling, ADAPTER_OF)
    dx, dA, dB = torch.autograd.grad(y[[1, 2, 3, 5]].sum(), leaves)
    assert y[[1, 2, 3, 5]].isfinite().all()
    assert not y[[0, 4]].isfinite().all(1).any()
    assert dx[[1, 2, 3, 5]].isfinite().all()
    assert dA[0].isfinite().all()
    assert dB[0].isfinite().all()
    assert not dA[1].any()  # nobody's
    assert not dB[1].any()


def test_s_of_each_row():
    x, _, lora_A, *_ = layer(6)
    s = reference.grouped_shrink(x, lora_A, ADAPTER_OF)
    for i, g in enumerate(ADAPTER_OF):
        expected = x[i] @ lora_A[g].t() if g >= 0 else torch.zeros(r).double()
        torch.testing.assert_close(s[i], expected, rtol=1e-12, atol=1e-12)
