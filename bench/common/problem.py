"""One measured LoRA linear layer: its sizes, its tensors, and what arithmetic says about it."""

from dataclasses import dataclass
from typing import Any

import torch
from lorafast.bench.common import bases, memory
from lorafast.bench.common.shapes import Shape
from torch import Tensor

from lorafast.operands import DENSE, Operand
from lorafast.reference import wide

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
PASSES = {
    "fwd": "forward",
    "bwd": "backward with dx",
    "both": "forward + backward with dx",
    "infer": "forward in inference mode",
}
SCALING = 2.0
"""alpha = 2r, the common choice; 1 would let a contender leave the multiplication out."""


_ROTATED_BYTES = 1 << 27
_MOST_SETS = 32


@dataclass(frozen=True)
class Problem:
    """``dtype`` is that of x and W, ``adapter_dtype`` that of A and B: names in ``DTYPES``.

    ``base`` is the format in which the adapted layer has W; the frozen layer has the same W dense.
    ``use_dora``: the adapter is DoRA's, and its magnitude as A and B are; it is counted, not timed.
    """

    shape: Shape
    r: int
    dtype: str
    adapter_dtype: str
    dropout_p: float
    base: str = DENSE
    use_dora: bool = False

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Problem":
        """Back from ``dataclasses.asdict``."""
        return cls(**fields | {"shape": Shape(**fields["shape"])})

    def __str__(self) -> str:
        """``minilm q,k,v,o  M=512 K=384 N=384  r=16  bf16 (fp32 adapter)  dropout 0.05``."""
        dropout = f"dropout {self.dropout_p:g}" if self.dropout_p else "no dropout"
        adapter = "" if self.adapter_dtype == self.dtype else f" ({self.adapter_dtype} adapter)"
        base = "" if self.base == DENSE else f" {self.base} base"
        dora = "  DoRA" if self.use_dora else ""
        return f"{self.shape}  r={self.r}{dora}  {self.dtype}{adapter}{base}  {dropout}"

    @property
    def element_size(self) -> int:
        """Bytes of one element of x."""
        return DTYPES[self.dtype].itemsize

    def arithmetic_limit(self, which: str) -> float:
        """FLOPs of the LoRA layer over those of the frozen one, for a pass of ``PASSES``.

        Forward: ``1 + r·(K+N)/(K·N)``; backward, where ds, dB, dA and the low-rank part of dx stand
        against dx: ``1 + 2·r·(K+N)/(K·N)``; both together: ``1 + 1.5·r·(K+N)/(K·N)``.
        """
        K, N = self.shape.K, self.shape.N
        shares = {"fwd": 1.0, "infer": 1.0, "bwd": 2.0, "both": 1.5}
        return 1 + shares[which] * self.r * (K + N) / (K * N)

    def flops(self, which: str, adapted: bool) -> float:
        """Floating-point operations of the frozen or the adapted layer."""
        base = 2.0 * self.shape.M * self.shape.K * self.shape.N * (2 if which == "both" else 1)
        return base * self.arithmetic_limit(which) if adapted else base

    def least_bytes(self, which: str, adapted: bool) -> int:
        """Bytes moved if every operand of a pass is read or written exactly once.

        Forward: x, W, bias, A, B, y. Backward: dy, W, dx and, adapted, x, A, B, dA, dB. The thin
        ``s [M, r]`` is written by the forward and read by the backward. Of a quantized W the adapted
        layer reads codes and scales. DoRA reads its magnitude in both, and writes its gradient.
        """
        M, K, N = self.shape.M, self.shape.K, self.shape.N
        size, adapter_size = self.element_size, DTYPES[self.adapter_dtype].itemsize
        factors = self.r * (K + N) * adapter_size
        s = M * self.r * wide(DTYPES[self.dtype]).itemsize
        base = self.base if adapted else DENSE
        W = bases.stored_bytes(N, K, DTYPES[self.dtype], base)
        forward = (M * K + M * N + (N if self.shape.bias else 0)) * size + W
        backward = (M * N + M * K) * size + W
        if adapted:
            magnitude = N * adapter_size if self.use_dora else 0
            forward += factors + s + magnitude
            backward += M * K * size + 2 * (factors + magnitude) + s
        return {
            "fwd": forward, "infer": forward, "bwd": backward, "both": forward + backward,
        }[which]  # fmt: skip


@dataclass
class Tensors:
    """What every contender of a problem gets; ``weight`` and ``bias`` are shared by all of them.

    ``operand`` is the weight in the format of the problem's base, None of a dense one; ``weight`` is
    then what it stands for.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    x: list[Tensor]
    dy: list[Tensor]
    operand: Operand | None = None

    def frozen(self) -> list[Tensor]:
        """All tensors that the weight is in; zeroed together they stand for W = 0."""
        stored = () if self.operand is None else self.operand.tensors().values()
        return [self.weight, *stored]


def input_sets(problem: Problem) -> int:
    """How many x and dy to rotate through, so that none is still in the cache at its next turn."""
    one = problem.shape.M * (problem.shape.K + problem.shape.N) * problem.element_size
    return min(max(-(-_ROTATED_BYTES // one), 2), _MOST_SETS)


def why_too_large(problem: Problem, device: torch.device) -> str | None:
    """A sentence if the tensors of ``draw`` alone are more than the device's whole memory, or None."""
    M, K, N, r = problem.shape.M, problem.shape.K, problem.shape.N, problem.r
    elements = K * N + input_sets(problem) * M * (K + N)
    adapter = r * (K + N) * DTYPES[problem.adapter_dtype].itemsize
    codes = 0
    if problem.base != DENSE:
        codes = bases.stored_bytes(N, K, DTYPES[problem.dtype], problem.base)
    needed, there = elements * problem.element_size + adapter + codes, memory.whole(device)
    if needed <= there:
        return None
    return f"{problem}: its tensors take {needed / 1e9:,.0f} GB, and {device} has {there / 1e9:,.0f} GB"


def draw(problem: Problem, device: torch.device, sets: int, seed: int = 0) -> Tensors:
    """Random tensors, ``sets`` of x and dy; the low-rank term is as large as the base product."""
    M, K, N, r = problem.shape.M, problem.shape.K, problem.shape.N, problem.r
    generator = torch.Generator(device).manual_seed(seed)
    dtype, adapter_dtype = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)

    weight = normal(N, K, scale=K**-0.5)
    operand = bases.quantized(weight, problem.base)
    return Tensors(
        weight=weight if operand is None else operand.dense(),
        bias=normal(N) if problem.shape.bias else None,
        lora_A=normal(r, K, scale=K**-0.5, dtype=adapter_dtype),
        lora_B=normal(N, r, scale=r**-0.5 / SCALING, dtype=adapter_dtype),
        x=[normal(M, K) for _ in range(sets)],
        dy=[normal(M, N) for _ in range(sets)],
        operand=operand,
    )
