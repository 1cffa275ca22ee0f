"""DTensors through the layers, with dropout: the mask of the whole tensor, the same on every rank."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lorafast import reference
from lorafast.functional import dora_linear, lora_conv, lora_linear

P = 0.3
NAMES = ("y", "dx", "dA", "dB", "dmagnitude")


def _on_each_rank(rank, world, file):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(s).double() for s in ((4, 6, 24), (10, 24), (3, 24), (10, 3)))
    m = torch.rand(10).double() + 0.5
    everywhere = [Replicate()]
    for of_x in (Replicate(), Shard(0), Shard(1)):
        for of_weight in (Replicate(), Shard(0)):
            shards = (
                distribute_tensor(x, mesh, [of_x]).requires_grad_(),
                distribute_tensor(A, mesh, everywhere).requires_grad_(),
                distribute_tensor(B, mesh, [of_weight]).requires_grad_(),
            )
            weight = distribute_tensor(W, mesh, [of_weight])
            torch.manual_seed(7 + rank)
            y = lora_linear(shards[0], weight, *shards[1:], 0.5, dropout_p=P)
            found = (y, *torch.autograd.grad(y.square().sum(), shards))

            torch.manual_seed(7)
            seed = torch.randint(2**63 - 1, (1,))
            whole = tuple(t.clone().requires_grad_() for t in (x, A, B))
            y = reference.lora_linear(whole[0], W, *whole[1:], 0.5, dropout_p=P, seed=seed)
            expected = (y, *torch.autograd.grad(y.square().sum(), whole))
            for name, one, two in zip(("y", "dx", "dA", "dB"), found, expected, strict=True):
                torch.testing.assert_close(one.full_tensor(), two, msg=f"{name} {of_x} {of_weight}")

            of_m = distribute_tensor(m, mesh, [of_weight]).requires_grad_()
            for p in (0.0, P):
                torch.manual_seed(7 + rank)
                y = dora_linear(shards[0], weight, *shards[1:], of_m, 0.5, dropout_p=p)
                found = (y, *torch.autograd.grad(y.square().sum(), (*shards, of_m)))
                own = m.clone().requires_grad_()
                y = reference.dora_linear(whole[0], W, *whole[1:], own, 0.5, dropout_p=p, seed=seed)
                expected = (y, *torch.autograd.grad(y.square().sum(), (*whole, own)))
                for name, one, two in zip(NAMES, found, expected, strict=True):
                    message = f"DoRA: {name} {of_x} {of_weight} {p}"
                    torch.testing.assert_close(one.full_tensor(), two, msg=message)
    _convolutions(rank, mesh)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that ends by itself


def _convolutions(rank, mesh):
    """PyTorch shards a convolution's batch; A and B are whole on every rank."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    x, W, A, B = (
        torch.randn(s).double() for s in ((4, 6, 5, 5), (8, 6, 3, 3), (2, 6, 3, 3), (8, 2, 1, 1))
    )
    m = torch.rand(8).double() + 0.5
    for of_x in (Replicate(), Shard(0)):
        for magnitude, p in ((None, 0.0), (None, P), (m, 0.0), (m, P)):
            whole, shards = [], []
            for t in (x, A, B, *[m] * (magnitude is not None)):
                whole.append(t.clone().requires_grad_())
                placement = of_x if t is x else Replicate()
                shards.append(distribute_tensor(t, mesh, [placement]).requires_grad_())
            found = _convolved(
                shards, distribute_tensor(W, mesh, [Replicate()]), seed=7 + rank, dropout_p=p
            )
            expected = _convolved(whole, W, seed=7, dropout_p=p)
            for name, one, two in zip(NAMES, found, expected, strict=False):
                message = f"conv: {name} {of_x} {magnitude is not None} {p}"
                torch.testing.assert_close(one.full_tensor(), two, msg=message)


def _convolved(trained, W, *, seed, dropout_p):
    """The output and the gradients of x, A, B and the magnitude, if there is one."""
    torch.manual_seed(seed)
    x, A, B, *m = trained
    y = lora_conv(
        x, W, A, B, 0.5, padding=1, magnitude=m[0] if m else None, dropout_p=dropout_p
    )  # fmt: skip
    return y, *torch.autograd.grad(y.square().sum(), trained)


@pytest.mark.slow
def test_dropout_of_a_dtensor_is_that_of_the_whole_tensor():
    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_each_rank, (2, os.path.join(folder, "rendezvous")), nprocs=2)
