"""The comparison of operations."""

import pytest
import torch

pytest.importorskip("triton")

from cards import A100, H200
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape
from lorafast.bench.operations.cases import cases

from lorafast.backends import registry
from lorafast.backends.cost import pretending

DEVICE = torch.device("cpu")


def drawn(p=0.0):
    layer = Problem(Shape("", 256, 512, 512), 16, "bf16", "fp32", p)
    return cases(layer, draw(layer, DEVICE, 1))


@pytest.mark.parametrize("card", [A100, H200], ids=lambda card: card.name)
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("name", ["linear_expand", "dx"])
def test_what_the_model_does_not_take_is_timed_too(card, name, p):
    """Fused or not: the one is taken, the other stands beside it."""
    with pretending(card):
        (other,) = registry.get("cuda").alternatives(drawn(p)[name].asks)
    assert other.startswith("fused=")


def test_other_backends_have_one_launch():
    with pretending(H200):
        assert registry.get("triton").alternatives(drawn()["dx"].asks) == {}


def test_without_a_gpu_there_is_nothing_to_launch():
    assert registry.get("cuda").alternatives(drawn()["dx"].asks) == {}
