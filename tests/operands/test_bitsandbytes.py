"""Weights as bitsandbytes makes and reads them, bit for bit."""

import copy
import logging
import re

import pytest
import torch
from torch import nn

from lorafast import operands
from lorafast.nn import LoRALinear
from lorafast.operands import FP4, NF4, Int8

logging.disable(logging.WARNING)  # it says what it lacks on this machine
bnb = pytest.importorskip("bitsandbytes")
logging.disable(logging.NOTSET)

KINDS = {"nf4": NF4, "fp4": FP4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Its own kernel for CPUs misreads rows of this width that blocks straddle: see below.
SHAPES = [(64, 256), (37, 100), (33, 101), (1, 1), (3, 2)]


def layer(kind="nf4", N=48, K=64, dtype=torch.float32, nested=True, **options):
    """A Linear4bit that is quantized."""
    made = bnb.nn.Linear4bit(
        K, N, quant_type=kind, compute_dtype=dtype, compress_statistics=nested, **options
    )
    return made.to(dtype).to("cpu")


@pytest.fixture
def uncompiled():
    """It compiles its own loop for odd widths and long blocks, again for each shape, dtype and block."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_it_is_made_dense_to_the_bit(uncompiled, kind, nested, dtype, block):
    assert_dense_to_the_bit(kind, nested, dtype, block, SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "block"), [("nf4", torch.bfloat16, 64), ("fp4", torch.float32, 4096)], ids=str
)
def test_it_is_what_its_compiled_loop_makes(kind, dtype, block):
    assert_dense_to_the_bit(kind, True, dtype, block, [(33, 101)])


def assert_dense_to_the_bit(kind, nested, dtype, block, shapes):
    for shape in shapes:
        W = (torch.randn(shape) * 0.05).to(dtype)
        codes, state = bnb.functional.quantize_4bit(
            W, blocksize=block, compress_statistics=nested, quant_type=kind
        )
        tensors = {"weight": codes, "absmax": state.absmax}
        if nested:
            tensors |= {
                "nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code,
                "nested_offset": state.offset,
            }  # fmt: skip
        weight = KINDS[kind](
            tensors, shape, dtype, block, state.state2.blocksize if nested else None
        )
        assert torch.equal(weight.dense(), bnb.functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_it_is_quantized_to_the_bit(kind, dtype, block):
    for shape in SHAPES:
        W = (torch.randn(shape) * 0.05).to(dtype)
        codes, state = bnb.functional.quantize_4bit(W, blocksize=block, quant_type=kind)
        found = KINDS[kind].of(W, block, nested=False).tensors()
        assert torch.equal(found["weight"].flatten(), codes.flatten())
        assert torch.equal(found["absmax"], state.absmax)


def test_nested_scales_are_the_nearest_ones():
    """Its kernel for CPUs is not exact there: it may take a neighbour of the nearest code. Ours is never
    further away."""
    W = torch.randn(512, 1024) * 0.05
    _, state = bnb.functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    found = NF4.of(W).tensors()
    assert torch.equal(found["nested_absmax"], state.state2.absmax)
    assert torch.equal(found["nested_quant_map"], state.state2.code)
    assert torch.equal(found["nested_offset"], state.offset)
    apart = (found["absmax"].int() - state.absmax.int()).abs()
    assert apart.max() <= 1
    assert apart.count_nonzero() < 0.01 * apart.numel()
    exact = NF4.of(W, nested=False).tensors()["absmax"]
    scales = [
        state.state2.code[codes.int()] * state.state2.absmax.repeat_interleave(256) + state.offset
        for codes in (found["absmax"], state.absmax)
    ]
    ours, its = ((scale - exact).abs() for scale in scales)
    assert (ours <= its + 1e-7).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_layer_is_adapted_over_its_own_memory(kind, nested, storage):
    plain = layer(kind, nested=nested, quant_storage=storage)
    x = torch.randn(5, 64, requires_grad=True)
    expected = plain(x)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    made = LoRALinear.from_linear(copy.deepcopy(plain), r=4)
    own = LoRALinear.from_linear(plain, r=4)
    assert own.operand().tensors()["weight"].data_ptr() == plain.weight.data_ptr()
    y = made(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-4)


def test_an_int8_layer_is_adapted_over_its_own_memory():
    plain = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu").train()
    before = operands.of_layer(plain)
    x = torch.randn(5, 64)
    expected = plain(x)
    for weight in (before, operands.of_layer(plain)):  # its first call moves them
        assert isinstance(weight, Int8)
        assert weight.tensors()["weight"].data_ptr() == plain.weight.data_ptr()
    made = LoRALinear.from_linear(plain, r=4)
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    low = made.bfloat16()
    assert low.operand().tensors()["SCB"].dtype is torch.float32
    state = plain.state
    rounded = state.CB.to(torch.bfloat16).mul_(state.SCB.unsqueeze(1).mul(1 / 127))
    assert torch.equal(low.base_weight(), rounded)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_may_have_another_dtype_than_it_computes_in(compute, dtype):
    plain = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=compute).to("cpu")
    x = torch.randn(5, 64).to(dtype)
    expected = plain(x)
    found = LoRALinear.from_linear(plain, r=4)(x)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
    plain = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False).to("cpu").train()
    expected = plain(x)
    found = LoRALinear.from_linear(plain, r=4)(x)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


class TestRefused:
    def test_a_forward_or_buffers_of_its_own(self):
        class Doubled(bnb.nn.Linear4bit):
            def forward(self, x):
                return 2 * super().forward(x)

        plain = Doubled(64, 48).to("cpu")
        with pytest.raises(TypeError, match="its forward is not that of bitsandbytes' Linear4bit"):
            LoRALinear.from_linear(plain, r=4)
        plain = layer()
        plain.register_buffer("mask", torch.ones(1))
        with pytest.raises(TypeError, match="it has mask, which a LoRALinear has no place for"):
            LoRALinear.from_linear(plain, r=4)

    def test_not_quantized_yet(self):
        for plain in (
            bnb.nn.Linear4bit(64, 48),
            bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False),
        ):
            with pytest.raises(TypeError, match="bitsandbytes has not quantized its weight yet"):
                LoRALinear.from_linear(plain, r=4)

    def test_repacked_for_inference(self):
        plain = layer(N=64, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            plain(torch.randn(2, 64).bfloat16())
        if not getattr(plain.weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("bitsandbytes repacks on processors with AVX-512's bfloat16 product")
        with pytest.raises(TypeError, match="bitsandbytes has repacked its weight for inference"):
            LoRALinear.from_linear(plain, r=4)

    def test_a_training_weight(self):
        plain = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=True)
        with pytest.raises(TypeError, match="its has_fp16_weights is True"):
            LoRALinear.from_linear(plain, r=4)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_scale_that_is_no_number(self, value):
        plain = layer(nested=False)
        plain.weight.quant_state.absmax[3] = value
        with pytest.raises(TypeError, match="a scale of its weight is NaN or infinite"):
            LoRALinear.from_linear(plain, r=4)

    @pytest.mark.parametrize("part", ["absmax", "code", "shape", "offset", "state2.absmax",
                                      "state2.code", "state2.blocksize"])  # fmt: skip
    def test_a_part_that_is_missing(self, part):
        plain = layer()
        *of, name = part.split(".")
        state = plain.weight.quant_state
        setattr(state.state2 if of else state, name, None)
        reason = operands.why_not_of_layer(plain)
        assert reason.startswith(f"its quant_state.{part} is None, expected ")
        assert operands.of_layer(plain) is None
        with pytest.raises(TypeError, match=re.escape(reason)):
            LoRALinear.from_linear(plain, r=4)

    def test_scales_that_are_missing_without_nesting(self):
        plain = layer(nested=False)
        plain.weight.quant_state.absmax = None
        reason = operands.why_not_of_layer(plain)
        assert reason == "its quant_state.absmax is None, expected a tensor"

    @pytest.mark.parametrize("called", [False, True])
    @pytest.mark.parametrize("part", ["CB", "SCB"])
    def test_a_part_of_int8_that_is_missing(self, part, called):
        """Before its first call, which moves them, and after."""
        plain = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu").train()
        if called:
            plain(torch.randn(2, 64))
        held = plain.state if plain.weight.CB is None else plain.weight
        setattr(held, part, None)
        # Codes that aren't with the weight are looked for where the first call puts them.
        lost = part == "CB" and held is plain.weight
        reason = operands.why_not_of_layer(plain)
        assert reason.startswith(
            "bitsandbytes has not quantized" if lost else f"its {part} is None, expected a tensor"
        )
        assert operands.of_layer(plain) is None

    @pytest.mark.parametrize("called", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda CB, SCB: (CB[:, 1:].contiguous(), SCB), "CB has shape [48, 63], expected [48, 64]"),
            (lambda CB, SCB: (CB[:-1], SCB[:-1]), "CB has shape [47, 64], expected [48, 64]"),
            (lambda CB, SCB: (CB, SCB[:1]), "SCB has shape [1], expected [48], a scale each row"),
            (lambda CB, SCB: (CB, SCB[0]), "SCB has shape [], expected [48], a scale each row"),
        ],
        ids=["columns", "rows", "one scale", "a number"],
    )  # fmt: skip
    def test_parts_of_int8_of_another_size(self, change, said, bias, called):
        plain = bnb.nn.Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False).to("cpu").train()
        if called:
            plain(torch.randn(2, 64))
        held = plain.state if plain.weight.CB is None else plain.weight
        held.CB, held.SCB = change(held.CB, held.SCB)
        assert operands.why_not_of_layer(plain) == f"its {said}"
        with pytest.raises(TypeError, match=re.escape(said)):
            LoRALinear.from_linear(plain, r=4)

    def test_a_part_without_values(self):
        plain = layer()
        plain.weight.quant_state.absmax = plain.weight.quant_state.absmax.to("meta")
        assert "quant_state.absmax is on the meta device" in operands.why_not_of_layer(plain)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("part", ["offset", "state2.absmax", "state2.code"])
    def test_a_nested_scale_that_is_no_number(self, part, value):
        plain = layer()
        state, name = plain.weight.quant_state, part.split(".")[-1]
        owner = state if name == part else state.state2
        broken = getattr(owner, name).clone()
        broken.view(-1)[0] = value
        setattr(owner, name, broken)
        reason = operands.why_not_of_layer(plain)
        assert reason == f"a scale of its weight is NaN or infinite (quant_state.{part})"

    def test_another_type_or_map(self):
        plain = layer()
        plain.weight.quant_state.quant_type = "nf5"
        with pytest.raises(TypeError, match="its quant_type is 'nf5', expected nf4 or fp4"):
            LoRALinear.from_linear(plain, r=4)
        plain = layer()
        plain.weight.quant_state.code = plain.weight.quant_state.code * 2
        with pytest.raises(TypeError, match="its quant_map is not that of nf4"):
            LoRALinear.from_linear(plain, r=4)

    def test_a_state_of_another_size(self):
        plain = layer()
        plain.weight.quant_state.absmax = plain.weight.quant_state.absmax[1:]
        with pytest.raises(TypeError, match=r"absmax is torch\.uint8 of 47 elements"):
            LoRALinear.from_linear(plain, r=4)
        plain = layer()
        plain.weight.quant_state.shape = torch.Size((64, 48))
        with pytest.raises(TypeError, match=r"its weight was quantized as \[64, 48\]"):
            LoRALinear.from_linear(plain, r=4)


def test_a_model_is_adapted():
    import lorafast

    model = nn.Sequential(layer(N=64), nn.ReLU(), layer(N=8))
    x = torch.randn(3, 64)
    expected = model(x)
    lorafast.adapt(model, r=4)
    assert all(isinstance(module, LoRALinear) for module in (model[0], model[2]))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    assert model[0].lora_B.grad is not None


def test_where_its_kernel_for_cpus_errs():
    """Rows of 96 in blocks of 64: ours are as its own plain PyTorch defines them. If this fails it is
    mended there: take the shape into ``SHAPES``."""
    W = torch.randn(8, 96)
    codes, state = bnb.functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    weight = NF4({"weight": codes, "absmax": state.absmax}, (8, 96), torch.float32, 64)
    its = bnb.functional.dequantize_4bit(codes, state)
    assert (weight.dense() - W).abs().mean() < 0.1 * W.abs().mean()
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert (its - W).abs().mean() > 0.2 * W.abs().mean()
