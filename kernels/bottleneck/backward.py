"""The backward of a bottleneck adapter: da and dh from one launch over dy, the rest by others' kernels.

``dz = scaling · dy·U`` and ``dh = dy + da·D`` are to dy as ``a`` and y are to h, so that their launch is
that of the forward: a program owns a block of rows and goes through their columns twice. dU and du are
``expand_backward`` of dy and z, dD is ``shrink_backward`` of da and h: each reads its matrix once.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.bottleneck.activations import activation, times_derivative
from lorafast.kernels.bottleneck.kernel import strides_of
from lorafast.kernels.bottleneck.rows import add_product
from lorafast.kernels.common.bottleneck_plan import (
    GRADIENTS,
    BottleneckBackwardLaunch,
    BottleneckLaunch,
    bottleneck_backward_launch,
)
from lorafast.kernels.common.bundles import Matrix
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
from lorafast.kernels.expand_backward import kernel as expand_backward
from lorafast.kernels.shrink.kernel import shrink_rows
from lorafast.kernels.shrink_backward import kernel as shrink_backward
from torch import Tensor

from lorafast.reference import wide

Gradients = tuple[Tensor | None, ...]
"""``dh``, ``dD``, ``dd``, ``dU`` and ``du``, None for what isn't asked for."""


@triton.jit(do_not_specialize=["M", "n_blocks"])
def bottleneck_backward_kernel(
    dy_ptr,
    a_ptr,
    down_ptr,
    up_ptr,
    da_ptr,
    z_ptr,
    dh_ptr,
    M,
    K,
    N,
    b,
    n_blocks,
    scaling,
    stride_dym,
    stride_dyn,
    stride_am,
    stride_ab,
    stride_db,
    stride_dk,
    stride_un,
    stride_ub,
    ADDS_DY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j): row block i, of whose dh it writes column group j; the first stores da and z.

    ``K`` is dy's length and ``N`` that of dh, as a forward that read dy would have them. Of da, z and dh
    what isn't asked for is None, ``down`` without dh, ``up`` where z is all. ADDS_DY: dh is ``dy +
    da·D``.
    """
    dy = Matrix(dy_ptr, stride_dym, stride_dyn)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    if up_ptr is not None:
        up = Matrix(up_ptr, stride_ub, stride_un)  # Uᵀ: its rows are U's columns
        dz = shrink_rows(
            dy, up, None, rows, ranks, 0, K, M, K, b, BLOCK_K, STAGES, DOWN, INTERPRETED
        )  # [BLOCK_M, BLOCK_R]
    inside = (rows < M)[:, None] & (ranks < b)[None, :]
    a = tl.load(
        a_ptr + rows.to(tl.int64)[:, None] * stride_am + ranks.to(tl.int64)[None, :] * stride_ab,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_M, BLOCK_R]
    if up_ptr is not None:
        da = times_derivative(dz * scaling, a, ACTIVATION)
        # An infinite U has made NaN of zeros beyond M.
        da = cast(tl.where(inside, da, 0.0), a_ptr.dtype.element_ty, INTERPRETED)
    places = rows.to(tl.int64)[:, None] * b + ranks[None, :]
    if tl.program_id(1) == 0:
        if da_ptr is not None:
            tl.store(da_ptr + places, da, mask=inside)
        if z_ptr is not None:
            z = cast(activation(a, ACTIVATION), z_ptr.dtype.element_ty, INTERPRETED)
            tl.store(z_ptr + places, z, mask=inside)
    if dh_ptr is not None:
        # Counted in blocks, so that the compiler knows the alignment of every load.
        begin = tl.program_id(1) * n_blocks * BLOCK_N
        end = tl.minimum(begin + n_blocks * BLOCK_N, N)
        add_product(
            da, Matrix(down_ptr, stride_db, stride_dk), None, dy if ADDS_DY else None, dh_ptr,
            rows, ranks, begin, end, M, N, b, None, BLOCK_N, STAGES, UP, INTERPRETED,
        )  # fmt: skip


def bottleneck_backward(
    dy: Tensor,
    h: Tensor | None,
    a: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float = 1.0,
    activation: str = "gelu",
    residual: bool = False,
    *,
    wants: tuple[str, ...] = GRADIENTS,
    config: LaunchConfig | None = None,
) -> Gradients:
    """The gradients asked for of ``bottleneck``, with ``da = scaling · dy·U ⊙ f'(a)``.

        dh = dy + da·D,  dD = daᵀ·h,  dd = Σ da,  dU = scaling · dyᵀ·f(a),  du = scaling · Σ dy

    Shapes: ``dy [M, N]``, ``h [M, K]``, ``a [M, b]``, ``down [b, K]``, ``up [N, b]``, of any strides →
    ``dh [M, K]`` in the dtype of ``dy``, the others in that of ``down``. With another ``residual`` than
    h, whose gradient is dy, ``dh = da·D``. Only dD reads ``h``, which may be None without it. ``config``
    is that of the launch over rows.
    """
    (M, N), (b, K) = dy.shape, down.shape
    rules = {
        "rows": config or rule_for("bottleneck", dy, M, N, K, b),
        "columns": rule_for("expand_backward", dy, M, N, N, b),
        "down": rule_for("shrink_backward", dy, M, K, K, b),
    }
    launch = bottleneck_backward_launch(
        rules,
        M,
        K,
        N,
        b,
        sms=sms(dy),
        dtype=dy.dtype,
        tf32=tf32(),
        activation=activation,
        wants=wants,
    )
    return launcher(launch, down.dtype, residual)(dy, h, a, down, up, scaling)


@functools.lru_cache(maxsize=KEPT)
def launcher(
    launch: BottleneckBackwardLaunch, dtype: torch.dtype, residual: bool
) -> Callable[..., Gradients]:
    """What launches it: of ``dy, h, a, down, up, scaling``; all but dh have ``dtype``. What no result
    depends on that is asked for may be None."""
    wants = launch.wants
    over_rows = _over_rows(launch.rows, wants, residual) if launch.rows else None
    over_columns = over_h = None
    if launch.columns:
        over_columns = expand_backward.launcher(launch.columns, dtype, torch.float32)
    if launch.down:
        over_h = shrink_backward.launcher(launch.down, dtype)

    @on_its_device
    def run(
        dy: Tensor,
        h: Tensor | None,
        a: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        scaling: float,
    ) -> Gradients:
        da = z = dh = dD = dd = dU = du = None
        if over_rows:
            da, z, dh = over_rows(dy, a, down, up, scaling)
        if over_columns:
            _, dU, du = over_columns(dy, z, None, scaling)
        if du is not None:
            du = du.mul_(scaling).to(dtype)
        if over_h:
            dD = over_h(da, h)
        if "dd" in wants:
            assert da is not None
            dd = da.sum(0, dtype=torch.float32).to(dtype)
        return dh, dD, dd, dU, du

    return run


def _over_rows(
    launch: BottleneckLaunch, wants: tuple[str, ...], residual: bool
) -> Callable[..., Gradients]:
    """What launches the pass over dy, and returns ``da``, ``z`` and dh as far as they are needed."""
    c, M, K, b = launch.config, launch.M, launch.N, launch.b
    start = Start(bottleneck_backward_kernel, launch.grid, c.options)
    blocks = (
        not residual, launch.activation, c.block_m, c.block_n, c.block_k, c.block_r, c.num_stages,
        launch.down, launch.up, INTERPRETED,
    )  # fmt: skip
    want_da, want_z, want_dh = bool({"dD", "dd"} & set(wants)), "dU" in wants, "dh" in wants

    def run(
        dy: Tensor, a: Tensor, down: Tensor | None, up: Tensor | None, scaling: float
    ) -> Gradients:
        device, low = dy.device, wide(dy.dtype)
        da = torch.empty((M, b), dtype=low, device=device) if want_da else None
        z = torch.empty((M, b), dtype=low, device=device) if want_z else None
        dh = torch.empty((M, K), dtype=dy.dtype, device=device) if want_dh else None
        if not M * b:
            return da, z, dh
        # The same code whatever else is there.
        down = down if want_dh else None
        up = up if want_da or want_dh else None
        strides = (*dy.stride(), *a.stride(), *strides_of(down, 2), *strides_of(up, 2))
        start(
            key_of(strides, tensors=(dy, a, down, up)),
            dy, a, down, up, da, z, dh, M, launch.K, K, b, launch.n_blocks, float(scaling),
            *strides, *blocks,
        )  # fmt: skip
        return da, z, dh

    return run
