"""DoRA's norm of a layer in evaluation, kept until something that it depends on changes.

A step of decoding multiplies by W once, and ``‖W + scaling · B·A‖`` reads all of W for ``N`` numbers
that were the same in the step before: of a quantized W, a dequantization of the whole. These numbers are
kept, for one adapter of each layer. They are in no ``state_dict``, pickle or copy of the layer, and go
when it goes.

They hold as long as what they were made of is the same tensors, over the same memory, of the versions
that PyTorch counts. It counts no change through ``tensor.data``, NumPy or a kernel that is given an
address, nor a step of PyTorch's fused optimizers. So a layer also forgets its norm in ``train()`` and
``eval()``. After a forward in training, or of which a gradient is asked, it keeps none before the next
of these two, and none while a parameter has a gradient: a step may follow.

PEFT's layers keep none: hot swapping an adapter writes through ``tensor.data``, and calls no layer.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.core import columns
from lorafast.core.context import alone, needs_plain_pytorch, watched
from lorafast.core.problem import PLAIN
from lorafast.core.sms import carveout
from lorafast.operands import Weight

_NOTHING = object()
NormOf = Callable[[Weight, Tensor, Tensor, float], Tensor]
"""``‖W + scaling · B·A‖ [N]`` of ``weight``, ``lora_A``, ``lora_B`` and ``scaling``."""


class _Kept(NamedTuple):
    """A norm, and what it is of."""

    key: tuple[object, ...]
    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    norm: Tensor

    def is_of(self, key: tuple[object, ...]) -> bool:
        """Whether nothing has changed: another tensor's memory may be where one was that is freed."""
        return self.key == key and all(storage() is not None for storage in self.storages)


_kept: weakref.WeakKeyDictionary[Any, _Kept | None] = weakref.WeakKeyDictionary()
"""By the layer; None for one that is trained. Not by its tensors, of which ``torch.utils.swap_tensors``
wants no weak references."""


def keeping(owner: Any, held: Sequence[Tensor | None], compute: NormOf) -> NormOf | None:
    """``compute``, once as long as its result is the same; None where nothing can be kept.

    ``held``: all the tensors that the norm is of, as ``owner`` holds them; None for one that is computed
    anew in every forward.
    """
    tensors = [tensor for tensor in held if tensor is not None]
    if len(tensors) < len(held) or not all(map(_is_counted, tensors)):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        mark_trained(owner)
        return None
    if _is_trained(owner) or any(t.is_leaf and t.grad is not None for t in tensors):
        return None
    if _is_surrounded() or _is_recorded(tensors[0].device):
        return None
    return functools.partial(_found, owner, tensors, compute)


def forget(owner: Any) -> None:
    """Drops the norm of ``owner``, if one is kept; the next may be."""
    if _kept:
        _kept.pop(owner, None)


def mark_trained(owner: Any) -> None:
    """Drops the norm of ``owner``, of which none is kept until ``forget``."""
    if not _is_trained(owner):
        _kept[owner] = None


def _is_trained(owner: Any) -> bool:
    return _kept.get(owner, _NOTHING) is None


def _found(
    owner: Any,
    held: Sequence[Tensor],
    compute: NormOf,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    # Before it is computed: what changes meanwhile makes it the norm of an earlier state.
    key = _key(held, weight, scaling)
    found = _kept.get(owner)
    if found is not None and found.is_of(key):
        return found.norm
    # Outside inference mode: the backward of a magnitude may save it later.
    with torch.inference_mode(False), torch.no_grad():
        norm = compute(weight, lora_A, lora_B, scaling)
    storages = tuple(weakref.ref(tensor.untyped_storage()) for tensor in held)
    _kept[owner] = _Kept(key, storages, norm)
    return norm


def _is_counted(tensor: Tensor) -> bool:
    """Whether PyTorch counts its changes, and it has memory of its own."""
    return (
        type(tensor) in PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_inference()
        and not tensor.is_meta
    )


def _is_surrounded() -> bool:
    """Whether something around the call is to see the norm computed, or changes tensors unseen.

    In a process group it may be FSDP or ZeRO: they fill a parameter's memory anew before a forward, and
    it is the same parameter of the same version.
    """
    if not alone() and (needs_plain_pytorch() is not None or watched()):
        return True
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return group or columns.current() is not None


def _is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph is captured: replays read the tensors as they are then."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _key(held: Sequence[Tensor], weight: Weight, scaling: float) -> tuple[object, ...]:
    """All that the bits of the norm depend on, and on a GPU the stream that has them in order."""
    device = held[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    tensors = [
        (id(t), t._version, t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in held
    ]
    chosen = forced.forced(), carveout(), registry.times_forgotten()
    return operands.describe(weight), scaling, stream, *chosen, *tensors
