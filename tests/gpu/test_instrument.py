"""The instrument itself on a GPU: its clock, its memory counts, its check of every contender."""

import contextlib
import statistics

import pytest
import torch
from lorafast.bench.common.check import why_wrong
from lorafast.bench.common.clock import CudaClock, interleave
from lorafast.bench.common.contenders import BUILDERS, UnavailableError
from lorafast.bench.common.memory import peak_bytes
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape

pytestmark = pytest.mark.gpu


def turn_of(call):
    @contextlib.contextmanager
    def turn(index):
        yield call

    return turn


def test_the_clock_sees_the_device(device):
    x = torch.ones(64, device=device)

    turns = {
        "once": turn_of(lambda: torch.cuda._sleep(1_000_000)),
        "twice": turn_of(lambda: torch.cuda._sleep(2_000_000)),
        "small": turn_of(lambda: x.add_(1)),
        "small again": turn_of(lambda: x.add_(1)),
    }
    samples = interleave(CudaClock(device), turns, seconds=0.5)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    assert medians["twice"] == pytest.approx(2 * medians["once"], rel=0.1)
    assert medians["small"] == pytest.approx(medians["small again"], rel=0.5)
    assert medians["small"] < 1e-4


def test_peak_is_what_is_held_at_once(device):
    def call():
        for _ in range(3):
            torch.empty(1 << 20, device=device)  # freed at once
        held = [torch.empty(1 << 20, device=device) for _ in range(2)]
        del held

    assert peak_bytes(call, device) == 2 * 4 << 20
    assert peak_bytes(lambda: None, device) == 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_contender_is_right(name, dropout_p, device):
    problem = Problem(Shape("", 512, 1024, 768), 16, "bf16", "fp32", dropout_p)
    tensors = draw(problem, device, 1)
    try:
        contender = BUILDERS[name](problem, tensors)
    except UnavailableError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    assert why_wrong(contender, problem, tensors) is None
