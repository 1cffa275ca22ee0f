"""A frozen model in NF4 with double quantization, as QLoRA has it: 4-bit codes by bitsandbytes."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

QUANTIZED = "nf4"


def quantize(model: nn.Module, encoder: nn.Module, device: torch.device) -> nn.Module:
    """Put bitsandbytes' 4-bit layers in the places of `encoder`'s linear ones, and tell PEFT."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        sys.exit(f"{error}. --base {QUANTIZED} needs: pip install bitsandbytes")
    for name, layer in list(encoder.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        made = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype,
            compress_statistics=True, quant_type=QUANTIZED, device="meta",
        )  # fmt: skip
        made.weight = Params4bit(
            layer.weight.data, requires_grad=False, quant_type=QUANTIZED, compress_statistics=True,
            module=made,
        )  # fmt: skip
        made.bias = layer.bias
        encoder.set_submodule(name, made.to(device))  # where it is quantized
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
