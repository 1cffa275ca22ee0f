"""csrc/cuda/dequantize.cu, executed: bit for bit what the operands' ``rows`` are."""

import pytest
import torch
from codes_cases import (
    BF16,
    F16,
    F32,
    FORMATS,
    drawn,
    eight_bit,
    four_bit,
    mxfp4,
    quantized,
)
from on_machine import Fault, launched, needs_nvcc, planted
from ptx.plant import EVERY, change

from lorafast.backends.cuda.dequantize import dequantize
from lorafast.operands import FP4, FP8, NF4, Int8

pytestmark = needs_nvcc

KERNEL = "dequantize_kernel"
INTEGERS = {2: torch.int16, 4: torch.int32}


def made(weight, dtype=None, arch=80, **options):
    with launched(arch, **options) as run:
        W = torch.empty(weight.shape, dtype=dtype or weight.dtype)
        dequantize(weight, W)
    assert len(run.launches) == (W.numel() > 0)
    return W, run


def same_bits(W, expected):
    """NaN is NaN, whatever else it says."""
    assert W.dtype is expected.dtype
    assert torch.equal(W.isnan(), expected.isnan())
    bits = INTEGERS[W.dtype.itemsize]
    found, wanted = (t.nan_to_num(0.0, torch.inf, -torch.inf).view(bits) for t in (W, expected))
    assert torch.equal(found, wanted)


def check(weight, dtype=None, arch=80, **options):
    W, run = made(weight, dtype, arch, **options)
    of = weight if dtype is None else weight.to(dtype)
    same_bits(W, of.rows(0, weight.shape[0]))
    return run


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, dtype):
    """More than a CTA, and an end that is no whole unit's but for MXFP4."""
    check(drawn(name, 45, 288 if name == "mxfp4" else 291, dtype), arch=80)
    check(drawn(name, 45, 288, dtype), arch=90, seed=1)


@pytest.mark.parametrize(
    "arch", [75, 90, *(pytest.param(n, marks=pytest.mark.slow) for n in (86, 89, 100, 120))]
)
@pytest.mark.parametrize("name", ["nf4", "int8", "fp8-blocks", "mxfp4"])
def test_every_architecture(name, arch):
    for dtype in (BF16, F32):
        check(drawn(name, 33, 320, dtype), arch=arch)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 32, 64, 96, 100, 4096])
@pytest.mark.parametrize("nested_block", [None, 1, 3, 256])
def test_blocks_that_straddle_rows(block, nested_block):
    for kind in (NF4, FP4):
        check(four_bit(kind, 7, 77, block=block, nested_block=nested_block))


@pytest.mark.parametrize("scales", ["one", "rows", (1, 1), (3, 8), (3, 5), (128, 128), (2, 1000)])
@pytest.mark.parametrize("kind", [Int8, FP8])
def test_scales_of_eight_bits(kind, scales):
    for K in (8, 64, 77):
        check(eight_bit(kind, 9, K, scales=scales))


@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 2), (3, 1), (0, 64), (5, 0), (1, 16_389)])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "mxfp4"])
def test_sizes(name, N, K):
    check(drawn(name, N, K))


@pytest.mark.parametrize("stored", [BF16, F16, F32, torch.float64])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_it_is_rounded_to_what_it_was_stored_for_first(stored, dtype):
    for weight in (four_bit(NF4, 8, 64, stored), eight_bit(Int8, 8, 64, stored)):
        check(weight, dtype)


@pytest.mark.parametrize("kind", [NF4, FP4, Int8, FP8])
def test_quantized_matrices(kind):
    check(quantized(kind, 24, 128))


class TestNumbers:
    def test_every_exponent_of_mxfp4(self):
        weight = mxfp4(256, 32, F32)
        weight.scales[:, 0] = torch.arange(256)
        for dtype in (F32, BF16):
            check(weight, dtype)

    def test_every_code_of_eight_bits(self):
        for kind in (Int8, FP8):
            weight = eight_bit(kind, 2, 256, F32, "one")
            weight.tensors()["weight"].view(torch.uint8)[:] = torch.arange(256)
            check(weight)
            weight.scale.fill_(2.0**-140)  # products that are not normal
            check(weight)

    @pytest.mark.parametrize("scale", [float("inf"), float("nan"), 0.0, -0.0, 3e38, 1e-45])
    def test_scales_without_size(self, scale):
        weight = four_bit(NF4, 4, 64, F32, nested_block=None)
        weight.tensors()["absmax"][1] = scale
        for dtype in (F32, F16, BF16):
            check(weight, dtype)


class TestMemory:
    @pytest.mark.parametrize("offset", [1, 2, 3, 4])
    def test_codes_at_any_address(self, offset):
        for weight in (four_bit(NF4, 12, 64), eight_bit(Int8, 12, 64)):
            tensors = dict(weight.tensors())
            codes = tensors["weight"].view(torch.uint8).flatten()
            moved = torch.empty(codes.numel() + offset, dtype=torch.uint8)[offset:].copy_(codes)
            tensors["weight"] = moved.view(weight.tensors()["weight"].shape)
            check(type(weight).build(tensors, weight.parameters))

    def test_any_quant_storage(self):
        weight = four_bit(NF4, 12, 64)
        tensors = dict(weight.tensors())
        tensors["weight"] = tensors["weight"].view(BF16)[:, None]
        check(NF4.build(tensors, weight.parameters))


def test_what_it_moves():
    """Whole sectors: codes and scales are read once, W is written 16 bytes at a time."""
    weight = four_bit(NF4, 64, 512)
    _, run = made(weight)
    (ran,) = run.ran()
    stores = [c for c in ran.counts if c.opcode.startswith("st.global") and c.bytes]
    assert {c.opcode for c in stores} == {"st.global.v4.u32"}
    assert sum(c.bytes for c in stores) == 64 * 512 * 2 == 32 * sum(c.sectors for c in stores)
    codes = [c for c in ran.counts if c.opcode == "ld.global.nc.u32"]
    assert sum(c.bytes for c in codes) == 64 * 512 // 2 == 32 * sum(c.sectors for c in codes)
    assert ran.steps < 64 * 512 / 32 * 18  # instructions of a lane for an element


def test_the_table_has_no_bank_conflicts():
    for weight in (four_bit(NF4, 64, 512), mxfp4(64, 512)):
        _, run = made(weight)
        (ran,) = run.ran()
        loads = [c for c in ran.counts if c.opcode.startswith("ld.shared")]
        assert sum(c.wavefronts for c in loads) == sum(c.issued for c in loads) == 64 * 512 // 32


class TestRefused:
    def call(self, weight, change):
        from lorafast.backends.cuda.dequantize import of_eight_bit, of_four_bit

        four = of_four_bit(weight)
        arguments = list(four or of_eight_bit(weight))
        for i, value in change.items():
            arguments[i] = value
        W = torch.empty(weight.shape, dtype=weight.dtype)
        name = "dequantize_four_bit" if four else "dequantize_eight_bit"
        getattr(torch.ops.lorafast_cuda, name)(*arguments, W)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({0: torch.zeros(7, dtype=torch.uint8)}, "codes has 7 bytes"),
            ({1: torch.zeros(7)}, "scales has 7 elements of dtype Float, expected 8"),
            ({1: torch.zeros(7, dtype=torch.uint8)}, "scales has 7 bytes"),
            ({3: None}, "of numbers_of_scales, of_scales and offset one is None beside another"),
            ({5: torch.zeros(15)}, "numbers has 15 elements"),
            ({6: 0}, "block is 0, expected 1 to 2147483647"),
            ({7: 0}, "nested_block is 0, expected 1 to"),
            ({9: 3}, "stored is 3, expected 0 to 2"),
        ],
        ids=str,
    )
    def test_four_bit(self, change, sentence):
        nested = 1 not in change or change[1].dtype is torch.uint8
        weight = four_bit(NF4, 8, 64, nested_block=256 if nested else None)
        with launched(80), pytest.raises(RuntimeError, match=sentence):
            self.call(weight, change)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({0: torch.zeros(8, 63, dtype=torch.int8)}, "codes has 504 bytes"),
            ({1: torch.zeros(7)}, "scale has 7 elements of dtype Float, expected 8"),
            ({4: 2, 5: 0}, "block_columns is 0"),
            ({6: -1}, "stored is -1, expected 0 to 2"),
        ],
        ids=str,
    )
    def test_eight_bit(self, change, sentence):
        with launched(80), pytest.raises(RuntimeError, match=sentence):
            self.call(eight_bit(Int8, 8, 64), change)

    def test_a_dense_weight(self):
        with pytest.raises(TypeError, match="weight is dense, expected a format"):
            dequantize(torch.ones(2, 2), torch.ones(2, 2))


FAULTS = {
    "halves of bytes in the other order": change(r"252645135", "-252645136"),
    "a unit beyond the end": change(r"setp\.gt\.s64", "setp.lt.s64", EVERY),
    "a scale too far": change(r"add\.s64", "sub.s64", 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted(name):
    weight = four_bit(NF4, 21, 77)
    check(weight)
    with pytest.raises((Fault, AssertionError)):
        check(weight, edit=planted(KERNEL, FAULTS[name]))
