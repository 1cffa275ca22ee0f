"""``disabled``: the bits of the frozen model, and afterwards those of the adapted one."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import lorafast


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


def conv1d():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(7, 5))


FLOATS = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))
KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), FLOATS, {}),
    "bfloat16": (lambda: nn.Sequential(nn.Linear(5, 7)).bfloat16(), FLOATS.bfloat16(), {}),
    "dora": (lambda: nn.Sequential(nn.Linear(5, 7)), FLOATS, {"use_dora": True}),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 7)), FLOATS, {"dropout": 0.5}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 7)), torch.tensor([[1, 4], [0, 1]]), {}),
    "conv1d": (conv1d, FLOATS, {}),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.Conv2d(4, 2, 1)),
        FLOATS[None].expand(2, 3, 2, 5),
        {},
    ),
    "attention": (Attention, torch.randn(2, 4, 8), {}),
    "quantized": (
        lambda: lorafast.quantize(nn.Sequential(nn.Linear(64, 64))),
        torch.randn(3, 64),
        {},
    ),
}


def adapted(base, draw_adapters, **options):
    model = copy.deepcopy(base)
    targets = [name for name, module in model.named_modules() if name and "out_proj" not in name]
    return draw_adapters(lorafast.adapt(model, 2, targets, **options))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_has_the_bits_of_the_frozen_model(kind, training, draw_adapters):
    make, x, options = KINDS[kind]
    base = make().requires_grad_(False).train(training)
    model = adapted(base, draw_adapters, **options)
    state, expected = model.state_dict().keys(), base(x)
    torch.manual_seed(0)
    on = model(x)
    assert not torch.equal(on, expected)
    with lorafast.disabled(model) as inside:
        assert inside is model
        with lorafast.disabled(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        assert model.state_dict().keys() == state
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (model, *copies):
        torch.manual_seed(0)
        assert torch.equal(one(x), on)
    assert not any({"forward", "_off"} & vars(module).keys() for module in model.modules())


def test_a_merged_layer_is_merged_again_and_an_error_ends_it(net, x, draw_adapters):
    base = copy.deepcopy(net)
    draw_adapters(lorafast.adapt(net, 2))
    net.head.merge()
    on = net(x)
    off = []

    def fails():
        with lorafast.disabled(net):
            off.append(net(x))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(off[0], base(x))
    assert net.head.merged
    assert torch.equal(net(x), on)


def test_lasts_until_the_last_of_two_threads_has_ended(net, x, draw_adapters):
    expected = net(x)
    on = draw_adapters(lorafast.adapt(net, 2))(x)
    inside, leave = threading.Event(), threading.Event()

    def other():
        with lorafast.disabled(net):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with lorafast.disabled(net):
        thread.start()
        assert inside.wait(10)
    assert torch.equal(net(x), expected)
    leave.set()
    thread.join()
    assert torch.equal(net(x), on)


@pytest.mark.slow
def test_a_compiled_model_follows(draw_adapters):
    model, x = nn.Linear(5, 3).requires_grad_(False), FLOATS
    expected = model(x)
    model = draw_adapters(lorafast.adapt(model, 2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    on = compiled(x)
    with lorafast.disabled(compiled):
        assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), on)
    assert not torch.equal(on, expected)


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "injected"])
def test_of_peft(net, x, wrapped):
    peft = pytest.importorskip("peft")
    expected = net(x)
    config = peft.LoraConfig(
        r=2,
        target_modules=["up"],
        modules_to_save=["head"] if wrapped else None,
        init_lora_weights=False,
    )
    model = peft.PeftModel(net, config) if wrapped else peft.inject_adapter_in_model(config, net)
    lorafast.accelerate(model.double(), quiet=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "lora_" in name:
                parameter.add_(1)
                parameter.requires_grad_("lora_A" in name)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    on = model(x)
    with lorafast.disabled(model):
        assert torch.equal(model(x), expected)
        with lorafast.disabled(model):
            pass
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), on)
    assert not torch.equal(on, expected)
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "before"])
def test_of_a_layer_that_accelerate_has_offloaded(net, x, inside, draw_adapters):
    accelerate = pytest.importorskip("accelerate")
    expected = net(x)
    cpu = torch.device("cpu")
    if not inside:
        accelerate.cpu_offload(net, execution_device=cpu)
    on = draw_adapters(lorafast.adapt(net, 2))(x)
    with lorafast.disabled(net):
        if inside:
            accelerate.cpu_offload(net, execution_device=cpu)
        assert torch.equal(net(x), expected)
    assert torch.equal(net(x), on)


def bottlenecked(net, x, draw_adapters, lora):
    """With a bottleneck, which changes something, and LoRA too."""
    with torch.no_grad():
        expected = net(x)
        lorafast.adapt(net, kind="houlsby", targets=["up"], bottleneck=2, init="bert")
        if lora:
            draw_adapters(lorafast.adapt(net, 2, ["head"]))
        net.block.up.bottleneck.up.add_(1)
        return expected, net(x)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA too", "alone"])
def test_of_bottlenecks(net, x, lora, draw_adapters):
    expected, on = bottlenecked(net, x, draw_adapters, lora)
    assert not torch.equal(on, expected)
    first, second = lorafast.disabled(net), lorafast.disabled(net)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # the blocks overlap
    assert torch.equal(net(x), expected)
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    second.__exit__(None, None, None)
    for one in (net, *copies):
        assert torch.equal(one(x), on)
    one, h = net.block.up.bottleneck, torch.randn(2, 7, dtype=torch.float64)
    with lorafast.disabled(one):
        assert one(h) is h


def test_a_replica_computes_with_its_own_tensors(draw_adapters):
    """As ``nn.DataParallel`` makes one: other parameters in a copy of the layer's attributes."""
    layer = nn.Linear(5, 3)
    layer = draw_adapters(lorafast.adapt(layer, 2))
    with lorafast.disabled(layer):
        replica = layer._replicate_for_data_parallel()
        replica._parameters = {n: p.detach() + 1 for n, p in layer._parameters.items()}
        expected = nn.functional.linear(FLOATS, replica.weight, replica.bias)
        assert torch.equal(replica(FLOATS), expected)


def test_refuses_a_model_without_adapters(net):
    with pytest.raises(TypeError, match="model is a str, expected an nn"), lorafast.disabled("x"):
        pass
    with pytest.raises(ValueError, match="there is no adapter to disable"), lorafast.disabled(net):
        pass
