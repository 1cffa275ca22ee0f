"""The native kernels of ``csrc/cpu/bottleneck.cpp``: a bottleneck adapter's forward and backward, a call
each."""

import torch
from torch import Tensor

from lorafast.backends.cpu import native
from lorafast.backends.plan import Run
from lorafast.core.dtypes import wide
from lorafast.core.problem import ACTIVATIONS, Problem

native.why_not_loaded()  # loads them
_bottleneck = torch.ops.lorafast_cpu.bottleneck.default
_bottleneck_backward = torch.ops.lorafast_cpu.bottleneck_backward.default

TOGETHER = ("dD", "dU")
"""What the backward's kernel makes in any case."""


def bottleneck(problem: Problem) -> Run:
    """``y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u)`` and ``a = h·Dᵀ + d``."""
    index, want_a = ACTIVATIONS.index(problem.activation), "a" in problem.wants
    N, b, low = problem.N, problem.r, wide(problem.dtype)

    def run(
        h: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor | None,
        up_bias: Tensor | None,
        scaling: float,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y = h.new_empty((h.shape[0], N))
        a = h.new_empty((h.shape[0], b), dtype=low) if want_a else None
        _bottleneck(h, down, up, down_bias, up_bias, float(scaling), index, residual, y, a)
        return y, a

    return run


def bottleneck_backward(problem: Problem) -> Run:
    """``dh``, ``dD``, ``dd``, ``dU``, ``du``; ``dD`` and ``dU`` are wanted."""
    index, dtype, residual = (
        ACTIVATIONS.index(problem.activation),
        problem.adapter_dtype,
        problem.residual,
    )
    K, N, b = problem.K, problem.N, problem.r
    want_dh, want_dd, want_du = (name in problem.wants for name in ("dh", "dd", "du"))

    def run(
        dy: Tensor, h: Tensor, a: Tensor, down: Tensor | None, up: Tensor, scaling: float
    ) -> tuple[Tensor | None, ...]:
        dh = dy.new_empty((dy.shape[0], K)) if want_dh else None
        dD, dU = dy.new_empty((b, K), dtype=dtype), dy.new_empty((N, b), dtype=dtype)
        dd = dy.new_empty(b, dtype=dtype) if want_dd else None
        du = dy.new_empty(N, dtype=dtype) if want_du else None
        if down is None:  # which dh alone depends on
            down = dD
        _bottleneck_backward(
            dy, h, a, down, up, float(scaling), index, residual, dh, dD, dd, dU, du
        )
        return dh, dD, dd, dU, du

    return run
