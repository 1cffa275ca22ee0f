"""What holds for each of the registered operations: opcheck, derivatives, refusals."""

import re

import pytest
import torch
from helpers import covering, skip_unless_usable
from toy_formats import FORMATS

import lorafast
from lorafast import operands, ops, reference
from lorafast.backends import registry
from lorafast.core.problem import OPERATIONS

pytestmark = pytest.mark.usefixtures("toy_formats")

M, K, N, r = 4, 6, 5, 2
SEED = torch.tensor([42])


def draw(*size, grad=True):
    return torch.randn(size, dtype=torch.float64, requires_grad=grad)


def inputs(operation, grad=True):
    """The tensors of an operation, and a function of them that fixes the rest."""
    if operation == "shrink":
        return (draw(M, K, grad=grad), draw(r, K, grad=grad)), (0.25, SEED)
    if operation == "expand":
        return (draw(M, r, grad=grad), draw(N, r, grad=grad)), (0.5, 0.25, SEED)
    if operation == "linear_expand":
        shapes = ((M, K), (N, K), (M, r), (N, r))
        return tuple(draw(*shape, grad=grad) for shape in shapes), (0.5, None, 0.25, SEED)
    if operation == "expand_backward":
        shapes = ((M, N), (M, r), (N, r))
        return tuple(draw(*shape, grad=grad) for shape in shapes), (0.5,)
    return (draw(M, r, grad=grad), draw(M, K, grad=grad)), (0.25, SEED)


def call(module, operation, tensors, rest):
    """``expand`` is told the dtype of its output, which no tensor has."""
    dtype = {"dtype": tensors[0].dtype} if operation == "expand" else {}
    return getattr(module, operation)(*tensors, *rest, **dtype)


def in_format(format, tensors):
    """The weight, second of the tensors of linear_expand, stored so."""
    x, weight, *rest = tensors
    return (x, FORMATS[format](weight.detach() if format != "dense" else weight), *rest)


def as_registered(weight):
    """A weight is a list of tensors and the description of its format."""
    return operands.stored(weight), operands.describe(weight)


operation = pytest.mark.parametrize("operation", OPERATIONS)
CASES = [
    *((name, "dense") for name in OPERATIONS),
    *(("linear_expand", name) for name in FORMATS if name != "dense"),
]
in_every_format = pytest.mark.parametrize(("operation", "format"), CASES)


@pytest.mark.parametrize(
    ("case", "backend", "grad"), covering(CASES, ("reference", "aten", "triton"), (True, False))
)
def test_opcheck(case, backend, grad):
    operation, format = case
    skip_unless_usable(backend)
    if format != "dense" or operation not in registry.get(backend).operations:
        backend = {"triton": "cpu"}.get(backend, backend)  # its kernels read dense weights
    tensors, rest = inputs(operation, grad=False)
    if backend in ("triton", "cpu"):
        tensors = tuple(t.float() for t in tensors)
    tensors = tuple(t.requires_grad_(grad) for t in tensors)
    if operation == "linear_expand":
        x, weight, *others = in_format(format, tensors)
        tensors = (x, *as_registered(weight), *others)
    with lorafast.use_backend(backend):
        operation = getattr(torch.ops.lorafast, operation).default
        torch.library.opcheck(operation, (*tensors, *rest))


@pytest.mark.parametrize(
    ("backend", "format"),
    [
        *((backend, "dense") for backend in ("reference", "aten", "triton", "cpu")),
        *(
            (backend, name)
            for backend in ("reference", "aten", "cpu")
            for name in FORMATS
            if name != "dense"
        ),
    ],
)
def test_opcheck_of_a_whole_backward(backend, format):
    skip_unless_usable(backend)
    shapes = ((2, M, N), (2, M, K), (N, K), (r, K), (N, r), (2 * M, r))
    dy, x, weight, lora_A, lora_B, s = (torch.randn(shape) for shape in shapes)
    weight = FORMATS[format](weight)
    with lorafast.use_backend(backend):
        torch.library.opcheck(
            torch.ops.lorafast.lora_linear_backward.default,
            (dy, x, *as_registered(weight), lora_A, lora_B, s, 0.5, 0.25, SEED),
        )


@in_every_format
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_first_and_second_derivatives(operation, format, backend):
    tensors, rest = inputs(operation)
    if format != "dense":
        tensors[1].requires_grad_(False)

    def function(*tensors):
        if operation == "linear_expand":
            tensors = in_format(format, tensors)
        return call(ops, operation, tensors, rest)

    with lorafast.use_backend(backend):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@in_every_format
def test_aten_agrees_with_the_reference(operation, format):
    tensors, rest = inputs(operation, grad=False)
    dense = tensors
    if operation == "linear_expand":
        tensors = in_format(format, tensors)
        dense = tuple(operands.as_dense(tensor) for tensor in tensors)
    expected = call(reference, operation, dense, rest)
    found = call(ops, operation, tensors, rest)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@operation
def test_autocast_changes_nothing_inside_an_operation(operation):
    tensors, rest = inputs(operation, grad=False)
    tensors = tuple(t.float() for t in tensors)
    expected = call(ops, operation, tensors, rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(ops, operation, tensors, rest)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


expand_backward = torch.ops.lorafast.expand_backward
REFUSALS = {
    "shrink-K": (
        lambda: ops.shrink(draw(5, 4), draw(3, 6)),
        "lora_A has shape [3, 6], expected [r, 4]",
    ),
    "shrink-3d": (lambda: ops.shrink(draw(2, 5, 4), draw(3, 4)), "x has shape [2, 5, 4]"),
    "shrink-no-seed": (lambda: ops.shrink(draw(5, 4), draw(3, 4), 0.5), "seed is None"),
    "shrink-p": (
        lambda: ops.shrink(draw(5, 4), draw(3, 4), 1.5, SEED),
        "dropout_p is 1.5, expected a probability from 0 to 1",
    ),
    "shrink-seed": (
        lambda: ops.shrink(draw(5, 4), draw(3, 4), 0.5, torch.tensor([1, 2])),
        "seed is torch.int64 of 2 elements, expected one int64 element",
    ),
    "expand-r": (
        lambda: ops.expand(draw(5, 2), draw(7, 3), 1.0, dtype=torch.float64),
        "lora_B has shape [7, 3], expected [N, 2]",
    ),
    "expand-3d": (
        lambda: ops.expand(draw(2, 5, 2), draw(7, 2), 1.0, dtype=torch.float64),
        "s has shape [2, 5, 2], expected [M, r]",
    ),
    "expand-dtype": (
        lambda: ops.expand(draw(5, 2), draw(7, 2), 1.0, dtype=torch.float16),
        "s is torch.float64, expected torch.float32: y is torch.float16",
    ),
    "expand-no-seed": (
        lambda: ops.expand(draw(5, 2), draw(7, 2), 1.0, 0.5, dtype=torch.float64),
        "seed is None",
    ),
    "expand-p": (
        lambda: ops.expand(draw(5, 2), draw(7, 2), 1.0, -0.5, SEED, dtype=torch.float64),
        "dropout_p is -0.5, expected a probability from 0 to 1",
    ),
    "linear_expand-weight": (
        lambda: ops.linear_expand(draw(5, 4), draw(7, 3), draw(5, 2), draw(7, 2), 1.0),
        "weight has shape [7, 3], expected [N, 4]",
    ),
    "linear_expand-bias": (
        lambda: ops.linear_expand(draw(5, 4), draw(7, 4), draw(5, 2), draw(7, 2), 1.0, draw(6)),
        "bias has shape [6], expected [7]",
    ),
    "linear_expand-dtype": (
        lambda: ops.linear_expand(draw(5, 4), draw(7, 4).float(), draw(5, 2), draw(7, 2), 1.0),
        "weight is torch.float32, expected torch.float64, the dtype of x",
    ),
    "expand_backward-M": (
        lambda: ops.expand_backward(draw(5, 7), draw(6, 2), draw(7, 2), 1.0),
        "s has shape [6, 2], expected [5, r]",
    ),
    "expand_backward-r": (
        lambda: ops.expand_backward(draw(5, 7), draw(5, 2), draw(7, 3), 1.0),
        "lora_B has shape [7, 3], expected [7, 2]",
    ),
    "expand_backward-s": (
        lambda: expand_backward(draw(5, 7), None, draw(7, 2), 1.0),
        "s is None, expected a matrix: dB is wanted",
    ),
    "expand_backward-B": (
        lambda: expand_backward(draw(5, 7), draw(5, 2), None, 1.0, "ds"),
        "lora_B is None, expected a matrix: ds is wanted",
    ),
    "expand_backward-wants": (
        lambda: expand_backward(draw(5, 7), draw(5, 2), draw(7, 2), 1.0, "dB,ds"),
        "wants is 'dB,ds', expected some of ds,dB,dbias in this order",
    ),
    "expand_backward-dtype": (
        lambda: expand_backward(draw(5, 7), draw(5, 2), draw(7, 2), 1.0, "dB", torch.float32),
        "lora_B is torch.float64, expected torch.float32, the dtype of dB",
    ),
    "shrink_backward-M": (
        lambda: ops.shrink_backward(draw(4, 2), draw(5, 7)),
        "ds has shape [4, 2], expected [5, r]",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(call, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        call()
