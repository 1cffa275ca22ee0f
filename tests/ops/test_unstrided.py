"""Inputs that aren't strided tensors: what PyTorch's own calls give, at every size, or one sentence."""

import pytest
import torch
import torch.nn.functional as F
from toy_formats import FORMATS, held

import lorafast
from lorafast.functional import lora_linear

pytestmark = pytest.mark.usefixtures("toy_formats")
SCALING = 0.5
K, N, R = 64, 48, 4
KINDS = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "onednn": torch.Tensor.to_mkldnn,
    "nested": lambda x: torch.nested.nested_tensor([x, x[:3].cos()]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:3].cos()], layout=torch.jagged),
}


def dense(y):
    if y.is_nested:
        return torch.cat([part.flatten() for part in y.unbind()])
    return y if y.layout is torch.strided else y.to_dense()


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("rows", [4, 3000])
@pytest.mark.parametrize("kind", KINDS)
class TestEveryLayout:
    def tensors(self, kind, rows):
        x, W, bias = torch.randn(rows, K), torch.randn(N, K), torch.randn(N)
        A, B = torch.randn(R, K).requires_grad_(), torch.randn(N, R).requires_grad_()
        return KINDS[kind](x), W, A, B, bias

    @pytest.mark.parametrize("format", FORMATS)
    def test_output_and_gradients_are_those_of_plain_calls(self, kind, rows, format):
        x, W, A, B, bias = self.tensors(kind, rows)
        results = []
        for y in (
            lora_linear(x, FORMATS[format](W), A, B, SCALING, bias),
            F.linear(x, held(format, W), bias) + F.linear(F.linear(x, A), B * SCALING),
        ):
            results.append((dense(y), *torch.autograd.grad(dense(y).square().sum(), (A, B))))
            assert y.is_nested == (kind in ("nested", "jagged"))
        for name, found, expected in zip(("y", "dA", "dB"), *results, strict=True):
            assert torch.equal(found, expected), name

    def test_dropout(self, kind, rows):
        x, W, A, B, bias = self.tensors(kind, rows)
        if kind not in ("nested", "jagged"):
            with pytest.raises(
                ValueError, match=r"x is torch\..*, of which PyTorch has no dropout"
            ):
                lora_linear(x, W, A, B, SCALING, bias, dropout_p=0.5)
            return
        everything = lora_linear(x, W, A, B, SCALING, bias, dropout_p=1.0)
        assert torch.equal(dense(everything), dense(F.linear(x, W, bias)))
        some = dense(lora_linear(x, W, A, B, SCALING, bias, dropout_p=0.5))
        assert not torch.equal(some, dense(lora_linear(x, W, A, B, SCALING, bias)))

    def test_a_forced_backend_is_not_left_without_a_word(self, kind, rows):
        x, W, A, B, bias = self.tensors(kind, rows)
        with (
            lorafast.use_backend("aten"),
            pytest.raises(lorafast.BackendError, match="inputs like"),
        ):
            lora_linear(x, W, A, B, SCALING, bias)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("widths", "said"), [((63, 63), "63"), ((64, 63), "of several sizes")], ids=["one", "several"]
)
def test_a_nested_tensor_of_another_width(widths, said):
    x = torch.nested.nested_tensor([torch.randn(2, width) for width in widths])
    with pytest.raises(ValueError, match=rf"x has shape \[\.\.\., {said}\] \(nested\), expected"):
        lora_linear(x, torch.randn(N, K), torch.randn(R, K), torch.randn(N, R), SCALING)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["nested", "jagged"])
def test_float16_is_rounded_once(kind):
    """Neither s nor the low-rank term fits into float16; the sum does."""
    x = torch.nested.nested_tensor(
        [torch.full((n, K), 100.0, dtype=torch.float16) for n in (4, 2)],
        layout=torch.jagged if kind == "jagged" else torch.strided,
    )
    W = torch.full((N, K), -600.0 / K, dtype=torch.float16)
    A, B = torch.full((R, K), 1.0 / K), torch.full((N, R), 1.0 / R)
    rows = torch.full((6, K), 100.0, dtype=torch.float16)
    expected = lora_linear(rows, W, A, B, 700.0)
    assert expected.isfinite().all()
    found = dense(lora_linear(x, W, A, B, 700.0))
    torch.testing.assert_close(found, expected.flatten(), rtol=2e-3, atol=0)
