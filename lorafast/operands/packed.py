"""The frozen weight, packed once into the layout that oneDNN multiplies fastest.

oneDNN's GEMM rearranges the weight in every call. In bfloat16 that is most of a call over few rows.
Measured at 2048 x 2048, on a CPU with a bfloat16 product, a packed weight takes a third of the time for
one row, three quarters for 16, and 0.98 for 512. In float32 there is no gain. A frozen weight doesn't
change, so it can be packed once, for as much memory again.

A packed copy belongs to the weight, not to a layer: layers that share the weight share it, it is in no
``state_dict``, pickle or deepcopy, and it goes when the weight's memory goes. The storage is watched for
that, since ``torch.utils.swap_tensors`` refuses a tensor that has weak references. The copy is made by
``pack`` alone, or in inference mode within the memory that ``allow_packing`` grants. Every product asks
whether the weight is still what was packed, and drops the copy if not.
"""

import ctypes
import os
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.core.context import autocast_enabled, needs_plain_pytorch
from lorafast.core.problem import PLAIN

ENVIRONMENT_VARIABLE = "LORAFAST_PACK_MEMORY"
_ROWS, _COLUMNS = 8, 32


@dataclass(frozen=True, eq=False)
class _Packed:
    """oneDNN's copy of a weight, and what the weight was like when it was made."""

    storage: weakref.ref[torch.UntypedStorage]
    version: int
    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    sampled: Tensor  # owns no memory: valid while the weight is at its address
    sample: Tensor
    copy: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is unchanged.

        PyTorch counts changes in place, but not those through ``weight.data`` or another tensor over the
        same memory: those are looked for in a few elements. One that leaves them alone goes unseen.
        """
        return (
            self.version == weight._version
            and self.address == weight.data_ptr()
            and self.shape == weight.shape
            and self.stride == weight.stride()
            and self.copy.dtype is weight.dtype
            and torch.equal(self.sample, self.sampled)
        )


def _granted(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {text!r}, expected a number of bytes")
    return value


def _granted_at_import() -> int:
    """-1 if the variable is no number: importing raises nothing, the first layer to ask does."""
    try:
        return _granted(os.environ.get(ENVIRONMENT_VARIABLE) or "0")
    except ValueError:
        return -1


_packed: dict[int, _Packed] = {}
"""By the id of the weight: a lookup is in the way of every product."""
_asked: dict[int, weakref.ref[torch.UntypedStorage]] = {}
"""Weights of which it is decided whether they are packed by themselves, until ``allow_packing``."""
_memory = _granted_at_import()


def granted() -> int:
    """The bytes in which layers may pack by themselves.

    Raises:
        ValueError: ``LORAFAST_PACK_MEMORY`` is not a number of bytes.
    """
    return _granted(os.environ.get(ENVIRONMENT_VARIABLE) or "0") if _memory < 0 else _memory


def allow_packing(memory: int) -> None:
    """Lets layers pack their frozen weights by themselves, in ``memory`` bytes all together.

    A weight is packed when it is first multiplied by in inference mode (``torch.inference_mode()``)
    on a CPU, if it can be packed and the memory suffices; once for each call of this function, so that
    one which keeps changing is not packed again and again. 0, the default, leaves it to
    ``LoRALinear.pack_()``; memory in use stays in use. ``LORAFAST_PACK_MEMORY`` sets it for a process.

    Raises:
        ValueError: ``memory`` is not a number of bytes.
    """
    global _memory
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 0:
        raise ValueError(f"memory is {memory!r}, expected a number of bytes")
    _memory = memory
    _asked.clear()


def why_not_packable(weight: Tensor) -> str | None:
    """The reason for which ``weight`` can't be packed, or None if it can."""
    if type(weight) not in PLAIN:
        return f"it is a {type(weight).__name__}, expected a plain tensor"
    if weight.device.type != "cpu":
        return f"it is on {weight.device}, packing is for the CPU"
    if weight.dtype is not torch.bfloat16:
        return f"it is {weight.dtype}, only bfloat16 gains by packing"
    if weight.dim() != 2 or not weight.is_contiguous() or not weight.numel():
        layout = f"shape {list(weight.shape)} and strides {list(weight.stride())}"
        return f"it has {layout}, expected a contiguous matrix"
    if weight.is_inference():
        return "it was made in inference mode, where PyTorch counts no changes"
    return why_unavailable()


def why_unavailable() -> str | None:
    """What this machine lacks for packing, or None."""
    onednn = torch.ops.mkldnn
    try:
        # Private, but what PyTorch's own compiler freezes weights with.
        supported = onednn._is_mkldnn_bf16_supported()
        _ = onednn._reorder_linear_weight.default, onednn._linear_pointwise.default
    except AttributeError:
        return "this PyTorch has no oneDNN that packs"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this PyTorch has no oneDNN, or it is switched off"
    return None if supported else "oneDNN has no bfloat16 product on this processor"


def pack(weight: Tensor) -> None:
    """Packs ``weight`` for the products to come; again if it has changed.

    Raises:
        ValueError: it can't be packed; the message says why.
    """
    reason = why_not_packable(weight)
    if reason is not None:
        raise ValueError(f"weight can't be packed: {reason}")
    if _find(weight) is not None:
        return
    watch = _watch(weight, _packed)
    # Another tensor over the same memory may have been packed.
    twin = next((packed for packed in list(_packed.values()) if packed.is_of(weight)), None)
    if twin is not None:
        _packed[id(weight)] = replace(twin, storage=watch)
        return
    with torch.inference_mode(False), torch.no_grad():
        # A cache line of a few rows: the product doesn't read the weight, so each comes from memory.
        sampled = _unowned(weight)[:: max(weight.shape[0] // _ROWS, 1), :_COLUMNS]
        _packed[id(weight)] = _Packed(
            watch,
            weight._version,
            weight.data_ptr(),
            weight.shape,
            weight.stride(),
            sampled,
            sampled.clone(),
            # Last: a change meanwhile makes it the copy of an earlier state.
            torch.ops.mkldnn._reorder_linear_weight(weight.detach()),
        )


def _watch(weight: Tensor, kept: dict[int, Any]) -> weakref.ref[torch.UntypedStorage]:
    """A weak reference that drops what is ``kept`` about ``weight`` when its memory is freed."""
    key = id(weight)

    def drop(freed: weakref.ref[torch.UntypedStorage]) -> None:
        found = kept.get(key)
        if found is freed or getattr(found, "storage", None) is freed:
            kept.pop(key, None)

    return weakref.ref(weight.untyped_storage(), drop)


def _unowned(weight: Tensor) -> Tensor:
    """``weight`` as a tensor that doesn't keep its memory; the caller knows that it is there."""
    memory = (ctypes.c_char * (weight.numel() * weight.itemsize)).from_address(weight.data_ptr())
    return torch.frombuffer(memory, dtype=weight.dtype).view(weight.shape)


def unpack(weight: Tensor) -> None:
    """Drops what was packed of ``weight``, if anything was."""
    _packed.pop(id(weight), None)


def is_packed(weight: Tensor) -> bool:
    """Whether there is a packed copy of ``weight`` as it is now; one of an earlier state is dropped."""
    return _find(weight) is not None


def memory_in_use() -> int:
    """Bytes that packed weights take (rounding of the layout aside)."""
    copies = {id(packed.copy): packed.copy for packed in list(_packed.values())}
    return sum(copy.numel() * copy.itemsize for copy in copies.values())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, on the packed weight where there is one and nothing has to be differentiated.

    Not for code that is compiled, which would have a graph for each state of what is packed.
    """
    if not (_packed or _memory):
        return F.linear(x, weight, bias)
    y = linear_if_packed(x, weight, bias)
    return F.linear(x, weight, bias) if y is None else y


def linear_if_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x·Wᵀ + bias`` by the packed copy of ``weight``, None if there is none to be used."""
    if not (_packed or _memory):
        return None
    packed = _find(weight)
    if packed is None:
        if not (_memory and torch.is_inference_mode_enabled()):
            return None
        packed = _pack_if_allowed(weight)
        if packed is None:
            return None
    # oneDNN's product is called below autograd, autocast and dispatch, so nothing may be left to them.
    if (
        type(x) not in PLAIN
        or x.dtype is not packed.copy.dtype
        or not x.is_cpu
        or x.layout is not torch.strided
        or autocast_enabled(x)
        or needs_plain_pytorch() is not None
        or (
            torch.is_grad_enabled()
            and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            )
        )
    ):
        return None
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.copy, bias, "none", [], "")
    return y


def _pack_if_allowed(weight: Tensor) -> _Packed | None:
    key = id(weight)
    if key in _asked:
        return None
    memory = granted()
    _asked[key] = _watch(weight, _asked)
    if why_not_packable(weight) is not None:
        return None
    if memory_in_use() + weight.numel() * weight.itemsize > memory:
        return None
    pack(weight)
    return _find(weight)


def _find(weight: Tensor) -> _Packed | None:
    packed = _packed.get(id(weight))
    if packed is not None and not packed.is_of(weight):
        unpack(weight)
        return None
    return packed
