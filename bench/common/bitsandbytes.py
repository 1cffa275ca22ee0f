"""Layers of bitsandbytes over the codes and scales of an operand."""

from typing import Any

import torch
from torch import Tensor, nn

from lorafast.operands import FP4, NF4, Int8, Operand
from lorafast.operands.four_bit import FourBit

FLAGS = {
    NF4.format: "is_loaded_in_4bit",
    FP4.format: "is_loaded_in_4bit",
    Int8.format: "is_loaded_in_8bit",
}
"""The attribute of a model that tells PEFT of such layers, by format."""


def why_not(operand: Operand) -> str | None:
    """A sentence if there is no layer of bitsandbytes for it, or None."""
    if operand.format not in FLAGS:
        return f"bitsandbytes has no layer for {operand.format}"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return "bitsandbytes is not installed (pip install bitsandbytes)"
    if operand.format == Int8.format and operand.device.type == "cuda":
        return "on a GPU bitsandbytes rounds x to 8 bits too, which is another function"
    return None


def layer_of(operand: Operand, bias: Tensor | None) -> nn.Module:
    """``Linear4bit`` or ``Linear8bitLt`` over the operand's own memory; x has its dtype.

    It is in training mode, in which bitsandbytes keeps the codes as they are.
    """
    made = _four_bit(operand) if isinstance(operand, NF4 | FP4) else _int8(operand)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made.train()


def _four_bit(operand: FourBit) -> nn.Module:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    (N, K), t = operand.shape, operand.tensors()
    nested: dict[str, Any] = {}
    if operand.nested_block is not None:
        of_scales = QuantState(
            t["nested_absmax"], blocksize=operand.nested_block, code=t["nested_quant_map"],
            dtype=torch.float32,
        )  # fmt: skip
        nested = {"offset": t["nested_offset"], "state2": of_scales}
    state = QuantState(
        t["absmax"], shape=operand.shape, dtype=operand.stored_dtype, blocksize=operand.block,
        code=torch.tensor(operand.numbers, device=operand.device), quant_type=operand.format,
        **nested,
    )  # fmt: skip
    made: Any = Linear4bit(K, N, bias=False, compute_dtype=operand.dtype, device="meta")
    made.weight = Params4bit(
        t["weight"].view(-1, 1), quant_state=state, blocksize=operand.block,
        quant_type=operand.format, compress_statistics=bool(nested), bnb_quantized=True, module=made,
    )  # fmt: skip
    layer: nn.Module = made
    return layer


def _int8(operand: Operand) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    (N, K), t = operand.shape, operand.tensors()
    made: nn.Module = Linear8bitLt(K, N, bias=False, has_fp16_weights=False, device="meta")
    made.weight = Int8Params(
        t["weight"], requires_grad=False, has_fp16_weights=False, CB=t["weight"], SCB=t["SCB"]
    )
    return made
