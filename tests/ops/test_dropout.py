"""``drop(x)`` as a tensor: the mask of every operation, on every backend."""

import math

import pytest
import torch
from helpers import DROPOUT, DTYPES, skip_unless_usable
from layouts import LAYOUTS, lay_out

import lorafast
from lorafast import ops, reference
from lorafast.backends import registry

SEED = torch.tensor([-7])
BACKENDS = [name for name in registry.names() if "expand" in registry.get(name).operations]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", DROPOUT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_reference(backend, dtype, dropout_p):
    skip_unless_usable(backend)
    for layout in LAYOUTS:
        x = lay_out(torch.randn(13, 37).to(dtype), layout)
        with lorafast.use_backend(backend):
            found = ops.dropout(x, dropout_p, SEED)
        assert torch.equal(found, reference.dropout(x, dropout_p, SEED))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5), (3, 0)], ids=str)
def test_any_leading_dimensions(shape):
    x = torch.randn(shape)
    rows = x.reshape(math.prod(shape[:-1]), shape[-1])
    found = ops.dropout(x, 0.4, SEED)
    assert torch.equal(found, reference.dropout(rows, 0.4, SEED).view(shape))


def test_what_is_dropped_is_zero_whatever_it_was():
    keep = reference.keep_mask(4, 9, 0.5, SEED)
    x = torch.full((4, 9), math.nan)
    assert torch.equal(ops.dropout(x, 0.5, SEED) == 0, ~keep)


def test_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.4, SEED), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.dropout(x, 0.4, SEED), x)
    assert ops.dropout(x, 0.0, None) is x
