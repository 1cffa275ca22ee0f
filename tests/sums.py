"""Small kernels whose result depends on the order in which programs run."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_kernel(x_ptr, total_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + offsets)))


def sum_in_order_of_arrival(x: Tensor) -> Tensor:
    """What no kernel here may do: an atomic on a float."""
    total = torch.zeros(1, device=x.device)
    _add_kernel[(x.numel() // 64,)](x, total, BLOCK=64)
    return total


@triton.jit
def _note_kernel(count_ptr, when_ptr, ny, nz):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(when_ptr + (x * ny + y) * nz + z, tl.atomic_add(count_ptr, 1))


def who_came_when(grid: tuple[int, int, int]) -> Tensor:
    """For each program of the grid its place in the order of arrival."""
    nx, ny, nz = grid
    count, when = torch.zeros(1, dtype=torch.int32), torch.zeros(nx * ny * nz, dtype=torch.int32)
    _note_kernel[grid](count, when, ny, nz)
    return when
