"""Distributed checkpoints: of two ranks, loaded by as many, by four and by one; PEFT's files; merges."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import device, mesh_of, on_ranks
from small_decoder import decoder, fill_adapters, tokens
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import lorafast
from lorafast.nn import bitsandbytes_keys

BROKEN_AT, STEPS = 2, 4


def of_kinds(*quick, slow=()):
    """A test of these kinds of adapters and weights, of which some are left out by ``make test``."""
    others = [pytest.param(kind, marks=pytest.mark.slow) for kind in slow]
    return pytest.mark.parametrize("kind", [*quick, *others])


def _adapted(kind, world=0):
    """The same on every call: frozen weights, and adapters that aren't zero; on ``world`` ranks."""
    model = decoder(torch.float64)
    if kind == "nf4":
        lorafast.quantize(model, "nf4")
    torch.manual_seed(5)
    if kind == "bottleneck":
        lorafast.adapt(model, kind="pfeiffer", targets=["mlp"], init="bert", bottleneck=4)
    else:
        options = {"use_dora": True} if kind == "dora" else {}
        lorafast.adapt(model, 4, fuse="siblings" if kind == "siblings" else None, **options)
    if kind == "named":
        lorafast.add_adapter(model, "waits", 2)
    fill_adapters(model)
    return _sharded(model, world)


def _sharded(model, world):
    model.to(device())
    if not world:
        return model
    mesh = mesh_of()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _other(kind, world):
    """A model that a checkpoint makes that of ``_adapted``, by its adapters."""
    model = _adapted(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or ".inactive." in name:
                parameter.mul_(0.5)
    return _sharded(model, world)


def _optimizer(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2)


def _loss(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _train(model, optimizer, steps, rank=0, world=1):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = _loss(model, tokens(4, seed=step).chunk(world)[rank])
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def _save(rank, kind, folder):
    """The whole curve, of a run that saves in its middle."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    model = _adapted(kind, 2)
    optimizer = _optimizer(model)
    losses = _train(model, optimizer, range(BROKEN_AT), rank, 2)
    state = {"run": lorafast.AdapterState(model, optimizer)}
    dcp.save(state, checkpoint_id=f"{folder}/adapter")
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/whole")
    lorafast.save_adapter(model, f"{folder}/files")
    return losses + _train(model, optimizer, range(BROKEN_AT, STEPS), rank, 2)


def _resume(rank, kind, folder, world, into=_other):
    """The rest of the curve, of a run that begins with the checkpoint."""
    model = into(kind, world)
    optimizer = _optimizer(model)
    dcp.load({"run": lorafast.AdapterState(model, optimizer)}, checkpoint_id=f"{folder}/adapter")
    return _train(model, optimizer, range(BROKEN_AT, STEPS), rank, world or 1)


def _alone(kind, steps):
    model = _adapted(kind)
    return model, _train(model, _optimizer(model), range(steps))


def _close(found, expected):
    return all(math.isclose(a, b, rel_tol=1e-11) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a kind's checkpoints, and the curve of each rank; saved once."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = str(tmp_path_factory.mktemp(kind))
            made[kind] = folder, on_ranks(_save, kind, folder)
        return made[kind]

    return of


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@of_kinds("dora", "nf4", slow=("lora", "named", "siblings", "bottleneck"))
def test_a_resumed_run_has_the_same_curve(saved, kind):
    folder, (first, second) = saved(kind)
    assert first == second
    alone = _alone(kind, STEPS)[1]
    assert _close(first, alone)
    rest = first[BROKEN_AT:]
    assert on_ranks(_resume, kind, folder, 2) == [rest, rest]
    assert _close(_resume(0, kind, folder, 0), rest)
    # What isn't loaded is noticed: of the optimizer's state, and of the adapters' values.
    fresh = _other(kind, 0)
    assert not _close(_train(fresh, _optimizer(fresh), range(BROKEN_AT, STEPS)), rest)
    dcp.load({"run": lorafast.AdapterState(fresh)}, checkpoint_id=f"{folder}/adapter")
    there = _train(fresh, _optimizer(fresh), range(BROKEN_AT, STEPS))
    assert _close(there[:1], rest[:1])
    assert not _close(there, rest)


@of_kinds("dora", slow=("nf4",))
def test_four_ranks_go_on_with_what_two_saved(saved, kind):
    folder, (first, _) = saved(kind)
    for losses in on_ranks(_resume, kind, folder, 4, world=4):
        assert _close(losses, first[BROKEN_AT:])


def _has_no_waiting(kind, world):
    return _adapted("lora" if kind == "named" else "named", world)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_adapter_that_waits_is_in_it(saved):
    folder, _ = saved("named")
    model = _other("named", 0)
    dcp.load({"run": lorafast.AdapterState(model)}, checkpoint_id=f"{folder}/adapter")
    expected = _adapted("named").state_dict()
    waiting = [name for name in expected if ".inactive.waits." in name]
    assert waiting
    for name in waiting:
        assert torch.equal(model.state_dict()[name], expected[name]), name
    with pytest.raises(ValueError, match=r"inactive\.waits\.lora_A.*which the model hasn't"):
        _resume(0, "named", folder, 0, into=_has_no_waiting)
    with pytest.raises(CheckpointException, match=r"Missing key.*inactive\.waits\.lora_"):
        _resume(0, "lora", saved("lora")[0], 0, into=_has_no_waiting)


def _of_all(model):
    """An optimizer of the adapters that wait too."""
    names = ("lora_A", "lora_B")
    return torch.optim.AdamW([p for n, p in model.named_parameters() if n.endswith(names)], lr=1e-2)


def _train_all(model, optimizer, steps, rank, world):
    """What is left of the adapters that wait, each of which has a gradient of its own."""
    waiting = {n: p for n, p in model.named_parameters() if ".inactive." in n}
    for step in steps:
        optimizer.zero_grad()
        _loss(model, tokens(4, seed=step).chunk(world or 1)[rank]).backward()
        for parameter in waiting.values():
            parameter.grad = (0.3 + step) * parameter.detach()
        optimizer.step()
    return {
        name: (p.full_tensor() if world else p).detach().cpu().numpy()
        for name, p in waiting.items()
    }


def _save_all(rank, folder):
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    model = _adapted("named", 2)
    optimizer = _of_all(model)
    _train_all(model, optimizer, range(BROKEN_AT), rank, 2)
    dcp.save({"run": lorafast.AdapterState(model, optimizer)}, checkpoint_id=f"{folder}/adapter")
    return _train_all(model, optimizer, range(BROKEN_AT, STEPS), rank, 2)


def _resume_all(rank, folder, world):
    model = _other("named", world)
    optimizer = _of_all(model)
    dcp.load({"run": lorafast.AdapterState(model, optimizer)}, checkpoint_id=f"{folder}/adapter")
    return _train_all(model, optimizer, range(BROKEN_AT, STEPS), rank, world)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_moments_of_adapters_that_wait(tmp_path):
    folder = str(tmp_path)
    expected, _ = on_ranks(_save_all, folder)
    assert expected
    found = [_resume_all(0, folder, 0), *on_ranks(_resume_all, folder, 4, world=4)]
    for values in found:
        assert values.keys() == expected.keys()
        for name, value in values.items():
            torch.testing.assert_close(
                torch.from_numpy(value), torch.from_numpy(expected[name]), rtol=1e-11, atol=1e-13
            )
    with pytest.raises(ValueError, match=r"has an optimizer's state of .*\.inactive\.waits"):
        _resume(0, "named", folder, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_moments_that_no_checkpoint_has(saved):
    folder, _ = saved("named")
    with pytest.raises(CheckpointException, match=r"Missing key.*inactive\.waits\.lora_"):
        _resume_all(0, folder, 0)


def _asynchronous(rank, folder):
    """A checkpoint that is written while the training goes on, loaded by a model in DDP."""
    model = _adapted("lora", 2)
    optimizer = _optimizer(model)
    _train(model, optimizer, range(BROKEN_AT), rank, 2)
    state = {"run": lorafast.AdapterState(model, optimizer)}
    saving = dcp.async_save(
        state, checkpoint_id=folder, process_group=dist.new_group(backend="gloo")
    )
    losses = _train(model, optimizer, range(BROKEN_AT, STEPS), rank, 2)
    saving.result()
    dist.barrier()
    model = torch.nn.parallel.DistributedDataParallel(_other("lora", 0))
    optimizer = _optimizer(model)
    dcp.load({"run": lorafast.AdapterState(model, optimizer)}, checkpoint_id=folder)
    return losses, _train(model, optimizer, range(BROKEN_AT, STEPS), rank, 2)


@pytest.mark.slow
def test_saved_meanwhile_and_loaded_by_ddp(tmp_path):
    for losses, in_ddp in on_ranks(_asynchronous, str(tmp_path / "checkpoint")):
        assert _close(in_ddp, losses)


def _load_whole(rank, kind, folder, world):
    """The loss of a model with none of the checkpoint's values."""
    model = _other(kind, 0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    model = _sharded(model, world)
    with bitsandbytes_keys(False):
        state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=f"{folder}/whole")
    set_model_state_dict(model, state)
    return _loss(model, tokens(4, seed=BROKEN_AT).chunk(world or 1)[rank]).item()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@of_kinds("nf4", slow=("dora", "named"))
def test_the_whole_model(saved, kind):
    folder, (losses, _) = saved(kind)
    parts = on_ranks(_load_whole, kind, folder, 2)
    assert _close([sum(parts) / 2, _load_whole(0, kind, folder, 0)], [losses[BROKEN_AT]] * 2)


@of_kinds("dora", slow=("lora",))
def test_peft_loads_what_two_ranks_saved(saved, kind):
    peft = pytest.importorskip("peft")
    folder, _ = saved(kind)
    theirs = peft.PeftModel.from_pretrained(decoder(torch.float64), f"{folder}/files")
    model, _ = _alone(kind, BROKEN_AT)
    ids = tokens(4)
    torch.testing.assert_close(theirs.eval()(ids), model.eval()(ids), rtol=1e-6, atol=1e-6)
    ours = lorafast.load_adapter(decoder(torch.float64), f"{folder}/files")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).to(parameter), parameter, msg=name)


def _of_pytorch(rank, folder):
    """PyTorch's own states without frozen parameters; of quantized weights these have the scales."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    found = []
    for make in (_adapted, _other):
        model = make("nf4", 2)
        optimizer = _optimizer(model)
        if make is _adapted:
            _train(model, optimizer, range(BROKEN_AT), rank, 2)
        state = get_state_dict(model, optimizer, options=options)
        call = dcp.save if make is _adapted else dcp.load
        call({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder)
        if make is _other:
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state[0],
                optim_state_dict=state[1],
                options=options,
            )
        found.append(_train(model, optimizer, range(BROKEN_AT, STEPS), rank, 2))
    return found


def test_a_quantized_base_with_pytorchs_own_calls(tmp_path):
    for expected, found in on_ranks(_of_pytorch, str(tmp_path / "checkpoint")):
        assert found == expected


def _merge(rank, kind):
    model = _adapted(kind, 2)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, lorafast.nn.AdapterLayer)}
    found = {}
    for name, layer in layers.items():
        found[name] = layer.to_linear().weight.full_tensor()
        layer.merge()
    return found, model(tokens(4))


@of_kinds("dora", "nf4", slow=("lora",))
def test_two_ranks_merge_as_one(kind):
    model = _adapted(kind)
    expected = model(tokens(4)).detach()
    lorafast.merge(model)
    for weights, logits in on_ranks(_merge, kind):
        assert weights
        for name, weight in weights.items():
            torch.testing.assert_close(
                torch.from_numpy(weight), model.get_parameter(f"{name}.weight")
            )
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-11, atol=1e-11)
