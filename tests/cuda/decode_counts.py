"""What ``lora_linear_decode`` executes, counted: a line a shape, rows, rank and architecture.

    PYTHONPATH=tests:tests/cuda:tests/kernels python tests/cuda/decode_counts.py

A launch with one CTA of W and a launch with two are executed, at the full K and with the helpers of
the full layer: the difference is what a CTA costs, and so what all of them do. Clocks are a bound from
below: the unit at its full rate, nothing waiting for anything.
"""

from dataclasses import dataclass

import torch
from decode_cases import BF16, Layer, drawn, run
from ptx.counts import RATES, SMS
from ptx.launch import Count

from lorafast.backends.cost import Device
from lorafast.backends.cuda.decode import _Shares, _shares
from lorafast.core.problem import Problem

CPU = torch.device("cpu")
SHAPES = ((4096, 4096), (4096, 14336))
GPUS = {
    80: Device.known_by("A100", 80, 108),
    86: Device.known_by("RTX 3090", 86, 82),
    90: Device.known_by("H100", 90, 132),
}


@dataclass(frozen=True)
class Part:
    """Of a launch, or of a CTA of it."""

    issued: float
    streamed: float
    """Sectors that 16-byte loads without L1 take: of W, A and B."""
    others: float
    """Sectors of all other accesses to global memory: x, s, y, scratch."""
    wavefronts: float
    """Of shared memory."""

    @classmethod
    def of(cls, counts: tuple[Count, ...]) -> "Part":
        streamed = sum(c.sectors for c in counts if "no_allocate" in c.opcode)
        return cls(
            sum(c.issued for c in counts),
            streamed,
            sum(c.sectors for c in counts) - streamed,
            sum(c.wavefronts for c in counts),
        )

    def plus(self, other: "Part", times: float) -> "Part":
        return Part(*(a + times * b for a, b in zip(_numbers(self), _numbers(other), strict=True)))


def _numbers(part: Part) -> tuple[float, ...]:
    return part.issued, part.streamed, part.others, part.wavefronts


@dataclass(frozen=True)
class Row:
    """A launch. ``once``: sectors of W, A and B, read once each."""

    arch: int
    M: int
    K: int
    N: int
    r: int
    helpers: int
    cta: Part
    whole: Part
    once: float

    def line(self) -> str:
        rates, size = RATES[self.arch], 2 * self.N * self.K
        rows = 16 if self.M <= 8 else 32
        block = 2 * rows * self.K
        memory = block / rates.memory
        whole, cta, shared = self.whole, self.cta, self.cta.wavefronts
        l2 = 32 * (cta.streamed + cta.others) / rates.l2
        return (
            f"sm_{self.arch} {self.M:2} x {self.K} -> {self.N:5} r {self.r:2}, {self.helpers:2} "
            f"helpers: "
            f"{whole.streamed / self.once:.4f} of W, A, B ({32 * whole.streamed / size:.3f} of W), "
            f"others {32 * whole.others / size:.3f} of W; a CTA: {1024 * cta.issued / block:5.2f} "
            f"instructions a KB of W, {shared:4.0f} wavefronts; clocks: issue "
            f"{cta.issued / rates.issue:5.0f}, L2 {l2:5.0f}, memory {memory:5.0f}"
        )


def _of(layer: Layer, shares: _Shares, arch: int) -> Part:
    ran, _, _ = run(layer, shares.helpers, arch, resident=1)  # helpers start first
    return Part.of(ran.launches[0].ran.counts)


def counted(arch: int, M: int, K: int, N: int, r: int) -> Row:
    """Counts a layer in bfloat16."""
    problem = Problem("lora_linear", M, K, N, r, BF16, BF16, CPU, wants=("y", "s"))
    shares = _shares(problem, GPUS[arch])
    one, two = (_of(drawn(M, K, n * shares.rows, r, bias=False), shares, arch) for n in (1, 2))
    cta = two.plus(one, -1)
    whole = one.plus(cta, shares.ctas - 1)
    once = 2 * (N * K + r * (K + N)) / 32
    return Row(arch, M, K, N, r, shares.helpers, cta, whole, once)


if __name__ == "__main__":
    for arch in SMS:
        for K, N in SHAPES:
            for M in (1, 16):
                for r in (16, 64):
                    print(counted(arch, M, K, N, r).line(), flush=True)
