"""``fully_shard`` around adapters of every kind: two processes against one on the same data."""

import numpy as np
import pytest
import torch
from kinds_of_models import (
    DECODERS,
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
from ranks import device, mesh_of, on_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import lorafast

BATCH = 4
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def _blocks(model):
    return [model.conv, model.attention] if hasattr(model, "conv") else list(model.layers)


def _shard(model, **options):
    """Each block, and then the rest."""
    for block in _blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _in_checkpoint(block):
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)


def _backward(rank, kind, how):
    model = adapted(kind)
    if how == "checkpoint":
        for block in _blocks(model):
            _in_checkpoint(block)
    if how == "checkpoint_wrapper":
        model.layers = nn.ModuleList(map(checkpoint_wrapper, model.layers))
    if how == "compile":
        for block in model.layers:
            block.compile(backend="aot_eager")
    _shard(model)
    x = part(inputs(kind, BATCH), rank, 2)
    for _ in range(2):
        model.zero_grad()
        one = loss(model, x)
        one.backward()
    return one.item(), gradients(model)


@pytest.mark.parametrize("kind", quickly(KINDS))
def test_gradients_are_those_of_one_process(kind):
    found = on_ranks(_backward, kind, "checkpoint" if kind in ("lora", "nf4") else "")
    whole, expected = one_process(kind, BATCH)
    assert sum(one for one, _ in found) / 2 == pytest.approx(whole, rel=1e-12)
    for _, of_rank in found:
        assert_near(of_rank, expected)


def _accumulated(rank, kind):
    """In two backwards, of which the last one sends."""
    model = _shard(adapted(kind))
    for i, rows in enumerate(part(inputs(kind, BATCH), rank, 2).chunk(2)):
        model.set_requires_gradient_sync(i == 1)
        (loss(model, rows) / 2).backward()
    return gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "pfeiffer"])
def test_accumulated_gradients(kind):
    for found in on_ranks(_accumulated, kind):
        assert_near(found, one_process(kind, BATCH)[1])


def _in_other_layouts(rank, kinds):
    """Those of docs/scaling.md: A by columns, and replicas of what two ranks share."""
    found = {}
    layouts = {
        "by columns": {"shard_placement_fn": lambda p: Shard(1) if p.shape[0] < 4 else None},
        "replicas": {"mesh": mesh_of(2, 2, mesh_dim_names=("replicas", "shards"))},
    }
    for kind in kinds:
        for name, options in layouts.items():
            model = _shard(adapted(kind), **options)
            loss(model, part(inputs(kind, BATCH), rank, 4)).backward()
            cut = {p.placements[-1] for n, p in model.named_parameters() if n.endswith("lora_A")}
            found[kind, name] = gradients(model), cut == {Shard(int(name == "by columns"))}
    return found


@pytest.mark.slow
def test_layouts_of_many_gpus():
    for found in on_ranks(_in_other_layouts, ("lora", "nf4-dora"), world=4):
        for (kind, _), (of_rank, as_asked) in found.items():
            assert_near(of_rank, one_process(kind, BATCH)[1])
            assert as_asked


@pytest.mark.parametrize(
    "how", ["checkpoint_wrapper", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_wrapped_blocks(how):
    for _, found in on_ranks(_backward, "dora", how):
        assert_near(found, one_process("dora", BATCH)[1])


def _in_bfloat16(rank, kind):
    """The gradients under the policy, and those of this rank's model in bfloat16."""
    model = _shard(adapted(kind, torch.float32), mp_policy=BF16)
    x = part(inputs(kind, BATCH, torch.float32), rank, 2)
    for _ in range(2):
        model.zero_grad()
        loss(model, x).backward()
    alone = adapted(kind, torch.float32).to(torch.bfloat16)
    loss(alone, part(inputs(kind, BATCH), rank, 2)).backward()
    return gradients(model), gradients(alone)


@pytest.mark.parametrize(
    "kind", quickly(("lora", "dora", "houlsby", "embedding", "nf4", "nf4-dora", "int8", "fp8"))
)
def test_bfloat16_policy(kind):
    """The same bits as the model in bfloat16, whose gradients are averaged in float32."""
    (found, first), (_, second) = on_ranks(_in_bfloat16, kind)
    assert found.keys() == first.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, (first[name] + second[name]) / 2, name)


def _train(rank, sharded):
    """Two clipped steps: the norms, what the optimizer holds, and the adapters."""
    model = adapted("dora")
    if sharded:
        _shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        x = inputs("dora", BATCH)
        loss(model, part(x, rank, 2) if sharded else x).backward()
        norm = nn.utils.clip_grad_norm_(trained, 0.01)
        norms.append((norm.full_tensor() if sharded else norm).item())
        optimizer.step()
    state = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    values = {
        n: p.full_tensor() if sharded else p for n, p in model.named_parameters() if p.requires_grad
    }
    return norms, sorted(state["state"]), {n: p.detach().cpu().numpy() for n, p in values.items()}


def test_clipped_steps_and_the_state_of_the_optimizer():
    (norms, held, found), (other_norms, _, _) = on_ranks(_train, True)
    expected_norms, _, expected = _train(0, False)
    assert norms == other_norms == pytest.approx(expected_norms, rel=1e-12)
    assert expected_norms[0] > 0.02  # clipping does something
    assert_near(found, expected, 1e-9)  # AdamW divides by roots of small numbers
    assert held == sorted(expected)


def _disabled(rank, kinds):
    found = {}
    for kind in kinds:
        model = _shard(adapted(kind, torch.float32))
        x = part(inputs(kind, BATCH, torch.float32), rank, 2)
        with torch.no_grad():
            with lorafast.disabled(model):
                y = model(x)
            found[kind] = y, model(x), plain(kind, torch.float32)(x)
    return found


def test_disabled_has_the_bits_of_the_frozen_model():
    kinds = (
        "lora",
        "dora",
        "parallel",
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


def _begun_on_meta(rank, kind, broadcast):
    """What the model computes once it has the frozen tensors, and its adapters as they were drawn."""
    torch.manual_seed(8)  # the same on every rank, as training scripts have it
    with torch.device("meta"):
        options = {"r": 4} if "kind" not in DECODERS.get(kind, {}) else {"bottleneck": 4}
        model = adapted(kind, filled=False, **options)
    _shard(model)
    model.to_empty(device=device())
    frozen = plain(kind).state_dict()
    how = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, frozen if rank == 0 or not broadcast else {}, options=how)
    drawn = {n: p.detach().full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        y = model(inputs(kind, 2))
    return y, drawn


@pytest.mark.parametrize(
    ("kind", "broadcast"),
    [
        ("pfeiffer", True),
        ("dora", True),
        pytest.param("dora", False, marks=pytest.mark.slow),
        pytest.param("lora", True, marks=pytest.mark.slow),
        pytest.param("embedding", True, marks=pytest.mark.slow),
        pytest.param("conv-dora", True, marks=pytest.mark.slow),
        pytest.param("attention", False, marks=pytest.mark.slow),
    ],
)
def test_begun_on_meta(kind, broadcast):
    """The frozen model's numbers, and no rows that are the same on both ranks."""
    (y, drawn), (y_of_second, of_second) = on_ranks(_begun_on_meta, kind, broadcast)
    np.testing.assert_allclose(y, plain(kind)(inputs(kind, 2)).numpy(), rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(y, y_of_second)
    assert any(array.any() for array in drawn.values())
    for name, array in drawn.items():
        np.testing.assert_array_equal(array, of_second[name])
        upper, lower = array[: len(array) // 2], array[len(array) // 2 :]
        repeated = array.ndim > 1 and len(array) % 2 == 0 and np.array_equal(upper, lower)
        assert not repeated or not array.any(), name
