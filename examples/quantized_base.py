"""A frozen encoder in NF4 with double quantization, as QLoRA has it, and the same for PEFT."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import lorafast

QUANTIZED = "nf4"


def quantize(model: nn.Module, encoder: nn.Module) -> nn.Module:
    """Put frozen 4-bit layers in the places of `encoder`'s linear ones."""
    lorafast.quantize(encoder, QUANTIZED)
    return model


def give_to_bitsandbytes(model: nn.Module, encoder: nn.Module, device: torch.device) -> nn.Module:
    """Put bitsandbytes' layers in the places of lorafast's 4-bit ones, from their checkpoints, so that
    the codes are the same; and tell PEFT."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        sys.exit(f"{error}. --base {QUANTIZED} needs: pip install bitsandbytes")
    for name, layer in list(encoder.named_modules()):
        if not isinstance(layer, lorafast.nn.QuantizedLinear):
            continue
        state = layer.state_dict()
        codes, _ = state.pop("weight"), state.pop("bias", None)
        made = Linear4bit(
            layer.in_features, layer.out_features, bias=False, device="meta",
            compute_dtype=layer.dense_weight().dtype,
        )  # fmt: skip
        made.weight = Params4bit.from_prequantized(codes, state, device=device, module=made)
        made.bias = layer.bias
        encoder.set_submodule(name, made)
    model.is_loaded_in_4bit = True
    return model


def evaluate(model: nn.Module) -> None:
    """Like `model.eval()`, but bitsandbytes keeps its codes.

    On a CPU it repacks them in evaluation mode and rounds their scales: another weight than trained.
    """
    model.eval()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True


def weights_bytes(model: nn.Module) -> int:
    """What the model's weights take, codes and scales as they are stored."""
    tensors: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        of_codes = [tensor]
        state = getattr(tensor, "quant_state", None)  # of bitsandbytes
        if state is not None:
            of_codes += [state.absmax, state.code]
        if state is not None and state.nested:
            of_codes += [state.offset, state.state2.absmax, state.state2.code]
        tensors |= {t.data_ptr(): t for t in of_codes}
    return sum(tensor.nbytes for tensor in tensors.values())
