"""Quantized weights, drawn: every format with codes of all kinds, by hand and of quantized matrices."""

import torch
from torch import Tensor

from lorafast.core import codebooks
from lorafast.operands import FP4, FP8, MXFP4, NF4, Int8, Operand

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bytes_drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=_generator(seed))


def four_bit(
    kind: type, N: int, K: int, dtype=BF16, block=64, nested_block: int | None = 256, seed=0
) -> Operand:
    """Random codes of NF4 or FP4; scales of many magnitudes, of both signs, or nested."""
    rng, count = _generator(seed), N * K
    blocks = -(-count // block)
    t = {"weight": bytes_drawn((count + 1) // 2, seed=seed)}
    if nested_block is None:
        t["absmax"] = torch.randn(blocks, generator=rng) * 10.0 ** (torch.arange(blocks) % 9 - 5)
    else:
        t["absmax"] = bytes_drawn(blocks, seed=seed + 1)
        t["nested_absmax"] = torch.rand(-(-blocks // nested_block), generator=rng)
        t["nested_quant_map"] = torch.tensor(codebooks.dynamic())
        t["nested_offset"] = torch.tensor(0.03125 * 1.1)
    return kind(t, (N, K), dtype, block, nested_block)


def eight_bit(kind: type, N: int, K: int, dtype=BF16, scales="rows", seed=0) -> Operand:
    """Random codes of int8 or e4m3, none of them NaN.

    ``scales``: one, rows, SCB, or a block as (rows, columns).
    """
    rng, codes = _generator(seed), bytes_drawn(N, K, seed=seed)
    name, block = "scale", None
    if scales == "one":
        shape: tuple[int, ...] = ()
    elif scales in ("rows", "SCB"):
        shape, name = (N,), "scale" if scales == "rows" else "SCB"
    else:
        block = scales
        shape = -(-N // block[0]), -(-K // block[1])
    if kind is Int8:
        codes = codes.view(torch.int8)
    else:
        codes[codes % 128 == 127] = 126
    return kind({"weight": codes, name: torch.randn(shape, generator=rng)}, dtype, block)


def mxfp4(N: int, K: int, dtype=BF16, seed=0, exponents=(100, 140)) -> Operand:
    """``exponents``: the first and the one behind the last."""
    rng = _generator(seed)
    scales = torch.randint(*exponents, (N, K // 32), generator=rng).to(torch.uint8)
    return MXFP4(bytes_drawn(N, K // 2, seed=seed), scales, dtype)


def quantized(kind: type, N: int, K: int, dtype=BF16, seed=0) -> Operand:
    """Of a normal matrix."""
    return kind.of(torch.randn(N, K, generator=_generator(seed)).to(dtype))


def drawn(name: str, N: int, K: int, dtype=BF16, seed=0) -> Operand:
    """By a name of ``FORMATS``."""
    return FORMATS[name](N, K, dtype, seed)


FORMATS = {
    "nf4": lambda N, K, dtype, seed: four_bit(NF4, N, K, dtype, seed=seed),
    "nf4-plain": lambda N, K, dtype, seed: four_bit(NF4, N, K, dtype, 64, None, seed),
    "fp4-4096": lambda N, K, dtype, seed: four_bit(FP4, N, K, dtype, 4096, 2, seed),
    "int8": lambda N, K, dtype, seed: eight_bit(Int8, N, K, dtype, "rows", seed),
    "int8-SCB": lambda N, K, dtype, seed: eight_bit(Int8, N, K, dtype, "SCB", seed),
    "fp8-one": lambda N, K, dtype, seed: eight_bit(FP8, N, K, dtype, "one", seed),
    "fp8-blocks": lambda N, K, dtype, seed: eight_bit(FP8, N, K, dtype, (128, 128), seed),
    "mxfp4": lambda N, K, dtype, seed: mxfp4(N, K, dtype, seed),
}
