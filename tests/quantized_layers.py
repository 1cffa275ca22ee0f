"""Layers over quantized weights, for tests."""

import torch
from torch import nn

from lorafast.nn import QuantizedLinear

FORMATS = ("nf4", "fp4", "int8", "fp8")


def layer(format="nf4", N=24, K=40, bias=True, dtype=torch.float32, **options):
    return QuantizedLinear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), format, **options)
