"""``Problem``: one call, described. Whatever chooses or plans reads it, and nothing else."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafast.core.dtypes import wide

OPERATIONS = ("shrink", "expand", "linear_expand", "expand_backward", "shrink_backward")
"""Those of a LoRA linear layer; ``expand`` is the low-rank term of ``linear_expand`` by itself."""
LAYER_OPERATIONS = ("lora_linear", "lora_linear_backward")
"""A whole layer's forward and backward, which are made of these, but for ``expand``."""

GROUPED_OPERATIONS = ("grouped_lora_linear", "grouped_lora_linear_backward")
"""Those of a layer of several adapters, of which each element of a batch has one or none."""

WEIGHT_NORM = "weight_norm"
"""DoRA's norm of each row of ``W + scaling · B·A``, an operation beside those of a layer."""

BOTTLENECK_OPERATIONS = ("bottleneck", "bottleneck_backward")
"""Those of a bottleneck adapter."""
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
"""What may stand between its two products: GELU exact and by tanh, ReLU, SiLU (swish), tanh."""

SCALED_OPERATIONS = ("scaled_linear", "scaled_linear_backward")
"""Those of a frozen linear layer of which a vector scales what it gives or what it is given, (IA)³."""

DENSE = "dense"
"""The format of a weight that is a plain tensor, and of an operation that reads none."""

_TMA_ROW, _TMA_EXTENT = 2**40, 2**31
PLAIN = (Tensor, torch.nn.Parameter)
"""PyTorch's own classes of tensors, whose memory kernels can read."""


class Layout(NamedTuple):
    """How a matrix lies in memory.

    ``rows``: the bytes, up to 16, of which the address of each row is a multiple; 0 if the elements of
    a row are not neighbours. ``columns``: the same of its columns. ``huge``: beyond what TMA can
    describe, 2**31 rows or columns, or 2**40 bytes from one to the next, or none at all, or such as
    overlap.
    """

    rows: int = 16
    columns: int = 0
    huge: bool = False

    @classmethod
    def of(cls, matrix: Tensor) -> "Layout":
        """That of a matrix, or of a stack ``[n, rows, columns]`` of them: what holds for each."""
        (rows, columns), (row, column) = matrix.shape[-2:], matrix.stride()[-2:]
        size, address = matrix.dtype.itemsize, matrix.data_ptr()
        if matrix.dim() == 3:
            address |= matrix.stride(0) * size
        return cls(
            _alignment(address, row * size) if column == 1 else 0,
            _alignment(address, column * size) if row == 1 else 0,
            max(rows, columns) >= _TMA_EXTENT
            or max(row, column) * size >= _TMA_ROW
            or not min(row, column)
            or (column == 1 and rows > 1 and row < columns)
            or (row == 1 and columns > 1 and column < rows),
        )

    @classmethod
    def fresh(cls, rows: int, columns: int, dtype: torch.dtype) -> "Layout":
        """That of a new matrix: contiguous, at an aligned address."""
        row = columns * dtype.itemsize
        return cls(_alignment(0, row), 0, max(rows, columns) >= _TMA_EXTENT or row >= _TMA_ROW)


def _alignment(address: int, step: int) -> int:
    """The largest power of two up to 16 that divides both."""
    bits = address | step | 16
    return bits & -bits


class Layouts(NamedTuple):
    """The layout of each matrix that the operation reads; of the weight, of what it is stored in."""

    x: Layout = Layout()
    dy: Layout = Layout()
    weight: Layout = Layout()
    lora_A: Layout = Layout()
    lora_B: Layout = Layout()
    s: Layout = Layout()
    """Of ``ds`` where that is read."""
    residual: Layout = Layout()


class Problem(NamedTuple):
    """All that the choice of a backend and of its launches may depend on.

    Sizes are the layer's, ``x [M, K]`` and ``weight [N, K]``; one that the operation doesn't have is 0:
    ``shrink`` and ``shrink_backward`` have no N, ``expand`` and ``expand_backward`` have no K,
    ``weight_norm`` has no M.

    - ``operation``: one of ``OPERATIONS``, ``LAYER_OPERATIONS``, ``GROUPED_OPERATIONS``,
      ``BOTTLENECK_OPERATIONS`` or ``SCALED_OPERATIONS``, or ``WEIGHT_NORM``;
    - ``dtype``: of x, y, dy and dx, and of the weight as it is multiplied; ``adapter_dtype``: of A, B
      and their gradients, of two dtypes the one that both are promoted to;
    - ``format``: how the weight is stored, a name of ``lorafast.operands``; ``format_parameters``: what
      else it takes to read it;
    - ``transposed``: of ``linear_expand``: it multiplies by W, not by Wᵀ, as dx does;
    - ``wants``: the results asked for where there are several (``WANTS`` has them, in their order);
      ``lora_linear`` without ``s`` may have a plan that PyTorch differentiates itself;
    - ``dropout``: whether there is a mask; ``bias``: whether one is added;
    - ``plain``: whether all are strided tensors of PyTorch's own class, on one device;
    - ``tf32``: whether PyTorch may round the factors of float32 products so (on a CPU to bfloat16 too);
    - ``layouts``: how the matrices lie in memory, on a GPU; elsewhere nothing depends on it;
    - ``adapters``: of ``GROUPED_OPERATIONS``: how many there are;
    - ``graph``: of ``lora_linear``: whether gradients may be asked for. Without, no autograd function is
      called around the plan's launches;
    - ``activation``, ``residual``: of ``BOTTLENECK_OPERATIONS``: one of ``ACTIVATIONS``, and whether the
      change is added to another tensor than h. Their h is x, D is A, U is B, b is r, a is s;
    - ``scales_input``: of ``SCALED_OPERATIONS``: whether the vector, whose dtype is ``adapter_dtype``,
      scales x, not y.
    """

    operation: str
    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: torch.device
    format: str = DENSE
    transposed: bool = False
    wants: tuple[str, ...] = ()
    dropout: bool = False
    bias: bool = False
    plain: bool = True
    tf32: bool = False
    layouts: Layouts = Layouts()
    format_parameters: str = ""
    adapters: int = 0
    graph: bool = True
    activation: str = ""
    residual: bool = False
    scales_input: bool = False


WANTS = {
    "lora_linear": ("y", "s"),
    "expand_backward": ("ds", "dB", "dbias"),
    "lora_linear_backward": ("dx", "dweight", "dA", "dB", "dbias"),
    "grouped_lora_linear": ("y", "s"),
    "grouped_lora_linear_backward": ("dx", "dweight", "dA", "dB", "dscaling", "dbias"),
    "bottleneck": ("y", "a"),
    "bottleneck_backward": ("dh", "dD", "dd", "dU", "du"),
    "scaled_linear": ("y", "z"),
    "scaled_linear_backward": ("dx", "dscale"),
}


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are strided, of PyTorch's own class and on one device: what kernels can read."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(
        type(t) in PLAIN and t.layout is torch.strided and t.device == given[0].device
        for t in given
    )


_NO_WEIGHT: dict[str, Any] = {"format": DENSE, "format_parameters": ""}


def parts(problem: Problem) -> list[Problem]:
    """The problems of the operations that a whole layer's forward or backward is made of, in order."""
    p = problem._replace(graph=True)
    if p.operation == "lora_linear":
        return [
            p._replace(operation="shrink", N=0, wants=(), bias=False, **_NO_WEIGHT),
            p._replace(
                operation="linear_expand", wants=(), dropout=False, layouts=_with_fresh_s(p)
            ),
        ]
    assert p.operation == "lora_linear_backward", p.operation
    found = []
    first = expand_wants(p.wants)
    if first:
        found.append(
            p._replace(operation="expand_backward", K=0, dropout=False, wants=first, **_NO_WEIGHT)
        )
    if "dA" in p.wants:
        found.append(
            p._replace(
                operation="shrink_backward", N=0, wants=(), layouts=_with_fresh_s(p), **_NO_WEIGHT
            )
        )
    if "dx" in p.wants:
        found.append(
            p._replace(
                operation="linear_expand", transposed=True, wants=(), layouts=_with_fresh_s(p)
            )
        )
    return found


def expand_wants(wants: tuple[str, ...]) -> tuple[str, ...]:
    """What a layer's backward needs of ``expand_backward``."""
    needs_ds = "dx" in wants or "dA" in wants
    return tuple(
        name for name in WANTS["expand_backward"] if name in wants or (name == "ds" and needs_ds)
    )


def _with_fresh_s(p: Problem) -> Layouts:
    return p.layouts._replace(s=Layout.fresh(p.M, p.r, wide(p.dtype)))
