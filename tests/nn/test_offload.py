"""Layers whose values Accelerate keeps in the CPU's memory or on a disk."""

import copy

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")
from accelerate import hooks  # noqa: E402

import lorafast  # noqa: E402
from lorafast.nn import LoRALinear  # noqa: E402


def model():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6, bias=False))
    return net.requires_grad_(False).double()


def adapted(net):
    lorafast.adapt(net, 2, alpha=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.lora_A.normal_(generator=generator)
            layer.lora_B.normal_(generator=generator)
    return net


@pytest.fixture(params=["cpu", "disk"])
def offload(request, tmp_path):
    def run(net):
        if request.param == "cpu":
            return accelerate.cpu_offload(net)
        return accelerate.disk_offload(net, tmp_path / "weights")

    return run


@pytest.fixture
def x():
    return torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_offloaded(net):
    for layer in (net[0], net[2]):
        assert layer.weight.is_meta
        assert layer._hf_hook.offload


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.attn = nn.MultiheadAttention(6, 2, dtype=torch.float64).requires_grad_(False)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def test_attention_offloaded_after_adapting():
    net = lorafast.adapt(Attending(), 2, ["attn"])
    with torch.no_grad():
        for parameter in net.attn.adapter_parameters().values():
            parameter.normal_()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    expected = net(x).detach()
    accelerate.cpu_offload(net, preload_module_classes=["LoRAMultiheadAttention"])

    def assert_away():
        assert net.attn.in_proj_weight.is_meta
        assert net.attn.out_proj.weight.is_meta

    torch.testing.assert_close(net(x), expected)
    net.attn.merge()
    assert_away()
    torch.testing.assert_close(net(x), expected)
    net.attn.unmerge()
    torch.testing.assert_close(net(x), expected)
    assert_away()
    torch.testing.assert_close(lorafast.merge(net)(x), expected)


def test_attention_that_is_offloaded_already_is_refused():
    net = accelerate.cpu_offload(Attending(), preload_module_classes=["MultiheadAttention"])
    with pytest.raises(
        TypeError, match=r'with preload_module_classes=\["LoRAMultiheadAttention"\]'
    ):
        lorafast.adapt(net, 2, ["attn"])


class TestOffloadedAfterAdapting:
    def test_forward_backward_and_merging(self, offload, x):
        net = adapted(model())
        expected = net(x).detach()
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(net(leaf).sum(), leaf)
        offload(net)
        assert_offloaded(net)
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        torch.testing.assert_close(y.detach(), expected)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], dx)
        assert lorafast.merge(net) is net
        assert_offloaded(net)
        assert type(net[0]) is nn.Linear
        for _ in range(2):
            torch.testing.assert_close(net(x), expected)
        assert_offloaded(net)

    def test_one_layer_is_merged_and_unmerged(self, offload, x):
        net = adapted(model())
        expected, delta = net(x).detach(), net[0].delta_weight()
        offload(net)
        net[0].merge()
        assert_offloaded(net)
        torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(net[0].delta_weight(), delta)
        net[0].unmerge()
        torch.testing.assert_close(net(x), expected)

    def test_to_linear_has_the_values(self, offload, x):
        net = adapted(model())
        expected = net[0](x).detach()
        offload(net)
        plain = net[0].to_linear()
        torch.testing.assert_close(plain(x), expected)
        assert not {"_hf_hook", "_old_forward", "forward"} & set(vars(plain))
        assert_offloaded(net)

    @pytest.mark.parametrize("sample", [None, torch.ones(3, 7)], ids=["many rows", "x"])
    def test_explain_is_that_of_the_forward(self, offload, sample):
        net = adapted(model())
        expected = str(lorafast.explain(net, sample))
        offload(net)
        assert str(lorafast.explain(net, sample)) == expected
        assert_offloaded(net)

    def test_hooks_can_be_removed_after_merging(self, offload, x):
        net = adapted(model())
        expected = net(x).detach()
        offload(net)
        lorafast.merge(net)
        hooks.remove_hook_from_submodules(net)
        assert not net[0].weight.is_meta
        torch.testing.assert_close(net(x), expected)

    def test_a_layer_that_is_the_model(self, x):
        layer = adapted(model())[0]
        expected = layer(x).detach()
        accelerate.cpu_offload(layer)
        plain = lorafast.merge(layer)
        assert plain.weight.is_meta
        torch.testing.assert_close(plain(x), expected)

    def test_values_of_which_no_hook_knows_are_refused(self):
        net = adapted(model())
        net[2].to("meta")
        with pytest.raises(
            ValueError, match=r"^2 can't be merged: its weight is on the device meta, which holds"
        ):
            lorafast.merge(net)
        assert isinstance(net[0], LoRALinear)
        for call in (net[2].merge, net[2].to_linear):
            with pytest.raises(ValueError, match="its weight is on the device meta"):
                call()
        assert not net[2].merged


class TestAdaptedAfterOffloading:
    def test_it_trains_as_in_memory(self, offload, x):
        stay, away = model(), offload(model())
        adapted(stay)
        adapted(away)
        assert_offloaded(away)
        assert not away[0].lora_A.is_meta
        found = {}
        for name, net in (("stay", stay), ("away", away)):
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                leaf = x.clone().requires_grad_()
                y = net(leaf)
                y.square().sum().backward()
                optimizer.step()
            halves = [half for layer in (net[0], net[2]) for half in (layer.lora_A, layer.lora_B)]
            found[name] = [y.detach(), leaf.grad, *halves, *(half.grad for half in halves)]
        assert_offloaded(away)
        for one, two in zip(*found.values(), strict=True):
            torch.testing.assert_close(one, two)

    def test_merging(self, offload, x):
        stay, away = adapted(model()), adapted(offload(model()))
        expected = stay(x).detach()
        lorafast.merge(away)
        assert_offloaded(away)
        assert type(away[0]) is nn.Linear
        for _ in range(2):
            torch.testing.assert_close(away(x), expected)

    def test_only_the_frozen_weights_come_and_go(self, offload, x):
        net = adapted(offload(model()))
        lora_A = net[0].lora_A
        seen = []
        net[0].register_forward_hook(lambda layer, *_: seen.append(layer.weight.device.type))
        net[0].register_forward_pre_hook(lambda layer, *_: seen.append(layer.weight.device.type))
        net(x)
        assert net[0].lora_A is lora_A
        assert seen == ["meta", "meta"]  # Accelerate's hook is inside those of PyTorch

    def test_removing_the_hooks_brings_the_weights_back(self, offload, x):
        net = adapted(offload(model()))
        expected = net(x).detach()
        hooks.remove_hook_from_submodules(net)
        assert not net[0].weight.is_meta
        torch.testing.assert_close(net(x), expected)
        lorafast.merge(net)
        torch.testing.assert_close(net(x), expected)

    def test_accelerate_reads_the_weights_through_the_hook(self, offload):
        base = model()
        net = adapted(offload(model()))
        with accelerate.utils.align_module_device(net[0], "cpu"):
            assert torch.equal(net[0].weight, base[0].weight)
        assert_offloaded(net)

    def test_the_adapter_can_be_saved(self, offload, tmp_path):
        pytest.importorskip("safetensors")
        net = adapted(offload(model()))
        lorafast.save_adapter(net, tmp_path / "adapter")
        other = lorafast.load_adapter(model(), tmp_path / "adapter")
        assert torch.equal(other[2].lora_B, net[2].lora_B)

    def test_a_hook_that_only_moves_inputs(self, x):
        net = model()
        hooks.attach_execution_device_hook(net, "cpu")
        adapted(net)
        expected = adapted(model())(x)
        torch.testing.assert_close(net(x), expected)
        lorafast.merge(net)
        torch.testing.assert_close(net(x), expected)
        assert isinstance(net[0]._hf_hook, hooks.AlignDevicesHook)

    def test_a_copy_of_the_model(self, x):
        net = adapted(accelerate.cpu_offload(model()))
        twin = copy.deepcopy(net)
        torch.testing.assert_close(twin(x), net(x))

    def test_another_hook_is_refused_by_its_name(self):
        linear = nn.Linear(7, 5)
        hooks.add_hook_to_module(linear, hooks.ModelHook())
        with pytest.raises(TypeError, match="wrapped by Accelerate's hook ModelHook: remove it"):
            LoRALinear.from_linear(linear, 2)
        assert linear.weight.requires_grad
        hooks.remove_hook_from_module(linear)
        layer = LoRALinear.from_linear(linear, 2)
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        with pytest.raises(ValueError, match="wrapped by Accelerate's hook ModelHook: remove it"):
            lorafast.merge(layer)
