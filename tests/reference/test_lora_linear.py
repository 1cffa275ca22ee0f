import pytest
import torch
import torch.nn.functional as F

from lorafast import reference


def draw(*size):
    return torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_it_is_the_formula(leading, with_bias):
    x, weight, lora_A, lora_B = draw(*leading, 7), draw(5, 7), draw(3, 7), draw(5, 3)
    bias = draw(5) if with_bias else None
    y = reference.lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
    merged = F.linear(x, weight + 0.5 * lora_B @ lora_A, bias)
    torch.testing.assert_close(y, merged, rtol=1e-12, atol=1e-12)


def test_dropout_falls_on_the_low_rank_path_alone():
    x, weight, lora_A, lora_B = draw(6, 9), draw(4, 9), draw(2, 9), draw(4, 2)
    seed = torch.tensor([3])
    y = reference.lora_linear(x, weight, lora_A, lora_B, 1.0, dropout_p=0.5, seed=seed)
    low_rank = reference.dropout(x, 0.5, seed) @ lora_A.t() @ lora_B.t()
    torch.testing.assert_close(y, x @ weight.t() + low_rank, rtol=1e-12, atol=1e-12)


def test_no_dropout_outside_training():
    x, weight, lora_A, lora_B = draw(6, 9), draw(4, 9), draw(2, 9), draw(4, 2)
    args = (x, weight, lora_A, lora_B, 1.0)
    y = reference.lora_linear(*args, dropout_p=0.5, training=False)
    assert torch.equal(y, reference.lora_linear(*args))


def test_dropout_without_a_seed_is_refused():
    args = (draw(6, 9), draw(4, 9), draw(2, 9), draw(4, 2), 1.0)
    with pytest.raises(ValueError, match="seed is None"):
        reference.lora_linear(*args, dropout_p=0.5)


def test_the_backward_operations_are_its_gradients():
    M, K, N, r, scaling, p = 6, 9, 4, 2, 0.7, 0.4
    seed = torch.tensor([11])
    x, weight, lora_A, lora_B, dy = draw(M, K), draw(N, K), draw(r, K), draw(N, r), draw(M, N)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = reference.lora_linear(x, weight, lora_A, lora_B, scaling, dropout_p=p, seed=seed)
    dx, dA, dB = torch.autograd.grad(y, leaves, dy)

    s = reference.shrink(x, lora_A, p, seed)
    ds, dB_formula = reference.expand_backward(dy, s, lora_B, scaling)
    dA_formula = reference.shrink_backward(ds, x, p, seed)
    dx_formula = reference.linear_expand(dy, weight.t(), ds, lora_A.t(), 1.0, None, p, seed)
    for name, formula, autograd in (
        ("dx", dx_formula, dx),
        ("dA", dA_formula, dA),
        ("dB", dB_formula, dB),
    ):
        torch.testing.assert_close(formula, autograd, rtol=1e-12, atol=1e-12, msg=name)
