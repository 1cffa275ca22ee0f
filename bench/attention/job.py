"""Times a training step of a network of self-attention, after checking its layers and their gradients.

Adapters on every attention, and a trained head, in lorafast and in PEFT; beside them the frozen network
and full fine-tuning. The input requires a gradient in all, as that of blocks in a larger network does. A
step is forward, backward and AdamW over what is trained.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lorafast.bench.attention.network import Network, Plain, factors, results
from lorafast.bench.common import steps
from lorafast.bench.common.contenders import FROZEN, UnavailableError
from lorafast.bench.common.problem import DTYPES, SCALING
from lorafast.bench.common.record import Record
from lorafast.bench.common.steps import Arm, show
from torch import Tensor, nn
from torch.nn import functional as F

import lorafast
from lorafast.reference import contract

ARMS = (FROZEN, "lorafast", "peft", "accelerated", "full")
_ADAPTED = ("lorafast", "peft", "accelerated")
_SECONDS = 20.0
_CHECKED = 2


@dataclass(frozen=True)
class Size:
    """A step: inputs ``[tokens, batch, width]`` through so many blocks. ViT-B's width and tokens."""

    batch: int = 8
    tokens: int = 197
    width: int = 768
    blocks: int = 4


@dataclass
class Row(Arm):
    """One arm of a network."""

    batch: int
    tokens: int
    width: int
    blocks: int
    r: int
    dtype: str


def _draw(network: nn.Module) -> None:
    """The same values for the adapters of every arm."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in network.blocks:  # type: ignore[union-attr]
            for p in factors(block.attention).values():
                drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(drawn * (0.1 / p.shape[1] ** 0.5))


def _make(name: str, frozen: Network, r: int) -> nn.Module:
    network: nn.Module = copy.deepcopy(frozen)
    if name == "lorafast":
        lorafast.adapt(network, r, ["attention"], alpha=SCALING * r)
    elif name in _ADAPTED:
        try:
            import peft
        except ImportError as error:
            raise UnavailableError("peft is not installed") from error
        config = peft.LoraConfig(r=r, lora_alpha=int(SCALING * r), target_modules=["attention"])
        network = peft.inject_adapter_in_model(config, network)
        if name == "accelerated":
            lorafast.accelerate(network, quiet=True)
    else:
        network.requires_grad_(name == "full")
    if name in _ADAPTED:
        _draw(network)
    network.head.requires_grad_()
    return network.train()


def _step(network: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    trained = [p for p in network.parameters() if p.requires_grad]
    # A learning rate of zero: a step costs the same and the networks stay as they were checked.
    optimizer = torch.optim.AdamW(trained, lr=0.0, foreach=True)

    def step() -> None:
        F.cross_entropy(network(x.detach().requires_grad_()).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _bounds(network: nn.Module, x: Tensor) -> list[dict[str, contract.Bound]]:
    """What the contract asks of each block's attention, of an input like the network's."""
    found = []
    for block in network.blocks:  # type: ignore[union-attr]
        plain = Plain(block.attention)
        exact = results(copy.deepcopy(plain).double(), x.double())
        found.append(contract.bounds(results(plain, x), exact, dtype=x.dtype))
    return found


def _why_wrong(
    network: nn.Module, x: Tensor, bounds: list[dict[str, contract.Bound]]
) -> str | None:
    """The first layer whose output or gradients are wrong, or None."""
    for i, (block, of) in enumerate(zip(network.blocks, bounds, strict=True)):  # type: ignore[arg-type]
        reason = contract.why_any_broken(results(block.attention, x), of)
        if reason is not None:
            return f"attention of block {i}: {reason}"
    return None


def measure(size: Size, r: int, dtype: str, *, device: torch.device, seconds: float) -> list[Row]:
    """The rows of all arms."""
    sizes = (size.batch, size.tokens, size.width, size.blocks)
    rows = {name: Row(*sizes, r, dtype, contender=name) for name in ARMS}
    torch.manual_seed(0)
    x = torch.randn(size.tokens, size.batch, size.width).to(device, DTYPES[dtype])
    labels = torch.randint(100, (size.batch,)).to(device)
    frozen = Network(size.width, size.blocks).to(device, DTYPES[dtype]).requires_grad_(False)
    few = x[:, :_CHECKED].contiguous()
    bounds = _bounds(_make("lorafast", frozen, r), few)

    def why_wrong(name: str, network: nn.Module) -> str | None:
        return _why_wrong(network, few, bounds) if name in _ADAPTED else None

    return steps.measure(
        rows,
        lambda name: _make(name, frozen, r),
        why_wrong,
        lambda name, network: _step(network, x, labels),
        device=device,
        seconds=seconds,
    )


def run(
    r: int,
    dtype: str,
    *,
    device: torch.device,
    record: Record,
    size: Size | None = None,
    seconds: float | None = None,
) -> list[Row]:
    """All arms, printed and kept in ``record``."""
    rows = measure(size or Size(), r, dtype, device=device, seconds=seconds or _SECONDS)
    show(rows, describe)
    record.add("attention", rows)
    return rows


def describe(row: Row) -> str:
    """``4 blocks of self-attention …``."""
    return (
        f"{row.blocks} blocks of nn.MultiheadAttention, width {row.width}, random weights: training "
        f"step of {row.batch} x {row.tokens} tokens, {row.dtype}, r={row.r}, head trained"
    )
