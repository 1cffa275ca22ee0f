"""Policy and reference of one model on two ranks: adapters off, and both in one forward."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import device, on_ranks
from small_decoder import PROJECTIONS, Block, decoder, fill_adapters, tokens
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointError, checkpoint

import lorafast

BETA = 0.5


def policy(wrapping, **options):
    """The decoder with adapters that aren't zero, wrapped as it is on every rank."""
    torch.manual_seed(0)
    model = lorafast.adapt(decoder(torch.float64), 4, list(PROJECTIONS), **options)
    fill_adapters(model)
    model.to(device())
    if wrapping == "ddp":
        return DistributedDataParallel(model)
    if wrapping == "fsdp2":
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
    return model


def log_probabilities(logits, ids):
    """Of each sequence ``[batch]``."""
    each = F.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])
    return each.squeeze(2).sum(1)


def dpo_loss(model, ids, one_forward):
    """Of pairs: the even sequences are better than the odd ones."""
    n = len(ids)
    if one_forward:
        rows = ["default"] * n + [None] * n
        with lorafast.mixed(model, rows, base_grad=False):
            own, reference = model(torch.cat([ids, ids])).chunk(2)
    else:
        with torch.no_grad(), lorafast.disabled(model):
            reference = model(ids)
        own = model(ids)
    gain = log_probabilities(own, ids) - log_probabilities(reference.detach(), ids)
    return -F.logsigmoid(BETA * (gain[0::2] - gain[1::2])).mean()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(model, ids, one_forward):
    """The loss and the adapters' gradients by name."""
    loss = dpo_loss(model, ids, one_forward)
    loss.backward()
    found = {
        name.removeprefix("module."): whole(p.grad).cpu().numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return loss.item(), found


def _train_on_rank(rank, wrapping, one_forward, options):
    own = tokens(8)[4 * rank : 4 * rank + 4]
    loss, found = step(policy(wrapping, **options), own, one_forward)
    mean = torch.tensor(loss, dtype=torch.float64, device=device())
    dist.all_reduce(mean)
    return mean.item() / 2, found


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("one_forward", "options"), [(False, {}), (True, {}), (True, {"use_dora": True})]
)
def test_a_step_of_dpo_is_that_of_one_process(wrapping, one_forward, options):
    expected, gradients = step(policy(None, **options), tokens(8), one_forward=False)
    assert len(gradients) >= 2 * 2 * len(PROJECTIONS)
    for loss, found in on_ranks(_train_on_rank, wrapping, one_forward, options):
        assert loss == pytest.approx(expected, rel=1e-12)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                torch.from_numpy(found[name]), torch.from_numpy(gradient), msg=name
            )


def _reference_on_rank(rank, wrapping):
    model = policy(wrapping)
    ids = tokens(4, seed=rank)
    with torch.no_grad(), lorafast.disabled(model):
        found = model(ids)
    return torch.equal(found, decoder(torch.float64).to(device())(ids)), not torch.equal(
        model(ids), found
    )


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_the_reference_is_the_base_to_the_bit(wrapping):
    assert on_ranks(_reference_on_rank, wrapping) == [(True, True)] * 2


def checkpointed_step(model, ids, inside):
    """The gradients where blocks are checkpointed, by a backward in the block of ``mixed`` or after."""
    rows = ["default"] * len(ids) + [None] * len(ids)
    with lorafast.mixed(model, rows, base_grad=False):
        own, reference = model(torch.cat([ids, ids])).chunk(2)
        gain = log_probabilities(own, ids) - log_probabilities(reference.detach(), ids)
        loss = -F.logsigmoid(BETA * (gain[0::2] - gain[1::2])).mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    named = model.named_parameters()
    return {n.removeprefix("module."): whole(p.grad) for n, p in named if p.grad is not None}


def _checkpointed(rank, wrapping):
    own, found = tokens(8)[4 * rank : 4 * rank + 4], {}
    forward = Block.forward
    for use_reentrant in (False, True):
        Block.forward = lambda *given, how=use_reentrant: checkpoint(
            forward, *given, use_reentrant=how
        )
        model = policy(wrapping)
        model.register_forward_pre_hook(_asks_for_gradients)
        found[use_reentrant] = checkpointed_step(model, own, inside=True)
    Block.forward = lambda *given: checkpoint(forward, *given, use_reentrant=False)
    with pytest.raises(CheckpointError):
        checkpointed_step(policy(wrapping), own, inside=False)
    return found


def _asks_for_gradients(model, given):
    """A reentrant checkpoint needs an input that has a gradient."""
    inner = getattr(model, "module", model)
    inner.embed_tokens.register_forward_hook(lambda module, ids, x: x.requires_grad_())


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_checkpointed_blocks(wrapping):
    """What is computed again is mixed alike within the block alone: after it PyTorch raises."""
    _, expected = step(policy(None), tokens(8), one_forward=False)
    for found in on_ranks(_checkpointed, wrapping):
        for gradients in found.values():
            assert gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    torch.from_numpy(gradients[name]), torch.from_numpy(gradient), msg=name
                )
