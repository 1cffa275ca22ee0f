"""Times what a preference loss (DPO and its like) asks of a model: log-probabilities of a policy and of
its reference, the same model without the adapter, for the same sequences.

The arms: one forward of both with ``lorafast.mixed``; two forwards, the reference's with
``lorafast.disabled``; and one plain forward of as many rows through the adapted model, which is what
one mixed forward should take. The frozen model's forward of as many rows is what all are compared with.
The step is the forward and the backward of a loss of the policy's rows; in plain forwards of all rows.
The input requires a gradient in all, as that of blocks in a larger model does.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from lorafast.bench.accelerate.models import build
from lorafast.bench.common import steps
from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.problem import DTYPES, SCALING
from lorafast.bench.common.record import Record
from lorafast.bench.common.steps import Arm
from torch import Tensor, nn

import lorafast

ARMS = (FROZEN, "twice the rows", "mixed", "two forwards")
WHICH = ("forward", "forward + backward")
_SECONDS = 20.0
_EPSILONS = 8
"""Of the dtype, relative to the largest logit. Batches of another size add up in another order: measured
at most 2.7; policy and reference are 15 apart in bf16, and a million in fp32."""


@dataclass(frozen=True)
class Size:
    """So many sequences of so many tokens, for the policy and for its reference."""

    sequences: int = 4
    tokens: int = 64


@dataclass
class Row(Arm):
    """One arm."""

    which: str
    sequences: int
    tokens: int
    r: int
    dtype: str


def _adapted(frozen: nn.Module, r: int) -> nn.Module:
    model = copy.deepcopy(frozen)
    lorafast.adapt(model, r, alpha=SCALING * r)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(drawn * (0.1 / p.shape[1] ** 0.5))
    return model.train()


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(inputs_embeds=x).logits
    return logits


def _both(name: str, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the policy and of its reference, or of two halves of a plain forward."""
    n = len(x)
    if name == "two forwards":
        with torch.no_grad(), lorafast.disabled(model):
            reference = _logits(model, x)
        return _logits(model, x), reference
    rows = torch.cat([x, x])
    if name == "mixed":
        with lorafast.mixed(model, ["default"] * n + [None] * n, base_grad=False):
            logits = _logits(model, rows)
    else:
        logits = _logits(model, rows)
    return logits[:n], logits[n:]


def _call(which: str, x: Tensor, name: str, model: nn.Module) -> Callable[[], object]:
    plain = name in (FROZEN, "twice the rows")

    def forward() -> tuple[Tensor, Tensor]:
        return _both(name, model, x.detach().requires_grad_())

    def step() -> None:
        policy, reference = forward()
        loss = policy.float().square().mean()
        (loss + reference.float().square().mean() if plain else loss).backward()
        model.zero_grad()

    return forward if which == "forward" else step


def _why_wrong(name: str, model: nn.Module, frozen: nn.Module, x: Tensor) -> str | None:
    """Whether policy or reference are other than each by itself gives."""
    if name in (FROZEN, "twice the rows"):
        return None
    with torch.no_grad():
        for got, alone, what in zip(
            _both(name, model, x),
            (_logits(model, x), _logits(frozen, x)),
            ("policy", "reference"),
            strict=True,
        ):
            error = (got - alone).abs().max() / alone.abs().max()
            if not error <= _EPSILONS * torch.finfo(x.dtype).eps:
                return f"the {what} is off by {error:.1e}"
    return None


def measure(size: Size, r: int, dtype: str, *, device: torch.device, seconds: float) -> list[Row]:
    """The rows of all arms, of the forward and of the step."""
    frozen = build("tiny-llama", DTYPES[dtype], device).train()
    torch.manual_seed(0)
    embeddings = frozen.get_parameter("model.embed_tokens.weight")
    x = torch.randn(size.sequences, size.tokens, embeddings.shape[1]).to(embeddings)
    adapted = _adapted(frozen, r)
    found: list[Row] = []
    for which in WHICH:
        rows = {
            name: Row(which, size.sequences, size.tokens, r, dtype, contender=name) for name in ARMS
        }
        found += steps.measure(
            rows,
            lambda name: frozen if name == FROZEN else adapted,
            lambda name, model: _why_wrong(name, model, frozen, x),
            partial(_call, which, x),
            device=device,
            seconds=seconds / len(WHICH),
        )
    return found


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
    for which in WHICH:
        steps.show([row for row in rows if row.which == which], describe)
    record.add("preference", rows)
    return rows


def describe(row: Row) -> str:
    """``policy and reference, forward …``."""
    return (
        f"Policy and reference, {row.which}: a small Llama of random weights, {row.sequences} x "
        f"{row.tokens} tokens for each of the two, {row.dtype}, r={row.r} on every linear layer"
    )
