"""Which plain layers an adapter layer can wrap, and the reasons against the others."""

import inspect
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lorafast import operands
from lorafast.core.dtypes import FLOAT_NAMES, FLOATS
from lorafast.nn import offload
from lorafast.nn.plain import stock_class, why_not_carried, why_not_its_forward
from lorafast.operands import Operand

# Transformers' ways to write it.
_SCALED_FORWARD = re.compile(
    r"\s*def forward\(self, input_ids: torch\.Tensor\):\s*"
    r"return super\(\)\.forward\(input_ids\) \* self\.embed_scale(\.to\(self\.weight\.dtype\))?\s*"
)
_DISTRIBUTED = "torch.distributed."


def why_not_linear(linear: nn.Module, taken: Collection[str]) -> str | None:
    """The reason for which a ``LoRALinear``, which has ``taken``, can't wrap ``linear``, or None."""
    reason = operands.why_not_of_layer(linear)
    if reason is not None:
        return reason
    stock = stock_class(linear)
    if stock is None:
        return f"it is a {type(linear).__name__}, expected an nn.Linear"
    if isinstance(linear, nn.modules.linear.LazyLinear):
        return "it is a LazyLinear whose shape is not known yet: run it once first"
    return _why_not_stock(linear, stock, ("weight", "bias"), taken, "LoRALinear")


def why_not_embedding(embedding: nn.Module, taken: Collection[str]) -> str | None:
    """The reason for which a ``LoRAEmbedding``, which has ``taken``, can't wrap it, or None."""
    if not isinstance(embedding, nn.Embedding):
        return f"it is a {type(embedding).__name__}, expected an nn.Embedding"
    if embedding.max_norm is not None:
        return f"its max_norm is {embedding.max_norm}, which changes the frozen weight in each call"
    if embedding.scale_grad_by_freq:
        return "its scale_grad_by_freq is True, which the adapter's gradients don't follow"
    return _why_not_stock(embedding, nn.Embedding, ("weight",), taken, "LoRAEmbedding")


_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``."""
    return isinstance(module, _CONVOLUTIONS)


def why_not_convolution(conv: nn.Module, taken: Collection[str]) -> str | None:
    """The reason for which a ``LoRAConv``, which has ``taken``, can't wrap ``conv``, or None."""
    stock = next((kind for kind in _CONVOLUTIONS if isinstance(conv, kind)), None)
    if stock is None:
        return f"it is a {type(conv).__name__}, expected an nn.Conv1d, nn.Conv2d or nn.Conv3d"
    module: Any = conv
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin) and conv.has_uninitialized_params():
        return f"it is a {type(conv).__name__} whose shape is not known yet: run it once first"
    if type(module)._conv_forward is not stock._conv_forward:
        return f"its class {type(conv).__name__} convolves in its own way"
    return why_not_windows(module) or _why_not_stock(
        conv, stock, ("weight", "bias"), taken, "LoRAConv"
    )


def why_not_windows(conv: Any) -> str | None:
    """The reason for which A can't have the windows of ``conv`` in PEFT, or None if it can.

    PEFT gives A the stride and the numbers of ``padding`` alone: with a padding mode, or a dilation
    along an axis of the kernel, what it trains is not what it merges.
    """
    if any(d != 1 and k != 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return (
            f"its dilation is {conv.dilation} over a kernel of {conv.kernel_size}, and PEFT's lora_A "
            "has none, so that what it trains is not what it merges"
        )
    if all(size == 1 for size in conv.kernel_size) and conv.padding in ("same", "valid"):
        return None
    pads = conv.padding != "valid" if isinstance(conv.padding, str) else any(conv.padding)
    if pads and conv.padding_mode != "zeros":
        return (
            f"its padding_mode is {conv.padding_mode!r}, and PEFT pads with zeros for lora_A, so that "
            "what it trains is not what it merges"
        )
    return None


def why_not_attention(attention: nn.Module, taken: Collection[str]) -> str | None:
    """The reason for which a ``LoRAMultiheadAttention``, which has ``taken``, can't wrap it, or None."""
    if not isinstance(attention, nn.MultiheadAttention):
        return f"it is a {type(attention).__name__}, expected an nn.MultiheadAttention"
    if not attention._qkv_same_embed_dim:
        return (
            f"its kdim is {attention.kdim} and its vdim {attention.vdim}, expected its embed_dim, "
            f"{attention.embed_dim}: PEFT has no adapter over weights of q, k and v by themselves"
        )
    tensors = ("in_proj_weight", "in_proj_bias")
    others = set(taken) - {"dropout", "out_proj", "_qkv_same_embed_dim"}
    reason = _why_not_stock(
        attention, nn.MultiheadAttention, tensors, others, "LoRAMultiheadAttention"
    )
    if reason is not None:
        return reason
    out_proj: nn.Module = attention.out_proj
    reason = why_not_linear(out_proj, ())
    if reason is not None:
        return f"its out_proj can't be: {reason}"
    if offload.hooks_of(attention) or offload.hooks_of(out_proj):
        return (
            "Accelerate's hook serves its tensors: adapt the model before it is dispatched, and "
            'dispatch it with preload_module_classes=["LoRAMultiheadAttention"]'
        )
    return None


def scales_output(embedding: nn.Module) -> bool:
    """Whether it is an ``nn.Embedding`` whose forward multiplies by its ``embed_scale``, as Gemma's."""
    own, *others = [kind for kind in type(embedding).__mro__ if "forward" in vars(kind)]
    if others[:1] != [nn.Embedding]:
        return False
    try:
        source = inspect.getsource(vars(own)["forward"])
    except (OSError, TypeError):  # there is none, or it isn't Python's
        return False
    return _SCALED_FORWARD.fullmatch(source) is not None


def _why_not_stock(
    module: nn.Module,
    stock: type[nn.Module],
    tensors: Sequence[str],
    taken: Collection[str],
    wrapper: str,
) -> str | None:
    known = type(module) if scales_output(module) else stock
    if type(module).forward is not known.forward:
        name = stock.__name__
        expected = f"nn.{name}" if stock.__module__.startswith("torch.") else name
        return f"its forward is not that of {expected} ({type(module).__name__})"
    reason = why_not_its_forward(module, known)
    if reason is not None:
        return reason
    for name in tensors:
        if name not in module._parameters:
            return f"its {name} is computed by a parametrization: remove that first"
    dense = module._parameters[tensors[0]]
    assert dense is not None
    if dense.dtype not in FLOATS:
        return f"its {tensors[0]} is {dense.dtype}, expected {FLOAT_NAMES}"
    return _why_not_plain(dense) or why_not_carried(
        module, stock, set(taken) - set(tensors), wrapper
    )


def _why_not_plain(weight: Tensor) -> str | None:
    kind = type(weight)
    if kind.__module__.startswith(_DISTRIBUTED):
        weight = getattr(weight, "_local_tensor", weight)  # of a DTensor
    elif kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_fake(weight):
        return f"its weight is of class {kind.__name__} (quantized?), expected a plain tensor"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}, expected a dense one"
    return None if type(weight) is kind else _why_not_plain(weight)


def why_not_claimed(layer: nn.Module, weight: Operand) -> str | None:
    """The reason for which a layer that a format claims can't be taken apart, or None if it can."""
    reason = why_not_its_forward(layer, type(layer))
    if reason is not None:
        return reason
    if vars(layer).get("_compiled_call_impl") is not None:
        return "it was compiled in place: adapt it before Module.compile()"
    own = layer._parameters | layer._buffers
    if offload.hooks_of(layer) and any(own.get(n) is not t for n, t in weight.tensors().items()):
        return (
            f"Accelerate's hook serves its tensors by other names than {weight.format} has for them "
            f"({', '.join(weight.tensors())})"
        )
    return None
