"""4-bit codes of bitsandbytes. A policy of FSDP2 casts those that are stored as floats: PEFT's layer
refuses. Those that are bytes an adapted layer shards, and doesn't send."""

import importlib.util

import pytest
import torch
from ranks import on_ranks
from torch import nn

import lorafast

IMPORTS = ("peft", "bitsandbytes")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, IMPORTS)), reason="needs PEFT and bitsandbytes"
    ),
]
SIZE = 64


def quantized(storage):
    import bitsandbytes

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        SIZE, SIZE, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=storage
    )
    layer.load_state_dict(nn.Linear(SIZE, SIZE).state_dict())
    return nn.Sequential(layer.to("cpu"))


def _stored(rank, storages, own_class):
    """By storage: the error of y to that of one process, or what the forward says."""
    import peft
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(1)
    x, found = torch.randn(4, SIZE), []
    for storage in storages:
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        torch.manual_seed(2)
        frozen = quantized(storage)
        frozen.is_loaded_in_4bit = own_class  # by which PEFT chooses its class
        model = peft.get_peft_model(frozen, config)
        lorafast.accelerate(model, quiet=True)
        expected = model(x).detach()
        fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
        try:
            found.append(((model(x) - expected).norm() / expected.norm()).item())
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("own_class", [True, False])
def test_codes_that_the_policy_casts(own_class):
    storages = [torch.uint8, torch.bfloat16, torch.float32, torch.float16]
    for by_bytes, in_its_dtype, *cast in on_ranks(
        _stored,
        storages,
        own_class,
        imports=IMPORTS,
        cpu_because="the codes are those of bitsandbytes on a CPU",
    ):
        assert by_bytes < 2.0**-7  # of adapters in bfloat16
        assert in_its_dtype < 2.0**-7
        for storage, message in zip(storages[2:], cast, strict=True):
            assert "weight is torch.bfloat16" in message
            assert f"codes stored as {storage}" in message
            assert "MixedPrecisionPolicy" in message
            assert "\n" not in message


def _adapted(storage):
    model = lorafast.adapt(quantized(storage).float(), 4, ["0"])
    torch.manual_seed(3)
    nn.init.normal_(model[0].lora_B)
    return model


def _gradients(model, x):
    model(x).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name.removeprefix("module."): g.full_tensor() if hasattr(g, "full_tensor") else g
        for name, g in found.items()
    }


def _spread(rank, storage):
    """Bytes of codes that this rank has under FSDP2 and sends in DDP, and the errors of gradients."""
    from lorafast.bench.distributed.collectives import Collectives
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(1)
    x = torch.randn(4, SIZE)
    expected = _gradients(_adapted(storage), x)
    errors, model = [], fully_shard(_adapted(storage))
    held = getattr(model[0].weight, "_local_tensor", model[0].weight).nbytes
    for wrapped in (model, DistributedDataParallel(_adapted(storage))):
        with Collectives() as sent:
            found = _gradients(wrapped, x.chunk(2)[rank])
        errors += [((found[n] - g).norm() / g.norm()).item() for n, g in expected.items()]
    return held, max(call.bytes for call in sent.calls if call.kind == "broadcast"), errors


@pytest.mark.parametrize(
    ("storage", "is_bytes"), [(torch.uint8, True), (torch.float32, False)], ids=["bytes", "floats"]
)
def test_an_adapted_layer(storage, is_bytes):
    codes = SIZE * SIZE // 2
    because = "the codes are those of bitsandbytes on a CPU"
    for held, sent, errors in on_ranks(_spread, storage, imports=IMPORTS, cpu_because=because):
        assert held == (codes // 2 if is_bytes else codes)
        assert (sent < codes) == is_bytes
        assert len(errors) == 4
        assert max(errors) < 2.0**-20
