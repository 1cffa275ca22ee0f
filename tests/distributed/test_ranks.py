"""What runs the distributed tests: it gathers, and a failing or dead rank ends a run."""

import os
import subprocess
import sys
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import RankError, device, mesh_of, on_ranks


def _sum(rank: int, factor: int) -> tuple[int, float]:
    total = torch.tensor(float(rank * factor), device=device())
    dist.all_reduce(total)
    return rank, total.item()


def _second_raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("no such adapter")
    dist.barrier()


def _second_dies(rank: int) -> None:
    if rank == 1:
        os._exit(9)
    dist.barrier()


def _sleeps(rank: int) -> None:
    time.sleep(60)


def test_every_rank_answers():
    assert on_ranks(_sum, 3, world=3) == [(0, 9.0), (1, 9.0), (2, 9.0)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_second_raises, "no such adapter"),
        (_second_dies, "rank . died|Connection"),
        (_sleeps, "in time"),
    ],
)
def test_a_failing_rank_ends_the_run(function, message):
    began = time.monotonic()
    with pytest.raises(RankError, match=message):
        on_ranks(function, seconds=1 if function is _sleeps else 30)
    assert time.monotonic() - began < 20


@pytest.fixture
def begun(monkeypatch):
    """What a process that begins as a rank here asks for, in a list."""
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: asked.append(str(place)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda *names, **how: asked.append((names, how))
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(ranks, "_device", device())
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = True
    yield asked
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value


@pytest.mark.parametrize(
    ("gpus", "because", "backend", "places"),
    [
        (0, "", "gloo", ["cpu", "cpu"]),
        (1, "", "gloo", ["cpu", "cpu"]),
        (2, "", "nccl", ["cuda:0", "cuda:1"]),
        (4, "", "nccl", ["cuda:0", "cuda:1"]),
        (4, "it counts on the CPU", "gloo", ["cpu", "cpu"]),
    ],
)
def test_ranks_are_of_nccl_where_each_has_a_gpu(monkeypatch, begun, gpus, because, backend, places):
    """What is chosen, and that a rank begins with it: a GPU of its own, float32 without TF32."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    on_gpu = backend == "nccl"
    for rank, place in enumerate(places):
        begun.clear()
        ranks._begin(*ranks.chosen(rank, 2, because), rank, 2, "no file", 9.0)
        *on, (names, how) = begun
        assert (names, how["rank"], how["world_size"]) == ((backend,), rank, 2)
        assert (on, how["device_id"]) == (([place], device()) if on_gpu else ([], None))
        assert str(device()) == place
        assert (
            torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is not on_gpu
        )


def _where(rank):
    group = dist.distributed_c10d._get_default_group()
    made = torch.ones(2, device=device()) * rank
    seen = os.environ["CUDA_VISIBLE_DEVICES"] if device().type == "cpu" else ""
    return dist.get_backend(group), mesh_of().device_type, str(made.device), seen, made


def test_a_rank_on_the_cpu_sees_no_gpu_and_what_it_returns_is_an_array():
    for rank, (*where, made) in enumerate(on_ranks(_where, cpu_because="it is about the CPU")):
        assert where == ["gloo", "cpu", "cpu", ""]
        assert made.tolist() == [rank, rank]


_WATCHED = """
import importlib, sys, torch
asked = []
for name in ("is_available", "device_count", "init", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or 0)
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, *asked)
"""


def test_what_ranks_are_forked_from_has_not_begun_cuda(tmp_path):
    """A process that has can't be forked: no rank would have a GPU."""
    (tmp_path / "curious.py").write_text("import torch\n\ntorch.cuda.is_available()\n")
    command = [sys.executable, "-c", _WATCHED, *ranks.IMPORTED_ONCE, "curious"]
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    *silent, last = done.stdout.splitlines()
    assert silent == ranks.IMPORTED_ONCE
    assert last == "curious is_available"  # what would be seen
