"""``‖W + scaling · B·A‖`` of each row in PyTorch's own calls, without a matrix of the weight's size.

The norm of row j needs neither ``B·A`` nor its sum with W, N × K each:

    ‖W_j + s·B_j·A‖² = ‖W_j‖² + 2s · B_j·(W·Aᵀ)_j + s² · B_j·(A·Aᵀ)·B_jᵀ

from ``W·Aᵀ [N, r]`` and ``A·Aᵀ [r, r]``. Where the adapter cancels nearly all of a row the sum loses
digits: with a hundredth of the row's norm left, about four.

``‖W‖²`` is not kept for training: W may change where PyTorch counts no change (``weight.data += …``, as
PEFT merges), only a pass over W could tell, and a pass over W is what it would save. (In evaluation
``ops.kept_norm`` keeps the norm itself, until ``train()`` or ``eval()``.) Measured at
2048 × 2048 on two cores: 0.3 ms in float32 and 0.8 in bfloat16, beside the 28 and 10 ms of the product
with 512 rows. Of a quantized weight it would save no more: ``W·Aᵀ`` reads the same rows, made dense, and
changes in every step.
"""

import torch
from torch import Tensor

from lorafast import operands
from lorafast.core.dtypes import LEAST_NORM
from lorafast.operands import Weight

_BLOCKS = 16
"""What isn't float32 is squared and multiplied in a float32 copy, of a block of W's rows at a time: on a
CPU one that stays in the cache."""
_BLOCK_BYTES = 1 << 26
"""Of that copy on a GPU, where every block is four launches more: on an H100 sixteen for each layer of a
small model took most of its time."""


@torch.no_grad()
def weight_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``‖W + scaling · B·A‖`` of each row.

    Shapes: ``weight [N, K]``, a tensor or an operand of another format, ``lora_A [r, K]``,
    ``lora_B [N, r]`` → ``[N]`` in float32 (float64 of a float64 weight), at least ``LEAST_NORM``. No
    gradient flows through it.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.detach().to(dtype), lora_B.detach().to(dtype)
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling.detach(), 1.0
    elif torch.compiler.is_compiling():  # a number that may be symbolic
        B, scaling = B * scaling, 1.0
    of_weight, with_A = _of_weight(weight, A)
    # [N, r]: what B is multiplied by, once for both terms.
    beside_B = torch.addmm(with_A, B, A @ A.t(), beta=2 * scaling, alpha=scaling * scaling)
    squared = of_weight + (B * beside_B).sum(1)
    # Where the adapter cancels a row, what is left is rounding, which must not be negative or zero.
    rounding = torch.finfo(dtype).eps * of_weight
    return torch.maximum(squared, rounding).clamp_min(LEAST_NORM**2).sqrt()


def _blocks(weight: Weight, dtype: torch.dtype) -> int:
    """Into how many blocks of rows ``weight`` is cut, to be copied in ``dtype``."""
    if weight.device.type == "cpu":
        return _BLOCKS
    N, K = weight.shape
    return max(-(-N * K * dtype.itemsize // _BLOCK_BYTES), 1)


def _of_weight(weight: Weight, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """``‖W_j‖²`` of each row and ``W·Aᵀ [N, r]``, in the dtype of A."""
    if isinstance(weight, Tensor) and _is_transposed(weight):
        return _of_transposed(weight.t(), lora_A)
    whole = isinstance(weight, Tensor) and weight.dtype.itemsize >= lora_A.dtype.itemsize
    squares, products = [], []
    for rows in operands.row_blocks(weight, 1 if whole else _blocks(weight, lora_A.dtype)):
        wide = rows.detach().to(lora_A.dtype)
        squares.append(torch.linalg.vector_norm(wide, dim=1).square())
        products.append(torch.mm(wide, lora_A.t()))
    if len(squares) == 1:
        return squares[0], products[0]
    return torch.cat(squares), torch.cat(products)


def _is_transposed(weight: Tensor) -> bool:
    """Whether a CPU has W's columns in memory, as an embedding has them: of its rows PyTorch's norm and
    product take ten times as long."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and weight.t().is_contiguous()
        and not weight.is_contiguous()
    )


def _of_transposed(columns: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """The same from ``Wᵀ [K, N]``, a block of its rows at a time."""
    K, N = columns.shape
    squares, products = lora_A.new_zeros(N), lora_A.new_zeros(lora_A.shape[0], N)
    step = max(-(-K // (4 * _BLOCKS)), 1)
    for begin in range(0, K, step):
        wide = columns[begin : begin + step].detach().to(lora_A.dtype)
        squares = squares + wide.square().sum(0)
        products = torch.addmm(products, lora_A[:, begin : begin + step], wide)
    return squares, products.t()
