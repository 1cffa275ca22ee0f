"""``AdapterState`` in one process: what is in it, what it refuses, and that it then changes nothing."""

import copy
import io
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

import lorafast


def state_of(model, optimizer=None):
    """As a file has it, read without pickles of classes."""
    file = io.BytesIO()
    torch.save(lorafast.AdapterState(model, optimizer).state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def load(model, state, optimizer=None):
    lorafast.AdapterState(model, optimizer).load_state_dict(state)


@pytest.fixture
def saved(net, draw_adapters):
    return draw_adapters(lorafast.adapt(net, 2, ["up", "down"], alpha=3))


@pytest.fixture
def fresh(make_net):
    def make(r=2, targets=("up", "down"), alpha=3, **options):
        return lorafast.adapt(make_net(), r, targets, alpha=alpha, **options)

    return make


def test_what_is_in_it(saved):
    saved.head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2).requires_grad_(False))
    saved.add_module("other", nn.BatchNorm1d(3).requires_grad_(False))
    lorafast.add_adapter(saved, "waits", 1)
    names = set(state_of(saved)["tensors"])
    adapters = {name for name in saved.state_dict() if "lora_" in name}
    assert len(adapters) == 8
    head = {f"head.0.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    assert names == adapters | head | {"head.0.num_batches_tracked"}


def test_a_compiled_block_has_the_names_of_a_plain_one(saved, fresh, x):
    compiled = copy.deepcopy(saved)
    compiled.block = torch.compile(compiled.block, backend="eager")
    state = state_of(nn.DataParallel(compiled), torch.optim.AdamW(adapters_of(compiled)))
    assert state.keys() == {"tensors", "layers", "names", "optimizer"}
    model = fresh()
    load(model, state, torch.optim.AdamW(adapters_of(model)))
    assert torch.equal(model(x), saved(x))
    load(compiled, state_of(model))


def test_a_wrapped_block_has_the_names_of_a_plain_one():
    plain = lorafast.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "nf4")
    lorafast.adapt(plain, 2)
    expected = state_of(plain)
    plain[0] = checkpoint_wrapper(plain[0])
    found = state_of(plain)
    assert found["names"] == expected["names"]
    assert len(found["tensors"]) == 4
    assert found["layers"] == expected["layers"]


def adapters_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("fast", [False, True], ids=["", "accelerated"])
def test_pefts_models(make_net, x, fast):
    peft = pytest.importorskip("peft")

    def make(seed):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2, target_modules=["up", "down"], modules_to_save=["head"], init_lora_weights=False
        )
        model = peft.get_peft_model(make_net(), config)
        return lorafast.accelerate(model) if fast else model

    model, other = make(1), make(2)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(2)
    expected = model(x)
    assert not torch.equal(other(x), expected)
    optimizer = torch.optim.AdamW(adapters_of(model))
    state = state_of(model, optimizer)
    assert state["tensors"].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    load(other, state, torch.optim.AdamW(adapters_of(other)))
    assert torch.equal(other(x), expected)


def test_a_merged_model_is_merged_anew(saved, fresh, x):
    model = fresh()
    model.block.up.merge()
    load(model, state_of(saved))
    torch.testing.assert_close(model(x), saved(x))


def test_a_copy_is_saved(saved):
    state = lorafast.AdapterState(saved).state_dict()
    before = state["tensors"]["block.up.lora_A"].clone()
    with torch.no_grad():
        saved.block.up.lora_A.zero_()
    assert torch.equal(state["tensors"]["block.up.lora_A"], before)


def test_an_optimizers_state_begins_at_zero(saved):
    state = state_of(saved, torch.optim.AdamW(adapters_of(saved)))
    moments = state["optimizer"]["state"]["block.up.lora_A"]
    assert not moments["exp_avg"].any()
    assert all(parameter.grad is None for parameter in saved.parameters())


REFUSED = {
    "scaling": (
        {"alpha": 4},
        r"scaling of block\.down is 1\.5 in the checkpoint and 2\.0 in the model",
    ),
    "fewer": (
        {"targets": ["up"]},
        r"has block\.down\.lora_A, block\.down\.lora_B, which the model",
    ),
    "more": ({"use_dora": True}, r"lacks block\.down\.lora_magnitude, block\.up\.lora_magnitude"),
    "began": (
        {"init_lora_weights": "pissa"},
        r"init_lora_weights of block\.down is None in the check",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_was_adapted_otherwise(saved, fresh, unchanged, options, message):
    model = fresh(**options)
    with unchanged(model), pytest.raises(ValueError, match=message):
        load(model, state_of(saved))


def test_another_adapter_is_active(saved, unchanged):
    lorafast.add_adapter(saved, "second", 2)
    state = state_of(saved)
    lorafast.set_adapter(saved, "second")
    with (
        unchanged(saved),
        pytest.raises(ValueError, match="'default' in the checkpoint"),
    ):
        load(saved, state)
    lorafast.set_adapter(saved, "default")
    load(saved, state)


def test_no_half_of_a_state_is_loaded(saved, fresh, unchanged):
    model, state = fresh(), state_of(saved)
    with unchanged(model), pytest.raises(ValueError, match="has no optimizer's"):
        load(model, state, torch.optim.AdamW(adapters_of(model)))
    model.block.down.merge()
    state["tensors"]["block.down.lora_A"][0, 0] = torch.nan
    with unchanged(model), pytest.raises(ValueError, match="lora_A is NaN"):
        load(model, state)


def test_models_without_state(net):
    with pytest.raises(ValueError, match="no adapter, and no parameter of it is trained"):
        lorafast.AdapterState(net.requires_grad_(False)).state_dict()
    with torch.device("meta"):
        model = lorafast.adapt(nn.Sequential(nn.Linear(3, 4)), 2)
    with pytest.raises(ValueError, match=r"0\.lora_A is on the device meta"):
        lorafast.AdapterState(model).state_dict()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
def test_flat_parameters_are_refused(net):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(
            lorafast.adapt(net, 2), device_id=torch.device("cpu"), use_orig_params=True
        )
        with pytest.raises(ValueError, match="expected one that fully_shard has sharded"):
            lorafast.AdapterState(model).state_dict()
    finally:
        dist.destroy_process_group()


def stepped(model, x):
    """An optimizer that has taken a step; AdamW has moments then."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_moments_are_loaded_beside_gradients(saved, fresh, x):
    """PyTorch asks for none where it sees a gradient."""
    state = state_of(saved, stepped(saved, x))
    other = fresh()
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    other(x).square().sum().backward()
    before = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    load(other, state, optimizer)
    assert len(optimizer.state) == 4
    assert all(values["exp_avg"].any() for values in optimizer.state.values())
    for name, p in other.named_parameters():
        assert p.grad is before.get(name)


def test_a_state_of_before_the_first_step_counts_none(saved, x):
    optimizer = torch.optim.AdamW([p for p in saved.parameters() if p.requires_grad])
    before = copy.deepcopy(saved.state_dict())
    lorafast.AdapterState(saved, optimizer).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in saved.state_dict().items())
    assert {float(values["step"]) for values in optimizer.state.values()} <= {0.0}
    saved(x).square().sum().backward()
    optimizer.step()
    assert {float(values["step"]) for values in optimizer.state.values()} == {1.0}


def test_a_state_of_another_shape_or_with_less_is_refused(saved, fresh, unchanged):
    state = state_of(saved)
    other = fresh()
    name = next(iter(state["tensors"]))
    cut = {**state, "tensors": {**state["tensors"], name: state["tensors"][name][:1, :1]}}
    with unchanged(other), pytest.raises(ValueError, match="has shape"):
        load(other, cut)
    less = {n: t for n, t in state["tensors"].items() if n != name}
    with unchanged(other), pytest.raises(ValueError, match=name):
        load(other, {**state, "tensors": less})


def every_adapters(model):
    """The parameters of all adapters, active or not."""
    return [p for name, p in model.named_parameters() if "lora_" in name]


def optimizer_states(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: dict(values) for p, values in optimizer.state.items()}


def assert_same_states(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].keys() == values.keys()
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(found[name][key]), torch.as_tensor(value)), name


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def two(fresh, draw_adapters):
    """A model whose adapters were both trained, ``second`` last, by one optimizer."""

    def make(optimizer=torch.optim.AdamW, **options):
        model = fresh()
        lorafast.add_adapter(model, "second", 1)
        draw_adapters(model)
        made = optimizer(every_adapters(model), lr=0.1, **options)
        lorafast.set_adapter(model, "second")
        return model, made

    return make


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_moments_of_an_adapter_that_waits(two, x, optimizer):
    model, trained = two(optimizer)
    lorafast.set_adapter(model, "default")
    for _ in range(2):
        step(model, trained, x)
    lorafast.set_adapter(model, "second")
    step(model, trained, x)
    expected = copy.deepcopy(optimizer_states(model, trained))
    assert len(expected) == 8
    state = state_of(model, trained)
    assert_same_states(optimizer_states(model, trained), expected)
    other, fresh_one = two(optimizer)
    frozen = [name for name, p in other.named_parameters() if not p.requires_grad]
    load(other, state, fresh_one)
    assert_same_states(optimizer_states(other, fresh_one), expected)
    assert frozen == [name for name, p in other.named_parameters() if not p.requires_grad]
    for one, its in ((model, trained), (other, fresh_one)):
        lorafast.set_adapter(one, "default")
        step(one, its, x)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Rprop])
def test_one_that_never_was_trained_has_no_state_after_a_load_either(two, x, kind):
    model, optimizer = two(kind)
    step(model, optimizer, x)
    before = copy.deepcopy(optimizer_states(model, optimizer))
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    state = state_of(model, optimizer)
    assert_same_states(optimizer_states(model, optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    assert len(state["optimizer"]["state"]) == 8
    other, fresh_one = two(kind)
    load(other, state, fresh_one)
    assert_same_states(optimizer_states(other, fresh_one), before)
    for one, its in ((model, optimizer), (other, fresh_one)):
        lorafast.set_adapter(one, "default")
        step(one, its, x)
    assert torch.equal(other(x), model(x))


def test_a_group_without_a_state(two, x):
    def make():
        model, _ = two()
        parameters = every_adapters(model)
        groups = [{"params": parameters[:4], "momentum": 0.9}, {"params": parameters[4:]}]
        return model, torch.optim.SGD(groups, lr=0.1)

    model, optimizer = make()
    step(model, optimizer, x)
    other, fresh_one = make()
    load(other, state_of(model, optimizer), fresh_one)
    assert_same_states(optimizer_states(other, fresh_one), optimizer_states(model, optimizer))


def test_an_optimizer_of_another_kind_or_another_model_is_refused(two, x, unchanged):
    model, optimizer = two(torch.optim.SGD, momentum=0.9)
    step(model, optimizer, x)
    state = state_of(model, optimizer)
    other = torch.optim.AdamW(every_adapters(model))
    with unchanged(model), pytest.raises(ValueError, match=r"no exp_avg of .* another kind"):
        load(model, state, other)
    assert not other.state
    foreign = torch.optim.AdamW([*every_adapters(model), nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"a parameter of shape \[3\] that the model hasn't"):
        state_of(model, foreign)


def test_an_optimizer_of_other_parameters_is_refused(two, unchanged):
    model, of_all = two()
    of_active = torch.optim.AdamW(adapters_of(model))
    of_two, of_one = state_of(model, of_all), state_of(model, of_active)
    for state, optimizer, message in (
        (of_two, of_active, r"has an optimizer's state of block\.down\.inactive\.default\.lora_A"),
        (of_one, of_all, r"has no optimizer's state of block\.down\.inactive\.default\.lora_A"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            load(model, state, optimizer)
        assert not optimizer.state
    load(model, of_two)  # the adapters alone


def test_a_state_that_does_not_say_what_its_optimizer_had(two, x):
    """As it was written before ``names`` had the optimizer's."""
    model, optimizer = two()
    step(model, optimizer, x)
    state = state_of(model, optimizer)
    state["names"] = json.dumps(json.loads(state["names"])["tensors"])
    other, fresh_one = two()
    load(other, state, fresh_one)
    assert len(fresh_one.state) == 8


def test_what_is_frozen_and_no_adapters_is_not_in_it(saved, x):
    saved.head.requires_grad_(True)
    optimizer = torch.optim.AdamW(adapters_of(saved))
    step(saved, optimizer, x)
    assert len(state_of(saved, optimizer)["optimizer"]["state"]) == 6
    saved.head.requires_grad_(False)
    assert len(state_of(saved, optimizer)["optimizer"]["state"]) == 4
    assert len(optimizer.state) == 6
