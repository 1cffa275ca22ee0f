"""The formats of quantized weights: their definition, what doesn't fit, and their native kernels."""

import re

import pytest
import torch
from helpers import covering
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafast import operands, reference
from lorafast.backends.cpu import native
from lorafast.core import codebooks
from lorafast.nn import LoRALinear, QuantizedLinear
from lorafast.operands import FP4, FP8, MXFP4, NF4, Int8
from lorafast.operands import four_bit as four_bit_module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FOUR_BIT = [NF4, FP4]


def four_bit(kind, N, K, block=64, nested=False, dtype=torch.float32):
    """Of random codes and scales."""
    blocks = -(-N * K // block)
    tensors = {"weight": torch.randint(0, 256, ((N * K + 1) // 2, 1), dtype=torch.uint8)}
    if nested:
        tensors |= {
            "absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            "nested_absmax": torch.rand(-(-blocks // 256)),
            "nested_quant_map": torch.tensor(codebooks.dynamic()),
            "nested_offset": torch.tensor(1.3),
        }
    else:
        tensors["absmax"] = torch.rand(blocks)
    return kind(tensors, (N, K), dtype, block, 256 if nested else None)


def eight_bit(N, K, dtype=torch.float32):
    """One of each kind of scales."""
    codes = torch.randint(0, 256, (N, K), dtype=torch.uint8)
    integers, floats = codes.view(torch.int8), codes.view(torch.float8_e4m3fn)
    by_block = torch.rand(-(-N // 128), -(-K // 128))
    return [
        Int8({"weight": integers, "SCB": torch.rand(N)}, dtype),
        Int8({"weight": integers, "scale": torch.rand(N, 1)}, dtype),
        FP8({"weight": floats, "scale": torch.rand(N)}, dtype),
        FP8({"weight": codes, "scale": torch.rand(())}, dtype),
        FP8({"weight": codes, "scale": by_block}, dtype, (128, 128)),
    ]


def mxfp4(N, K, dtype=torch.float32):
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    return MXFP4(codes, torch.randint(100, 140, (N, K // 32), dtype=torch.uint8), dtype)


def same(found, expected):
    """NaN where it is expected, else the same bits."""
    assert found.dtype is expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize(
    ("kind", "nested", "dtype", "block", "shape"),
    covering(
        list(FOUR_BIT),
        (False, True),
        DTYPES,
        (7, 32, 64, 4096),
        ((1, 1), (5, 3), (33, 101), (37, 100), (8, 96), (0, 4), (3, 0)),
    ),
)
def test_four_bits_are_as_defined(kind, nested, dtype, block, shape):
    """Odd sizes, rows that blocks straddle, a short last block."""
    weight = four_bit(kind, *shape, block, nested, dtype)
    t, numbers = weight.tensors(), torch.tensor(kind.numbers)
    scales = t["absmax"]
    if nested:
        scales = reference.scales_of(
            t["absmax"], t["nested_absmax"], t["nested_quant_map"], t["nested_offset"], 256
        )
    W = reference.dequantize_four_bit(t["weight"], scales, numbers, block, torch.Size(shape), dtype)
    same(weight.dense(), W)
    N = shape[0]
    same(weight.rows(N // 3, N - N // 4), W[N // 3 : N - N // 4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bits_are_as_defined(dtype):
    N, K = 130, 261
    scaled, by_row, floats, bytes_, by_block = eight_bit(N, K, dtype)
    for weight in (scaled, by_row):
        scale = weight.scale.reshape(-1, 1) * (1 / 127 if weight is scaled else 1)
        same(
            weight.dense(), reference.dequantize_eight_bit(weight.tensors()["weight"], scale, dtype)
        )
    codes = floats.tensors()["weight"]
    same(floats.dense(), reference.dequantize_eight_bit(codes, floats.scale[:, None], dtype))
    same(bytes_.dense(), reference.dequantize_eight_bit(codes, bytes_.scale, dtype))
    wide = by_block.scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    same(by_block.dense(), reference.dequantize_eight_bit(codes, wide, dtype))


def test_mxfp4_is_as_defined():
    """Every exponent, also the least, which isn't normal, and 255, which is NaN."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(16).view(256, 16)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None]
    found = MXFP4(codes, exponents, torch.float32).dense()
    for row in range(255):
        numbers = [codebooks.E2M1[half] for c in codes[row].tolist() for half in (c & 15, c >> 4)]
        expected = torch.tensor(numbers, dtype=torch.float64) * 2.0 ** (row - 127)
        assert torch.equal(found[row], expected.float()), row
    assert found[255].isnan().all()
    defined = reference.dequantize_mxfp4(
        codes, exponents, torch.tensor(codebooks.E2M1), torch.float32
    )
    same(found, defined)


@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [7, 64, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 101), (16, 64)])
def test_four_bits_are_made_as_defined(kind, dtype, block, shape):
    W = torch.randn(shape, dtype=dtype)
    W[: shape[0] // 2, ::3] = 0
    W[-1] = 0
    codes, scales = reference.quantize_four_bit(W, torch.tensor(kind.numbers), block)
    made = kind.of(W, block, nested=False).tensors()
    assert torch.equal(made["weight"].reshape(-1), codes)
    assert torch.equal(made["absmax"], scales)
    t = kind.of(W, block, nested_block=5).tensors()
    of_scales, nested, offset = reference.quantize_scales(
        scales, torch.tensor(codebooks.dynamic()), 5
    )
    assert torch.equal(t["absmax"], of_scales)
    assert torch.equal(t["nested_absmax"], nested)
    assert torch.equal(t["nested_offset"], offset)


@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 10])
@pytest.mark.parametrize("block", [1, 7, 64, 4096])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (33, 101), (64, 128)])
def test_chunks_change_no_bit(kind, chunk, block, shape, monkeypatch):
    W = torch.randn(shape)
    whole = kind.of(W, block, nested_block=5).tensors()
    monkeypatch.setattr(four_bit_module, "_CHUNK", chunk)
    found = kind.of(W, block, nested_block=5).tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


class Greatest(TorchDispatchMode):
    """Bytes of the greatest memory that a result of any operation has, but for some that were there."""

    def __init__(self, there):
        super().__init__()
        self.there, self.nbytes = there.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() != self.there:
                    self.nbytes = max(self.nbytes, storage.nbytes())
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_memory_is_of_a_chunk(dtype, nested, monkeypatch):
    """Nothing else is made that is larger than the codes."""
    monkeypatch.setattr(four_bit_module, "_CHUNK", 1 << 10)
    W = torch.randn(64, 1024).to(dtype)
    with Greatest(W) as greatest:
        made = NF4.of(W, nested=nested)
    assert greatest.nbytes == made.tensors()["weight"].nbytes


@pytest.mark.parametrize("kind", [Int8, FP8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bits_are_made_as_defined(kind, dtype):
    W = torch.randn(33, 101, dtype=dtype) * 100
    W[7] = 0
    codes, scale = reference.quantize_eight_bit(W, kind.code_dtype)
    made = kind.of(W).tensors()
    assert torch.equal(made["weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(made["scale"], scale)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_like_is_as_quantize(format, dtype):
    """To the bit: merging and quantizing again is quantizing the merged weight."""
    W = torch.randn(130, 261).to(dtype)
    W[7] = 0
    made = operands.quantize(torch.randn(130, 261).to(dtype), format)
    found, expected = made.like(W), operands.quantize(W, format)
    assert found.tensors().keys() == expected.tensors().keys() == made.tensors().keys()
    assert all(torch.equal(found.tensors()[n], t) for n, t in expected.tensors().items())
    assert (found.dtype, found.parameters) == (expected.dtype, expected.parameters)


def test_like_keeps_the_kind_of_scales():
    W = torch.randn(6, 8)
    for scale in (torch.ones(6), torch.ones(6, 1)):
        codes = torch.zeros(6, 8, dtype=torch.int8)
        for made in (
            Int8({"weight": codes, "scale": scale}, torch.float32),
            FP8({"weight": codes.view(torch.uint8), "weight_scale_inv": scale}, torch.float32),
        ):
            found = made.like(W).tensors()
            assert found.keys() == made.tensors().keys()
            expected = made.of(W).tensors()
            assert torch.equal(found["weight"], expected["weight"])
            (name,) = found.keys() - {"weight"}
            assert torch.equal(found[name], expected["scale"].view_as(scale))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_the_nearest_code_is_found(kind, nested):
    """No other code is nearer; zeros, a block of them too, stay zeros."""
    W = torch.randn(37, 100)
    W[3:6] = 0
    weight = kind.of(W, 64, nested=False)
    numbers = torch.tensor(kind.numbers)
    scales = weight.tensors()["absmax"].repeat_interleave(64)[: W.numel()].view_as(W)
    every = numbers[:, None, None] * scales
    error = (weight.dense() - W).abs()
    assert (error <= (every - W).abs().amin(0) * (1 + 1e-6) + 1e-12).all()
    assert not weight.dense()[3:6].any()
    if nested:
        twice = kind.of(W, 64)
        assert twice.nested_block == 256
        torch.testing.assert_close(twice.dense(), weight.dense(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", [NF4, FP4, Int8, FP8])
def test_a_weight_with_any_strides_is_quantized(kind):
    W = torch.randn(6, 8)
    found = kind.of(W.t().contiguous().t())
    assert all(tensor.is_contiguous() for tensor in found.tensors().values())
    assert torch.equal(found.dense(), kind.of(W).dense())


@pytest.mark.parametrize("kind", [Int8, FP8])
def test_a_row_of_zeros_is_kept(kind):
    W = torch.randn(5, 7)
    W[2] = 0
    found = kind.of(W).dense()
    assert not found[2].any()
    torch.testing.assert_close(found, W, rtol=0.07, atol=0.02)


NF4_OF = {"weight": torch.zeros(8, dtype=torch.uint8), "absmax": torch.ones(1)}
REFUSED = [
    (NF4, NF4_OF | {"weight": torch.zeros(9, dtype=torch.uint8)}, "4x4,float32,64",
     "weight has 9 bytes of codes, expected 8 for 4 x 4"),
    (NF4, NF4_OF | {"absmax": torch.ones(2)}, "4x4,float32,64",
     "absmax is torch.float32 of 2 elements, expected torch.float32 of 1"),
    (NF4, NF4_OF | {"absmax": torch.ones(1).bfloat16()}, "4x4,float32,64",
     "absmax is torch.bfloat16 of 1 elements, expected torch.float32 of 1"),
    (NF4, NF4_OF, "4x4,float32,0", "block is 0, expected 1 to 2147483647"),
    (NF4, NF4_OF, "4x4,int8,64", "weight is of torch.int8, expected a float dtype"),
    (NF4, NF4_OF, "4by4", "weight is said to be '4by4', expected sizes, dtype and block"),
    (Int8, {"weight": torch.zeros(4, 4), "scale": torch.ones(4)}, "float32",
     "weight is torch.float32 [4, 4], expected torch.int8 [N, K]"),
    (Int8, {"weight": torch.zeros(4, 4, dtype=torch.int8), "scale": torch.ones(3)}, "float32",
     "scale has shape [3], expected [], [4] or [4, 1]: the weight is 4 x 4"),
    (FP8, {"weight": torch.zeros(4, 4, dtype=torch.uint8), "scale": torch.ones(4)}, "float32,2x2",
     "scale has shape [4], expected [2, 2], of blocks of 2 x 2: the weight is 4 x 4"),
    (FP8, {"weight": torch.zeros(4, 4, dtype=torch.uint8), "scale": torch.ones(4)}, "float32,2",
     "weight is said to be 'float32,2', expected a dtype"),
    (MXFP4, {"blocks": torch.zeros(4, 8, dtype=torch.uint8),
             "scales": torch.zeros(4, 1, dtype=torch.uint8)}, "float32",
     "blocks are torch.uint8 [4, 8], expected torch.uint8 [4, 16]: the scales are [4, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tensors", "parameters", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused(kind, tensors, parameters, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        kind.build(tensors, parameters)


BYTES = torch.zeros(4, 4, dtype=torch.uint8)
LACKING = [
    (lambda: NF4({"weight": BYTES[:2]}, (4, 4), torch.float32, 64),
     "absmax is missing, expected weight, absmax"),
    (lambda: NF4({"absmax": torch.ones(1)}, (4, 4), torch.float32, 64),
     "weight is missing, expected weight, absmax"),
    (lambda: NF4(NF4_OF | {"absmax": BYTES[:1, :1]}, (4, 4), torch.float32, 64, 256),
     "nested_absmax is missing, expected weight, absmax, nested_absmax"),
    (lambda: NF4(NF4_OF | {"absmax": None}, (4, 4), torch.float32, 64),
     "absmax is None, expected a tensor"),
    (lambda: NF4(NF4_OF, None, torch.float32, 64),
     "weight is said to have shape None, expected two sizes (N, K)"),
    (lambda: NF4(NF4_OF, (4.0, 4.0), torch.float32, 64),
     "weight is said to have shape (4.0, 4.0), expected two sizes (N, K)"),
    (lambda: Int8({"weight": BYTES}, torch.float32), "scale is missing, expected weight, scale"),
    (lambda: Int8({"SCB": torch.ones(4)}, torch.float32), "weight is missing, expected weight, SCB"),
    (lambda: FP8({"weight": BYTES, "scale": 1.0}, torch.float32),
     "scale is a float, expected a tensor"),
    (lambda: MXFP4(BYTES, None, torch.float32), "scales is None, expected a tensor"),
    (lambda: MXFP4.build({"blocks": BYTES}, "float32"), "scales is missing, expected blocks, scales"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), LACKING, ids=[sentence for _, sentence in LACKING])
def test_what_is_missing_is_named(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


NO_MATRICES = {
    "None": (lambda: None, "weight is None, expected a float matrix [N, K]"),
    "list": (lambda: [[1.0]], "weight is a list, expected a float matrix [N, K]"),
    "layer": (lambda: torch.nn.Linear(2, 2), "weight is a Linear, expected a float matrix [N, K]"),
    "vector": (lambda: torch.ones(4), "weight is torch.float32 [4], expected a float matrix [N, K]"),
    "integers": (lambda: BYTES, "weight is torch.uint8 [4, 4], expected a float matrix [N, K]"),
    "sparse": (
        lambda: torch.ones(4, 4).to_sparse(),
        "weight is a tensor of torch.sparse_coo, expected a float matrix [N, K]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("draw", "sentence"), NO_MATRICES.values(), ids=NO_MATRICES.keys())
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "fp8", "w8a8"])
def test_what_is_no_matrix_is_not_quantized(format, draw, sentence):
    kind = operands.kind_of(format)
    for quantize in (
        kind.of,
        kind.of(torch.ones(4, 4)).like,
        lambda weight: operands.quantize(weight, format),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            quantize(draw())


@pytest.mark.parametrize("block", [8, (8,), (8, 8, 8), "88", (8.0, 8.0), (True, 8)], ids=str)
def test_a_block_of_8_bit_codes_has_two_sizes(block):
    tensors = {"weight": torch.zeros(8, 8, dtype=torch.uint8), "scale": torch.ones(1, 1)}
    with pytest.raises(ValueError, match=re.escape(f"block is {block!r}, expected two ints")):
        FP8(tensors, torch.float32, block)


@pytest.mark.parametrize("format", [None, 4, ["nf4"]], ids=str)
def test_a_format_is_a_name(format):
    sentence = f"format is {format!r}, expected one of nf4, fp4, int8, fp8"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        operands.quantize(torch.ones(4, 4), format)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [LoRALinear, QuantizedLinear])
@pytest.mark.parametrize(("format", "name"), [
    ("nf4", "nested_absmax"), ("nf4", "nested_offset"), ("int8", "SCB"), ("fp8", "scale"),
])  # fmt: skip
def test_no_layer_has_scales_that_are_no_numbers(format, name, kind, value):
    weight = operands.quantize(torch.randn(8, 16), format)
    tensors = {n: t.clone() for n, t in weight.tensors().items()}
    tensors[name].view(-1)[0] = value
    broken = type(weight).build(tensors, weight.parameters)
    options = {"r": 2} if kind is LoRALinear else {}
    with pytest.raises(
        TypeError, match=f"its {name} is NaN or infinite somewhere, expected finite"
    ):
        kind.from_operand(broken, **options)


def test_a_layer_whose_weight_is_no_number_is_not_quantized():
    linear = torch.nn.Linear(8, 4)
    with torch.no_grad():
        linear.weight[1, 2] = float("nan")
    for format in ("nf4", "int8", "fp8"):
        with pytest.raises(TypeError, match="is NaN or infinite somewhere, expected finite scales"):
            QuantizedLinear.from_linear(linear, format)


STRIDED = [
    (NF4, {"weight": torch.zeros(16, dtype=torch.uint8)[::2], "absmax": torch.ones(1)},
     "4x4,float32,64"),
    (NF4, {"weight": torch.zeros(4096, dtype=torch.uint8), "absmax": torch.ones(1).expand(2)},
     "2x4096,float32,4096"),
    (Int8, {"weight": torch.zeros(4, 3, dtype=torch.int8).t(), "scale": torch.ones(3)}, "float32"),
    (Int8, {"weight": torch.zeros(4, 3, dtype=torch.int8), "scale": torch.ones(1).expand(4)},
     "float32"),
    (MXFP4, {"blocks": torch.zeros(4, 16, dtype=torch.uint8),
             "scales": torch.zeros(1, 1, dtype=torch.uint8).expand(4, 1)}, "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tensors", "parameters"), STRIDED)
def test_what_is_not_contiguous_is_refused(kind, tensors, parameters):
    with pytest.raises(ValueError, match=r"ha(s|ve) strides \(.*\), expected contiguous"):
        kind.build(tensors, parameters)


def test_sizes_that_overflow_are_refused():
    tensors = {"weight": torch.empty(0, dtype=torch.uint8), "absmax": torch.empty(0)}
    with pytest.raises(
        ValueError, match="weight has 0 bytes of codes, expected 9223372036854775808"
    ):
        NF4(tensors, (2**32, 2**32), torch.float32, 64)
    for block in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"block is {block}, expected 1 to 2147483647"):
            NF4.of(torch.ones(2, 2), block)


NOT_OPTIONS = [
    ({"block": True}, "block is True, expected an int from 1 to 2147483647"),
    ({"block": "64"}, "block is '64', expected an int from"),
    ({"block": 64.0}, "block is 64.0, expected an int from"),
    ({"block": None}, "block is None, expected an int from"),
    ({"block": 10**5000}, "block is of 16610 bits, expected 1 to 2147483647"),
    ({"nested_block": True}, "nested_block is True, expected an int from"),
    ({"nested_block": "256"}, "nested_block is '256', expected an int from"),
    ({"nested_block": 256.0}, "nested_block is 256.0, expected an int from"),
    ({"nested_block": 0}, "nested_block is 0, expected 1 to 2147483647"),
    ({"nested": 1}, "nested is 1, expected True or False"),
    ({"nested": "no"}, "nested is 'no', expected True or False"),
    ({"nested": None}, "nested is None, expected True or False"),
]


@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize(("options", "sentence"), NOT_OPTIONS)
def test_options_are_of_their_types(kind, options, sentence):
    """Before anything is quantized: a weight without memory has no values."""
    for W in (torch.ones(4, 4), torch.empty(4, 4, device="meta")):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            operands.quantize(W, kind.format, **options)


@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("value", [True, "64", 64.0])
def test_blocks_of_an_operand_are_integers(kind, value):
    t = four_bit(kind, 4, 4, nested=True).tensors()
    with pytest.raises(ValueError, match=re.escape(f"block is {value!r}, expected an int from")):
        kind(t, (4, 4), torch.float32, value, 256)
    with pytest.raises(ValueError, match=re.escape(f"nested_block is {value!r}, expected an int")):
        kind(t, (4, 4), torch.float32, 64, value)


@pytest.mark.parametrize("kind", [NF4, FP4, Int8, FP8])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_layer_is_compiled_whole(kind, use_dora):
    torch._dynamo.reset()  # each layer is one more graph of the same forward
    layer = LoRALinear.from_operand(kind.of(torch.randn(8, 16)), 2, use_dora=use_dora)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_is_multiplied_in_the_dtype_of_x(dtype):
    layer = LoRALinear.from_operand(NF4.of(torch.randn(8, 16)), 2, bias=torch.randn(8))
    x = torch.randn(3, 16)
    found = layer(x.to(dtype))
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), layer(x), rtol=0.03, atol=0.05)


def test_a_cast_keeps_what_is_stored():
    """Its tensors, their order, and which parameters are one."""
    weight = NF4.of(torch.randn(8, 16))
    codes = torch.nn.Parameter(weight.tensors()["weight"], requires_grad=False)
    held = NF4({**weight.tensors(), "weight": codes}, (8, 16), torch.float32, 64, 256)
    one, two = (LoRALinear.from_operand(held, 2) for _ in range(2))
    model = torch.nn.Sequential(one, two)
    names = [name for name, _ in one.named_parameters()]
    before = weight.dense()
    model.bfloat16().float()
    assert [name for name, _ in one.named_parameters()] == names
    assert one.weight is two.weight
    assert torch.equal(one.base_weight(), before)


OTHERS = [
    ({"weight": torch.ones(4, 8)},
     r"stores weight as torch\.int8, and the checkpoint as torch\.float32"),
    ({"weight": torch.ones(16, 1, dtype=torch.uint8), "weight.absmax": torch.ones(1)},
     "and the checkpoint is of a layer of bitsandbytes"),
]  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("given", "said"), OTHERS)
def test_a_checkpoint_of_another_kind_changes_nothing(strict, given, said):
    layer = LoRALinear.from_operand(Int8.of(torch.randn(4, 8)), 2)
    before = layer.base_weight()
    with pytest.raises(RuntimeError, match=said):
        layer.load_state_dict(given, strict=strict)
    assert torch.equal(layer.base_weight(), before)


@pytest.mark.parametrize(
    "missing", ["absmax", "nested_absmax", "nested_quant_map", "nested_offset"]
)
def test_half_a_state_is_refused(missing):
    weight = four_bit(NF4, 4, 4, nested=True)
    tensors = dict(weight.tensors())
    description = operands.describe(weight).replace(f",{missing}", "")
    del tensors[missing]
    with pytest.raises(ValueError, match=f"{missing} is missing, expected weight, absmax"):
        operands.build(list(tensors.values()), description)


@pytest.mark.skipif(native.why_not_loaded() is not None, reason=str(native.why_not_loaded()))
class TestNative:
    """Any part of W, to the bit as ``rows`` gives it; tests/native has the other instruction sets."""

    @given(data=st.data())
    def test_a_part(self, data):
        from lorafast.backends.cpu import dequantize

        dtype = data.draw(st.sampled_from(DTYPES))
        cast = data.draw(st.sampled_from(DTYPES))
        N, K = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
        kind = data.draw(st.sampled_from(["nf4", "fp4", "eight", "mxfp4"]))
        if kind == "eight":
            weight = data.draw(st.sampled_from(range(5)).map(eight_bit(N, K, dtype).__getitem__))
        elif kind == "mxfp4":
            K = -(-K // 32) * 32
            weight = mxfp4(N, K, dtype)
        else:
            block = data.draw(st.sampled_from([1, 7, 32, 64, 256]))
            of = NF4 if kind == "nf4" else FP4
            weight = four_bit(of, N, K, block, data.draw(st.booleans()), dtype)
        weight = weight.to(cast)
        top, left = data.draw(st.integers(0, N - 1)), data.draw(st.integers(0, K - 1))
        bottom, right = data.draw(st.integers(top, N)), data.draw(st.integers(left, K))
        out = torch.full((N * K + 1,), float("nan"), dtype=cast)
        found = dequantize.part(weight, (top, bottom), (left, right), out)
        same(found, weight.rows(top, bottom)[:, left:right])
        assert out[(bottom - top) * (right - left) :].isnan().all()

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("kind", [NF4, FP8, Int8])
    def test_a_product_in_parts_is_that_of_the_whole(self, monkeypatch, kind, transposed):
        """Parts of 32 rows or columns, the last one of fewer; rounded once."""
        from lorafast.backends.cpu import dequantize

        monkeypatch.setattr(dequantize, "_PART", 1)
        monkeypatch.setattr(dequantize, "_FEW", {torch.float32: (-1, -1)})
        W = torch.randn(70, 101).double()
        weight, x = kind.of(W.float()), torch.randn(3, 70 if transposed else 101)
        bias = None if transposed else torch.randn(70)
        dense = weight.dense().double()
        if transposed:
            found, expected = dequantize.linear_transposed(x, weight), x.double() @ dense
        else:
            found = dequantize.linear(x, weight, bias)
            expected = x.double() @ dense.t() + bias.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)

    def test_memory_serves_within_and_without_inference_mode(self, monkeypatch):
        from lorafast.backends import workspace
        from lorafast.backends.cpu import dequantize

        monkeypatch.setattr(dequantize, "_FEW", {torch.float32: (-1, -1)})
        workspace.release()
        weight, x = NF4.of(torch.randn(4, 8)), torch.randn(2, 8)
        with torch.inference_mode():
            first = dequantize.linear(x, weight, None)
        assert torch.equal(dequantize.linear(x, weight, None), first)
