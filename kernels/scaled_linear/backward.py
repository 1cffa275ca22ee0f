"""The backward of a frozen layer with a vector: one GEMM, and where y is scaled one pass.

    y is scaled:  dx = (l ⊙ dy)·W,  dl = Σ dy ⊙ z
    x is scaled:  dx = l ⊙ u,  dl = Σ x ⊙ u,  u = dy·W

Where x is scaled the GEMM's tiles of u are multiplied and summed before they are written, and u is not.
Where y is, dl is a pass over dy and z: many tiles of dx read one of dy, which only one should multiply
by z. That pass, which PyTorch's GEMM has before or behind it, gives ``l ⊙ g`` of what it reads as well.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common import sum_partials
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.device import cast
from lorafast.kernels.common.launch import INTERPRETED, KEPT, on_its_device, sms
from lorafast.kernels.common.scaled_plan import ScaledPassLaunch, scaled_pass_launch
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.scaled_linear.kernel import gemm_launch
from lorafast.kernels.scaled_linear.kernel import launcher as gemm_launcher
from torch import Tensor


@triton.jit(do_not_specialize=["M", "m_blocks"])
def scaled_pass_kernel(
    g_ptr,
    t_ptr,
    scale_ptr,
    out_ptr,
    sums_ptr,
    M,
    N,
    m_blocks,
    stride_gm,
    stride_gn,
    stride_tm,
    stride_tn,
    stride_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j): column block i of row group j, of whose ``g ⊙ t`` it leaves the sums over rows.

    ``out`` is ``scale ⊙ g``. Both, and what they take, may be None.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_cols = cols.to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if out_ptr is not None:
        factors = tl.load(
            scale_ptr + cols.to(tl.int64) * stride_scale, mask=cols < N, other=0.0
        ).to(tl.float32)  # [BLOCK_N]
    begin = tl.program_id(1) * m_blocks
    end = tl.minimum(begin + m_blocks, tl.cdiv(M, BLOCK_M))
    for block in tl.range(begin, end, num_stages=STAGES):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        # 64 bits: M·N may pass 2**31 elements.
        wide_rows = rows.to(tl.int64)[:, None]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        g = tl.load(
            g_ptr + wide_rows * stride_gm + wide_cols * stride_gn, mask=inside, other=0.0
        ).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if sums_ptr is not None:
            t = tl.load(
                t_ptr + wide_rows * stride_tm + wide_cols * stride_tn, mask=inside, other=0.0
            ).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            total += g * t
        if out_ptr is not None:
            scaled = cast(g * factors[None, :], out_ptr.dtype.element_ty, INTERPRETED)
            tl.store(out_ptr + wide_rows * N + wide_cols, scaled, mask=inside)
    if sums_ptr is not None:
        places = sums_ptr + tl.program_id(1).to(tl.int64) * N + cols
        tl.store(places, tl.sum(total, 0), mask=cols < N)


def scaled_pass(
    g: Tensor, scale: Tensor | None, t: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """``l ⊙ g`` in the dtype of ``g``, and ``Σ g ⊙ t`` over the rows in ``dtype``.

    Shapes: ``g``, ``t [M, N]``, of any strides, ``scale [N]`` → ``[M, N]``, ``[N]``. Without a vector
    or without ``t`` its result is None.
    """
    M, N = g.shape
    launch = scaled_pass_launch(M, N, sms=sms(g), writes=scale is not None, sums=t is not None)
    return pass_launcher(launch)(g, scale, t, dtype)


@functools.lru_cache(maxsize=KEPT)
def pass_launcher(
    launch: ScaledPassLaunch,
) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """What launches it: of ``g, scale, t, dtype``."""
    c, M, N = launch.config, launch.M, launch.N
    start = Start(scaled_pass_kernel, launch.grid, c.options)
    blocks = (c.block_m, c.block_n, c.num_stages, INTERPRETED)

    @on_its_device
    def run(
        g: Tensor, scale: Tensor | None, t: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        out = torch.empty((M, N), dtype=g.dtype, device=g.device) if launch.writes else None
        # The same code whatever else is there.
        scale = scale if launch.writes else None
        t = t if launch.sums else None
        if not M * N:
            return out, None if t is None else g.new_zeros(N, dtype=dtype)
        sums = None
        if launch.sums:
            sums = torch.empty((launch.grid[1], N), dtype=torch.float32, device=g.device)
        strides = (
            *g.stride(), *((None, None) if t is None else t.stride()),
            None if scale is None else scale.stride(0),
        )  # fmt: skip
        start(
            key_of(strides, tensors=(g, t, scale)),
            g, t, scale, out, sums, M, N, launch.m_blocks, *strides, *blocks,
        )  # fmt: skip
        return out, None if sums is None else added_up(sums, dtype)

    return run


def added_up(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The partial sums ``[count, N]`` added up in an order that never changes."""
    count, N = sums.shape
    out = torch.empty(N, dtype=dtype, device=sums.device)
    sum_partials.launcher(count, N)(sums, out, 1.0)
    return out


def scaled_dx(
    dy: Tensor, weight: Tensor, scale: Tensor, *, config: LaunchConfig | None = None
) -> Tensor:
    """``dx = (l ⊙ dy)·W`` in one launch.

    Shapes: ``dy [M, N]``, ``weight [N, K]``, ``scale [N]`` → ``dx [M, K]`` in the dtype of ``dy``.
    """
    launch = gemm_launch(dy, weight, config, transposed=True, at_load=True)
    dx, _, _ = gemm_launcher(launch)(dy, weight, scale)
    assert dx is not None
    return dx


def scaled_linear_backward(
    dy: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    scales_input: bool = False,
    *,
    wants: tuple[str, ...] = ("dx", "dscale"),
    config: LaunchConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``dx`` and ``dl``, as far as they are wanted.

    Shapes: ``dy [M, N]``, ``kept [M, N]`` for z, with ``scales_input`` ``[M, K]`` for x, ``weight
    [N, K]``, ``scale [N]`` or ``[K]`` → ``dx [M, K]`` in the dtype of ``dy``, ``dl`` as ``scale``.
    """
    dx = dscale = None
    if not scales_input:
        if "dscale" in wants:
            _, dscale = scaled_pass(dy, None, kept, scale.dtype)
        if "dx" in wants:
            assert weight is not None
            dx = scaled_dx(dy, weight, scale, config=config)
        return dx, dscale
    assert weight is not None
    launch = gemm_launch(
        dy, weight, config, transposed=True, writes="dx" in wants, sums="dscale" in wants
    )
    return summed(gemm_launcher(launch))(dy, kept, weight, scale)


def summed(
    run: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]],
) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """A GEMM that scales what it writes, and its sums added up: of ``dy, kept, weight, scale``."""

    @on_its_device
    def backward(
        dy: Tensor, kept: Tensor | None, weight: Tensor, scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        dx, _, sums = run(dy, weight, scale, None, kept)
        if sums is None:
            return dx, None
        if not sums.numel():
            return dx, torch.zeros_like(scale)
        return dx, added_up(sums, scale.dtype)

    return backward
