import pytest
import torch
from lorafast.bench.common import bases, bitsandbytes
from lorafast.bench.common.memory import peak_bytes, saved_bytes
from torch import nn

from lorafast.backends import workspace
from lorafast.functional import grouped_lora_linear
from lorafast.nn import LoRALinear, QuantizedLinear

CPU = torch.device("cpu")


def test_saved_counts_a_storage_once_and_no_parameter():
    x = torch.randn(100, 10, requires_grad=True)
    weight = torch.randn(10, 10)

    def forward():
        y = x * x  # x twice
        return y @ weight  # weight, a parameter, for dx

    assert saved_bytes(forward, [weight]) == x.nbytes
    assert saved_bytes(forward, []) == x.nbytes + weight.nbytes


def test_peak_is_what_is_held_at_once():
    def call():
        for _ in range(3):
            torch.empty(1 << 20)  # freed at once
        held = [torch.empty(1 << 20) for _ in range(2)]
        del held

    assert peak_bytes(call, CPU) == 2 * 4 << 20
    assert peak_bytes(lambda: None, CPU) == 0


SIZE, LAYERS, ROWS = 2048, 3, 4
W_BYTES = 2 * SIZE * SIZE


def weights(base):
    generator = torch.Generator().manual_seed(0)
    for _ in range(LAYERS):
        W = torch.randn(SIZE, SIZE, generator=generator).mul_(SIZE**-0.5)
        yield bases.quantized(W.bfloat16(), base)


def peak_of_a_step(model):
    x = torch.randn(ROWS, SIZE).bfloat16().requires_grad_()

    def step():
        model(x).sum().backward()
        for tensor in (x, *model.parameters()):
            tensor.grad = None

    return peak_bytes(step, CPU)


@pytest.mark.parametrize("base", ["nf4", "int8", "fp8"])
def test_a_step_of_several_quantized_layers_takes_one_part_of_a_weight(base):
    """Half a weight at most, beside activations and gradients, for all layers and both directions."""
    model = nn.Sequential(*(LoRALinear.from_operand(weight, 4) for weight in weights(base)))
    peak = peak_of_a_step(model)
    rest = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    rest += 4 * (LAYERS + 2) * ROWS * SIZE * 2
    assert peak <= W_BYTES // 2 + rest < W_BYTES
    assert peak_of_a_step(model) == peak  # memory that layers share counts in each


MANY, MANY_SIZE = 192, 1024
"""Rows of which a product makes W dense; a W that is larger than what is made of so many rows."""


def dora(weight):
    return LoRALinear.from_operand(weight, 4, use_dora=True)


def mixed(weight):
    """Two adapters in turn."""
    A, B = torch.randn(2, 4, MANY_SIZE), torch.randn(2, MANY_SIZE, 4)
    factors = [nn.Parameter(t.bfloat16()) for t in (A, B)]
    layer = nn.Module()
    layer.factors = nn.ParameterList(factors)
    adapter_of = [i % 2 for i in range(MANY)]
    layer.forward = lambda x: grouped_lora_linear(x, weight, *factors, 1.0, adapter_of)
    return layer


LAYERS_OF = {
    # How many activations a layer keeps, and how many more a step takes.
    "lora": (lambda weight: LoRALinear.from_operand(weight, 4), 1, 2),
    "frozen": (QuantizedLinear.from_operand, 0, 3),
    "dora": (dora, 2, 7),
    "mixed": (mixed, 1, 3),
}


@pytest.mark.parametrize(
    ("base", "kind"),
    [("nf4", kind) for kind in LAYERS_OF]
    + [("int8", "lora"), ("fp4", "frozen"), ("mxfp4", "dora"), ("fp8", "mixed")],
)
def test_of_many_rows_a_step_takes_one_weight_for_all_layers(base, kind):
    """Twice as many layers take no second one, nor does the backward."""
    make, kept, more = LAYERS_OF[kind]
    activation, W = 2 * MANY * MANY_SIZE, 2 * MANY_SIZE**2
    peaks = []
    for layers in (2, 4):
        drawn = [torch.randn(MANY_SIZE, MANY_SIZE).mul_(MANY_SIZE**-0.5) for _ in range(layers)]
        model = nn.Sequential(*(make(bases.quantized(W.bfloat16(), base)) for W in drawn))
        x = torch.randn(MANY, MANY_SIZE).bfloat16().requires_grad_()

        def step(model=model, x=x):
            model(x).sum().backward()
            for tensor in (x, *model.parameters()):
                tensor.grad = None

        step()
        peaks.append(peak_bytes(step, CPU))
        assert peaks[-1] <= W + (layers * kept + more) * activation * 1.05
    assert peaks[1] - peaks[0] <= 2 * (kept + 0.2) * activation < W


def test_over_bitsandbytes_a_step_takes_whole_weights():
    """The measure sees one: bitsandbytes makes W dense in a fresh buffer."""
    model = nn.Sequential(*(bitsandbytes.layer_of(weight, None) for weight in weights("nf4")))
    assert peak_of_a_step(model) >= W_BYTES


FEW = 128
"""Rows up to which the codes themselves are multiplied."""


def test_workspaces_are_given_back():
    layer = LoRALinear.from_operand(next(weights("nf4")), 4)
    x = torch.randn(FEW + 1, SIZE).bfloat16()
    layer(x)
    released = peak_bytes(lambda: layer(x), CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "release", lambda: None)
        held = peak_bytes(lambda: layer(x), CPU)
    assert released - held >= W_BYTES // 4
