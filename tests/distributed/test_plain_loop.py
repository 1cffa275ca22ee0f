"""A loop of one's own over accelerate's ``Accelerator``: two processes against one on the same data;
killed and resumed."""

import importlib.util
import os
from functools import partial

import pytest
import torch
from ranks import RankError, device, on_ranks
from small_decoder import decoder, fill_adapters, loss_of, tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("accelerate", "peft"))),
        reason="needs accelerate and peft",
    ),
]
IMPORTS = ("accelerate", "peft", "lorafast.integrations.peft")
TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = {"adapted": torch.float64, "accelerated": torch.float32}
ROUNDING = {torch.float64: 1e-12, torch.float32: 2.0**-18}
BATCHES, SAVED_AFTER = 8, 4


def be_rank(rank, world):
    """What accelerate reads to know its place; ``world`` 1: it is alone, whatever group there is."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    for name, value in places.items():
        os.environ.pop(name, None)
        if world > 1:
            os.environ[name] = str(value)


def _model(kind):
    import peft

    import lorafast

    torch.manual_seed(3)
    if kind == "adapted":
        model = lorafast.adapt(decoder(torch.float64), 4, TARGETS)
    else:
        model = peft.get_peft_model(decoder(), peft.LoraConfig(r=4, target_modules=TARGETS))
        lorafast.accelerate(model, quiet=True)
        assert None in lorafast.explain(model).layers.values()
    fill_adapters(model)
    return model


def _loop(kind, world, make_optimizer, folder=None, resume=False, dies_at=None):
    """The losses of all batches, and the gradients of each step of two."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=device().type == "cpu", gradient_accumulation_steps=2)
    model = _model(kind)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(tokens(4 * BATCHES), batch_size=4 // world)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, gradients, begin = [], [], 0
    if resume:
        accelerator.load_state(folder)
        begin, loader = SAVED_AFTER, accelerator.skip_first_batches(loader, SAVED_AFTER)
    for batch, ids in enumerate(loader, begin):
        with accelerator.accumulate(model):
            loss = loss_of(model, ids)
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if batch == dies_at:
                os._exit(9)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                trained = accelerator.unwrap_model(model).named_parameters()
                gradients.append({n: p.grad.clone() for n, p in trained if p.requires_grad})
            optimizer.step()
            optimizer.zero_grad()
        if folder is not None and batch + 1 == SAVED_AFTER and not resume:
            accelerator.save_state(folder)
    return losses, gradients, type(model).__name__


def _as_one(rank):
    for kind, dtype in KINDS.items():
        be_rank(rank, 2)
        # Adam divides rounding by rounding where a gradient is nearly 0.
        losses, two, wrapped = _loop(kind, 2, torch.optim.SGD)
        assert wrapped == "DistributedDataParallel"
        be_rank(0, 1)
        expected, one, wrapped = _loop(kind, 1, torch.optim.SGD)
        assert wrapped != "DistributedDataParallel"
        assert losses == pytest.approx(expected, rel=ROUNDING[dtype])
        assert len(two) == len(one) == BATCHES // 2
        for found, other in zip(two, one, strict=True):
            assert found.keys() == other.keys() != set()
            for name, gradient in other.items():
                error = (found[name] - gradient).norm()
                assert error <= ROUNDING[dtype] * gradient.norm(), name


def test_two_processes_train_as_one():
    on_ranks(_as_one, imports=IMPORTS)


def _part(rank, kind, folder, resume, dies):
    be_rank(rank, 2)
    dies_at = SAVED_AFTER + 1 if dies and rank == 1 else None
    losses, gradients, _ = _loop(kind, 2, torch.optim.AdamW, folder, resume, dies_at)
    return losses, [{n: g.tolist() for n, g in step.items()} for step in gradients]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_is_resumed(tmp_path, kind):
    """To the bit, from what ``save_state`` wrote."""
    part = partial(on_ranks, _part, kind, imports=IMPORTS)
    whole = part(str(tmp_path / "whole"), False, False)
    with pytest.raises(RankError):
        part(str(tmp_path / "killed"), False, True)
    resumed = part(str(tmp_path / "killed"), True, False)
    for (losses, gradients), (later, last) in zip(whole, resumed, strict=True):
        assert later == losses[SAVED_AFTER:]
        assert last == gradients[SAVED_AFTER // 2 :]
        assert gradients[SAVED_AFTER // 2] != gradients[-1]
