"""Runs of models that are cut: their checkpoints, a rank that is lost; and four ranks of every kind."""

import os
import re
import time
from datetime import timedelta

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from kinds_of_models import adapted as of_kind
from kinds_of_models import gradients, inputs, loss, one_process, part
from ranks import mesh_of, on_ranks
from small_decoder import tokens
from test_tensor_parallel import EXACT, adapted, error, loss_of, plan_of, steps

import lorafast

pytestmark = pytest.mark.slow


def cut(model):
    return lorafast.parallel.parallelize(model, mesh_of(), plan_of(model))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, seeds):
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        found = loss_of(model, tokens(4, seed=seed))
        found.backward()
        optimizer.step()
        losses.append(found.detach())
    return torch.stack(losses)


def _saved(rank, folder):
    """What a cut model saved goes on in a cut one, and in one process: two steps, AdamW's state too."""
    model = cut(adapted(p=0.0))
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    dcp.save({"run": lorafast.AdapterState(model, optimizer)}, checkpoint_id=folder)
    expected = train(model, optimizer, range(2, 4))
    for alone in (False, True):
        again = adapted(p=0.0)
        with torch.no_grad():
            for parameter in again.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5)
        again = again if alone else cut(again)
        optimizer = optimizer_of(again)
        state = {"run": lorafast.AdapterState(again, optimizer)}
        dcp.load(state, checkpoint_id=folder, no_dist=alone)
        assert error(train(again, optimizer, range(2, 4)), expected) < EXACT, alone


def test_what_a_cut_model_saves_goes_on_in_one_process(tmp_path):
    on_ranks(_saved, str(tmp_path))


def _loses_a_rank(rank, rendezvous, end, dies):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2,
        timeout=timedelta(seconds=3),
    )  # fmt: skip
    model = cut(adapted(p=0.0))
    loss_of(model, tokens(2)).backward()
    whole = loss_of(model, tokens(2))
    if rank == 1:
        if dies:
            os._exit(9)
        time.sleep(60)
    try:
        whole.backward()
        [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
        end.send("no error")
    except RuntimeError as error:
        end.send(str(error))
    os._exit(0)


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "hangs"])
def test_a_lost_rank_ends_the_others(tmp_path, dies):
    here, there = ranks._context.Pipe(duplex=False)
    arguments = (str(tmp_path / "rendezvous"), there, dies)
    both = [
        ranks._context.Process(target=_loses_a_rank, args=(rank, *arguments)) for rank in range(2)
    ]
    with ranks.forked_for("cpu"):
        for process in both:
            process.start()
    try:
        assert here.poll(60), "the other rank hangs"
        message = here.recv()
    finally:
        for process in both:
            process.kill()
            process.join()
    expected = "closed|reset|refused|Timed out" if dies else "Timed out"
    assert re.search(expected, message), message


def _four(rank, kind):
    """By how the model is spread: the largest relative error of a gradient to that of one process."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    _, expected = one_process(kind, 4)
    found = {}
    for how in ("DDP", "FSDP2"):
        model = of_kind(kind)
        if how == "DDP":
            model = DistributedDataParallel(model)
        else:
            for block in model.layers:
                fully_shard(block)
            fully_shard(model)
        loss(model, part(inputs(kind, 4), rank, 4)).backward()
        own = gradients(model)
        assert own.keys() == expected.keys()
        found[how] = max(abs(own[n] - g).max() / abs(g).max() for n, g in expected.items())
    one, two = adapted(bottlenecks=True), cut(adapted(bottlenecks=True))
    (losses, own), (exact, exactly) = steps(two, tokens(2), 2), steps(one, tokens(2), 2)
    lorafast.parallel.check_replicas(two)
    assert error(losses, exact) < EXACT
    found["TP"] = max(error(own[n], g) for n, g in exactly.items())
    return found


def test_four_ranks():
    for found in on_ranks(_four, "lora", world=4):
        assert found.keys() == {"DDP", "FSDP2", "TP"}
        assert all(wrong < EXACT for wrong in found.values()), found
