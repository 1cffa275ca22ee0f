"""``y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u)`` in one launch.

A program owns a block of rows: it goes through their columns for ``a = h·Dᵀ + d``, which it keeps, and
again for y. What it reads of h the second time is in L2, as far as the rows of all programs that run
together fit there; nothing keeps them on the SM.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.bottleneck.activations import activation
from lorafast.kernels.bottleneck.rows import add_product
from lorafast.kernels.common.bottleneck_plan import BottleneckLaunch, bottleneck_launch
from lorafast.kernels.common.bundles import Matrix, Vector
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.device import cast
from lorafast.kernels.common.launch import (
    INTERPRETED,
    KEPT,
    on_its_device,
    rule_for,
    sms,
    tf32,
)
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.shrink.kernel import shrink_rows
from torch import Tensor

from lorafast.reference import wide


@triton.jit(do_not_specialize=["M", "n_blocks"])
def bottleneck_kernel(
    h_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    residual_ptr,
    a_ptr,
    y_ptr,
    M,
    K,
    N,
    b,
    n_blocks,
    scaling,
    stride_hm,
    stride_hk,
    stride_db,
    stride_dk,
    stride_d,
    stride_un,
    stride_ub,
    stride_u,
    stride_rm,
    stride_rn,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j): row block i, of whose y it writes column group j; the first of them stores ``a``.

    Biases may be None, ``a`` where nobody asks for it, and the residual, which is h then. LOW is the
    dtype of ``a`` and of z.
    """
    h = Matrix(h_ptr, stride_hm, stride_hk)
    down = Matrix(down_ptr, stride_db, stride_dk)
    up = Matrix(up_ptr, stride_ub, stride_un)  # Uᵀ: its rows are U's columns
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    acc = shrink_rows(
        h, down, None, rows, ranks, 0, K, M, K, b, BLOCK_K, STAGES, DOWN, INTERPRETED
    )  # [BLOCK_M, BLOCK_R]
    if down_bias_ptr is not None:
        shift = tl.load(
            down_bias_ptr + ranks.to(tl.int64) * stride_d, mask=ranks < b, other=0.0
        )  # [BLOCK_R]
        acc += shift.to(tl.float32)[None, :]
    a = cast(acc, LOW, INTERPRETED)
    if a_ptr is not None:
        inside = (rows < M)[:, None] & (ranks < b)[None, :]
        if tl.program_id(1) == 0:
            tl.store(a_ptr + rows.to(tl.int64)[:, None] * b + ranks[None, :], a, mask=inside)
    # Of the rounded a, of which the backward has it again.
    z = cast(activation(a.to(tl.float32), ACTIVATION), LOW, INTERPRETED)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = tl.program_id(1) * n_blocks * BLOCK_N
    end = tl.minimum(begin + n_blocks * BLOCK_N, N)
    base = Matrix(residual_ptr, stride_rm, stride_rn) if residual_ptr is not None else h
    bias = Vector(up_bias_ptr, stride_u) if up_bias_ptr is not None else None
    add_product(
        z, up, bias, base, y_ptr, rows, ranks, begin, end, M, N, b, scaling,
        BLOCK_N, STAGES, UP, INTERPRETED,
    )  # fmt: skip


def bottleneck(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "gelu",
    residual: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``a = h·Dᵀ + d`` and ``y = residual + scaling · (f(a)·Uᵀ + u)``; without a residual that is h.

    Shapes: ``h [M, K]``, ``down [b, K]``, ``up [N, b]``, ``down_bias [b]``, ``up_bias [N]``, ``residual
    [M, N]``, of any strides → ``y [M, N]`` in the dtype of ``h``, ``a [M, b]`` in that too, in float32
    for float16. ``activation`` is one of ``ACTIVATIONS``, ``b`` at most what ``widest`` says.
    """
    (M, K), (N, b) = h.shape, up.shape
    launch = bottleneck_launch(
        config or rule_for("bottleneck", h, M, K, N, b), M, K, N, b,
        sms=sms(h), dtype=h.dtype, tf32=tf32(), activation=activation,
    )  # fmt: skip
    return launcher(launch)(h, down, up, down_bias, up_bias, scaling, residual)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: BottleneckLaunch) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What launches it: of ``h, down, up, down_bias, up_bias, scaling, residual``, which may be None as
    biases may. Gives y and ``a``, None where it isn't asked for."""
    c, M, K, N, b = launch.config, launch.M, launch.K, launch.N, launch.b
    start = Start(bottleneck_kernel, launch.grid, c.options)
    blocks = (
        launch.activation, low_of(launch.dtype), c.block_m, c.block_n, c.block_k, c.block_r,
        c.num_stages, launch.down, launch.up, INTERPRETED,
    )  # fmt: skip

    @on_its_device
    def run(
        h: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor | None,
        up_bias: Tensor | None,
        scaling: float,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y = torch.empty((M, N), dtype=h.dtype, device=h.device)
        a = None
        if launch.keeps:
            a = torch.empty((M, b), dtype=wide(h.dtype), device=h.device)
        if not M * b:
            return y, a
        strides = (
            *h.stride(), *down.stride(), *strides_of(down_bias, 1),
            *up.stride(), *strides_of(up_bias, 1), *strides_of(residual, 2),
        )  # fmt: skip
        start(
            key_of(strides, tensors=(h, down, up, down_bias, up_bias, residual)),
            h, down, down_bias, up, up_bias, residual, a, y, M, K, N, b, launch.n_blocks,
            float(scaling), *strides, *blocks,
        )  # fmt: skip
        return y, a

    return run


def low_of(dtype: torch.dtype) -> tl.dtype:
    """That of ``a`` and z beside an h of ``dtype``, as the language has it."""
    return tl.bfloat16 if dtype is torch.bfloat16 else tl.float32


def strides_of(tensor: Tensor | None, dims: int) -> tuple[int | None, ...]:
    """None of a tensor that is missing."""
    return (None,) * dims if tensor is None else tensor.stride()
