"""Several adapters of DoRA, and variants of LoRA, over quantized layers."""

import pytest
import torch

pytest.importorskip("peft")

import quantized_twins
from peft_twins import assert_equal
from test_variants import options_of


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids="dropout {}".format)
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8 by row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dora_twice(kind, dtype, dropout):
    options = {"use_dora": True, "adapters": 2, "lora_dropout": dropout}
    pair = quantized_twins.twins(kind, dtype, **options)
    assert set(quantized_twins.lorafast.explain(pair.fast).layers.values()) == {None}
    x, dy = torch.randn(3, 5, quantized_twins.K), torch.randn(3, 5, quantized_twins.N)
    assert_equal(pair, x.to(dtype), dy.to(dtype), dtype)


@pytest.mark.parametrize("kind", ["BD-LoRA, B", "VeLoRA"])
def test_variants(kind):
    """PEFT has them over torchao's layers, not over bitsandbytes'."""
    dtype = torch.bfloat16
    pair = quantized_twins.twins("torchao int8 by row", dtype, **options_of(kind))
    assert set(quantized_twins.lorafast.explain(pair.fast).layers.values()) == {None}
    x, dy = torch.randn(3, 5, quantized_twins.K), torch.randn(3, 5, quantized_twins.N)
    assert_equal(pair, x.to(dtype), dy.to(dtype), dtype)
