"""Who convolves with A: PyTorch, or a backend's kernels where that backend or none is forced."""

import pytest
import torch

import lorafast
from lorafast.backends import convolution
from lorafast.backends.convolution import Kernels
from lorafast.core.convolution import Geometry, convolve

GEOMETRY = Geometry((1, 2), (1, 0), (1, 1), 1)
x, A, ds = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 3, 2), torch.randn(2, 3, 5, 3)


@pytest.fixture
def served(monkeypatch):
    """What stands-in for kernels were called for, which serve A of three dimensions and more."""
    calls = []

    def shrink(x, lora_A, geometry):
        calls.append("s")
        return convolve(x, lora_A, None, geometry)

    def backward(ds, x, lora_A, geometry):
        calls.append("dA")
        return convolution.gradients(ds, x, lora_A, geometry, (False, True))[1]

    def fits(x, lora_A):
        return lora_A.shape[0] == 3

    def never(*_):
        return False

    kernels = Kernels(None, None, shrink, backward, never, never, fits, fits)
    monkeypatch.setitem(convolution._kernels, "cpu", ("cpu", lambda: kernels))
    return calls


@pytest.mark.parametrize(
    ("backend", "lora_A", "calls"),
    [
        ("auto", A, ["s", "dA"]),
        ("cpu", A, ["s", "dA"]),
        ("aten", A, []),
        ("reference", A, []),
        ("auto", A[:2], []),
    ],
    ids=["auto", "cpu", "aten", "reference", "another rank"],
)
def test_kernels_serve_where_they_are_ahead_and_no_other_backend_is_forced(
    served, backend, lora_A, calls
):
    of_s = ds[:, : len(lora_A)]
    with lorafast.use_backend(backend):
        s = convolution.conv_shrink(x, lora_A, GEOMETRY)
        dx, dA = convolution.conv_shrink_backward(of_s, x, lora_A, GEOMETRY, (True, True))
        convolution.conv_shrink_backward(of_s, x, lora_A, GEOMETRY, (True, False))
    assert served == calls
    torch.testing.assert_close(s, convolve(x, lora_A, None, GEOMETRY))
    expected = convolution.gradients(of_s, x, lora_A, GEOMETRY, (True, True))
    torch.testing.assert_close((dx, dA), expected)


def test_without_kernels_PyTorch_convolves(monkeypatch):
    monkeypatch.setitem(convolution._kernels, "cpu", ("cpu", lambda: None))
    s = convolution.conv_shrink(x, A, GEOMETRY)
    assert torch.equal(s, convolve(x, A, None, GEOMETRY))


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_a_backward_runs_on_the_backend_of_its_forward(served, backend):
    lora_A, lora_B = A.clone().requires_grad_(), torch.randn(7, 3, 1, 1, requires_grad=True)
    with lorafast.use_backend(backend):
        y = lorafast.functional.lora_conv(x, torch.randn(7, 4, 3, 2), lora_A, lora_B, 0.5)
    with lorafast.use_backend("auto" if backend == "aten" else "aten"):
        y.sum().backward()
    assert served == ([] if backend == "aten" else ["s", "dA"])
