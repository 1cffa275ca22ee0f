"""Launches leave those SMs free that PyTorch is asked to leave free."""

import pytest
import torch

from lorafast.backends import registry
from lorafast.core.problem import Problem
from lorafast.core.sms import carveout, planned_for
from lorafast.ops import calls


@pytest.fixture
def leave(monkeypatch):
    """Asks for so many SMs."""

    def ask(count):
        monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda: count, raising=False)

    return ask


def test_none_are_left_unless_asked():
    assert carveout() == 0
    assert planned_for(132) == 132


@pytest.mark.filterwarnings("ignore:Setting the SM carveout")
def test_pytorchs_own_switch():
    if not hasattr(torch._C, "_set_sm_carveout_experimental"):
        pytest.skip("this PyTorch has none")
    try:
        torch._C._set_sm_carveout_experimental(16)
        assert carveout() == 16
        torch._C._set_sm_carveout_experimental(0)
        assert carveout() == 0
    finally:
        torch._C._set_sm_carveout_experimental(None)
    assert carveout() == 0


@pytest.mark.parametrize(("asked", "left"), [(0, 132), (None, 132), (16, 116), (200, 1)])
def test_at_least_one_is_planned_for(leave, asked, left):
    leave(asked)
    assert planned_for(132) == left


def test_a_pytorch_without_the_switch(monkeypatch):
    monkeypatch.delattr(torch._C, "_get_sm_carveout_experimental", raising=False)
    assert carveout() == 0


def test_a_change_makes_plans_anew_and_the_first_are_found_again(leave):
    bf16 = torch.bfloat16
    problem = Problem("shrink", 4, 64, 0, 8, bf16, bf16, torch.device("cpu"))
    x = torch.ones(4, 64)
    found = {}
    for count in (0, 16, 0):
        leave(count)
        plans = registry.choose(problem), registry.plan_of("aten", problem), calls.where([x])
        if count in found:
            first = found[count]
            assert all(one is other for one, other in zip(plans[:2], first[:2], strict=True))
            assert plans[2] == first[2]
        found[count] = plans
    assert not any(one is other for one, other in zip(found[0], found[16], strict=True))
    assert found[0][2] != found[16][2]
