"""Quantized weights of random codes and scales, each way of storing one by its name."""

import torch

from lorafast.core import codebooks
from lorafast.operands import FP4, FP8, MXFP4, NF4, Int8, Operand


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _four_bit(kind, N, K, dtype, block=64, nested_block=None):
    blocks = -(-N * K // block)
    tensors = {"weight": _bytes((N * K + 1) // 2, 1), "absmax": torch.rand(blocks)}
    if nested_block:
        tensors |= {
            "absmax": _bytes(blocks),
            "nested_absmax": torch.rand(-(-blocks // nested_block)),
            "nested_quant_map": torch.tensor(codebooks.dynamic()),
            "nested_offset": torch.tensor(1.3),
        }
    return kind(tensors, (N, K), dtype, block, nested_block)


def _eight_bit(kind, N, K, dtype, scale, block=None, name="scale"):
    codes = _bytes(N, K)
    if kind is Int8:
        codes = codes.view(torch.int8)
    elif K % 2:
        codes = codes.view(torch.float8_e4m3fn)
    else:
        codes[codes & 127 == 127] = 0  # no NaN: products are looked at, too
    return kind({"weight": codes, name: scale}, dtype, block)


KINDS = {
    "nf4": lambda N, K, dtype: _four_bit(NF4, N, K, dtype),
    "nf4 nested": lambda N, K, dtype: _four_bit(NF4, N, K, dtype, 64, 256),
    "fp4 in blocks of 7": lambda N, K, dtype: _four_bit(FP4, N, K, dtype, 7),
    "fp4 nested in blocks of 100": lambda N, K, dtype: _four_bit(FP4, N, K, dtype, 100, 3),
    "nf4 in blocks of 4096": lambda N, K, dtype: _four_bit(NF4, N, K, dtype, 4096),
    "int8 by row": lambda N, K, dtype: _eight_bit(Int8, N, K, dtype, torch.rand(N)),
    "int8 of bitsandbytes": lambda N, K, dtype: _eight_bit(
        Int8, N, K, dtype, 127 * torch.rand(N), name="SCB"
    ),
    "fp8": lambda N, K, dtype: _eight_bit(FP8, N, K, dtype, torch.rand(())),
    "fp8 by row": lambda N, K, dtype: _eight_bit(FP8, N, K, dtype, torch.rand(N, 1)),
    "fp8 in blocks": lambda N, K, dtype: _eight_bit(
        FP8, N, K, dtype, torch.rand(-(-N // 16), -(-K // 24)), (16, 24)
    ),
    "mxfp4": lambda N, K, dtype: MXFP4(
        _bytes(N, K // 32 * 16), torch.randint(118, 130, (N, K // 32), dtype=torch.uint8), dtype
    ),
}  # fmt: skip


def draw(kind: str, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Operand:
    """A weight ``[N, K]`` stored so; of mxfp4 K is cut to a multiple of 32."""
    weight = KINDS[kind](N, K, dtype)
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
    return type(weight).build(tensors, weight.parameters)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN where it is expected, else the same bits."""
    assert found.dtype is expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    kind = {2: torch.int16, 4: torch.int32}[found.element_size()]
    kept = ~expected.isnan()
    assert torch.equal(found[kept].view(kind), expected[kept].view(kind))
