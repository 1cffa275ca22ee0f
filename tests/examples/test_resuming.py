"""A run that is stopped and goes on ends where one that isn't stopped ends, to the bit."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

PATH = Path(__file__).parents[2] / "examples" / "resuming.py"
SPEC = importlib.util.spec_from_file_location("resuming", PATH)
resuming = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(resuming)

OPTIONS = {"steps": 6, "base": "nf4"}


@dataclass
class Arm:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list = field(default_factory=list)
    seconds: list = field(default_factory=list)


def arms():
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        model[0].requires_grad_(False)
        made.append(Arm(model, torch.optim.AdamW(model[2].parameters(), lr=0.1)))
    return made


def train(arms, begin, end):
    for step in range(begin, end):
        for arm in arms:
            arm.optimizer.zero_grad()
            loss = arm.model(torch.full((8, 4), float(step))).square().mean()
            loss.backward()
            arm.optimizer.step()
            arm.losses.append(loss.item())
            arm.seconds.append(1.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "demo.state"


def test_a_stopped_run_ends_where_another_ends(path):
    whole = arms()
    train(whole, 0, 6)
    stopped = arms()
    train(stopped, 0, 4)
    resuming.State(path, OPTIONS).save(4, stopped)
    train(stopped, 4, 5)  # is lost
    torch.manual_seed(99)
    others = arms()
    assert resuming.State(path, OPTIONS).load(others) == 4
    train(others, 4, 6)
    for a, b in zip(whole, others, strict=True):
        assert a.losses == b.losses
        assert len(b.seconds) == 6
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_frozen_weights_are_not_in_it(path):
    trained = arms()
    resuming.State(path, OPTIONS).save(1, trained)
    content = torch.load(path, weights_only=True)
    assert set(content["arms"][0]["parameters"]) == {"2.weight", "2.bias"}


@pytest.mark.parametrize("begin", ["", "no file of torch's"])
def test_what_cannot_be_read_starts_anew(path, begin, capsys):
    path.write_text(begin)
    assert resuming.State(path, OPTIONS).load(arms()) == 0
    assert "starts anew" in capsys.readouterr().out


def test_other_options_start_anew(path):
    resuming.State(path, OPTIONS).save(4, arms())
    assert resuming.State(path, OPTIONS | {"base": "dense"}).load(arms()) == 0
    assert resuming.State(path, OPTIONS).load(arms()) == 4


def test_without_a_file_a_run_starts(path):
    assert resuming.State(path, OPTIONS).load(arms()) == 0


def test_a_run_that_is_done_leaves_nothing(path):
    state = resuming.State(path, OPTIONS)
    state.save(6, arms())
    state.remove()
    state.remove()
    assert not list(path.parent.iterdir())
