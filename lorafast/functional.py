"""The public functions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import ops
from lorafast.backends import forced
from lorafast.core import columns
from lorafast.core.assignment import Assignment
from lorafast.core.context import autocast_anywhere, autocast_enabled, without_autocast
from lorafast.operands import Operand, Weight
from lorafast.ops.bottleneck_checks import check_bottleneck
from lorafast.ops.checks import (
    check_dora_linear,
    check_float,
    check_lokr_linear,
    check_lora_linear,
    check_oft_linear,
    check_probability,
    check_scaled_lora_linear,
    has_rows,
)
from lorafast.ops.dora_linear import around_float16
from lorafast.ops.kept_norm import NormOf
from lorafast.ops.lora_conv_checks import (
    check_lora_conv,
    check_magnitude,
    geometry_of,
    key_of,
    known_geometry,
    remember,
)
from lorafast.reference.bottleneck import activate

_SEEDS = 2**63 - 1


def _draw(device: torch.device) -> Tensor:
    """The seed of a mask, int64 ``[1]``."""
    seed = torch.randint(_SEEDS, (1,), device=device)
    part = columns.current()
    return seed if part is None else part.seed(seed)


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias``, the LoRA linear layer (Hu et al., 2021).

    Args:
        x: ``[..., K]``, any number of leading dimensions, any strides. A sparse, nested or oneDNN
            tensor gives what ``F.linear`` gives for it, by PyTorch's own calls.
        weight: ``[N, K]``, in the dtype of ``x``: a tensor, or an ``Operand`` of another format
            (``lorafast.operands``), into which no gradient flows.
        lora_A: ``[r, K]``; ``r`` of at least 1, larger than ``K`` or ``N`` if you like.
        lora_B: ``[N, r]``, in the dtype of ``lora_A``, which may differ from that of ``x``: float32
            adapters over a bfloat16 layer make no float32 copy of ``x``.
        scaling: a number, ``alpha / r`` or ``alpha / sqrt(r)``.
        bias: ``[N]``, in the dtype of ``x``.
        dropout_p: probability with which an element of ``x`` is dropped on its way into the low-rank
            product; applied if ``training``. The seed is drawn from PyTorch's generator for the
            device of ``x``, so ``torch.manual_seed`` and checkpointing behave as with
            ``nn.Dropout``.

    Returns:
        ``y [..., N]`` in the dtype of ``x``. Every tensor argument may require a gradient; ``x`` is
        kept for the backward only if ``lora_A`` (or ``weight``) does. Under autocast ``x``,
        ``weight`` and ``bias`` are cast as ``F.linear`` would; ``lora_A`` and ``lora_B`` stay.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what
            was expected.
        BackendError: the forced backend can't serve the call; the message says why.
    """
    if autocast_anywhere() and autocast_enabled(x):
        return _under_autocast(
            x, weight, lora_A, lora_B, scaling, bias, dropout_p=dropout_p, training=training
        )
    if dropout_p:
        if training:
            check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)  # before a draw
            seed = _draw(x.device)
            return ops.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
        check_probability(dropout_p)
        dropout_p = 0.0
    return ops.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    norm_of: NormOf | None = None,
) -> Tensor:
    """``y = magnitude / ‖W + scaling·B·A‖ ⊙ (x·(W + scaling·B·A)ᵀ) + bias`` (Liu et al., "DoRA", 2024).

    The norm is that of each row, and carries no gradient (section 4.3 of the paper). A row of zeros
    gives zero, before the bias. With dropout the frozen layer sees x and the change that DoRA makes to
    it sees ``drop(x)``, as in PEFT: with ``scale`` for ``magnitude / norm``,

        y = x·Wᵀ + (scale − 1) ⊙ drop(x)·Wᵀ + scale ⊙ scaling · (drop(x)·Aᵀ)·Bᵀ + bias

    Args:
        x: ``[..., K]``, any number of leading dimensions, any strides.
        weight: ``[N, K]``, in the dtype of ``x``: a tensor, or an ``Operand`` of another format
            (``lorafast.operands``), into which no gradient flows.
        lora_A: ``[r, K]``; ``r`` of at least 1.
        lora_B: ``[N, r]``, in the dtype of ``lora_A``, which may differ from that of ``x``. With float32
            adapters over float16 all but the products with ``weight`` is float32.
        magnitude: ``[N]``, in any float dtype; a new layer's is the norm of each row of ``weight``.
        scaling: a number, ``alpha / r`` or ``alpha / sqrt(r)``.
        bias: ``[N]``, in the dtype of ``x``.
        dropout_p: probability with which an element of ``x`` is dropped, applied if ``training``, with
            the mask and the seed of ``lora_linear``.
        norm_of: what takes the norm ``[N]`` of ``weight``, ``lora_A``, ``lora_B`` and ``scaling``: a
            layer's keeps it in evaluation. None computes it.

    Returns:
        ``y [..., N]`` in the dtype of ``x``. Every tensor argument may require a gradient. ``B·A`` and
        its sum with W are never made. Under autocast ``x``, ``weight`` and ``bias`` are cast as
        ``F.linear`` would, after the norm was taken. With dropout ``drop(x)`` is made, and the mask is
        kept for the backward where ``x`` requires a gradient.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what
            was expected.
        BackendError: the forced backend can't serve the call; the message says why.
    """
    uncast = weight
    under_autocast = autocast_anywhere() and autocast_enabled(x)
    if under_autocast:
        x, weight, bias = _cast(x, weight, bias)
    check_dora_linear(x, weight, lora_A, lora_B, magnitude, scaling, bias, dropout_p)
    p = dropout_p if training else 0.0
    seed = _draw(x.device) if p else None
    with without_autocast(x):
        scale = magnitude / (norm_of or ops.weight_norm)(uncast, lora_A, lora_B, scaling)
        run = ops.dora_linear
        if x.dtype is torch.float16 and lora_A.dtype is torch.float32 and not under_autocast:
            run = around_float16
        return run(x, weight, lora_A, lora_B, scale, scaling, bias, p, seed)


def scaled_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    d_in: Tensor | None = None,
    m: Tensor | None = None,
    d_out: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``y = x·Wᵀ + scaling · d_out ⊙ ((((d_in ⊙ drop(x))·Aᵀ) ⊙ m)·Bᵀ) + bias``: LoRA's relatives.

    | adapter | what is trained | arguments |
    |---|---|---|
    | LoRA (Hu et al., 2021) | A, B | no vector |
    | LoRA-FA (Zhang et al., 2023) | B | ``lora_A`` without a gradient |
    | VeRA (Kopiczko et al., 2023) | ``m``, ``d_out`` | A and B shared and frozen |
    | AdaLoRA (Zhang et al., 2023) | A, B, ``m`` | ``m``: the singular values |
    | LoRA-XS (Bałazy et al., 2024) | ``m [r, r]`` | A and B frozen, of an SVD of W |

    The vectors are folded into A and B, which are small: x and y take the passes of ``lora_linear``.

    Args:
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, training: as for ``lora_linear``.
        d_in: ``[K]``, in any float dtype, as the other vectors; None is ones.
        m: ``[r]``; or ``[r, r]``, a matrix between A and B: ``s·mᵀ`` for ``s ⊙ m``.
        d_out: ``[N]``.

    Returns:
        ``y [..., N]`` in the dtype of ``x``. Every tensor argument may require a gradient; ``x`` is
        kept for the backward only if ``lora_A``, ``d_in`` or ``weight`` does. Under autocast ``x``,
        ``weight`` and ``bias`` are cast as ``F.linear`` would; the others stay.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what
            was expected.
        BackendError: the forced backend can't serve the call; the message says why.
    """
    if autocast_anywhere() and autocast_enabled(x):
        x, weight, bias = _cast(x, weight, bias)
    check_scaled_lora_linear(
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, d_in=d_in, m=m, d_out=d_out
    )
    p = dropout_p if training else 0.0
    seed = _draw(x.device) if p else None
    with without_autocast(x):
        return ops.scaled_lora_linear(
            x, weight, lora_A, lora_B, scaling, bias, d_in, m, d_out, p, seed
        )


def lokr_linear(
    x: Tensor,
    weight: Weight,
    w1: Tensor,
    w2: Tensor | tuple[Tensor, Tensor],
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x·(W + scaling · w1 ⊗ w2)ᵀ + bias``, LoKr (Yeh et al., "LyCORIS", 2023).

    ``w1 ⊗ w2`` is never made: two small products over ``x`` as ``[M, b, d]`` take its place.

    Args:
        x: ``[..., b·d]``, strided.
        weight: ``[a·c, b·d]``, in the dtype of ``x``: a tensor or an ``Operand``.
        w1: ``[a, b]``, in any float dtype.
        w2: ``[c, d]``, or a pair ``[c, r]``, ``[r, d]`` of which it is the product, in the dtype of
            ``w1``.
        scaling: a number; PEFT's is ``alpha / r``.
        bias: ``[a·c]``, in the dtype of ``x``.

    Returns:
        ``y [..., a·c]`` in the dtype of ``x``. Every tensor argument may require a gradient; ``x`` is
        kept for the backward, and no product. float16 is computed in float32: no product with w1 or w2
        need fit into it. Under autocast ``x``, ``weight`` and ``bias`` are cast as ``F.linear`` would.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what
            was expected.
    """
    if autocast_anywhere() and autocast_enabled(x):
        x, weight, bias = _cast(x, weight, bias)
    check_lokr_linear(x, weight, w1, w2, scaling, bias)
    with without_autocast(x):
        return ops.lokr_linear(x, weight, w1, w2, scaling, bias)


def oft_linear(x: Tensor, weight: Weight, blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = (x·diag(R_1 … R_b))·Wᵀ + bias``, OFT (Qiu et al., 2023), for any blocks.

    Args:
        x: ``[..., b·k]``, strided.
        weight: ``[N, b·k]``, in the dtype of ``x``: a tensor or an ``Operand``.
        blocks: ``[b, k, k]``, in any float dtype; the product with x is computed in the wider one.
        bias: ``[N]``, in the dtype of ``x``.

    Returns:
        ``y [..., N]`` in the dtype of ``x``. Every tensor argument may require a gradient; ``x`` is
        kept for the backward if ``blocks`` does. Under autocast ``x``, ``weight`` and ``bias`` are cast
        as ``F.linear`` would.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what
            was expected.
    """
    if autocast_anywhere() and autocast_enabled(x):
        x, weight, bias = _cast(x, weight, bias)
    check_oft_linear(x, weight, blocks, bias)
    with without_autocast(x):
        return ops.oft_linear(x, weight, blocks, bias)


def grouped_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    adapter_of: Sequence[int] | int | Tensor | Assignment,
    bias: Tensor | None = None,
) -> Tensor:
    """``y_i = x_i·Wᵀ + scaling[g_i] · (x_i·A[g_i]ᵀ)·B[g_i]ᵀ + bias`` with ``g = adapter_of``: each
    element of a batch with one of several adapters, or with none.

    Adapters are stacked, as in Punica (Chen et al., 2023) and S-LoRA (Sheng et al., 2023); those of a
    lower rank are filled up with zeros. There is no dropout. ``aten`` computes it, and ``reference``
    where that is forced; no other backend that ships has it.

    Args:
        x: ``[..., K]``, any number of leading dimensions, any strides.
        weight: ``[N, K]``, in the dtype of ``x``: a tensor, or an ``Operand`` of another format
            (``lorafast.operands``), into which no gradient flows.
        lora_A: ``[n, r, K]``; ``n`` and ``r`` of at least 1.
        lora_B: ``[n, N, r]``, in the dtype of ``lora_A``, which may differ from that of ``x``.
        scaling: ``[n]`` in any float dtype, or a number for all.
        adapter_of: integers from -1, which is none, to ``n - 1``: of the leading dimensions of ``x``, or
            of the first of them, where all rows of an element have the same adapter.

            - A sequence (of the first dimension), or a tensor on the CPU: the host groups the elements,
              in Python, and a GPU is given the groups without being waited for. The fewest operations,
              for few elements: sequences, not tokens. Code is compiled again for another sequence, not
              for another tensor.
            - A tensor on the CUDA device of ``x``: that groups the elements, in about forty small
              operations, and the host doesn't wait for it. Up to a quarter more rows than there are go
              through the low-rank products, for the groups must hold any assignment. CUDA graphs take
              this one. (A device of another kind is waited for, and the host groups.)
            - An ``Assignment`` (``lorafast.core.assignment``) of either: what one call makes of it
              serves those of other layers, on the same device and stream.
        bias: ``[N]``, in the dtype of ``x``.

    Returns:
        ``y [..., N]`` in the dtype of ``x``. Every float tensor may require a gradient, ``scaling`` too.
        A NaN or an infinity in an element or in an adapter reaches no output and no gradient of another
        adapter. Under autocast ``x``, ``weight`` and ``bias`` are cast as ``F.linear`` would; the
        adapters stay. The low-rank term of a float16 ``x`` is float32.

    Raises:
        TypeError, ValueError: an argument doesn't fit, or ``adapter_of`` holds an index out of range;
            the message names it, what it is, and what was expected.
        RuntimeError: a tensor on a GPU holds an index out of range. A device-side assertion says so, as
            of ``F.embedding``: the host hears of it when it next waits for the GPU, and must start anew.
        BackendError: the forced backend can't serve the call; the message says why.
    """
    if not (autocast_anywhere() and autocast_enabled(x)):
        return ops.grouped_lora_linear(x, weight, lora_A, lora_B, scaling, adapter_of, bias)
    x, weight, bias = _cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return ops.grouped_lora_linear(x, weight, lora_A, lora_B, scaling, adapter_of, bias)


def bottleneck(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """``y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u)``, a bottleneck adapter.

    Houlsby et al., 2019; Pfeiffer et al., 2021; He et al., 2022, scale it and add it to another
    ``residual``. The bias u is scaled too, as in AdapterHub's ``adapters``.

    Args:
        h: ``[..., K]``, any number of leading dimensions, any strides.
        down: D ``[b, K]``; ``b`` of at least 1.
        up: U ``[N, b]``, in the dtype of ``down``, which may differ from that of ``h``.
        down_bias: d ``[b]``, in the dtype of ``down``; None only where ``up_bias`` is.
        up_bias: u ``[N]``, in the dtype of ``down``.
        scaling: a number.
        activation: f: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"`` (swish) or ``"tanh"``.
        residual: ``[..., N]`` in the dtype of ``h``, by default ``h`` itself.

    Returns:
        ``y [..., N]`` in the dtype of ``h``. Every tensor may require a gradient. Kept for the backward
        are ``h``, if ``down`` requires one, and ``h·Dᵀ + d``. In float16 all but ``h``, ``residual`` and
        ``y`` is float32. Under autocast y has the dtype of ``residual``, as PyTorch's own sum would.
        Where that is not autocast's dtype PyTorch's own calls compute it, and a forced backend that is
        made of others refuses. A second derivative needs ``h``: ``down`` must require a gradient then.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what
            was expected.
        BackendError: the forced backend can't serve the call; the message says why.
    """
    if not (autocast_anywhere() and autocast_enabled(h)):
        return ops.bottleneck(h, down, up, down_bias, up_bias, scaling, activation, residual)
    (low,) = _cast(h)
    onto = h if residual is None else residual
    like = residual
    if isinstance(residual, Tensor) and residual.is_floating_point() and has_rows(residual):
        # Any float dtype fits; one element is cast, to be checked in place of them all.
        like = residual.new_empty((), dtype=low.dtype).expand(residual.shape)
    check_bottleneck(low, down, up, down_bias, up_bias, scaling, activation, like)
    if onto.dtype is low.dtype:
        with torch.autocast(h.device.type, enabled=False):
            return ops.bottleneck(low, down, up, down_bias, up_bias, scaling, activation, residual)
    forced.check_plain_pytorch(
        "bottleneck", f"residuals of another dtype ({onto.dtype}) than autocast's"
    )
    z = activate(F.linear(low, down, down_bias), activation)
    return onto + scaling * F.linear(z, up, up_bias)


def quantized_linear(x: Tensor, weight: Operand, bias: Tensor | None = None) -> Tensor:
    """``y = x·Wᵀ + bias`` over a frozen weight of another format than dense.

    Args:
        x: ``[..., K]``, any number of leading dimensions, any strides.
        weight: ``[N, K]``, an ``Operand`` (``lorafast.operands``) in the dtype of ``x``. No gradient
            flows into it.
        bias: ``[N]``, in the dtype of ``x``.

    Returns:
        ``y [..., N]`` in the dtype of ``x``. ``x`` and ``bias`` may require a gradient. Neither ``x``
        nor W made dense is kept for the backward. Under autocast all are cast as ``F.linear`` would.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what
            was expected.
        BackendError: the forced backend can't serve the call; the message says why.
    """
    if not (autocast_anywhere() and autocast_enabled(x)):
        return ops.quantized_linear(x, weight, bias)
    x, weight, bias = _cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return ops.quantized_linear(x, weight, bias)


def _under_autocast(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    *,
    dropout_p: float,
    training: bool,
) -> Tensor:
    """Casts at the entrance, then leaves autocast: inside, dtypes are settled."""
    device_type = x.device.type
    x, weight, bias = _cast(x, weight, bias)
    with torch.autocast(device_type, enabled=False):
        return lora_linear(
            x, weight, lora_A, lora_B, scaling, bias, dropout_p=dropout_p, training=training
        )


def _cast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """``x`` and what is beside it, as autocast casts arguments of ``F.linear``."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Any) -> Any:
        # As autocast itself: float64 stays. What is no float tensor stays too, to be refused by name.
        lower = isinstance(tensor, (Tensor, Operand)) and tensor.dtype.is_floating_point
        return tensor.to(dtype) if lower and tensor.dtype != torch.float64 else tensor

    return tuple(cast(tensor) for tensor in (x, *others))


def lora_embedding(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """``y = W[x] + scaling · Aᵀ[x]·Bᵀ``, LoRA over an embedding (Hu et al., 2021), as PEFT has it.

    PyTorch's own calls compute it, whatever backend is forced. ``padding_idx`` is the one option of
    ``F.embedding`` that it has: ``max_norm`` would change the frozen weight, ``scale_grad_by_freq`` has
    no second derivative, and ``sparse`` no gradient of A. Where an embedding scales its output (Gemma's
    ``embed_scale``), scale ``y``.

    Args:
        tokens: ``[...]``, integers of any dtype from 0 to V - 1.
        weight: ``[V, N]``, any strides.
        lora_A: ``[r, V]``; ``r`` of at least 1.
        lora_B: ``[N, r]``, in the dtype of ``lora_A``, which may differ from that of ``weight``.
        scaling: a number, ``alpha / r`` or ``alpha / sqrt(r)``, or a tensor of shape ``[]``, whose value
            is not waited for.
        padding_idx: the row of W and of Aᵀ that is read and gets no gradient, as in ``F.embedding``;
            counted from the end if negative.

    Returns:
        ``y [..., N]`` in the dtype of ``weight``, under autocast too. Every tensor but ``tokens`` may
        require a gradient. Kept for the backward are ``tokens``, ``lora_B`` and ``Aᵀ[x]``.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what was
            expected.
        IndexError: a token is none of the V (PyTorch's; on a GPU, its assertion).
    """
    return ops.lora_embedding(tokens, weight, lora_A, lora_B, scaling, padding_idx)


def lora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    norm_of: NormOf | None = None,
) -> Tensor:
    """``y = conv(x, W) + scaling · conv(conv(drop(x), A), B) + bias``, the LoRA convolution in one, two
    or three dimensions, as PEFT has it (Hu et al., 2021, over a kernel).

    A convolves all channels to r with the windows of W; B is a product at each position. PyTorch's own
    calls convolve with W, whatever backend is forced, and y has the memory format that they give it. The
    low-rank term is added in place. Of channels-last images in float32 on a CPU with AVX-512 native
    kernels convolve with A at ranks up to 8. A 1 x 1 convolution of stride 1 of channels-last images is
    ``lora_linear`` over its positions, without a copy. On a CPU, in float32 and float64 and without
    dropout, W + scaling·B·A is made and convolves where W is small beside y and x by a rule of sizes.

    Args:
        x: ``[batch, C, *size]`` or ``[C, *size]``, with one to three spatial dimensions.
        weight: ``[N, C / groups, *kernel]``, in the dtype of ``x``.
        lora_A: ``[r, C, *kernel]``; ``r`` a positive multiple of ``groups``.
        lora_B: ``[N, r / groups, 1, …]``, in the dtype of ``lora_A``, which may differ from that of
            ``x``.
        scaling: a number, ``alpha / r`` or ``alpha / sqrt(r)``.
        bias: ``[N]``, in the dtype of ``x``.
        stride, padding, dilation, groups: as for ``F.conv2d``; those of A too, but ``groups``.
        magnitude: ``N`` numbers, which make it DoRA (Liu et al., 2024): ``y = magnitude / ‖W + scaling ·
            B·A‖ ⊙ (conv(x, W) + scaling · conv(conv(x, A), B)) + bias``, with the norm of each output
            channel's filter, which has no gradient. With dropout the frozen layer sees x, the change
            that DoRA makes to it what is left of x, as in PEFT. For ``groups`` 1.
        dropout_p: probability with which an element of ``x`` is dropped on its way into the low-rank
            product; applied if ``training``. The mask is that of ``lora_linear`` for x as a matrix of
            positions (batch first) and channels.
        norm_of: with a ``magnitude``, what takes the norm, as for ``dora_linear``.

    Returns:
        ``y [batch, N, *size of y]`` in the dtype of ``x``. Every tensor argument may require a
        gradient. Kept for the backward are ``x`` if ``lora_A`` or ``weight`` needs one, and ``s``, r
        channels, if ``lora_B`` does; with a ``magnitude`` that needs one y before its scale too, or
        with dropout ``conv(drop(x), W)``. Under autocast ``x``, ``weight`` and ``bias`` are cast as
        ``F.conv2d`` would.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what it is, and what was
            expected.
        BackendError: the forced backend can't serve ``ds`` and ``dB``; the message says why.
    """
    check_float("x", x)
    uncast = weight
    if autocast_anywhere() and autocast_enabled(x):
        x, weight, bias = _cast(x, weight, bias)
    windows = stride, padding, dilation, groups
    key = key_of((x, weight, lora_A, lora_B), bias, scaling, windows, dropout_p)
    geometry, batch, single = known_geometry(key), x, False
    if geometry is None:
        padded, geometry = geometry_of(x, weight, stride, padding, dilation, groups)
        single = padded.dim() == weight.dim() - 1
        batch = padded.unsqueeze(0) if single else padded
        check_lora_conv(batch, weight, lora_A, lora_B, scaling, bias, geometry, dropout_p)
        if batch is x:
            remember(key, geometry)
    if magnitude is not None:
        check_magnitude(magnitude, weight, geometry)
    p = dropout_p if training else 0.0
    seed = _draw(x.device) if p else None
    with without_autocast(x):
        if magnitude is None:
            y = ops.lora_conv(batch, weight, lora_A, lora_B, scaling, bias, geometry, p, seed)
        else:
            norm = (norm_of or filter_norm)(uncast, lora_A, lora_B, scaling)
            y = ops.dora_conv(
                batch, weight, lora_A, lora_B, magnitude.reshape(-1) / norm, scaling, bias, geometry,
                p, seed,
            )  # fmt: skip
    return y.squeeze(0) if single else y


def filter_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``‖W + scaling · B·A‖`` of each filter, ``[N]``."""
    assert isinstance(weight, Tensor)
    return ops.weight_norm(*filters(weight, lora_A, lora_B), scaling)


def filters(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels as matrices of a row for each filter, in the order in which the first lies in memory."""
    if weight.movedim(1, -1).is_contiguous():
        weight, lora_A = weight.movedim(1, -1), lora_A.movedim(1, -1)
    return weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1)
