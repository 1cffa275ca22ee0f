"""``freeze`` and ``thaw``: what is trained, what a backward computes and keeps, held statistics."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from models import trained
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import lorafast


class Network(nn.Module):
    """Three stages of a convolution and a norm, in one list, and a head."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=i > 0), nn.ReLU())
            for i in range(3)
        )
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(self.scale * x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Network()


X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
BELOW = {"scale", "stem.0.weight", "stem.1.weight", "stem.1.bias"}
FIRST = {"stages.0.0.weight", "stages.0.0.bias"}


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        pytest.param({"until": "stages.0"}, BELOW | FIRST, id="until"),
        pytest.param({"until": "stem"}, BELOW, id="until-a-parent"),
        pytest.param({"until": "stem.0"}, {"scale", "stem.0.weight"}, id="until-inside"),
        pytest.param({"until": "stages.0", "except_": ["bias"]}, (BELOW | FIRST)
                     - {"stem.1.bias", "stages.0.0.bias"}, id="except-parameters"),
        pytest.param({"targets": ["stem", "stages.0"]}, (BELOW | FIRST) - {"scale"}, id="names"),
        pytest.param({"targets": r"stages\.0.*"}, FIRST, id="regex"),
        pytest.param({"targets": ["scale", "stem.0"]}, {"scale", "stem.0.weight"}, id="parameter"),
        pytest.param({"except_": r"stages\.[0-9]|fc"}, BELOW, id="except-modules"),
    ],
)  # fmt: skip
def test_freezes_what_is_named(model, options, frozen):
    every = trained(model)
    assert lorafast.freeze(model, **options) is model
    assert every - trained(model) == frozen
    lorafast.thaw(model)
    assert trained(model) == every


def backward(model):
    """Bytes kept for the backward beside parameters, its nodes, and how many convolutions give dx."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(X).square().sum()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    nodes, found = [loss.grad_fn], {loss.grad_fn}
    for node in nodes:
        after = [one for one, _ in node.next_functions if one is not None and one not in found]
        found |= set(after)
        nodes += after
    convolutions = [node for node in nodes if node.name() == "ConvolutionBackward0"]
    to_x = sum(node.next_functions[0][0] is not None for node in convolutions)
    loss.backward()
    return sum(kept.values()), Counter(node.name() for node in nodes), to_x


def test_nothing_is_kept_or_computed_below_the_first_trained_layer(model):
    whole, every, to_x = backward(model)
    assert (every["ConvolutionBackward0"], every["NativeBatchNormBackward0"], to_x) == (4, 4, 4)
    lorafast.freeze(model, until="stages.1")
    model.zero_grad()
    kept, nodes, to_x = backward(model)
    assert (nodes["ConvolutionBackward0"], nodes["NativeBatchNormBackward0"], to_x) == (1, 1, 0)
    # Of one stage: the convolution's x, the norm's and ReLU's. Then a few numbers: statistics, logits.
    stage = 2 * 4 * 6 * 6 * 4
    assert 3 * stage <= kept <= 3 * stage + 400
    assert whole >= 10 * stage
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def changed(before, model):
    return {n.rpartition(".")[0] for n, b in model.named_buffers() if not torch.equal(before[n], b)}


def test_frozen_norms_keep_their_statistics_until_they_are_thawed(model):
    keys = list(model.state_dict())
    lorafast.freeze(model, until="stages.1", except_=["stages.1.1.bias"])
    before = statistics(model)
    held = {"stem.1", "stages.0.1"}  # of the third something is trained
    every = held | {"stages.1.1", "stages.2.1"}
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one.eval()
        assert one.train() is one
        one(X)
        assert changed(before, one) == every - held
        assert list(one.state_dict()) == keys
        evaluated = copy.deepcopy(one)
        lorafast.thaw(evaluated.eval())
        assert not any(module.training for module in evaluated.modules())
        lorafast.thaw(one, ["stages.0"])
        assert [name for name, module in one.named_modules() if not module.training] == ["stem.1"]
        lorafast.thaw(one, ["stem.1"])
        one(X)
        assert changed(before, one) == every


def test_a_held_norm_computes_as_in_evaluation(model):
    model(X)
    expected = copy.deepcopy(model).eval()(X)
    lorafast.freeze(model).train()
    assert torch.equal(model(X), expected)


def test_thaws_block_by_block(model):
    lorafast.freeze(model)
    found = []
    for _ in range(6):
        before = trained(model)
        lorafast.thaw(model, last=1)
        found.append({name.rpartition(".")[0] for name in trained(model) - before})
    assert found == [
        {"fc"},
        {"stages.2.0", "stages.2.1"},
        {"stages.1.0", "stages.1.1"},
        {"stages.0.0"},
        {"stem.1"},
        {"stem.0"},
    ]
    lorafast.thaw(lorafast.freeze(model), last=2)
    assert {name.partition(".")[0] for name in trained(model)} == {"fc", "stages"}


def test_of_an_adapted_model_adapters_are_thawed(model):
    lorafast.adapt(model, 2, ["stages.1.0", "stages.2.0"])
    adapters = trained(model)
    lorafast.freeze(model)
    assert not trained(model)
    lorafast.thaw(model, last=1)
    assert trained(model) == {name for name in adapters if "stages.2" in name}
    lorafast.thaw(model)
    assert trained(model) == adapters
    lorafast.thaw(model, ["fc"])
    assert trained(model) == adapters | {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA too", "alone"])
def test_bottlenecks_are_thawed(lora):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
    model.append(nn.Linear(4, 4))
    lorafast.adapt(model, kind="pfeiffer", targets=["0.0", "1.0"], bottleneck=2)
    if lora:
        lorafast.adapt(model, 2, ["2"])
    adapters = trained(model)
    lorafast.thaw(lorafast.freeze(model))
    assert trained(model) == adapters
    lorafast.thaw(lorafast.freeze(model), ["bottleneck"])
    assert trained(model) == {name for name in adapters if "bottleneck" in name}
    lorafast.freeze(model)
    for last in ("2",) * lora + ("1", "0"):
        before = trained(model)
        lorafast.thaw(model, last=1)
        assert trained(model) - before == {name for name in adapters if name.startswith(last)}


def test_what_adapters_are_over_stays_frozen():
    model = nn.Sequential(
        nn.MultiheadAttention(4, 2), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    )
    lorafast.adapt(model, 2, ["0", "1.0", "2"])
    adapters = trained(model)

    def of(name):
        return {one for one in adapters if one.startswith(name) or one.endswith(f".{name}")}

    for name in ("0", "1", "2"):
        lorafast.thaw(lorafast.freeze(model), rf"{name}.*")
        assert trained(model) == of(name)
    with pytest.raises(ValueError, match="names only what stays frozen"):
        lorafast.thaw(model, ["out_proj"])
    lorafast.add_adapter(model, "b", 2)
    for name in ("lora_A", "1"):
        lorafast.thaw(lorafast.freeze(model), [name])
        assert trained(model) == of(name)
    lorafast.thaw(lorafast.freeze(model), last=1)
    assert trained(model) == of("2")


def test_norms_that_are_not_trained_stay_held_among_adapters(model):
    lorafast.adapt(model, 2, ["stages.1.0"])
    lorafast.thaw(lorafast.freeze(model))
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    lorafast.thaw(model, ["stem"])
    assert model.stem[1].training


def test_a_parameter_of_the_model_is_no_block_with_adapters(model):
    lorafast.adapt(model, 2, ["stem.0"])
    lorafast.thaw(lorafast.freeze(model), last=9)
    assert trained(model) == {"stem.0.lora_A", "stem.0.lora_B"}


def test_refuses_what_is_distributed(model, monkeypatch):
    class Distributed(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Distributed)
    lorafast.freeze(model)
    for call in (lorafast.thaw, lambda one: lorafast.new_head(one, 2)):
        with pytest.raises(ValueError, match="is in DistributedDataParallel"):
            call(Distributed(model))
    assert not trained(model)


@pytest.mark.slow
def test_of_peft_the_active_adapters_are_thawed(net):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], use_dora=True)
    model = peft.inject_adapter_in_model(config, net, adapter_name="one")
    adapters = trained(model)
    peft.inject_adapter_in_model(config, net, adapter_name="two")
    model.block.up.set_adapter("one")
    lorafast.freeze(model)
    lorafast.thaw(model, ["up"])
    assert trained(model) == {name for name in adapters if "up" in name}


def test_codes_of_a_quantized_layer_are_not_trained():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    lorafast.quantize(model, exclude=["1"])
    lorafast.thaw(lorafast.freeze(model), ["0", "1"])
    assert {"0.bias", "1.weight", "1.bias"} == trained(model) & {"0.bias", "1.weight", "1.bias"}
    assert all(p.is_floating_point() for p in model.parameters() if p.requires_grad)


def test_codes_of_float8_are_not_trained():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model = nn.Sequential(fp8.FP8Linear(128, 128, block_size=(128, 128)), nn.Linear(128, 3))
    lorafast.thaw(lorafast.freeze(model))
    assert trained(model) == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("call", "options", "sentence"),
    [
        (lorafast.freeze, {"targets": ["stages.0", "stagse"]}, r"'stagse', .* did you mean 'stages'"),
        (lorafast.freeze, {"targets": "stem.*x"}, r"'stem\.\*x', a regex that matches .* no module"),
        (lorafast.freeze, {"targets": "0"}, r"pass \['0'\]"),
        (lorafast.freeze, {"targets": []}, r"targets is \(\), expected at least one name"),
        (lorafast.freeze, {"until": "layer3"}, r"until has 'layer3', which is the name of no module"),
        (lorafast.freeze, {"until": "0"}, "until is '0', the ending of stem.0, stages.0, "),
        (lorafast.freeze, {"until": 3}, "until is 3, expected the name of a module"),
        (lorafast.freeze, {"until": "stem", "targets": ["fc"]}, "both given"),
        (lorafast.freeze, {"targets": ["fc"], "except_": ["fc"]}, "nothing to freeze"),
        (lorafast.freeze, {"except_": ["fk"]}, r"except_ has 'fk', .* \(there are stem, stages, fc, "),
        (lorafast.thaw, {"targets": "("}, "not a regex"),
        (lorafast.thaw, {"last": 0}, "last is 0, expected a positive integer"),
        (lorafast.thaw, {"last": 1, "targets": ["fc"]}, "both given"),
    ],
)  # fmt: skip
def test_refuses_in_a_sentence(model, unchanged, call, options, sentence):
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        call(model, **options)
