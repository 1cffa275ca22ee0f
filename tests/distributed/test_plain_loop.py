"""A loop of one's own over accelerate's ``Accelerator``: two processes against one on the same data."""

import importlib.util
import os

import pytest
import torch
from ranks import device, on_ranks
from small_decoder import decoder, fill_adapters, loss_of, tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate"),
]


def _loop(world):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    import lorafast

    accelerator = Accelerator(cpu=device().type == "cpu", gradient_accumulation_steps=2)
    torch.manual_seed(3)
    model = lorafast.adapt(decoder(torch.float64), 4, ["q_proj", "v_proj", "down_proj"])
    fill_adapters(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(tokens(16), batch_size=4 // world)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, gradients = [], []
    for ids in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, ids)
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                trained = accelerator.unwrap_model(model).named_parameters()
                gradients.append({n: p.grad.clone() for n, p in trained if p.requires_grad})
            optimizer.step()
            optimizer.zero_grad()
    return losses, gradients, type(model).__name__


def _as_one(rank):
    from accelerate.state import AcceleratorState, GradientState

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    losses, two, wrapped = _loop(2)
    assert wrapped == "DistributedDataParallel"
    for name in places:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    expected, one, wrapped = _loop(1)
    assert wrapped == "Decoder"
    assert losses == pytest.approx(expected, rel=1e-12)
    assert len(two) == len(one) == 2
    for found, other in zip(two, one, strict=True):
        assert found.keys() == other.keys() != set()
        for name, gradient in other.items():
            assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_two_processes_train_as_one():
    on_ranks(_as_one)
