"""Adversarial blocks, bit for bit as bitsandbytes' own definition has them.

That is its plain PyTorch, which serves every device that it has no kernels for. Its kernels for CPUs
differ from it: ``test_bitsandbytes`` says where.
"""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from helpers import covering

from lorafast import operands
from lorafast.backends.cpu import native
from lorafast.operands import FP4, NF4, Int8

logging.disable(logging.WARNING)  # it says what it lacks on this machine
bnb = pytest.importorskip("bitsandbytes")
logging.disable(logging.NOTSET)

KINDS = (NF4, FP4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Rows that blocks straddle, short last blocks, odd widths.
SHAPES = ((37, 100), (33, 101), (5, 96), (16, 4160))
NESTED_BLOCK = 256


@pytest.fixture(scope="module")
def defined():
    """Its operations in plain PyTorch, by name."""
    found = {}

    def collecting(name, _):
        return lambda function: found.setdefault(name.removeprefix("bitsandbytes::"), function)

    path = Path(bnb.__file__).parent / "backends" / "default" / "ops.py"
    spec = importlib.util.spec_from_file_location("bitsandbytes.backends.default.again", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bnb._ops, "register_kernel", collecting)
        spec.loader.exec_module(module)
    with torch.compiler.set_stance("force_eager"):  # it compiles its loops for each shape
        yield found


SCALES = {
    "random": torch.rand(61) * 0.1,
    "zeros": torch.tensor([0.0, -0.0]),
    "denormal": torch.tensor([1e-45, 1e-40, 1e-38, 1.2e-38]),
    "huge": torch.tensor([3e38, 3.4028235e38, 65504.0, 7e4]),
    "negative": torch.tensor([-1.0, 6e-8, -(2.0**-14)]),
}


def repeated(values, count):
    return values.repeat(-(-count // values.numel()))[:count].contiguous()


def same(found, expected, kind):
    """The same bits; of FP4 the code 8 is −0, as on a GPU, where the table for CPUs has 0."""
    assert found.dtype is expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.nan_to_num(0.0), expected.nan_to_num(0.0)
    assert torch.equal(found, expected)
    kept = found != 0 if kind is FP4 else torch.ones_like(found, dtype=torch.bool)
    assert torch.equal(found.signbit()[kept], expected.signbit()[kept])


def made_dense(weight):
    """By the format, and by the native kernels, where there are any."""
    yield weight.dense()
    if native.why_not_loaded() is None:
        from lorafast.backends.cpu import dequantize

        N, K = weight.shape
        out = torch.full((N * K,), float("nan"), dtype=weight.dtype)
        yield dequantize.part(weight, (0, N), (0, K), out)


@pytest.mark.parametrize(
    ("kind", "block", "dtype", "storage", "shape", "scales"),
    covering(
        KINDS,
        BLOCKS,
        DTYPES,
        (torch.uint8, torch.bfloat16, torch.float16, torch.float32),
        SHAPES,
        list(SCALES),
    ),
    ids=str,
)
def test_every_code_is_made_dense_to_the_bit(defined, kind, block, dtype, storage, shape, scales):
    """All 256 bytes, in each block in another order."""
    count = shape[0] * shape[1]
    codes = torch.arange((count + 1) // 2).mul(37).to(torch.uint8)
    if codes.numel() % storage.itemsize:
        shape, count = (64, 256), 64 * 256
        codes = torch.arange(count // 2).mul(37).to(torch.uint8)
    absmax = repeated(SCALES[scales], -(-count // block))
    expected = defined["dequantize_4bit"](codes, absmax, block, kind.format, shape, dtype)
    weight = kind({"weight": codes.view(storage), "absmax": absmax}, shape, dtype, block)
    for W in made_dense(weight):
        same(W, expected, kind)


@pytest.mark.parametrize(
    ("kind", "block", "dtype", "shape", "scales"),
    covering(KINDS, BLOCKS, DTYPES, SHAPES, list(SCALES)),
    ids=str,
)
def test_nested_scales_of_every_code(defined, kind, block, dtype, shape, scales):
    count = shape[0] * shape[1]
    codes = torch.arange((count + 1) // 2).mul(37).to(torch.uint8)
    blocks = -(-count // block)
    nested = repeated(SCALES[scales], -(-blocks // NESTED_BLOCK))
    of_scales, offset = torch.arange(blocks).mul(59).to(torch.uint8), torch.tensor(0.37)
    numbers = bnb.functional.create_dynamic_map()
    absmax = offset + defined["dequantize_blockwise"](
        of_scales, nested, numbers, NESTED_BLOCK, torch.float32
    )
    expected = defined["dequantize_4bit"](codes, absmax, block, kind.format, shape, dtype)
    tensors = {
        "weight": codes, "absmax": of_scales, "nested_absmax": nested, "nested_quant_map": numbers,
        "nested_offset": offset,
    }  # fmt: skip
    for W in made_dense(kind(tensors, shape, dtype, block, NESTED_BLOCK)):
        same(W, expected, kind)


def test_only_the_sign_of_a_zero_of_fp4_is_not_its_own(defined):
    """As its kernels for GPUs multiply by a sign. If this fails it is mended there: compare all bits."""
    codes, absmax = torch.arange(256, dtype=torch.uint8), torch.ones(8)
    expected = defined["dequantize_4bit"](codes, absmax, 64, "fp4", (8, 64), torch.float32)
    W = FP4({"weight": codes, "absmax": absmax}, (8, 64), torch.float32, 64).dense()
    assert torch.equal(W, expected)
    of_code_8 = torch.stack((codes >> 4, codes & 15), dim=1).view(8, 64) == 8
    assert torch.equal(W.signbit() != expected.signbit(), of_code_8)


def _mixed(W):
    W.view(-1)[::7], W.view(-1)[5], W.view(-1)[-1] = 0, 3e4, 1e-7
    return W


def _middles(W):
    """Between two numbers, of which the lesser is taken."""
    numbers = torch.tensor(NF4.numbers)
    middles = repeated((numbers[1:] + numbers[:-1]) / 2, W.numel()).view_as(W).clone()
    middles.view(-1)[::16] = 1.0
    return middles.to(W.dtype)


WEIGHTS = {
    "random": lambda W: W * 0.05,
    "zeros": torch.zeros_like,
    "negative zeros": lambda W: -torch.zeros_like(W),
    "denormal": lambda W: W * (torch.finfo(W.dtype).tiny / 2),
    "the least": lambda W: torch.full_like(W, torch.finfo(W.dtype).tiny * torch.finfo(W.dtype).eps),
    "huge": lambda W: W.clamp(-1, 1) * torch.finfo(W.dtype).max,
    "mixed": _mixed,
    "powers of two": lambda W: torch.exp2((8 * W).round().clamp(-14, 14)) * W.sign(),
    "in the middle": _middles,
}


@pytest.mark.parametrize(
    ("kind", "block", "dtype", "shape", "weight"),
    covering(KINDS, BLOCKS, DTYPES, SHAPES, list(WEIGHTS)),
    ids=str,
)
def test_it_is_quantized_to_the_bit(defined, kind, block, dtype, shape, weight):
    """Codes, scales and nested scales."""
    W = WEIGHTS[weight](torch.randn(shape).to(dtype))
    codes, absmax = defined["quantize_4bit"](W, block, kind.format, torch.uint8)
    found = kind.of(W, block, nested=False).tensors()
    assert torch.equal(found["weight"].view(-1), codes.view(-1))
    assert torch.equal(found["absmax"], absmax)
    numbers, offset = bnb.functional.create_dynamic_map(), absmax.mean()
    of_scales, nested = defined["quantize_blockwise"](absmax - offset, numbers, NESTED_BLOCK)
    found = kind.of(W, block).tensors()
    assert torch.equal(found["weight"].view(-1), codes.view(-1))
    assert torch.equal(found["absmax"], of_scales)
    assert torch.equal(found["nested_absmax"], nested)
    assert torch.equal(found["nested_quant_map"], numbers)
    assert torch.equal(found["nested_offset"], offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [w for w in WEIGHTS if w not in ("denormal", "the least")])
def test_int8_is_quantized_to_the_bit(defined, dtype, weight):
    """But where 127 over the greatest of a row is no float32, of which it makes any integer."""
    W = WEIGHTS[weight](torch.randn(37, 100).to(dtype))
    codes, scales, _ = defined["int8_vectorwise_quant"](W)
    found = operands.quantize(W, "int8").tensors()
    assert torch.equal(found["SCB"], scales)
    assert torch.equal(found["weight"], codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
def test_every_code_of_int8(dtype, scales):
    """W as it trains by: the product in float32, rounded once to the dtype of x."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(12, 1).view(torch.int8)
    SCB = repeated(SCALES[scales], 12)
    weight = Int8({"weight": codes, "SCB": SCB}, torch.float32)
    expected = codes.float().mul_(SCB.unsqueeze(1).mul(1.0 / 127.0))
    for W in made_dense(weight):
        same(W, expected, Int8)
    for W in made_dense(weight.to(dtype)):
        same(W, expected.to(dtype), Int8)
