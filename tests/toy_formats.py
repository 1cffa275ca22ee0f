"""Formats that tests go through: some of the package's, and two that only they know."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.operands import Operand, Weight


class Negative(Operand):
    """W as −W, in its own dtype."""

    format = "negative"

    def __init__(self, negative: Tensor) -> None:
        if negative.dim() != 2:
            raise ValueError(f"negative has shape {list(negative.shape)}, expected [N, K]")
        self.negative = negative
        self.shape, self.dtype = negative.shape, negative.dtype

    @classmethod
    def of(cls, weight: Tensor) -> "Negative":
        return cls(-weight)

    def tensors(self) -> dict[str, Tensor]:
        return {"negative": self.negative}

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], parameters: str) -> "Negative":
        return cls(tensors["negative"])

    @classmethod
    def of_layer(cls, layer: nn.Module) -> "Negative | None":
        return cls(layer.negative) if isinstance(layer, NegativeLinear) else None

    def rows(self, begin: int, end: int) -> Tensor:
        return (-self.negative[begin:end]).to(self.dtype)


class NegativeLinear(nn.Module):
    """A frozen layer that keeps its weight so."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.negative = nn.Parameter(-linear.weight.detach(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, -self.negative, self.bias)


class Scaled(Operand):
    """W as ``values [N·K]``, flat, and ``exponents [N]``, int8: row n is ``values·2^exponents[n]``.

    ``parameters``: the shape, as "NxK".
    """

    format = "scaled"

    def __init__(self, values: Tensor, exponents: Tensor, shape: tuple[int, int]) -> None:
        if values.shape != (shape[0] * shape[1],) or exponents.shape != shape[:1]:
            raise ValueError(
                f"values and exponents have shapes {list(values.shape)} and {list(exponents.shape)}, "
                f"expected [{shape[0] * shape[1]}] and [{shape[0]}]"
            )
        self.values, self.exponents = values, exponents
        self.shape, self.dtype = torch.Size(shape), values.dtype
        self.parameters = f"{shape[0]}x{shape[1]}"

    @classmethod
    def of(cls, weight: Tensor) -> "Scaled":
        N, K = weight.shape
        exponents = -(torch.arange(N, device=weight.device) % 4)
        values = (weight * 2.0 ** -exponents.to(weight.dtype)[:, None]).reshape(-1)
        return cls(values, exponents.to(torch.int8), (N, K))

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "exponents": self.exponents}

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], parameters: str) -> "Scaled":
        N, K = parameters.split("x")
        return cls(tensors["values"], tensors["exponents"], (int(N), int(K)))

    def rows(self, begin: int, end: int) -> Tensor:
        values = self.values.view(self.shape)[begin:end]
        return torch.ldexp(values, self.exponents[begin:end, None]).to(self.dtype)


def _dense(weight: Tensor) -> Tensor:
    return weight


FORMATS: dict[str, Callable[[Tensor], Weight]] = {
    "dense": _dense,
    "nf4": functools.partial(operands.NF4.of, nested=False),
    "fp8": operands.FP8.of,
    "negative": Negative.of,
    "scaled": Scaled.of,
}
"""By name, what stores a dense weight so, if need be with a loss: ``held`` has what is left, of which no
more is lost when it is stored again."""


def held(format: str, weight: Tensor) -> Tensor:
    """What the format holds of a dense weight: the weight that its products are to be compared by."""
    return operands.as_dense(FORMATS[format](weight))


@contextmanager
def registered() -> Iterator[None]:
    """Within the block the package knows the formats."""
    for operand in (Negative, Scaled):
        operands.register(operand)
    try:
        yield
    finally:
        for operand in (Negative, Scaled):
            operands.unregister(operand.format)
