"""Activated LoRA (aLoRA; Greenewald et al., 2025): a sequence has its adapter from some token on.

PEFT says how many of its last tokens have it (``alora_offsets``). Here that is a row map of
``functional.grouped_lora_linear``, made once for all the layers that ask for the same one.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafast.core.assignment import Assignment
from lorafast.core.context import dispatch_modes, transforms_active
from lorafast.core.transfer import on_device
from lorafast.integrations.peft.adapters import Adapter

Counts = tuple[int, ...]
"""Of each sequence, how many of its last tokens have the adapter."""


def counts_of(offsets: Sequence[Any] | None, x: Tensor) -> Counts:
    """Those of ``x [B, T, K]`` or ``[B, K]``, which is sequences of a token; ``offsets`` is PEFT's
    ``alora_offsets``, None for no adapter at all."""
    B, T = x.shape[0], tokens_of(x)
    if offsets is None:
        return (0,) * B
    return tuple(0 if o is None else max(0, min(int(o), T)) for o in offsets)


def tokens_of(x: Tensor) -> int:
    """``T`` of ``x [B, T, K]``; 1 of ``[B, K]``."""
    return x.shape[1] if x.dim() == 3 else 1


def assigned(adapter_of: Sequence[int], counts: Counts, x: Tensor) -> Assignment | Tensor:
    """To the last ``counts[i]`` tokens of sequence i the adapter ``adapter_of[i]``, to the others none.

    In compiled code a tensor of the leading dimensions of ``x``: other counts need few other graphs,
    and each place of None in PEFT's offsets one.
    """
    if torch.compiler.is_compiling():
        one_each = torch.tensor(adapter_of, dtype=torch.int64, device=x.device).unsqueeze(1)
        return torch.where(_mask(counts, x), one_each, -1).view(x.shape[:-1])
    what = tuple(adapter_of), counts, tokens_of(x)
    if _keeps_its_own(x):
        return _assigned.__wrapped__(*what, ())
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    return _assigned(*what, (x.device, stream, torch.is_inference_mode_enabled()))


def _keeps_its_own(x: Tensor) -> bool:
    """Whether tensors made now are of what surrounds the call, and no use to calls outside of it: of a
    mode, as fake ones are, of a level of ``torch.func``, or of the CUDA graph being captured."""
    if dispatch_modes() or transforms_active():
        return True
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):
        return torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=4)
def _assigned(
    adapter_of: tuple[int, ...], counts: Counts, T: int, kept_for: tuple[Any, ...]
) -> Assignment:
    """``kept_for``: the device, the stream and the mode of the tensors that calls keep in it."""
    if all(count in (0, T) for count in counts):
        return Assignment([g if c else -1 for g, c in zip(adapter_of, counts, strict=True)])
    rows: list[int] = []
    for g, count in zip(adapter_of, counts, strict=True):
        rows += [-1] * (T - count) + [g] * count
    return Assignment(rows)


def added(y: Tensor, x: Tensor, adapters: list[Adapter], counts: Counts) -> Tensor:
    """``y`` and what each adapter makes of the tokens that have it, by PyTorch's own calls.

    Shapes: ``x [B, T, K]``, ``y [B, T, N]``, or both without T. The sum of several is rounded once, to
    the dtype of ``y``.
    """
    if torch.compiler.is_compiling():
        mask = _mask(counts, x).view(*x.shape[:-1], 1)
        own, found = torch.where(mask, x, 0), y  # 0: a gradient of 0 times NaN would be NaN
        for _, A, B, dropout, s in adapters:
            found = found + B(A(dropout(own.to(A.weight.dtype)))) * s
        return torch.where(mask, found.to(y.dtype), y)
    index = _index(assigned((0,) * len(counts), counts, x), x)
    own = x.reshape(-1, x.shape[-1]).index_select(0, index)
    rows = y.reshape(-1, y.shape[-1])
    found = rows.index_select(0, index)
    for _, A, B, dropout, s in adapters:
        found = found + B(A(dropout(own.to(A.weight.dtype)))) * s
    return rows.index_copy(0, index, found.to(rows.dtype)).view(y.shape)


def with_bias(y: Tensor, bias: Tensor, assignment: Assignment | Tensor, g: int = 0) -> Tensor:
    """``y [B, T, N]`` or ``[B, N]`` plus ``bias [N]`` where ``assignment`` has the adapter g.

    The sum, and that of the gradient of ``bias``, is in the wider dtype of the two.
    """
    if isinstance(assignment, Tensor):
        return torch.where((assignment == g).unsqueeze(-1), (y + bias).to(y.dtype), y)
    wide = torch.promote_types(y.dtype, bias.dtype)
    rows = y.reshape(-1, y.shape[-1]).to(wide)
    index = _index(assignment, y, g)
    # Not picked from a table: the gradient of that would be a sum in whatever order.
    change = bias.to(wide).expand(len(index), -1)
    return rows.index_add(0, index, change).to(y.dtype).view(y.shape)


def _index(assignment: Any, x: Tensor, g: int = 0) -> Tensor:
    index: Tensor = assignment.made(_rows, g, x.shape[:-1].numel(), x.device)
    return index


def _rows(assignment: Assignment, g: int, M: int, device: torch.device) -> Tensor:
    """Which of ``M`` rows have the adapter g."""
    each = M // max(assignment.elements, 1)
    own = [i for i, of in enumerate(assignment.adapter_of) if of == g]
    return on_device([i * each + t for i in own for t in range(each)], torch.int64, device)


def _mask(counts: Counts, x: Tensor) -> Tensor:
    """``[B, T]``: whether a token has the adapter."""
    T = tokens_of(x)
    last = torch.tensor(counts, dtype=torch.int64, device=x.device).unsqueeze(1)
    return torch.arange(T, device=x.device) >= T - last
