"""A transformer's feed-forward, and the bottleneck adapters that may follow it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lorafast.bench.common.contenders import UnavailableError
from lorafast.bench.common.problem import SCALING
from torch import Tensor, nn
from torch.nn import functional as F

import lorafast
from lorafast.nn.bottleneck import bottleneck_at

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class FeedForward(nn.Module):
    """``gelu(x·W1ᵀ + b1)·W2ᵀ + b2``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[M, width]`` → the same."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Plain(nn.Module):
    """``h + scaling · (f(h·Dᵀ + d)·Uᵀ + u)`` in PyTorch's own calls: what is right."""

    def __init__(self, width: int, bottleneck: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.f = ACTIVATIONS[activation]

    def forward(self, h: Tensor) -> Tensor:
        """``[M, width]`` → the same."""
        return h + SCALING * self.up(self.f(self.down(h)))


class _Hub(nn.Module):
    """The module of AdapterHub's package alone: what its models do around it is left out."""

    def __init__(self, width: int, bottleneck: int, activation: str) -> None:
        super().__init__()
        try:
            from adapters import SeqBnConfig
            from adapters.methods.modeling import Adapter
        except ImportError as error:
            raise UnavailableError("adapters is not installed (pip install adapters)") from error
        reduction = width / bottleneck
        settings = SeqBnConfig(
            reduction_factor=reduction, non_linearity=activation, scaling=SCALING
        )
        self.adapter = Adapter("bench", width, bottleneck, settings)

    def forward(self, h: Tensor) -> Tensor:
        """``[M, width]`` → the same."""
        y: Tensor = self.adapter(h, h)[0]
        return y


@dataclass
class Made:
    """A feed-forward with what follows it. ``adapter`` is that alone, None of one that has none, and
    ``trained`` its D, d, U and u."""

    network: nn.Module
    adapter: nn.Module | None
    trained: dict[str, nn.Parameter]


def alone(of: FeedForward) -> Made:
    """A feed-forward that nothing follows."""
    return Made(of, None, {})


def ours(of: FeedForward, bottleneck: int, activation: str) -> Made:
    """As ``adapt`` puts it there."""
    lorafast.adapt(
        of, kind="pfeiffer", targets=["fc2"], bottleneck=bottleneck, activation=activation,
        scaling=SCALING, adapter_dtype=of.fc2.weight.dtype,
    )  # fmt: skip
    adapter = bottleneck_at(of.fc2)
    assert adapter is not None
    return Made(of, adapter, _named(adapter.down, adapter.down_bias, adapter.up, adapter.up_bias))


def plain(of: FeedForward, bottleneck: int, activation: str) -> Made:
    """In PyTorch's own calls."""
    adapter = Plain(of.fc1.in_features, bottleneck, activation)
    return _behind(of, adapter, adapter.down, adapter.up)


def hub(of: FeedForward, bottleneck: int, activation: str) -> Made:
    """AdapterHub's."""
    adapter = _Hub(of.fc1.in_features, bottleneck, activation)
    within: Any = adapter.adapter
    return _behind(of, adapter, within.adapter_down[0], within.adapter_up)


def _behind(of: FeedForward, adapter: nn.Module, down: nn.Linear, up: nn.Linear) -> Made:
    adapter.to(of.fc2.weight.device, of.fc2.weight.dtype)
    trained: Any = (down.weight, down.bias, up.weight, up.bias)
    return Made(nn.Sequential(of, adapter), adapter, _named(*trained))


def _named(*trained: nn.Parameter) -> dict[str, nn.Parameter]:
    return dict(zip(("D", "d", "U", "u"), trained, strict=True))


def draw(trained: dict[str, nn.Parameter]) -> None:
    """The same values for every adapter; its change is about as large as h."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained.values():
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(drawn / (p.shape[1] ** 0.5 if p.dim() == 2 else 10))
