"""Weights as torchao and DeepSeek-style checkpoints hold them, read bit for bit."""

import copy

import pytest
import torch
from torch import nn

import lorafast
from lorafast import operands, reference
from lorafast.nn import LoRALinear
from lorafast.operands import FP8, Int8
from lorafast.reference import contract

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, K = 48, 64


def quantized(config, N=N, K=K, dtype=torch.float32, bias=True):
    """An nn.Linear whose weight torchao has quantized."""
    torchao = pytest.importorskip("torchao.quantization")
    granularity = {
        "row": torchao.PerRow, "tensor": torchao.PerTensor, "group": lambda: torchao.PerGroup(16),
    }  # fmt: skip
    kind, by = config.split(" by ")
    make = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}[kind]
    model = nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype)
    torchao.quantize_(model, make(granularity=granularity[by](), set_inductor_config=False))
    return model[0]


CONFIGS = ["int8 by row", "int8 by tensor", "int8 by group", "fp8 by row", "fp8 by tensor"]


def same(found, expected):
    """NaN where it is expected, else the same bits, of zeros too."""
    assert found.dtype is expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.nan_to_num(0.0), expected.nan_to_num(0.0)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", [(48, 64), (1, 16), (33, 112)], ids=str)
def test_it_is_made_dense_to_the_bit(config, dtype, shape):
    layer = quantized(config, *shape, dtype)
    weight = operands.of_layer(layer)
    assert type(weight) is (Int8 if config.startswith("int8") else FP8)
    assert weight.dtype is dtype
    assert weight.tensors()["weight"].data_ptr() == layer.weight.qdata.data_ptr()
    assert weight.tensors()["scale"].data_ptr() == layer.weight.scale.data_ptr()
    same(weight.dense(), layer.weight.dequantize())
    adapted = LoRALinear.from_linear(copy.deepcopy(layer), r=2)
    same(adapted.base_weight(), layer.weight.dequantize())


SCALES = {
    "one": [1.0],
    "of zeros": [0.0, -0.0],
    "denormal": [1e-45, 1e-40, -3e-39],
    "huge": [3e38, 1e38, -2e38],
    "negative": [-1.0, -0.37],
    "tiny and large": [1e-30, 7e-8, 3e4, 2.0**-14],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("scales", SCALES)
def test_every_code_with_adversarial_scales(config, dtype, scales):
    """All 256 codes in each row: zeros, negative zero, denormals and, in e4m3, NaN."""
    layer = quantized(config, 12, 256, dtype)
    codes = torch.arange(256, dtype=torch.uint8).repeat(12, 1)
    layer.weight.qdata.view(torch.uint8).copy_(codes)
    values = torch.tensor(SCALES[scales])
    scale = layer.weight.scale
    scale.copy_(values.repeat(scale.numel())[: scale.numel()].view_as(scale))
    weight = operands.of_layer(layer)
    same(weight.dense(), layer.weight.dequantize())
    same(weight.rows(5, 9), layer.weight.dequantize()[5:9])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_layer_gives_what_it_gave(config, dtype):
    plain = quantized(config, dtype=dtype)
    x = torch.randn(5, K).to(dtype)
    W, b = plain.weight.dequantize(), plain.bias.detach()
    made = LoRALinear.from_linear(copy.deepcopy(plain), r=4)
    found = {}
    for name, layer in (("fast", made), ("torchao", plain)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.sum().backward()
        found[name] = {"y": y.detach(), "dx": leaf.grad}
    wide = x.double().requires_grad_()
    y = nn.functional.linear(wide, W.double(), b.double())
    y.sum().backward()
    exact = {"y": y.detach(), "dx": wide.grad}
    bounds = contract.bounds(found["torchao"], exact, dtype=dtype)
    assert contract.why_any_broken(found["fast"], bounds) is None


def test_a_model_is_adapted_saved_and_merged(tmp_path):
    pytest.importorskip("torchao")
    model = nn.Sequential(quantized("int8 by row"), nn.ReLU(), quantized("fp8 by row", 8, N))
    x = torch.randn(3, K)
    expected = model(x)
    lorafast.adapt(model, r=4)
    assert [type(m.operand()) for m in (model[0], model[2])] == [Int8, FP8]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    assert model[0].lora_B.grad is not None
    again = nn.Sequential(quantized("int8 by row"), nn.ReLU(), quantized("fp8 by row", 8, N))
    lorafast.adapt(again, r=4)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    merged = lorafast.merge(copy.deepcopy(model))
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)


def _with_dynamic_input(layer):
    layer.weight.act_quant_kwargs = object()


def _with_scaled_input(layer):
    layer.weight.act_pre_scale = torch.ones(1)


def _with_zero_points(layer):
    layer.weight.zero_point = torch.ones_like(layer.weight.scale, dtype=torch.int8)


def _with_nan(layer):
    layer.weight.scale[0] = float("nan")


def _with_few_scales(layer):
    layer.weight.scale = layer.weight.scale[1:]


def _without_scales(layer):
    layer.weight.scale = None


def _without_codes(layer):
    layer.weight.qdata = None


def _with_scales_in_half(layer):
    layer.weight.scale = layer.weight.scale.half()


def _with_odd_blocks(layer):
    layer.weight.block_size = [1, 24]


def _transposed(layer):
    layer.weight.qdata = layer.weight.qdata.t().contiguous().t()


def _with_a_buffer(layer):
    layer.register_buffer("mask", torch.ones(1))


UNFIT = {
    _with_dynamic_input: r"torchao quantizes its input too \(act_quant_kwargs\)",
    _with_scaled_input: r"torchao scales its input \(act_pre_scale\)",
    _with_zero_points: "its codes have zero points, expected symmetric ones",
    _with_nan: "a scale of its weight is NaN or infinite",
    _with_few_scales: r"scale has shape \[47, 1\], expected \[48, 1\], of rows",
    _without_scales: "its weight's scale is None, expected a tensor",
    _without_codes: "its weight's qdata is None, expected a tensor",
    _with_scales_in_half: r"scale is torch\.float16, expected torch\.float32",
    _with_odd_blocks: "blocks of 1 x 24, which don't divide 48 x 64",
    _transposed: r"weight has strides \(1, 48\), expected contiguous",
    _with_a_buffer: "it has mask, which a LoRALinear has no place for",
}


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_what_does_not_fit_is_refused_in_a_sentence(change):
    layer = quantized("int8 by row")
    change(layer)
    weight = layer.weight
    with pytest.raises(TypeError, match=UNFIT[change]):
        LoRALinear.from_linear(layer, r=4)
    model = nn.Sequential(quantized("int8 by row"), layer)
    with pytest.raises((TypeError, ValueError), match=UNFIT[change]):
        lorafast.adapt(model, r=4, targets=["0", "1"])
    assert not any(isinstance(module, LoRALinear) for module in model)  # nothing half wrapped
    assert layer.weight is weight


def test_other_tensors_of_torchao_are_refused_by_name():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32))
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    with pytest.raises(
        TypeError, match="its weight is torchao's IntxUnpackedToInt8Tensor, expected"
    ):
        LoRALinear.from_linear(model[0], r=4)


def test_e5m2_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32))
    config = torchao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2)
    torchao.quantize_(model, config)
    with pytest.raises(
        TypeError, match=r"weight is torch\.float8_e5m2 .*expected torch\.float8_e4m3fn"
    ):
        LoRALinear.from_linear(model[0], r=4)


def in_blocks(N=200, K=300, *, block=(128, 128), bias=True):
    """Transformers' FP8Linear of random codes, but for NaN, random scales and bias."""
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(K, N, block_size=block, has_bias=bias)
    codes = torch.randint(0, 256, (N, K), dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    with torch.no_grad():
        layer.weight.copy_(codes.view(torch.float8_e4m3fn))
        layer.weight_scale_inv.copy_(torch.rand_like(layer.weight_scale_inv) + 0.5)
        if layer.bias is not None:  # memory as it was
            layer.bias.normal_()
    return layer


class TestCheckpointsAsDeepSeeks:
    @pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 300), (1, 1)], ids=str)
    @pytest.mark.parametrize("block", [(128, 128), (64, 32), None], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_blocks_are_made_dense_as_defined(self, shape, block, dtype):
        layer = in_blocks(*shape, block=block)
        weight = operands.of_layer(layer)
        assert type(weight) is FP8
        assert weight.tensors()["weight"] is layer.weight
        assert weight.tensors()["weight_scale_inv"] is layer.weight_scale_inv
        scale = layer.weight_scale_inv.detach()
        if block is not None:
            rows, columns = block
            scale = scale.repeat_interleave(rows, 0)[: shape[0]]
            scale = scale.repeat_interleave(columns, 1)[:, : shape[1]]
        W = reference.dequantize_eight_bit(layer.weight.detach(), scale, torch.float32)
        same(weight.to(torch.float32).dense().detach(), W)
        same(weight.to(dtype).dense().detach(), W.to(dtype))

    def test_as_transformers_makes_it_dense(self):
        from transformers.integrations import finegrained_fp8

        layer = in_blocks()
        its = finegrained_fp8._dequantize_fp8_weight(
            layer.weight.detach(), layer.weight_scale_inv.detach(), [128, 128], torch.float32
        )
        same(operands.of_layer(layer).dense().detach(), its)

    def test_a_layer_is_adapted_and_keeps_its_names(self):
        layer = in_blocks()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        W = operands.of_layer(layer).dense().detach()
        made = LoRALinear.from_linear(layer, r=4)
        x = torch.randn(5, 300, requires_grad=True)
        y = made(x)
        torch.testing.assert_close(y, nn.functional.linear(x, W, made.bias), rtol=1e-4, atol=1e-3)
        y.sum().backward()
        assert {name for name, p in made.named_parameters() if p.grad is not None} == {
            "lora_A", "lora_B",
        }  # fmt: skip
        for name, tensor in before.items():
            assert torch.equal(made.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8))
        low = made.bfloat16()
        assert low.weight.dtype is torch.float8_e4m3fn
        assert low.weight_scale_inv.dtype is torch.float32
        same(low.base_weight().detach(), W.bfloat16())

    def test_a_plain_linear_that_carries_them(self):
        source = in_blocks()
        layer = nn.Linear(300, 200, device="meta")
        layer.weight, layer.bias = source.weight, source.bias
        layer.register_buffer("weight_scale_inv", source.weight_scale_inv.detach())
        found, expected = operands.of_layer(layer), operands.of_layer(source)
        same(found.dense().detach(), expected.dense().detach())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_scale_that_is_no_number(self, value):
        layer = in_blocks()
        layer.weight_scale_inv.data[1, 2] = value
        with pytest.raises(TypeError, match="a scale of its weight is NaN or infinite"):
            LoRALinear.from_linear(layer, r=4)

    @pytest.mark.parametrize("shape", [(2, 2), (3, 2), (1, 3), (6,)], ids=str)
    def test_scales_of_another_size(self, shape):
        layer = in_blocks()
        layer.weight_scale_inv = nn.Parameter(torch.ones(shape))
        match = r"weight_scale_inv has shape .*expected \[2, 3\], of blocks of 128 x 128"
        with pytest.raises(TypeError, match=match):
            LoRALinear.from_linear(layer, r=4)
        assert type(layer).__name__ == "FP8Linear"

    def test_scales_that_are_powers_of_two_of_8_bits(self):
        layer = in_blocks()
        scale = torch.ones(2, 3).to(torch.float8_e8m0fnu)
        layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        with pytest.raises(TypeError, match=r"weight_scale_inv is torch\.float8_e8m0fnu, expected"):
            LoRALinear.from_linear(layer, r=4)

    def test_a_static_scale_of_the_input(self):
        layer = in_blocks()
        layer.activation_scale = nn.Parameter(torch.tensor(1.0))
        with pytest.raises(TypeError, match="it has activation_scale, which a LoRALinear has no"):
            LoRALinear.from_linear(layer, r=4)

    def test_a_forward_of_its_own(self):
        layer = in_blocks()

        class Own(type(layer)):
            def forward(self, x):
                return x

        layer.__class__ = Own
        with pytest.raises(TypeError, match="its forward is not that of Transformers' FP8Linear"):
            LoRALinear.from_linear(layer, r=4)
