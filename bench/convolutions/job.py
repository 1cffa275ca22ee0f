"""Times a training step of a convolutional network, after checking its layers and their gradients.

Adapters on every convolution but the stem's, and a trained head, in lorafast and in PEFT; beside them
the frozen network, where a gradient flows to where the adapters begin; the head alone; and full
fine-tuning. Norms have fixed statistics in all. A step is forward, backward and AdamW over what is
trained.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lorafast.bench.common import steps
from lorafast.bench.common.contenders import FROZEN, UnavailableError
from lorafast.bench.common.problem import DTYPES, SCALING
from lorafast.bench.common.record import Record
from lorafast.bench.common.steps import Arm, show
from lorafast.bench.convolutions.network import Network, Plain, calibrated, convolutions
from torch import Tensor, nn
from torch.nn import functional as F

import lorafast
from lorafast.reference import contract

ARMS = (FROZEN, "head", "lorafast", "peft", "accelerated", "full")
_ADAPTED = ("lorafast", "peft", "accelerated")
_SECONDS = 20.0


@dataclass(frozen=True)
class Size:
    """A step: images ``[batch, 3, side, side]``."""

    batch: int = 16
    side: int = 96
    widths: tuple[int, ...] = (64, 128, 256, 512)


@dataclass
class Row(Arm):
    """One arm of a network."""

    batch: int
    side: int
    r: int
    dtype: str
    channels_last: bool


def _draw(network: nn.Module) -> None:
    """The same values for the adapters of every arm, which all name them alike in their order."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(drawn * (0.1 / max(p[0].numel(), 1) ** 0.5))


def _adapted(name: str, frozen: Network, r: int) -> nn.Module:
    """A copy of the modules around the same weights, with adapters."""
    network = copy.deepcopy(frozen, {id(p): p for p in frozen.blocks.parameters()})
    targets = list(convolutions(network))
    if name == "lorafast":
        lorafast.adapt(network, r, targets, alpha=SCALING * r)
        _draw(network)
        network.head.requires_grad_()
        return network
    try:
        import peft
    except ImportError as error:
        raise UnavailableError("peft is not installed") from error
    config = peft.LoraConfig(r=r, lora_alpha=int(SCALING * r), target_modules=targets)
    adapted: nn.Module = peft.inject_adapter_in_model(config, network)
    _draw(adapted)
    network.head.requires_grad_()
    network.eval()
    if name == "accelerated":
        lorafast.accelerate(adapted, quiet=True)
    return adapted


def _make(name: str, frozen: Network, r: int) -> nn.Module:
    if name in _ADAPTED:
        return _adapted(name, frozen, r)
    network = copy.deepcopy(frozen)
    network.requires_grad_(name == "full")
    network.stem.requires_grad_(False)
    network.head.requires_grad_()
    return network


def _loss(name: str, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss; in the frozen arm a gradient flows to where the adapters of others begin."""
    x = network.stem(images)  # type: ignore[operator]
    if name == FROZEN:
        x = x.detach().requires_grad_()
    return F.cross_entropy(network.logits(x).float(), labels)  # type: ignore[operator]


def _step(name: str, network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    trained = [p for p in network.parameters() if p.requires_grad]
    # A learning rate of zero: a step costs the same and the networks stay as they were checked.
    optimizer = torch.optim.AdamW(trained, lr=0.0, foreach=True)

    def step() -> None:
        _loss(name, network, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _inputs(frozen: Network, images: Tensor) -> dict[str, Tensor]:
    """What each convolution that gets an adapter is given for two of the images."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in convolutions(frozen):

        def keep(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = given[0].detach().clone()

        hooks.append(frozen.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        frozen(images[:2])
    for hook in hooks:
        hook.remove()
    return found


def _results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A layer's output and gradients, of A and B in this order."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    factors = [p for name, p in layer.named_parameters() if "lora_" in name]
    y: Tensor = layer(x)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y)
    gradients = torch.autograd.grad(y, [x, *factors], dy)
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), gradients, strict=True))}


def _bounds(network: nn.Module, inputs: dict[str, Tensor]) -> dict[str, dict[str, contract.Bound]]:
    """What the contract asks of each layer: whole networks of ReLUs are no measure, for where one is
    near 0 a rounding decides on a gradient."""
    found = {}
    for name, x in inputs.items():
        layer: Any = network.get_submodule(name)
        plain = Plain(layer)
        exact = _results(copy.deepcopy(plain).double(), x.double())
        found[name] = contract.bounds(_results(plain, x), exact, dtype=x.dtype)
    return found


def _why_wrong(
    network: nn.Module, inputs: dict[str, Tensor], bounds: dict[str, dict[str, contract.Bound]]
) -> str | None:
    """The first layer whose output or gradients are wrong, or None."""
    for name, x in inputs.items():
        reason = contract.why_any_broken(_results(network.get_submodule(name), x), bounds[name])
        if reason is not None:
            return f"{name}: {reason}"
    return None


def measure(
    size: Size,
    r: int,
    dtype: str,
    *,
    device: torch.device,
    seconds: float,
    channels_last: bool = True,
) -> list[Row]:
    """The rows of all arms."""
    sizes = (size.batch, size.side)
    rows = {n: Row(*sizes, r, dtype, channels_last, contender=n) for n in ARMS}
    of = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    shape = (size.batch, 3, size.side, size.side)
    images = torch.randn(shape).to(device, DTYPES[dtype], memory_format=of)
    labels = torch.randint(100, (size.batch,)).to(device)
    frozen = _laid_out(Network(size.widths).to(device, DTYPES[dtype]), of)
    frozen = calibrated(frozen, images).requires_grad_(False)
    inputs = _inputs(frozen, images)
    bounds = _bounds(_laid_out(_make("lorafast", frozen, r), of), inputs)

    def why_wrong(name: str, network: nn.Module) -> str | None:
        return _why_wrong(network, inputs, bounds) if name in _ADAPTED else None

    return steps.measure(
        rows,
        lambda name: _laid_out(_make(name, frozen, r), of),
        why_wrong,
        lambda name, network: _step(name, network, images, labels),
        device=device,
        seconds=seconds,
    )


_N = TypeVar("_N", bound=nn.Module)


def _laid_out(network: _N, memory_format: torch.memory_format) -> _N:
    """The network with its kernels in this format."""
    move: Any = network.to
    move(memory_format=memory_format)
    return network


def run(
    r: int,
    dtype: str,
    *,
    device: torch.device,
    record: Record,
    size: Size | None = None,
    seconds: float | None = None,
) -> list[Row]:
    """All arms, channels last and not, printed and kept in ``record``."""
    found = []
    for channels_last in (True, False):
        rows = measure(
            size or Size(), r, dtype, device=device, seconds=seconds or _SECONDS,
            channels_last=channels_last,
        )  # fmt: skip
        show(rows, describe)
        record.add("convolutions", rows)
        found += rows
    return found


def describe(row: Row) -> str:
    """``ResNet-18's shape, random weights: training step of 16 images of 96 x 96 …``."""
    order = "channels last" if row.channels_last else "channels first"
    return (
        f"ResNet-18's shape, random weights: training step of {row.batch} images of {row.side} x "
        f"{row.side}, {row.dtype}, {order}, r={row.r} on every convolution but the stem's, head trained"
    )
