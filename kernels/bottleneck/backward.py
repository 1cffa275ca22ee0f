"""The backward of a bottleneck adapter: a launch over the rows of dy, one over the columns of dy and h.

``dz = scaling · dy·U`` takes a whole row of dy, and everything but du takes ``da = dz ⊙ f'(a)`` or z. So
dy is read once for da, and once more, beside h, for the sums over rows and dh (``columns.py``). dh alone
is written at once: then the first launch is that of the forward, which goes through its rows twice.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.bottleneck import columns
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
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, cast, sum_blocks
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

Gradients = tuple[Tensor | None, ...]
"""``dh``, ``dD``, ``dd``, ``dU`` and ``du``, None for what isn't asked for."""
_AT_ONCE = 16
"""Partial sums of dd that a program has in flight, lest it wait for memory once for each."""


@triton.jit
def _add_up_dd(
    dd_ptr, partials_ptr, ranks, b, count, AT_ONCE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """``dd = Σ partials`` of ``count`` row blocks, ``b`` elements each, in a fixed order."""
    total = tl.zeros((ranks.shape[0],), dtype=tl.float32)
    for first in tl.range(0, count, AT_ONCE, num_stages=1):
        parts = first + tl.arange(0, AT_ONCE)
        found = tl.load(
            partials_ptr + parts.to(tl.int64)[:, None] * b + ranks[None, :],
            mask=(parts < count)[:, None] & (ranks < b)[None, :],
            other=0.0,
        )  # [AT_ONCE, BLOCK_R]
        total += tl.sum(found, axis=0)
    tl.store(dd_ptr + ranks, cast(total, dd_ptr.dtype.element_ty, INTERPRETED), mask=ranks < b)


@triton.jit
def _leave(
    dz,
    first,
    a,
    da_ptr,
    z_ptr,
    dd_ptr,
    dd_partials_ptr,
    counter_ptr,
    rows,
    ranks,
    M,
    b,
    scaling,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    AT_ONCE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``da = scaling · dz ⊙ f'(a)`` of ``rows`` in LOW; stores it, z and its sum if ``first``.

    ``dz`` is a tile, or None where z is all; ``a [M, b]`` is a ``Matrix``. The last one adds up dd.
    """
    offsets, rank_offsets = rows.to(tl.int64)[:, None], ranks.to(tl.int64)[None, :]
    inside = (rows < M)[:, None] & (ranks < b)[None, :]
    a_tile = tl.load(
        a.ptr + offsets * a.stride_row + rank_offsets * a.stride_col, mask=inside, other=0.0
    ).to(tl.float32)  # [BLOCK_M, BLOCK_R]
    da = a_tile
    if dz is not None:
        da = times_derivative(dz * scaling, a_tile, ACTIVATION)
        # An infinite U has made NaN of zeros beyond M.
        da = tl.where(inside, da, 0.0)
    low = cast(da, LOW, INTERPRETED)
    if first:
        places = offsets * b + rank_offsets
        if da_ptr is not None:
            tl.store(da_ptr + places, low, mask=inside)
        if z_ptr is not None:
            z = cast(activation(a_tile, ACTIVATION), LOW, INTERPRETED)
            tl.store(z_ptr + places, z, mask=inside)
        if dd_ptr is not None:
            dd_part = dd_partials_ptr + tl.program_id(0).to(tl.int64) * b
            tl.store(dd_part + ranks, tl.sum(da, axis=0), mask=ranks < b)
            count = tl.num_programs(0)
            if arrive(counter_ptr) == count - 1:
                _add_up_dd(dd_ptr, dd_partials_ptr, ranks, b, count, AT_ONCE, INTERPRETED)
                tl.store(counter_ptr, 0)
    return low


@triton.jit(do_not_specialize=["M", "n_blocks", "k_blocks"])
def bottleneck_backward_kernel(
    dy_ptr,
    a_ptr,
    down_ptr,
    up_ptr,
    da_ptr,
    z_ptr,
    dh_ptr,
    dd_ptr,
    dz_partials_ptr,
    dd_partials_ptr,
    counters_ptr,
    M,
    K,
    N,
    b,
    n_blocks,
    k_blocks,
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
    AT_ONCE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j): row block i, of whose dh it writes column group j; the first of them leaves da, z
    and dd. Without dh, j is its share of dy's columns: each leaves a partial sum of dz, and the last one
    of a row block goes on with their sum.

    ``K`` is dy's length and ``N`` that of dh, as a forward that read dy would have them. Of da, z, dh
    and dd what isn't asked for is None, ``down`` without dh, ``up`` where z is all, the partial sums of
    dz where a program has all of K. ADDS_DY: dh is ``dy + da·D``. The first counter is dd's.
    """
    dy = Matrix(dy_ptr, stride_dym, stride_dyn)
    a = Matrix(a_ptr, stride_am, stride_ab)
    LOW: tl.constexpr = a_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    dz = None
    if up_ptr is not None:
        up = Matrix(up_ptr, stride_ub, stride_un)  # Uᵀ: its rows are U's columns
        # Counted in blocks, so that the compiler knows the alignment of every load.
        begin, end = 0, K
        if dz_partials_ptr is not None:
            begin = tl.program_id(1) * k_blocks * BLOCK_K
            end = tl.minimum(begin + k_blocks * BLOCK_K, K)
        dz = shrink_rows(
            dy, up, None, rows, ranks, begin, end, M, K, b, BLOCK_K, STAGES, DOWN, INTERPRETED
        )  # [BLOCK_M, BLOCK_R]
    if dz_partials_ptr is not None:
        places = rows.to(tl.int64)[:, None] * b + ranks[None, :]
        inside = (rows < M)[:, None] & (ranks < b)[None, :]
        size, shares = tl.cast(M, tl.int64) * b, tl.num_programs(1)
        tl.store(dz_partials_ptr + tl.program_id(1) * size + places, dz, mask=inside)
        counter = counters_ptr + 1 + tl.program_id(0)
        if arrive(counter) == shares - 1:
            dz = sum_blocks(dz_partials_ptr, places, inside, size, shares)
            _leave(
                dz, True, a, da_ptr, z_ptr, dd_ptr, dd_partials_ptr, counters_ptr,
                rows, ranks, M, b, scaling, ACTIVATION, LOW, AT_ONCE, INTERPRETED,
            )  # fmt: skip
            tl.store(counter, 0)
    else:
        da = _leave(
            dz, tl.program_id(1) == 0, a, da_ptr, z_ptr, dd_ptr, dd_partials_ptr, counters_ptr,
            rows, ranks, M, b, scaling, ACTIVATION, LOW, AT_ONCE, INTERPRETED,
        )  # fmt: skip
        if dh_ptr is not None:
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
    over_columns: LaunchConfig | None = None,
) -> Gradients:
    """The gradients asked for of ``bottleneck``, with ``da = scaling · dy·U ⊙ f'(a)``.

        dh = dy + da·D,  dD = daᵀ·h,  dd = Σ da,  dU = scaling · dyᵀ·f(a),  du = scaling · Σ dy

    Shapes: ``dy [M, N]``, ``h [M, K]``, ``a [M, b]``, ``down [b, K]``, ``up [N, b]``, of any strides →
    ``dh [M, K]`` in the dtype of ``dy``, the others in that of ``down``. With another ``residual`` than
    h, whose gradient is dy, ``dh = da·D``. Only dD reads ``h``, which may be None without it. ``config``
    is that of the launch over rows, ``over_columns`` of the other.
    """
    (M, N), (b, K) = dy.shape, down.shape
    rules = {
        "rows": config or rule_for("bottleneck", dy, M, N, K, b),
        "columns": over_columns or rule_for("bottleneck_backward", dy, M, K, N, b),
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
        residual=residual,
    )
    return launcher(launch, down.dtype)(dy, h, a, down, up, scaling)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: BottleneckBackwardLaunch, dtype: torch.dtype) -> Callable[..., Gradients]:
    """What launches it: of ``dy, h, a, down, up, scaling``; all but dh have ``dtype``. What no result
    depends on that is asked for may be None."""
    over_rows = _over_rows(launch, launch.rows, dtype) if launch.rows else None
    over_columns = columns.launcher(launch.columns, dtype) if launch.columns else None

    def run(
        dy: Tensor,
        h: Tensor | None,
        a: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        scaling: float,
    ) -> Gradients:
        da = z = of_rows = dh = dD = dd = dU = du = None
        if over_rows:
            da, z, of_rows, dd = over_rows(dy, a, down, up, scaling)
        if over_columns:
            dh, dD, dU, du = over_columns(dy, h, down, z, da, scaling)
        return dh if of_rows is None else of_rows, dD, dd, dU, du

    return run


def _over_rows(
    whole: BottleneckBackwardLaunch, launch: BottleneckLaunch, dtype: torch.dtype
) -> Callable[..., Gradients]:
    """What launches the pass over rows: gives ``da``, ``z``, dh and dd as far as they are its work."""
    c, M, K, b = launch.config, launch.M, launch.N, launch.b
    start = Start(bottleneck_backward_kernel, launch.grid, c.options)
    blocks = (
        not whole.residual, launch.activation, c.block_m, c.block_n, c.block_k, c.block_r,
        c.num_stages, launch.down, launch.up, _AT_ONCE, INTERPRETED,
    )  # fmt: skip
    row_blocks, shares = launch.grid
    later = whole.columns.wants if whole.columns else ()
    want_dh = "dh" in whole.wants and "dh" not in later
    want_da, want_z, want_dd = bool({"dh", "dD"} & {*later}), "dU" in later, "dd" in whole.wants

    @on_its_device
    def run(
        dy: Tensor, a: Tensor, down: Tensor | None, up: Tensor | None, scaling: float
    ) -> Gradients:
        device, low = dy.device, wide(dy.dtype)
        da = torch.empty((M, b), dtype=low, device=device) if want_da else None
        z = torch.empty((M, b), dtype=low, device=device) if want_z else None
        dh = torch.empty((M, K), dtype=dy.dtype, device=device) if want_dh else None
        dd = dd_partials = dz_partials = used = None
        if want_dd:
            dd = (torch.empty if M else torch.zeros)((b,), dtype=dtype, device=device)
        if not M * b:
            return da, z, dh, dd
        if want_dd:
            dd_partials = torch.empty((row_blocks, b), dtype=torch.float32, device=device)
        if launch.split:
            dz_partials = torch.empty((shares, M, b), dtype=torch.float32, device=device)
        if want_dd or launch.split:
            used = counters(dy, 1 + row_blocks)
        # The same code whatever else is there.
        down = down if want_dh else None
        up = up if want_da or want_dh or want_dd else None
        strides = (*dy.stride(), *a.stride(), *strides_of(down, 2), *strides_of(up, 2))
        start(
            key_of(strides, tensors=(dy, a, down, up)),
            dy, a, down, up, da, z, dh, dd, dz_partials, dd_partials, used,
            M, launch.K, K, b, launch.n_blocks, launch.k_blocks, float(scaling), *strides, *blocks,
        )  # fmt: skip
        return da, z, dh, dd

    return run
