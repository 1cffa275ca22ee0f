"""The LoRA convolution: one backward formula, registered for tracing and wrapped for eager.

The convolutions with W are PyTorch's, whatever backend is forced; those with A may be a backend's own,
``backends/convolution.py``. A 1 x 1 convolution of channels-last images is a ``lora_linear`` over their
positions, without a copy. In any other without groups, ``ds`` and ``dB`` of a channels-last or 16-bit
``dy`` come with ``dA``, or are the operation ``expand_backward`` of whatever backend serves it. Under
``torch.func`` transforms, in forward mode, in exported programs and for subclasses of tensors a call is
the reference, which PyTorch differentiates, batches and exports itself.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast import reference
from lorafast.backends import forced, registry
from lorafast.core.context import alone, is_batched, needs_plain_pytorch, watched, without_autocast
from lorafast.core.convolution import Geometry, convolve, is_channels_last
from lorafast.core.dtypes import wide
from lorafast.core.problem import is_plain
from lorafast.ops import flops, unstrided
from lorafast.ops.checks import check_dropout
from lorafast.ops.lora_conv_checks import check_lora_conv
from lorafast.ops.lora_conv_products import WANTS, Adapter, backward, forward
from lorafast.ops.lora_linear import lora_linear
from lorafast.ops.registration import register, register_autograd

_HALVES = (torch.float16, torch.bfloat16)
_NO_X = (
    "a second derivative of lora_conv needs x, which is not kept when lora_A has no gradient: let "
    "lora_A require one"
)


def lora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    geometry: Geometry,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = conv(x, W) + scaling · conv(conv(drop(x), A), B) + bias`` outside autocast, of a batch; as
    ``functional.lora_conv``, on checked arguments, with the seed of the mask given."""
    if is_linear(x, weight, geometry):
        y = lora_linear(
            x.movedim(1, -1), weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1), scaling, bias,
            dropout_p, seed,
        )  # fmt: skip
        return y.movedim(-1, 1)
    compiling = torch.compiler.is_compiling()
    if compiling or not alone() or not is_plain(x, weight, lora_A, lora_B, bias):
        found = _surrounded(
            compiling, x, weight, lora_A, lora_B, scaling, bias, geometry, dropout_p, seed
        )
        if found is not None:
            return found
    adapter = Adapter(lora_A, lora_B, float(scaling), geometry, dropout_p, seed)
    if torch.is_grad_enabled():
        return _apply(x, weight, lora_A, lora_B, bias, adapter)
    return forward(x, weight, bias, adapter, keep_s=False)[0]


def is_linear(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the convolution is a linear layer over rows that x has in memory, and y too: 1 x 1,
    channels last.

    In one dimension there is no such format, in three it depends on the dtype whether a CPU's y has
    it, and an x that is contiguous too counts as that.
    """
    stride, padding, _, groups = geometry
    return (
        groups == 1
        and weight.dim() == 4
        and not x.is_contiguous()
        and all(size == 1 for size in weight.shape[2:])
        and all(one == 1 for one in stride)
        and not any(padding)
        and is_channels_last(x)
    )


def _surrounded(
    compiling: bool,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    geometry: Geometry,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor | None:
    """The layer in compiled code, under transforms, tracing and modes; None if it is none of these."""
    reason = needs_plain_pytorch(compiling)
    if reason is None and not compiling:
        if not is_plain(x, weight, lora_A, lora_B, bias):
            reason = "tensors of other classes than PyTorch's own"
        elif not watched():
            return None
    if reason is not None:
        forced.check_plain_pytorch("lora_conv", reason)
        if dropout_p and seed is not None and unstrided.is_sharded(x):
            return unstrided.lora_conv(
                x, weight, lora_A, lora_B, scaling, bias, geometry, dropout_p, seed
            )
        return reference.lora_conv(
            x,
            weight,
            lora_A,
            lora_B,
            scaling,
            bias,
            geometry=geometry,
            dropout_p=dropout_p,
            seed=seed,
        )
    if compiling:
        # A float of a custom operation is a constant: another value would be another graph.
        if lora_B.dtype in _HALVES:  # which would round the product
            lora_A, lora_B = lora_A.float(), lora_B.float()
        lora_B, scaling = lora_B * scaling, 1.0
    else:
        flops.tell_counters()
    y: Tensor = torch.ops.lorafast.lora_conv(
        x, weight, lora_A, lora_B, scaling, bias, *geometry, dropout_p, seed
    )[0]
    return y


def _save(
    ctx: Any, x: Tensor, weight: Tensor, adapter: Adapter, s: Tensor | None, needs: tuple[bool, ...]
) -> None:
    """Keeps for the backward what the needed gradients take. The bias is none of it."""
    need_dx, need_dweight, need_dA, need_dB = needs
    lora_A, lora_B, *_, seed = adapter
    ctx.save_for_backward(
        x if need_dA or need_dweight else None,
        weight if need_dx or need_dweight else None,
        lora_A if need_dx or need_dA else None,
        lora_B,
        s if need_dB else None,
        seed,
    )
    ctx.lora_A = lora_A  # not its values: what a second derivative is for
    ctx.scaling, ctx.geometry, ctx.dropout_p = adapter[2:5]
    ctx.of_x = x.shape, is_channels_last(x)
    ctx.backend = forced.forced()


def _saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """``x``, ``weight``, ``lora_A``, ``lora_B``, ``s`` and ``seed``, those that ``_save`` kept."""
    try:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            "x, weight, lora_A or lora_B was changed in place after a LoRA layer had kept it for its "
            "backward: write x = x + layer(x), not x += layer(x), and step the optimizer only after "
            "the backward"
        ) from error
    return saved


def _like_x(ctx: Any, dy: Tensor) -> Tensor:
    """Of the size and the memory format of an x that isn't kept; nobody reads its values."""
    (batch, C, *size), last = ctx.of_x
    if not last:
        return dy.new_empty((batch, C, *size))
    return dy.new_empty((batch, *size, C)).movedim(-1, 1)


def _wanted(needs: tuple[bool, ...]) -> tuple[str, ...]:
    return tuple(name for name, need in zip(WANTS, needs, strict=True) if need)


def _differentiable_backward(ctx: Any, dy: Tensor, wants: tuple[str, ...]) -> dict[str, Any]:
    """The formula on the reference, so that PyTorch can differentiate it once more."""
    x, weight, lora_A, lora_B, s, seed = _saved(ctx)
    geometry, p = ctx.geometry, ctx.dropout_p
    if x is None and {"dx", "dB"} <= set(wants):
        raise RuntimeError(_NO_X)
    if s is None:  # nothing wanted takes it
        sizes = (dy.shape[0], ctx.lora_A.shape[0], *dy.shape[2:])
        s = dy.new_zeros(sizes, dtype=wide(dy.dtype))
    elif x is not None:
        # s was saved as a number; its dependence on x and A must be part of the graph.
        again = reference.conv_shrink(x, ctx.lora_A, geometry, p, seed)
        s = again + (s - again).detach()
    x = _like_x(ctx, dy).zero_() if x is None else x
    W = weight if weight is not None else _like_weight(ctx, dy)
    A = lora_A if lora_A is not None else ctx.lora_A.detach()
    assert lora_B is not None
    found = reference.lora_conv_backward(
        dy, x, W, A, lora_B, s, ctx.scaling, geometry=geometry, dropout_p=p, seed=seed
    )
    return {n: g for n, g in zip(WANTS, found, strict=True) if n in wants}


def _like_weight(ctx: Any, dy: Tensor) -> Tensor:
    """Of the size of a weight that isn't kept, since no gradient takes its values."""
    C, *kernel = ctx.lora_A.shape[1:]
    return dy.new_zeros((dy.shape[1], C // ctx.geometry.groups, *kernel))


class _LoRAConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        adapter: Adapter,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:4]
        y, s = forward(x, weight, bias, adapter, keep_s=needs[3])
        _save(ctx, x, weight, adapter, s, needs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        wants = _wanted(ctx.needs_input_grad[:5])
        with without_autocast(dy):
            found = _eager_backward(ctx, dy, wants)
        return (*(found.get(name) for name in WANTS), None)


def _eager_backward(ctx: Any, dy: Tensor, wants: tuple[str, ...]) -> dict[str, Any]:
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()  # compiled autograd, which traces this
        or is_batched(dy)  # is_grads_batched
        or type(dy) is not Tensor
        or (not alone() and needs_plain_pytorch() is not None)
    ):
        return _differentiable_backward(ctx, dy, wants)
    x, weight, lora_A, lora_B, s, seed = _saved(ctx)
    x = _like_x(ctx, dy) if x is None else x
    lora_A = ctx.lora_A if lora_A is None else lora_A
    assert lora_A is not None
    assert lora_B is not None
    adapter = Adapter(lora_A, lora_B, ctx.scaling, ctx.geometry, ctx.dropout_p, seed)
    if forced.forced() == ctx.backend:
        found = backward(dy, x, weight, s, adapter, wants)
    else:
        with forced.use_backend(ctx.backend or registry.AUTO):
            found = backward(dy, x, weight, s, adapter, wants)
    return dict(zip(WANTS, found, strict=True))


# As that of lora_linear.
_apply = super(torch.autograd.Function, _LoRAConv).apply


def _registered_run(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    check_lora_conv(x, weight, lora_A, lora_B, scaling, bias, geometry, dropout_p)
    check_dropout(dropout_p, seed)
    adapter = Adapter(lora_A, lora_B, scaling, geometry, dropout_p, seed)
    y, s = forward(x, weight, bias, adapter, keep_s=True)
    assert s is not None
    return y, s


def _registered_fake(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    check_dropout(dropout_p, seed)
    low = wide(x.dtype)
    left = x.movedim(1, -1).contiguous().movedim(-1, 1) if dropout_p else x
    s = convolve(left.to(low), lora_A.to(low), None, geometry.of_A())
    return convolve(x, weight, bias, geometry), s


def _registered_backward_run(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dropout_p: float,
    seed: Tensor | None,
    wants: str,
) -> tuple[Tensor, ...]:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    adapter = Adapter(lora_A, lora_B, scaling, geometry, dropout_p, seed)
    found = backward(dy, x, weight, s, adapter, tuple(wants.split(",")))
    likes = (x, weight, lora_A, lora_B)
    dbias = found[4]
    return (
        *(_laid_out(t, like) for t, like in zip(found[:4], likes, strict=True)),
        dy.new_empty(0) if dbias is None else dbias,
    )


def _laid_out(found: Tensor | None, like: Tensor) -> Tensor:
    """``found`` with the strides of ``torch.empty_like(like)``, which the fake promises."""
    if found is None:
        return like.new_empty(0)
    promised = torch.empty_like(like)
    return found if found.stride() == promised.stride() else promised.copy_(found)


def _registered_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dropout_p: float,
    seed: Tensor | None,
    wants: str,
) -> tuple[Tensor, ...]:
    asked = wants.split(",")
    likes = {"dx": x, "dweight": weight, "dA": lora_A, "dB": lora_B}
    found = [torch.empty_like(t) if n in asked else t.new_empty(0) for n, t in likes.items()]
    return *found, dy.new_empty(dy.shape[1] if "dbias" in asked else 0)


def _registered_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)  # no zeros for that of s
    x, weight, lora_A, lora_B, scaling, _, *geometry, dropout_p, seed = inputs
    stride, padding, dilation, groups = geometry
    ctx.geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    ctx.save_for_backward(x, weight, lora_A, lora_B, s, seed)


def _registered_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    need_dx, need_dweight, need_dA, need_dB, _, need_dbias = ctx.needs_input_grad[:6]
    wants = _wanted((need_dx, need_dweight, need_dA, need_dB, need_dbias))
    if dy is None or not wants:
        return (None,) * count
    x, weight, lora_A, lora_B, s, seed = ctx.saved_tensors
    if torch.is_grad_enabled() or needs_plain_pytorch(torch.compiler.is_compiling()) is not None:
        again = reference.conv_shrink(x, lora_A, ctx.geometry, ctx.dropout_p, seed)
        s = again + (s - again).detach()
        found = reference.lora_conv_backward(
            dy, x, weight, lora_A, lora_B, s, ctx.scaling, geometry=ctx.geometry,
            dropout_p=ctx.dropout_p, seed=seed,
        )  # fmt: skip
    else:
        found = torch.ops.lorafast.lora_conv_backward(
            dy, x, weight, lora_A, lora_B, s, ctx.scaling, *ctx.geometry, ctx.dropout_p, seed,
            ",".join(wants),
        )  # fmt: skip
    dx, dweight, dA, dB, dbias = (
        g if n in wants else None for n, g in zip(WANTS, found, strict=True)
    )
    return (dx, dweight, dA, dB, None, dbias, *[None] * 6)[:count]


register(
    "lora_conv",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, int groups, float dropout_p=0.0, "
    "Tensor? seed=None) -> (Tensor y, Tensor s)",
    _registered_run,
    _registered_fake,
)
register_autograd("lora_conv", _registered_setup_context, _registered_backward)
register(
    "lora_conv_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, float scaling, "
    "int[] stride, int[] padding, int[] dilation, int groups, float dropout_p, Tensor? seed, "
    "str wants) -> (Tensor dx, Tensor dweight, Tensor dA, Tensor dB, Tensor dbias)",
    _registered_backward_run,
    _registered_backward_fake,
)
