"""What a backward over a quantized weight keeps: x, s and what is stored, never W made dense."""

import pytest
import torch
from torch import nn

import lorafast
from lorafast import functional
from lorafast.core.dtypes import wide
from lorafast.nn import LoRALinear
from lorafast.operands import FP4, FP8, MXFP4, NF4, W8A8, Int8

N, K, M, r = 96, 64, 40, 4
"""Rows enough that W is less than x, and not to be mistaken for it."""


def mxfp4(weight):
    N, K = weight.shape
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    return MXFP4(codes, torch.randint(120, 128, (N, K // 32), dtype=torch.uint8), weight.dtype)


QUANTIZED = {
    "nf4": NF4.of,
    "fp4": FP4.of,
    "int8": Int8.of,
    "fp8": FP8.of,
    "w8a8": W8A8.of,
    "mxfp4": mxfp4,
}
in_each = pytest.mark.parametrize("format", QUANTIZED)
in_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def saved_by(call, given):
    """What ``call`` saves for its backward beside ``given``, a tensor for each piece of memory."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    found = {}

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            found[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    assert y.requires_grad
    return list(found.values())


@in_each
@in_dtypes
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["auto", "aten", "cpu"])
def test_a_layer_saves_s_and_no_more_than_a_seed(format, dtype, dropout, backend):
    layer = LoRALinear.from_operand(
        QUANTIZED[format](torch.randn(N, K, dtype=dtype)), r, dropout=dropout, adapter_dtype=dtype
    )
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    with lorafast.use_backend(backend):
        saved = saved_by(lambda: layer(x), (x, *layer.state_dict().values()))
    s, seed = M * r * wide(dtype).itemsize, 8 * bool(dropout)
    assert sum(tensor.nbytes for tensor in saved) <= s + seed


@in_each
def test_a_layer_of_dora_saves_nothing_of_the_size_of_w(format):
    """But for what it scales: y, and vectors of N."""
    layer = LoRALinear.from_operand(QUANTIZED[format](torch.randn(N, K)), r, use_dora=True)
    x = torch.randn(M, K, requires_grad=True)
    saved = saved_by(lambda: layer(x), (x, *layer.state_dict().values()))
    assert all(tensor.numel() <= M * N for tensor in saved)
    assert all(tuple(tensor.shape) not in ((N, K), (K, N)) for tensor in saved)


@in_each
def test_a_mixed_batch_saves_s(format):
    weight = QUANTIZED[format](torch.randn(N, K))
    A, B = torch.randn(2, r, K, requires_grad=True), torch.randn(2, N, r, requires_grad=True)
    x, scaling = torch.randn(M, K, requires_grad=True), torch.ones(2)
    chosen = torch.arange(M) % 3 - 1
    saved = saved_by(
        lambda: functional.grouped_lora_linear(x, weight, A, B, scaling, chosen),
        (x, A, B, scaling, chosen, *weight.tensors().values()),
    )
    assert all(tensor.numel() <= M * K for tensor in saved)
    assert all(tuple(tensor.shape) not in ((N, K), (K, N)) for tensor in saved)


@in_each
def test_a_frozen_layer_saves_no_x(format):
    """Neither A nor B trained: dx alone."""
    layer = LoRALinear.from_operand(QUANTIZED[format](torch.randn(N, K)), r)
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.requires_grad_(False)
    x = torch.randn(M, K)
    copy = x.clone().requires_grad_()
    saved = saved_by(lambda: layer(copy), layer.state_dict().values())
    assert sum(tensor.nbytes for tensor in saved) == 0


def test_the_sequence_saves_what_its_layers_do():
    """Ten layers keep ten s and ten x, not one W."""
    layers = nn.Sequential(
        *(LoRALinear.from_operand(NF4.of(torch.randn(K, K)), r) for _ in range(10))
    )
    x = torch.randn(M, K, requires_grad=True)
    saved = saved_by(lambda: layers(x), (x, *layers.state_dict().values()))
    assert sum(tensor.nbytes for tensor in saved) <= 4 * (10 * M * r + 9 * M * K)
