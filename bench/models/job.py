"""Times training steps, after checking logits and gradients against the model in float64."""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from lorafast.bench.common import memory
from lorafast.bench.common.check import raised
from lorafast.bench.common.clock import Call, Timed, Turn, clock_for, interleave
from lorafast.bench.common.contenders import FROZEN, FULL, UnavailableError
from lorafast.bench.common.problem import DTYPES
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import Model
from lorafast.bench.common.table import megabytes, table, why_no_time
from lorafast.bench.models.arms import Arm, Size, build, fitting, make, quantize, why_too_large
from torch import Tensor, nn

from lorafast.operands import DENSE
from lorafast.reference import contract

_TOKENS = {"cpu": 256, "cuda": 8192}
_SECONDS = {"cpu": 10.0, "cuda": 5.0}
_SEQUENCE = 2048
_CHECKED_TOKENS = 128
_HEADER = (
    "", "step", "middle half", "overhead", "middle half", "tokens/s", "peak MB", "weights MB",
)  # fmt: skip


@dataclass
class Row(Timed):
    """One arm; samples are seconds of a step, ``peak_bytes`` what a step allocates at most,
    ``weights_bytes`` what the arm holds before it."""

    model: str
    layers: int
    all_layers: int
    vocabulary: int
    tokens: int
    r: int
    dtype: str
    contender: str
    wrong: str | None = None
    unavailable: str | None = None
    samples: list[float] = field(default_factory=list)
    frozen_samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    base: str = DENSE
    weights_bytes: int | None = None


def measure(
    size: Size, r: int, against: Sequence[str], *, device: torch.device, seconds: float
) -> list[Row]:
    """Rows of the frozen model, lorafast, and those named."""
    names = list(dict.fromkeys((FROZEN, "lorafast", *against)))
    rows = {
        name: Row(
            size.model.name, size.layers, size.model.layers, size.vocabulary, size.tokens, r,
            size.dtype, name, base=size.base,
        )
        for name in names
    }  # fmt: skip
    try:
        too_large = why_too_large(size, device)
        if too_large is not None:
            raise UnavailableError(too_large)
        frozen = build(size, device)
    except UnavailableError as error:
        for row in rows.values():
            row.unavailable = str(error)
        return list(rows.values())
    operands = quantize(frozen, size.base)
    embeddings, labels = _batch(size, device)
    arms = {}
    truth = _Truth(frozen, r, embeddings, labels)
    for name in progress(names, "arm"):
        try:
            arm = make(name, frozen, r, operands)
            rows[name].weights_bytes = arm.weights_bytes
            rows[name].wrong = truth.why_wrong(arm)
        except UnavailableError as error:
            rows[name].unavailable = str(error)
            continue
        except Exception as error:  # it is the arm's, reported with it, and the others go on
            rows[name].wrong = raised(error)
        if rows[name].wrong is None:
            arms[name] = arm
    del truth
    turns = {name: _turn(arm, embeddings, labels) for name, arm in arms.items()}
    samples = interleave(clock_for(device), turns, seconds=seconds, least=5, most=50)
    for name, times in samples.items():
        rows[name].samples, rows[name].frozen_samples = times, samples[FROZEN]
        arm = arms[name]
        rows[name].peak_bytes = memory.peak_bytes(
            functools.partial(arm.step, embeddings, labels), device
        )
    return list(rows.values())


def _batch(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token embeddings (a leaf that requires a gradient) and labels, ``tokens`` in all."""
    length = min(size.tokens, _SEQUENCE)
    generator = torch.Generator(device).manual_seed(2)
    shape = (max(size.tokens // length, 1), length)
    embeddings = torch.randn((*shape, size.model.hidden), generator=generator, device=device)
    labels = torch.randint(size.vocabulary, shape, generator=generator, device=device)
    return embeddings.to(DTYPES[size.dtype]).requires_grad_(), labels


class _Truth:
    """The adapted model in float64, and the error that plain PyTorch makes in the model's dtype.

    Llama's norms and rotary embedding compute in float32 whatever the weights are.
    """

    def __init__(self, frozen: nn.Module, r: int, embeddings: Tensor, labels: Tensor) -> None:
        # A few tokens suffice: each goes through every layer.
        self._inputs = embeddings[:1, :_CHECKED_TOKENS].detach(), labels[:1, :_CHECKED_TOKENS]
        eager = self._outputs(make("reference", frozen, r))
        exact = self._outputs(make("reference", copy.deepcopy(frozen).double(), r))
        self._bounds = contract.bounds(eager, exact, dtype=embeddings.dtype)

    def _outputs(self, arm: Arm) -> dict[str, Tensor]:
        """Logits, gradient of the embeddings, gradients of all adapters in one vector."""
        embeddings, labels = self._inputs
        x = embeddings.to(arm.dtype, copy=True).requires_grad_()
        with arm.context():
            output = arm.model(inputs_embeds=x, labels=labels)
            output.loss.backward()
        assert x.grad is not None
        found = {"logits": output.logits.detach(), "dx": x.grad}
        adapters = [tensor for name in sorted(arm.adapters) for tensor in arm.adapters[name]]
        if adapters:
            missing = [tensor for tensor in adapters if tensor.grad is None]
            gradients = [t.grad.flatten() for t in adapters if t.grad is not None]
            found["adapter gradients"] = x.new_empty(0) if missing else torch.cat(gradients)
        for tensor in adapters:
            tensor.grad = None
        return found

    def why_wrong(self, arm: Arm) -> str | None:
        """What is wrong with an arm's results, or None; the plain models are what they are."""
        if arm.name in (FROZEN, FULL):
            return None
        return contract.why_any_broken(self._outputs(arm), self._bounds)


def _turn(arm: Arm, embeddings: Tensor, labels: Tensor) -> Turn:
    @contextmanager
    def turn(index: int) -> Iterator[Call]:
        yield lambda: arm.step(embeddings, labels)

    return turn


def run(
    model: Model,
    r: int,
    dtype: str,
    against: Sequence[str],
    *,
    device: torch.device,
    record: Record,
    tokens: int | None = None,
    layers: int | None = None,
    seconds: float | None = None,
    base: str = DENSE,
) -> list[Row]:
    """The rows of a model, printed and kept in ``record``; ``layers`` None: as many as fit."""
    tokens = tokens or _TOKENS[device.type]
    if layers:
        size = Size(model, layers, tokens, dtype, base)
    else:
        size = fitting(model, tokens, dtype, device, base)
    say(f"\n{describe(size, r)}")
    rows = measure(size, r, against, device=device, seconds=seconds or _SECONDS[device.type])
    record.add("models", rows)
    say(format_rows(rows))
    return rows


def describe(size: Size, r: int) -> str:
    """``Llama of the sizes of llama-8b, 8 of 32 blocks …``."""
    base = "" if size.base == DENSE else f", {size.base} base (the frozen model's dense)"
    return (
        f"Llama of the sizes of {size.model.name}, random weights, {size.layers} of "
        f"{size.model.layers} blocks, vocabulary {size.vocabulary}: training step on {size.tokens} "
        f"tokens, {size.dtype}{base}, r={r} on every linear layer"
    )


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each arm."""
    remarks = [why_no_time(row.wrong, row.unavailable) for row in rows]
    return table(_HEADER, list(map(_cells, rows)), remarks=remarks)


def _cells(row: Row) -> tuple[str, ...]:
    time, overhead = row.time, row.overhead
    if time is None or overhead is None:
        return (f"  {row.contender}",)
    return (
        f"  {row.contender}",
        f"{time.median * 1e3:.4g} ms",
        f"{time.low * 1e3:.4g} – {time.high * 1e3:.4g} ms",
        f"{overhead.median:.3f}",
        f"{overhead.low:.3f} – {overhead.high:.3f}",
        f"{row.tokens / time.median:,.0f}",
        megabytes(row.peak_bytes),
        megabytes(row.weights_bytes),
    )
