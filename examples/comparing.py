"""What the examples share: arms of a comparison that take turns, what is measured of them, checks."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from quantized_base import evaluate
from resuming import State
from torch import Tensor, nn
from tqdm import tqdm

SMOOTHING = 15
SAVED_EVERY = 10
LOSS_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and what it should say."""

    inputs: tuple[Tensor, ...]
    labels: Tensor


@dataclass
class Arm:
    """One way to train the model, and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = math.nan
    peak_bytes: int = 0
    weights_bytes: int = 0
    adapter_bytes: int = 0


def learning_rate_factor(step: int, steps: int) -> float:
    """A short warm-up, then a straight line to zero."""
    warmup = max(1, steps // 15)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def train_step(arm: Arm, batch: Batch) -> float:
    arm.optimizer.zero_grad(set_to_none=True)
    loss = arm.loss(arm.model(*batch.inputs), batch.labels)
    loss.backward()
    arm.optimizer.step()
    return loss.item()


def train(
    arms: list[Arm],
    batches: Sequence[Batch],
    state: State | None,
    description: str | None = None,
) -> None:
    """Train all arms on the same batches, taking turns, the first place going round.

    What a stopped run did is kept in `state`, if there is one.
    """
    done = state.load(arms) if state else 0
    if state and done:
        print(f"Going on after step {done}, from {state.path}.")
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            arm.optimizer, partial(learning_rate_factor, steps=len(batches)), last_epoch=done - 1
        )
        for arm in arms
    ]
    progress = tqdm(
        range(done, len(batches)), desc=description or f"training {len(arms)} arms", unit="step",
        dynamic_ncols=True, initial=done, total=len(batches),
    )  # fmt: skip
    for step in progress:
        first = step % len(arms)
        for arm in arms[first:] + arms[:first]:
            start = time.perf_counter()
            arm.losses.append(train_step(arm, batches[step]))
            arm.seconds.append(time.perf_counter() - start)
        for scheduler in schedulers:
            scheduler.step()
        if state and ((step + 1) % SAVED_EVERY == 0 or step + 1 == len(batches)):
            state.save(step + 1, arms)
        progress.set_postfix({arm.name: f"{arm.losses[-1]:.4f}" for arm in arms})


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    evaluate(model)
    hits = sum(int((model(*b.inputs).argmax(1) == b.labels).sum()) for b in batches)
    return hits / sum(len(b.labels) for b in batches)


def peak_bytes(arm: Arm, batch: Batch) -> int:
    """Return what one step allocates at its peak, plus the optimizer's state, without weights.

    To be called after the training, whose schedule has brought the learning rate to zero: the step
    changes no weight.
    """
    state = [value for values in arm.optimizer.state.values() for value in values.values()]
    state_bytes = sum(value.nbytes for value in state if isinstance(value, Tensor))
    arm.optimizer.zero_grad(set_to_none=True)
    if batch.labels.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train_step(arm, batch)
        return torch.cuda.max_memory_allocated() - before + state_bytes
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        train_step(arm, batch)
    return _profiled_peak(profile) + state_bytes


def _profiled_peak(profile: torch.profiler.profile) -> int:
    """Return the peak of the bytes that PyTorch's CPU allocator held since the profile began."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    changes = [e for e in trace["traceEvents"] if e.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in changes))


@torch.no_grad()
def largest_difference(a: nn.Module, b: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the largest difference between the logits of two models."""
    evaluate(a)
    evaluate(b)
    return largest([float((a(*x.inputs) - b(*x.inputs)).abs().max()) for x in batches])


def largest(values: Sequence[float]) -> float:
    """Return the largest of them, NaN if there is one."""
    return max(values, key=lambda value: (math.isnan(value), value))


def loss_differences(arm: Arm, reference: Arm) -> list[float]:
    return [abs(x - y) for x, y in zip(arm.losses, reference.losses, strict=True)]


def check_loss_curves(fast_arm: Arm, peft_arm: Arm, why_not: str | None) -> list[str]:
    """Print how far the two LoRA curves are apart; return a sentence if it is too far.

    `why_not` says why they can't be equal, where they can't.
    """
    worst = largest(loss_differences(fast_arm, peft_arm))
    found = f"Largest difference between lorafast's and PEFT's loss at any step: {worst:.1e}."
    if why_not is not None:
        say(f"{found} Not checked: {why_not}, the curves are close, not equal.")
    elif not worst <= LOSS_TOLERANCE:
        say(f"{found} More than {LOSS_TOLERANCE:g}.")
        return [
            f"lorafast must follow PEFT's loss curve within {LOSS_TOLERANCE:g}, not {worst:.1e}"
        ]
    else:
        say(f"{found} The same curve: every step is within {LOSS_TOLERANCE:g}.")
    return []


def check_in_peft(
    arm: Arm, fresh: nn.Module, adapter: Path, batches: Sequence[Batch], dtype: str = "float32"
) -> list[str]:
    """Load the saved adapter with PEFT on a fresh model and compare the outputs."""
    import peft

    device = batches[0].labels.device
    loaded = peft.PeftModel.from_pretrained(fresh, adapter, torch_device=str(device)).to(device)
    worst = largest_difference(arm.model, loaded, batches)
    found = f"{adapter}: saved by lorafast in PEFT's format, loaded by PEFT on a fresh model"
    if dtype != "float32":
        say(f"{found}. Largest logit difference {worst:.1e}; checked in float32 only.")
    elif not worst <= LOGIT_TOLERANCE:
        say(f"{found}: the outputs DISAGREE, largest logit difference {worst:.1e}.")
        return [f"PEFT's outputs with lorafast's adapter differ by {worst:.1e}"]
    else:
        say(f"{found}: the outputs agree, largest logit difference {worst:.1e}.")
    return []


def table(rows: Sequence[Sequence[str]], header: int) -> str:
    """Return the rows as text, a line below the first `header` ones."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "   ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(header, "-" * len(lines[0]))
    return "\n".join(lines)


def draw_losses(axes: Axes, arm: Arm, color: str, width: float, line: str = "-") -> None:
    """Draw a loss curve: every step, and the running mean over SMOOTHING of them."""
    steps = range(1, len(arm.losses) + 1)
    label = f"{arm.name} (test accuracy {arm.accuracy:.3f})"
    axes.plot(steps, arm.losses, color=color, alpha=0.22, linewidth=width * 0.6)
    axes.plot(steps, _smoothed(arm.losses), line, color=color, linewidth=width, label=label)


def _smoothed(values: list[float]) -> list[float]:
    """Return the running mean over SMOOTHING steps, fewer at both ends."""
    half = SMOOTHING // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def say(text: str) -> None:
    print(textwrap.fill(text, width=96, break_long_words=False, break_on_hyphens=False))


def bounded_int(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, not {value}")
        return value

    parse.__name__ = "integer"  # the name argparse gives the type in its messages
    return parse
