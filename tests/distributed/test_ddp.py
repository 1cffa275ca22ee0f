"""DistributedDataParallel around adapters of every kind: two processes against one on the same data."""

import contextlib
import inspect
import os
import re
import tempfile
import time
from datetime import timedelta

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from kinds_of_models import (
    KINDS,
    adapted,
    assert_near,
    gradients,
    inputs,
    loss,
    one_process,
    part,
    plain,
    quickly,
)
from lorafast.bench.distributed.collectives import Collectives
from ranks import device, on_ranks
from small_decoder import fill_adapters
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorafast
from lorafast.ops import siblings

BATCH = 4
OF_BUCKETS = {"static_graph": True, "gradient_as_bucket_view": True}


def _step(model, x, micro_batches):
    """The loss of ``x``, with its gradients accumulated and summed in the last backward."""
    total = 0.0
    for i, rows in enumerate(x.chunk(micro_batches)):
        last = i == micro_batches - 1
        with contextlib.nullcontext() if last else model.no_sync():
            one = loss(model, rows) / micro_batches
            one.backward()
            total += one.item()
    return total


@contextlib.contextmanager
def _stderr():
    """What is written to the file that C++ warns in, in a list."""
    lines = []
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode().splitlines()


def _watch_strides(model):
    """Raises where a gradient would be copied into the parameter's layout."""

    def check(grad, parameter):
        assert grad.stride() == parameter.stride()

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, parameter=parameter: check(grad, parameter))


def _backward(rank, kind, options, micro_batches):
    torch.set_warn_always(True)
    siblings.FEWEST_ROWS = siblings.FEWEST_ELEMENTS = 1
    with _stderr() as warned:
        bare = adapted(kind)
        _watch_strides(bare)
        model = DistributedDataParallel(bare, **options)
        x = part(inputs(kind, BATCH), rank, 2)
        _step(model, x, 1)  # static_graph wants a first one that is synchronised
        model.zero_grad()
        found = _step(model, x, micro_batches), gradients(model)
    return *found, [line for line in warned if "strides" in line]


def _check(found, kind):
    whole, expected = one_process(kind, BATCH)
    assert sum(one for one, _, _ in found) / 2 == pytest.approx(whole, rel=1e-12)
    for _, of_rank, warned in found:
        assert_near(of_rank, expected)
        assert warned == []


@pytest.mark.parametrize("kind", quickly(KINDS))
def test_accumulated_gradients_are_those_of_one_process(kind):
    _check(on_ranks(_backward, kind, OF_BUCKETS, 2), kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}], ids=str
)
def test_settings(options):
    _check(on_ranks(_backward, "nf4-dora", options, 1), "nf4-dora")


def _in_bfloat16(rank, kind):
    """This rank's part alone, and what the ranks have of both parts."""
    found = []
    for wrap in (lambda model: model, DistributedDataParallel):
        model = wrap(adapted(kind, torch.float32).to(torch.bfloat16))
        loss(model, part(inputs(kind, BATCH, torch.bfloat16), rank, 2)).backward()
        found.append(gradients(model))
    return found


@pytest.mark.parametrize("kind", quickly(("nf4-dora", "lora", "houlsby", "int8", "conv-dora")))
def test_bfloat16(kind):
    """The mean of two models in bfloat16, which rounds each summand and the sum."""
    (first, found), (second, of_second) = on_ranks(_in_bfloat16, kind)
    expected = {name: (array + second[name]) / 2 for name, array in first.items()}
    assert_near(found, expected, 2.0**-7)
    assert_near(of_second, found, 0.0)
    assert any((first[name] != array).any() for name, array in second.items())


def _compiled(rank, kind, how):
    bare = adapted(kind)
    if how == "in blocks":
        for block in bare.layers:
            block.compile(backend="aot_eager", fullgraph=True)
        model = DistributedDataParallel(bare, **OF_BUCKETS)
    elif how == "inside":
        model = DistributedDataParallel(torch.compile(bare, backend="aot_eager"))
    else:  # by PyTorch's own pass for it, in graphs of a bucket each
        dist._DEFAULT_FIRST_BUCKET_BYTES = 2**14
        model = torch.compile(
            DistributedDataParallel(bare, bucket_cap_mb=2**-6), backend="aot_eager"
        )
    x = part(inputs(kind, BATCH), rank, 2)
    for _ in range(2):
        bare.zero_grad()
        found = loss(model, x)
        found.backward()
    return found.item(), gradients(bare), []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"), [("siblings", "in blocks"), ("nf4-dora", "inside"), ("lora", "around")]
)
def test_compiled(kind, how):
    _check(on_ranks(_compiled, kind, how), kind)


def _sent(rank, kinds):
    """By kind: what is sent in a step, with buffers and without, and the size of the adapters."""
    found = {}
    options = inspect.signature(DistributedDataParallel).parameters
    setting = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in options)
    for kind in kinds:
        for of_buffers in (True, False):
            bare = adapted(kind)
            model = DistributedDataParallel(bare, **{setting: of_buffers})
            x = part(inputs(kind, BATCH), rank, 2)
            for _ in range(2):  # after the first, buckets are made anew
                loss(model, x).backward()
            with Collectives() as sent:
                loss(model, x).backward()
            size = sum(p.numel() for p in bare.parameters() if p.requires_grad)
            found[kind, of_buffers] = [(c.kind, c.shape, c.backward) for c in sent.calls], size
    return found


def test_what_is_sent():
    """The adapters' gradients; and in each forward, unless DDP is told not to, the scales of quantized
    weights, which are buffers."""
    for found in on_ranks(_sent, ("lora", "nf4", "int8", "fp8")):
        for (kind, of_buffers), (calls, size) in found.items():
            *forward, last = calls
            assert last == ("all_reduce", (size,), True), kind
            assert bool(forward) == (of_buffers and kind != "lora"), (kind, forward)
            assert {(one, backward) for one, _, backward in forward} <= {("broadcast", False)}


class _OtherLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy.as_strided(dy.shape, (1, 7))


class _Restrided(nn.Module):
    """Its gradient has another stride than the parameter, along an axis of one element."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1))

    def forward(self, x):
        return x @ _OtherLayout.apply(self.weight)


def _warned_of(rank):
    with _stderr() as warned:
        model = DistributedDataParallel(_Restrided().to(device()), gradient_as_bucket_view=True)
        for _ in range(2):
            model(torch.ones(2, 3, device=device())).sum().backward()
    return [line for line in warned if "strides" in line]


def test_a_gradient_of_another_layout_would_be_noticed():
    assert all(warned for warned in on_ranks(_warned_of))


def _unused(rank, everywhere):
    model = adapted("lora")
    skipping = model.layers[1].mlp
    if everywhere or rank == 1:
        skipping.forward = lambda x: x
    model = DistributedDataParallel(model, find_unused_parameters=True)
    with _stderr():
        for _ in range(2):
            model.zero_grad()
            loss(model, part(inputs("lora", BATCH), rank, 2)).backward()
    return gradients(model)


@pytest.mark.parametrize("everywhere", [False, True], ids=["on-one-rank", "everywhere"])
def test_layers_that_a_forward_leaves_out(everywhere):
    """Where one rank left them out it counts with zeros; where all did there is no gradient."""
    expected, halves = {}, []
    for rank in range(2):
        model = adapted("lora")
        if everywhere or rank == 1:
            model.layers[1].mlp.forward = lambda x: x
        loss(model, part(inputs("lora", BATCH), rank, 2)).backward()
        halves.append(gradients(model))
    for name in halves[0]:
        expected[name] = sum(one.get(name, 0.0) for one in halves) / 2
    for found in on_ranks(_unused, everywhere):
        assert_near(found, expected)
    assert ("layers.1.mlp.up_proj.lora_A" in expected) == (not everywhere)


def _not_told_of_unused(rank):
    model = adapted("lora")
    model.layers[1].mlp.forward = lambda x: x
    model = DistributedDataParallel(model)
    for _ in range(2):
        loss(model, inputs("lora", 2)).backward()


def test_without_the_setting_the_second_step_raises():
    with pytest.raises(ranks.RankError, match="find_unused_parameters=True"):
        on_ranks(_not_told_of_unused)


def _with_a_second_adapter():
    model = adapted("lora", dropout=0.5)
    lorafast.add_adapter(model, "second", 2, dropout=0.5)
    lorafast.set_adapter(model, "second")
    fill_adapters(model)
    return model


def _train(rank, seeds):
    """Gradients of the first of three steps, and of this rank alone; all parameters, an output."""
    torch.manual_seed(4)
    model = DistributedDataParallel(_with_a_second_adapter())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    torch.manual_seed(seeds[rank])
    first = None
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, part(inputs("lora", BATCH), rank, 2)).backward()
        first = first or gradients(model)
        optimizer.step()
    torch.manual_seed(seeds[rank])
    y = model(inputs("lora", 1))
    torch.manual_seed(4)
    alone = _with_a_second_adapter()
    torch.manual_seed(seeds[rank])
    loss(alone, part(inputs("lora", BATCH), rank, 2)).backward()
    return first, gradients(alone), dict(model.module.named_parameters()), y


def test_dropout_and_a_named_adapter():
    """Each rank draws its own masks; the same run has the same bits; what is inactive stays."""
    seeds = (5, 6)
    (first, *halves, trained, y), (_, half, of_second, y_of_second) = on_ranks(_train, seeds)
    halves.append(half)
    _, _, trained_again, _ = on_ranks(_train, seeds)[0]
    assert not np.array_equal(y, y_of_second)
    for name, array in trained.items():
        np.testing.assert_array_equal(array, of_second[name])
        np.testing.assert_array_equal(array, trained_again[name])
    assert_near(first, {name: (array + halves[1][name]) / 2 for name, array in halves[0].items()})
    torch.manual_seed(4)
    for name, parameter in _with_a_second_adapter().named_parameters():
        unchanged = np.array_equal(trained[name], parameter.detach().numpy())
        assert unchanged == (not parameter.requires_grad), name


def _disabled(rank, kinds):
    found = {}
    for kind in kinds:
        model = DistributedDataParallel(adapted(kind, torch.float32))
        x = part(inputs(kind, BATCH, torch.float32), rank, 2)
        with lorafast.disabled(model), torch.no_grad():
            y = model(x)
        with torch.no_grad():
            found[kind] = y, model(x), plain(kind, torch.float32)(x)
    return found


def test_disabled_has_the_bits_of_the_frozen_model():
    kinds = (
        "lora",
        "dora",
        "pfeiffer",
        "embedding",
        "nf4",
        "int8",
        "fp8",
        "conv-dora",
        "attention",
    )
    for found in on_ranks(_disabled, kinds):
        for kind, (without, within, expected) in found.items():
            np.testing.assert_array_equal(without, expected, kind)
            assert not np.array_equal(within, expected), kind


def _loses_a_rank(rank, rendezvous, end, dies, shards):
    """Rank 1 ends, or stays away, in the middle of a step; the other sends what it was told. Over gloo:
    NCCL raises nothing, its watchdog ends the process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2,
        timeout=timedelta(seconds=3),
    )  # fmt: skip
    model = adapted("lora")
    model = fully_shard(model) if shards else DistributedDataParallel(model)
    x = part(inputs("lora", BATCH), rank, 2)
    loss(model, x).backward()
    whole = loss(model, x)
    if rank == 1:
        if dies:
            os._exit(9)
        time.sleep(60)
    try:
        whole.backward()
        [p.grad.full_tensor() for p in model.parameters() if shards and p.grad is not None]
        end.send("no error")
    except RuntimeError as error:
        end.send(str(error))
    os._exit(0)


@pytest.mark.parametrize(
    "dies", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["dies", "hangs"]
)
@pytest.mark.parametrize("shards", [False, True], ids=["ddp", "fsdp2"])
def test_a_lost_rank_ends_the_others(tmp_path, dies, shards):
    here, there = ranks._context.Pipe(duplex=False)
    arguments = (str(tmp_path / "rendezvous"), there, dies, shards)
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
    assert re.search("Timed out" if not dies else "closed|reset|refused|Timed out", message), (
        message
    )
