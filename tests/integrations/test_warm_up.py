"""Kernels are compiled and plans made beforehand, and nothing else has happened."""

import pytest
import torch
from torch import nn

import lorafast
from lorafast.nn import LoRALinear

ROWS = [1, 7]


class Seen(nn.Module):
    """Keeps the shapes of what goes through, forward and backward."""

    def __init__(self):
        super().__init__()
        self.forward_rows, self.backward_rows = [], []
        self.layer = LoRALinear(12, 20, 4, dropout=0.5)
        self.layer.register_forward_hook(self._note)

    def _note(self, layer, inputs, output):
        self.forward_rows.append(inputs[0].shape[0])
        if output.requires_grad:
            output.register_hook(lambda dy: self.backward_rows.append(dy.shape[0]))


def test_every_layer_runs_forward_and_backward_for_every_number_of_rows():
    seen = Seen()
    lorafast.warm_up(nn.Sequential(nn.Linear(3, 12), seen), ROWS)
    assert seen.forward_rows == ROWS
    assert seen.backward_rows == ROWS


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_without_gradients_there_is_no_backward(how):
    seen = Seen()
    if how == "frozen":
        seen.requires_grad_(False)
    with torch.set_grad_enabled(how == "frozen"):
        lorafast.warm_up(seen, ROWS)
    assert seen.forward_rows == ROWS
    assert seen.backward_rows == []


def test_nothing_else_happens():
    layer = LoRALinear(12, 20, 4, dropout=0.5)
    touched = []
    layer.lora_A.register_hook(touched.append)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    generator = torch.get_rng_state()
    lorafast.warm_up(layer, ROWS)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert touched == []
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    assert layer.training


def test_under_autocast_the_callers_dtype_is_warmed_up(monkeypatch):
    seen = []
    layer = LoRALinear(12, 20, 4)
    layer.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lorafast.warm_up(layer, [2])
    assert seen == [torch.bfloat16]


def test_conv1d_and_merged_layers_are_warmed_up_too():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    lorafast.warm_up(LoRALinear.from_linear(Conv1D(20, 12), 4), ROWS)
    merged = LoRALinear(12, 20, 4)
    merged.merge()
    lorafast.warm_up(merged, ROWS)


def test_layers_of_peft_are_warmed_up():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 20)), peft.LoraConfig(r=4, target_modules=["0"])
    )
    with pytest.raises(ValueError, match="no adapter to warm up"):
        lorafast.warm_up(model, ROWS)
    lorafast.accelerate(model, quiet=True)
    rows = []
    model.base_model.model[0].register_forward_hook(lambda *call: rows.append(len(call[2])))
    lorafast.warm_up(model, ROWS)
    assert rows == ROWS
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_of_peft_is_warmed_up(monkeypatch):
    peft = pytest.importorskip("peft")
    from lorafast.nn import attention

    def attention_of(adapters):
        config = peft.LoraConfig(r=4, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(12, 2)), config)
        for name in adapters:
            model.add_adapter(name, config)
        model.base_model.set_adapter(["default", *adapters])
        return lorafast.accelerate(model, quiet=True)

    called = []
    real = attention.lora_linear

    def noted(x, weight, *rest, **options):
        called.append((x.shape[:-1].numel(), weight.shape[0]))
        return real(x, weight, *rest, **options)

    monkeypatch.setattr(attention, "lora_linear", noted)
    model = attention_of([])
    lorafast.warm_up(model, ROWS)
    assert called == [(rows, out) for rows in ROWS for out in (3 * 12, 12)]
    assert all(parameter.grad is None for parameter in model.parameters())
    left = attention_of(["other"])  # to PEFT, which would merge into the stand-ins
    stock = peft.tuners.lora.layer.MultiheadAttention
    monkeypatch.setattr(stock, "forward", lambda *call, **named: pytest.fail("called"))
    lorafast.warm_up(left, ROWS)


@pytest.mark.parametrize("rows", [[0], [-1], [1.0], [True], ["8"]], ids=str)
def test_a_number_of_rows_that_is_none_is_said(rows):
    with pytest.raises(ValueError, match="expected whole numbers of at least 1"):
        lorafast.warm_up(LoRALinear(12, 20, 4), rows)


def test_a_module_without_adapted_layers_is_said():
    with pytest.raises(ValueError, match=r"no adapter to warm up: lorafast\.adapt"):
        lorafast.warm_up(nn.Linear(3, 4), ROWS)


def test_layers_that_accelerate_has_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(12, 20))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    lorafast.adapt(model, r=4, targets=["0"])
    x = torch.randn(3, 12)
    before = model(x)
    lorafast.warm_up(model, ROWS)
    assert model[0].weight.is_meta
    assert torch.equal(model(x), before)
