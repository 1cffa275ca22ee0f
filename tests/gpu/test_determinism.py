"""Nothing that changes between two runs changes a bit, and the mask is the reference's, bit for bit."""

import pytest
import torch
from circumstances import MEMORY, WORK, assert_same_bits
from helpers import skip_unless_usable
from lorafast.bench.common.check import mask_of, run
from lorafast.bench.common.contenders import BUILDERS
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape

import lorafast
from lorafast import reference

pytestmark = pytest.mark.gpu

BACKENDS = ["reference", "aten", "triton", "cuda"]
PROBLEM = Problem(Shape("", 4099, 2048, 1024), 16, "bf16", "fp32", 0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bits_are_the_same_whatever_changes(backend, device):
    """Programs are placed and end in another order beside other work; memory lies elsewhere."""
    skip_unless_usable(backend)
    tensors = draw(PROBLEM, device, 1)
    contender = BUILDERS[backend](PROBLEM, tensors)
    often = {f"{name}, {i}": within for name, within in WORK.items() for i in range(5)}
    assert_same_bits(lambda: run(contender, tensors.x[0], tensors.dy[0]), MEMORY, often)


def test_every_backend_draws_the_mask_of_the_reference(device, monkeypatch):
    tensors = draw(PROBLEM, device, 1)
    seed = torch.tensor([-(2**62) + 12345], device=device)
    monkeypatch.setattr(torch, "randint", lambda *arguments, **options: seed.clone())
    shape = PROBLEM.shape
    expected = reference.keep_mask(shape.M, shape.K, PROBLEM.dropout_p, seed.cpu())
    for backend in BACKENDS:
        if not lorafast.backends()[backend].usable:
            continue
        found = mask_of(BUILDERS[backend](PROBLEM, tensors), PROBLEM, tensors)
        assert found is not None
        assert torch.equal(found.keep.cpu(), expected), backend
