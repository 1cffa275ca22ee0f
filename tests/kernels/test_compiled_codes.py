"""What reads codes, compiled for every architecture: nothing spills, and accesses are wide. So of a
layer of few rows in one launch, whose weight may be dense."""

import itertools
import os

import pytest
import torch
from helpers import covering

pytest.importorskip("triton")

from lorafast.kernels.common.codes_plan import codes_launch
from lorafast.kernels.common.configs import SHARED_MEMORY
from lorafast.kernels.common.decode_plan import decode_launch
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.common.plan import precision_of, skinny_precision_of
from lorafast.kernels.dequantize import dequantize
from lorafast.kernels.linear_expand import codes
from lorafast.kernels.lora_linear import decode
from recorded import launches_of

from lorafast.operands import FP8, NF4, Int8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.executed,
    pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET"),
]
N = K = 4096


def empty(*size, dtype=torch.uint8):
    return torch.empty(size, dtype=dtype, device="meta")


def weight_of(kind, dtype, K=K):
    scale = empty(N, dtype=torch.float32)
    if kind == "int8":
        return Int8({"weight": empty(N, K, dtype=torch.int8), "scale": scale}, dtype)
    if kind == "fp8":
        return FP8({"weight": empty(N, K), "scale": scale}, dtype)
    blocks = N * K // 64
    tensors = {
        "weight": empty(N * K // 2, 1),
        "absmax": empty(blocks),
        "nested_absmax": empty(blocks // 256, dtype=torch.float32),
        "nested_quant_map": empty(256, dtype=torch.float32),
        "nested_offset": empty(dtype=torch.float32),
    }
    return NF4(tensors, (N, K), dtype, 64, 256)


def instructions_of(machine_of, capability, call):
    (launch,) = launches_of(capability, call)
    machine = machine_of(launch, capability)
    assert (machine.spills, machine.local, machine.serialized) == (0, 0, False)
    assert machine.shared <= SHARED_MEMORY[capability]
    return machine.instructions


KINDS = ("nf4 nested", "int8", "fp8")
EVERY = os.environ.get("EXECUTE") == "all"
choices = itertools.product if EVERY else covering
"""What isn't known takes a second or two: ``make test-executed`` asks for all, compiled anew."""


@pytest.mark.parametrize(
    ("capability", "kind", "dtype"),
    choices(list(SHARED_MEMORY), KINDS, (torch.bfloat16, torch.float32)),
    ids=str,
)
def test_dequantize(machine_of, capability, kind, dtype):
    weight, W = weight_of(kind, dtype), empty(N, K, dtype=dtype)
    has = instructions_of(machine_of, capability, lambda: dequantize(weight, W))
    assert "STG.128" in has


@pytest.mark.parametrize(
    ("capability", "kind", "M", "product"),
    choices(list(SHARED_MEMORY), KINDS, (16, 64, 128), ("y", "dx")),
    ids=str,
)
def test_a_product_that_reads_codes(machine_of, capability, kind, M, product):
    """Its codes are copied to shared memory ahead of their use."""
    transposed = product == "dx"
    launch = codes_launch(
        M, K, N, 16, sms=132, dtype=torch.bfloat16, precision="ieee", transposed=transposed
    )
    x, s, B = (empty(*size, dtype=torch.bfloat16) for size in ((M, K), (M, 16), (N, 16)))
    weight = weight_of(kind, torch.bfloat16)
    call = codes.launcher(launch)
    has = instructions_of(machine_of, capability, lambda: call(x, weight, s, B, 0.5))
    assert "LDGSTS.128" in has


DECODED = {"nf4 nested": 4, "int8": 8, "fp8": 8, "dense": None}
"""Bits of an element of W, as many as x has of a dense one."""


@pytest.mark.parametrize(
    ("capability", "kind", "dtype", "r", "K"),
    choices(
        list(SHARED_MEMORY), list(DECODED), (torch.bfloat16, torch.float16, torch.float32),
        (16, 40), (512, K),
    ),
    ids=str,
)  # fmt: skip
def test_a_layer_of_few_rows(machine_of, capability, kind, dtype, r, K):
    """With helpers, and where K is short without; in 16 bits four programs have an SM's registers.

    To run more programs at once ptxas puts up to two words on the stack in some of these, which are
    stored once: more would be a spill.
    """
    launch = decode_launch(
        16, K, N, r, sms=132, dtype=dtype, bits=DECODED[kind] or 8 * dtype.itemsize,
        precision=precision_of(dtype, False), skinny=skinny_precision_of(dtype, False),
    )  # fmt: skip
    assert bool(launch.shares) is (K * launch.rank_blocks > 1024)
    x, A, B = (empty(*size, dtype=dtype) for size in ((16, K), (r, K), (N, r)))
    weight = empty(N, K, dtype=dtype) if kind == "dense" else weight_of(kind, dtype, K)
    (found,) = launches_of(capability, lambda: decode.launcher(launch)(x, weight, A, B, 0.5))
    machine = machine_of(found, capability)
    assert machine.stack <= 8
    assert (machine.local, machine.serialized) == (0, False)
    assert machine.shared <= SHARED_MEMORY[capability]
    assert "LDGSTS.128" in machine.instructions
    assert machine.registers <= (128 if dtype.itemsize == 2 else 255)
