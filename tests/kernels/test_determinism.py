"""No kernel's bits depend on what memory held, or on the order in which its programs start."""

import pytest
import torch
from circumstances import MEMORY, ORDER, WORK, assert_same_bits, together
from helpers import Problem

pytest.importorskip("triton")

from small_tiles import SMALL_TILES, on_kernels

# Several tiles and partial sums in every direction, none of them whole.
P = Problem(40, 70, 45, 20, torch.float32, torch.float32, 0.0, "contiguous", 1)
CALLS = {
    "shrink": lambda run, t: run.shrink(t.x, t.lora_A),
    "linear_expand": lambda run, t: run.linear_expand(t.x, t.weight, t.s, t.lora_B, 0.7, t.bias),
    "dx": lambda run, t: run.linear_expand(t.dy, t.weight.t(), t.ds, t.lora_A.t(), 1.0),
    "expand_backward": lambda run, t: run.expand_backward(t.dy, t.s, t.lora_B, 0.7, dbias=True),
    "shrink_backward": lambda run, t: run.shrink_backward(t.ds, t.x),
}


@pytest.mark.parametrize("tiles", SMALL_TILES)
@pytest.mark.parametrize("call", CALLS)
def test_the_bits_are_the_same_whatever_changes(device, call, tiles):
    t = P.tensors(device)
    for name, tensor in vars(t).items():
        if tensor is not None:
            setattr(t, name, tensor.float())
    operation = "linear_expand" if call == "dx" else call
    kernels = on_kernels(**{operation: SMALL_TILES[tiles]})
    assert_same_bits(lambda: CALLS[call](kernels, t), together(MEMORY, ORDER or WORK))
