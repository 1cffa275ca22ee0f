"""``interpolate``: the weights between two models, what is refused; the curve."""

import copy
import json
from itertools import accumulate

import pytest
import torch
from torch import nn

import lorafast
from lorafast.reference import contract

CPU = [torch.profiler.ProfilerActivity.CPU]


class Model(nn.Module):
    """A convolution with a norm that counts, a table tied to the head, and integers of its own."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, dtype=dtype)
        self.norm = nn.BatchNorm2d(8, dtype=dtype)
        self.table = nn.Embedding(7, 8, dtype=dtype)
        self.head = nn.Linear(8, 7, dtype=dtype)
        self.head.weight = self.table.weight
        self.register_buffer("places", torch.arange(3))


def two(dtype=torch.float32):
    """Two models of the same structure, channels last, and one layer that they share the values of."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Model(dtype).to(memory_format=torch.channels_last)
        model.norm.running_mean.normal_()
        model.norm.num_batches_tracked.fill_(seed)
        nn.init.ones_(model.norm.weight)
        made.append(model)
    return made


def assert_between(found, a, b, alpha):
    """Holds each float of ``found`` to the contract; of integers ``a``'s are there."""
    for key, tensor in found.state_dict().items():
        one, other = a.state_dict()[key], b.state_dict()[key]
        if not tensor.is_floating_point():
            assert torch.equal(tensor, one)
            continue
        eager = (1 - alpha) * one + alpha * other
        ref64 = (1 - alpha) * one.double() + alpha * other.double()
        assert contract.why_broken(tensor, eager, ref64) is None, key
        assert not torch.equal(tensor, one) or torch.equal(one, other), key


@pytest.mark.parametrize("alpha", [0.3, 0.75, 1.5])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_every_float_lies_between(dtype, alpha):
    a, b = two(dtype)
    before, other = copy.deepcopy(a), copy.deepcopy(b)
    assert lorafast.interpolate(a, b, alpha) is a
    assert_between(a, before, b, alpha)
    assert a.head.weight is a.table.weight
    assert a.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for key, tensor in b.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ends_and_equal_weights_keep_their_bits(dtype):
    a, b = two(dtype)
    for alpha, expected in ((0, a), (1, b)):
        found = lorafast.interpolate(copy.deepcopy(a), b, alpha)
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(name))
    same = lorafast.interpolate(copy.deepcopy(a), a, 0.3)
    assert all(torch.equal(p, a.get_parameter(name)) for name, p in same.named_parameters())


def test_is_rounded_once():
    """To bfloat16 from float32, where each step in bfloat16 would round."""
    a, b = (nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(2))
    expected = torch.lerp(a.weight.float(), b.weight.float(), 0.3).bfloat16()
    in_bfloat16 = torch.lerp(a.weight, b.weight, torch.tensor(0.3, dtype=torch.bfloat16))
    assert torch.equal(lorafast.interpolate(a, b, 0.3).weight, expected)
    assert not torch.equal(in_bfloat16, expected)


@pytest.mark.parametrize("source", ["state dict", "file", "folder", "shards", "float64"])
def test_from_a_checkpoint(source, tmp_path):
    a, b = two()
    expected = lorafast.interpolate(copy.deepcopy(a), b, 0.25)
    state = {key: tensor.clone().contiguous() for key, tensor in b.state_dict().items()}
    if source != "state dict":
        del state["head.weight"]  # which is tied: a file has one of its names
    if source == "float64":
        state = {k: t.double() if t.is_floating_point() else t for k, t in state.items()}
    other = state
    if source in ("file", "folder", "shards"):
        safetensors = pytest.importorskip("safetensors.torch")
        other = tmp_path
        if source == "shards":
            files = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(state)}
            for file in set(files.values()):
                part = {key: tensor for key, tensor in state.items() if files[key] == file}
                safetensors.save_file(part, tmp_path / file)
            index = json.dumps({"weight_map": files})
            (tmp_path / "model.safetensors.index.json").write_text(index)
        else:
            safetensors.save_file(state, tmp_path / "model.safetensors")
            other = tmp_path / "model.safetensors" if source == "file" else str(tmp_path)
    assert lorafast.interpolate(a, other, 0.25) is a
    for key, tensor in expected.state_dict().items():
        assert a.state_dict()[key].dtype is tensor.dtype
        exact = source != "float64" or not tensor.is_floating_point()
        allowed = 0 if exact else torch.finfo(tensor.dtype).eps * tensor.norm()
        assert (a.state_dict()[key] - tensor).double().norm() <= allowed


def test_into_another_model_and_into_the_other():
    a, b = two()
    before = copy.deepcopy(a.state_dict())
    expected = lorafast.interpolate(copy.deepcopy(a), b, 0.25)
    for into in (copy.deepcopy(b), Model(torch.bfloat16), b):
        assert lorafast.interpolate(a, b, 0.25, into=into) is into
        for name, parameter in expected.named_parameters():
            assert torch.equal(into.get_parameter(name), parameter.to(into.conv.weight.dtype))
    assert all(torch.equal(tensor, before[key]) for key, tensor in a.state_dict().items())


def test_equal_values_stay_to_the_bit():
    """Infinities, of which ``lerp`` makes NaN, and zeros of another sign."""
    a, b = (nn.Linear(3, 1, bias=False) for _ in range(2))
    a.weight.data, b.weight.data = (
        torch.tensor([[-0.0, float("inf"), 1]]),
        torch.tensor([[0, float("inf"), 2]]),
    )
    for alpha in (0, 0.5, 1.5):
        found = lorafast.interpolate(copy.deepcopy(a), b, alpha).weight
        assert found.signbit()[0, 0]
        assert found[0].tolist() == [0, float("inf"), 1 + alpha]


def test_overlapping_tensors_are_refused(unchanged):
    a = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    b = copy.deepcopy(a)
    a[1].weight = nn.Parameter(a[0].weight.t())
    with unchanged(a), pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory"):
        lorafast.interpolate(a, b, 0.5)
    lorafast.interpolate(b, a, 0.5)


def test_into_gets_the_integers_of_the_model():
    a, b = two()
    into = Model()
    into.places += 5
    lorafast.interpolate(a, b, 0.5, into=into)
    assert torch.equal(into.places, a.places)
    assert into.norm.num_batches_tracked == 1
    made = [lorafast.quantize(nn.Sequential(nn.Linear(64, 64))) for _ in range(2)]
    with pytest.raises(ValueError, match=r"0\.weight is of a quantized weight and differs in into"):
        lorafast.interpolate(made[0], copy.deepcopy(made[0]), 0.5, into=made[1])


@pytest.mark.slow
def test_there_is_no_third_copy():
    a, b = (nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16))) for _ in range(2))
    b = b.state_dict()
    with torch.profiler.profile(profile_memory=True, activities=CPU) as profile:
        lorafast.interpolate(a, b, 0.5)
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(change for _, change in memory))
    assert 0 < peak <= 3 * a[0].weight.nbytes


def adapted(net, draw_adapters, **options):
    return draw_adapters(lorafast.adapt(net, 2, ["up", "down"], alpha=3, **options))


def test_of_an_adapter_the_change_is_scaled(net, x, draw_adapters, assert_same, tmp_path):
    base = copy.deepcopy(net)
    model = adapted(net, draw_adapters)
    merged = lorafast.merge(copy.deepcopy(model))
    lorafast.save_adapter(model, tmp_path)
    expected = lorafast.interpolate(copy.deepcopy(base), merged, 0.3)(x).detach()
    factors = {n: p.clone() for n, p in model.named_parameters()}
    assert lorafast.interpolate(model, None, 0.3) is model
    assert model.block.up.scaling == 0.3 * 1.5
    assert all(torch.equal(p, factors[name]) for name, p in model.named_parameters())
    assert_same(model(x).detach(), expected)
    assert_same(lorafast.interpolate(base, tmp_path, 0.3)(x).detach(), expected)
    lorafast.save_adapter(model, tmp_path)
    again = lorafast.load_adapter(lorafast.merge(base), tmp_path)
    assert again.block.up.scaling == pytest.approx(0.45)
    model.block.up.merge()
    lorafast.interpolate(model, None, 0)
    assert torch.equal(model.block.up._merged_weight, model.block.up.weight)


def test_of_a_bottleneck_the_change_is_scaled():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    lorafast.adapt(model, kind="houlsby", targets=["0"], bottleneck=2, init="bert")
    with torch.no_grad():
        model[0].bottleneck.up.add_(1)
        on = model(x)
        with lorafast.disabled(model):
            off = model(x)
        lorafast.interpolate(model, None, 0.25)
        torch.testing.assert_close(model(x), off + 0.25 * (on - off))
    with pytest.raises(ValueError, match="the model has adapters"):
        lorafast.interpolate(model, copy.deepcopy(model), 0.5)


@pytest.mark.parametrize("adapted_before", [True, False])
def test_an_adapter_that_cannot_be_scaled_is_taken_away(
    net, unchanged, tmp_path, draw_adapters, adapted_before
):
    lorafast.save_adapter(
        adapted(copy.deepcopy(net), draw_adapters), tmp_path, modules_to_save=["head"]
    )
    with torch.no_grad():
        net.head.bias.add_(1)
    if adapted_before:
        draw_adapters(lorafast.adapt(net, 2, ["up", "down"], alpha=5))
        net.block.up.merge()
    with unchanged(net), pytest.raises(ValueError, match="finite"):
        lorafast.interpolate(net, tmp_path, 1.7e308)
    assert any(p.requires_grad for p in net.head.parameters()) is not adapted_before


def test_what_began_as_pissa_is_refused(net, unchanged, tmp_path):
    base = copy.deepcopy(net)
    lorafast.adapt(net, 2, ["up"], init_lora_weights="pissa")
    lorafast.save_adapter(net, tmp_path)
    for model, other in ((net, None), (base, tmp_path)):
        with unchanged(model), pytest.raises(ValueError, match="began as 'pissa'"):
            lorafast.interpolate(model, other, 0.5)


def refused(net):
    other = copy.deepcopy(net)
    state = other.state_dict()
    without = {key: tensor for key, tensor in state.items() if key != "block.down.weight"}
    return {
        "missing": (without, "block.down.weight is in the model, and not in the state dict"),
        "more": (state | {"z": state["head.bias"]}, "z is in the state dict, and not in the model"),
        "shape": (state | {"norm.bias": torch.ones(4)}, r"norm.bias has shape \[3\] .* \[4\] in"),
        "integers": (
            state | {"norm.bias": torch.ones(3, dtype=torch.int32)},
            "norm.bias is torch.float64 in the model and torch.int32",
        ),
        "meta": (
            copy.deepcopy(net).to("meta"),
            "block.up.weight of the other model is on",
        ),
        "adapted": (lorafast.adapt(other, 2, ["up"]), "the other model has adapters"),
        "none": (None, "the model has no adapter to scale"),
    }


@pytest.mark.parametrize(
    "kind", ["missing", "more", "shape", "integers", "meta", "adapted", "none"]
)
def test_refuses_in_a_sentence(net, unchanged, kind):
    other, sentence = refused(net)[kind]
    for call in (
        lambda: lorafast.interpolate(net, other, 0.5),
        lambda: lorafast.interpolation_curve(
            net, other, [0.5], lambda model: pytest.fail("called")
        ),
    ):
        with unchanged(net), pytest.raises(ValueError, match=sentence):
            call()


def test_refuses_what_has_nothing_between(unchanged):
    a, b = two()
    b.places += 1
    with unchanged(a), pytest.raises(ValueError, match=r"places is torch.int64 and differs in"):
        lorafast.interpolate(a, b, 0.5)
    state = two()[1].state_dict()
    state["head.weight"] = state["head.weight"] + 1
    with unchanged(a), pytest.raises(ValueError, match="are one tensor in the model, and two in"):
        lorafast.interpolate(a, state, 0.5)
    untied, other = two()
    untied.head.weight = nn.Parameter(torch.zeros(7, 8))
    with unchanged(untied), pytest.raises(ValueError, match="are one tensor in into, and two in"):
        lorafast.interpolate(untied, untied, 0.5, into=other)
    made = [lorafast.quantize(nn.Sequential(nn.Linear(64, 64))) for _ in range(2)]
    with pytest.raises(ValueError, match=r"0\.weight is of a quantized weight"):
        lorafast.interpolate(*made, 0.5)
    lorafast.interpolate(made[0], copy.deepcopy(made[0]), 0.5)


def test_refuses_other_things(net, unchanged, tmp_path, draw_adapters):
    with unchanged(net):
        for alpha in (float("nan"), "0.5", True):
            with pytest.raises(ValueError, match="expected a finite number"):
                lorafast.interpolate(net, net, alpha)
        with pytest.raises(TypeError, match="other is a int, expected a model, a state dict or"):
            lorafast.interpolate(net, 3, 0.5)
        with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
            lorafast.interpolate(net, tmp_path / "no", 0.5)
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(FileNotFoundError, match="it holds pytorch_model"):
            lorafast.interpolate(net, tmp_path, 0.5)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            lorafast.interpolate(net, tmp_path / "pytorch_model.bin", 0.5)
    model = adapted(copy.deepcopy(net), draw_adapters, use_dora=True)
    lorafast.save_adapter(model, tmp_path)
    for one, other in ((model, None), (net, tmp_path)):
        with unchanged(one), pytest.raises(ValueError, match="is DoRA's, whose change"):
            lorafast.interpolate(one, other, 0.5)


def test_the_curve_restores_the_model(unchanged):
    a, b = two()
    before = copy.deepcopy(a)
    seen = []

    def evaluate(model):
        assert model is a
        seen.append(copy.deepcopy(model))
        return model.conv.bias.mean().item()

    with unchanged(a):
        found = lorafast.interpolation_curve(a, b, [0, 0.25, 1], evaluate)
    assert [alpha for alpha, _ in found] == [0, 0.25, 1]
    assert [value for _, value in found] == [model.conv.bias.mean().item() for model in seen]
    for alpha, model in zip((0, 0.25, 1), seen, strict=True):
        expected = lorafast.interpolate(copy.deepcopy(before), b, alpha)
        for key, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor)

    def fails(model):
        raise KeyError

    with unchanged(a), pytest.raises(KeyError):
        lorafast.interpolation_curve(a, b, [0.5], fails)


def test_the_curve_of_an_adapter_restores_its_scaling(net, x, draw_adapters, unchanged):
    base = copy.deepcopy(net)
    model = adapted(net, draw_adapters)
    on = model(x)
    model.block.down.merge()
    with pytest.raises(ValueError, match="into is given"):
        lorafast.interpolate(model, None, 0.5, into=base)
    alpha, scaling = model.block.up.alpha, model.block.up.scaling
    found = dict(lorafast.interpolation_curve(model, None, [0, 1 / 3, 1], lambda one: one(x)))
    model.block.down.unmerge()
    assert (model.block.up.alpha, model.block.up.scaling) == (alpha, scaling)
    assert torch.equal(model(x), on)
    assert torch.equal(found[0], base(x))
    assert not torch.equal(found[1 / 3], found[1])
