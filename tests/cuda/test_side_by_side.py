"""Two launches whose CTAs take turns: right on counters of their own, and found out on common ones."""

import pytest
import torch
from decode_cases import call, drawn
from decode_cases import run as run_alone
from on_machine import launched, needs_nvcc
from ptx.launch import Fault
from side_by_side import SideBySide
from skinny_cases import SCHEDULES, Case, bits

from lorafast.backends.cuda import skinny

pytestmark = needs_nvcc

CASES = {
    "shrink": Case("shrink", 140, 600, 16, dropout_p=0.2),
    "expand_backward": Case("expand_backward", 300, 530, 16),
    "shrink_backward": Case("shrink_backward", 900, 140, 16),
}


def two_of(case):
    """A case's tensors, and others."""
    one = case.tensors()
    return one, {name: tensor.flip(0) for name, tensor in one.items()}


@pytest.mark.parametrize("operation", CASES)
def test_skinny_launches(operation):
    case = CASES[operation]
    tensors = two_of(case)
    alone = []
    for given in tensors:
        with launched(case.arch, sms=case.sms) as run:
            alone.append(case.run(given))
        assert run.launches[0].grid[1] > 1  # sums are shared
    for schedule in SCHEDULES:
        with SideBySide(case.arch, *schedule, sms=case.sms):
            found = [case.run(given) for given in tensors]
        for one, expected in zip(found, alone, strict=True):
            assert all(bits(one[name]).equal(bits(expected[name])) for name in expected)


@pytest.mark.parametrize("operation", CASES)
def test_skinny_launches_on_the_same_counters(operation, monkeypatch):
    common = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(skinny, "counters", lambda x, count: common[:count])
    case = CASES[operation]
    one, other = two_of(case)
    with pytest.raises(Fault), SideBySide(case.arch, sms=case.sms):
        case.run(one), case.run(other)


@pytest.mark.parametrize(("arch", "adapter_of"), [(80, None), (75, [1, -1, 0])])
def test_decode_steps(arch, adapter_of):
    layers = [drawn(3, 520, 40, 33, torch.float16, adapter_of=adapter_of, seed=i) for i in (0, 1)]
    for seed in range(5):
        counters = [torch.zeros(10, dtype=torch.int32) for _ in layers]
        with SideBySide(arch, seed, 1 + seed):
            found = [call(layer, 7, own) for layer, own in zip(layers, counters, strict=True)]
        for layer, (y, s) in zip(layers, found, strict=True):
            _, alone_y, alone_s = run_alone(layer, 7, arch)
            assert y.equal(alone_y)
            assert s.equal(alone_s)
        assert not any(c.any() for c in counters)


def test_decode_steps_on_the_same_counters():
    one, other = (drawn(3, 520, 40, 33, seed=i) for i in (0, 1))
    counters = torch.zeros(10, dtype=torch.int32)
    with pytest.raises(Fault), SideBySide(80, 3, 4):
        call(one, 7, counters), call(other, 7, counters)
