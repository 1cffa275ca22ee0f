"""A rank of an example takes a GPU only where each rank of the machine has one."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def own_device():
    spec = importlib.util.spec_from_file_location("own_device", EXAMPLES / "own_device.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.own_device()


@pytest.mark.parametrize(
    ("gpus", "ranks", "expected"),
    [(0, 1, "cpu"), (1, 1, "cuda:0"), (1, 2, "cpu"), (2, 2, "cuda:1"), (4, 2, "cuda:1")],
)
def test_own_device(monkeypatch, gpus, ranks, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", str(ranks - 1))
    assert own_device() == torch.device(expected)
    assert chosen == ([] if expected == "cpu" else [torch.device(expected)])


def test_every_example_of_several_ranks_asks_it():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "init_process_group(" in text:
            assert "own_device()" in text, path.name
