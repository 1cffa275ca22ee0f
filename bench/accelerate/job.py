"""Times a training and an evaluation step of a model without adapters, with PEFT's, and accelerated.

Outputs and gradients of the accelerated model must first be as near to float64 as those of stock PEFT.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lorafast.bench.accelerate.models import build
from lorafast.bench.common.check import raised
from lorafast.bench.common.clock import Call, Summary, Timed, Turn, clock_for, interleave
from lorafast.bench.common.contenders import FROZEN, UnavailableError
from lorafast.bench.common.problem import DTYPES, SCALING
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.table import table, why_no_time
from torch import Tensor, nn

import lorafast
from lorafast.reference import contract

STOCK, FAST = "peft", "accelerated"
_SECONDS = 8.0
_ADAPTERS = 8
_BATCH, _LENGTH = 16, 32
_HEADER = ("", "step", "middle half", "over frozen", "middle half", "peft / this", "middle half")


@dataclass(frozen=True)
class Case:
    """What a step does, and with which adapters."""

    title: str
    training: bool
    use_dora: bool = False
    dropout: float = 0.0
    adapters: int = 1
    length: int = _LENGTH


CASES = (
    Case("training step", True),
    Case("training step, dropout 0.05", True, dropout=0.05),
    Case("evaluation step", False),
    Case("training step, DoRA", True, use_dora=True),
    Case("evaluation step, DoRA", False, use_dora=True),
    Case(f"evaluation step, batch of {_ADAPTERS} adapters", False, adapters=_ADAPTERS),
    Case(
        f"evaluation step, batch of {_ADAPTERS} adapters, one token", False, adapters=_ADAPTERS, length=1
    ),
)  # fmt: skip


@dataclass
class Row(Timed):
    """One contender in one case; samples are seconds of a step."""

    model: str
    case: str
    batch: int
    length: int
    r: int
    dtype: str
    contender: str
    wrong: str | None = None
    unavailable: str | None = None
    samples: list[float] = field(default_factory=list)
    frozen_samples: list[float] = field(default_factory=list)
    stock_samples: list[float] = field(default_factory=list)

    @property
    def speedup(self) -> Summary | None:
        """The ratio of stock PEFT's time to this, round by round."""
        if not self.samples or not self.stock_samples:
            return None
        return Summary.of_ratio(self.stock_samples, self.samples)


def _adapted(frozen: nn.Module, case: Case, r: int) -> nn.Module:
    """A copy of the modules around the same weights, with PEFT's adapters on every linear layer."""
    import peft

    model = copy.deepcopy(frozen, {id(p): p for p in frozen.parameters()})
    config = peft.LoraConfig(
        r=r, lora_alpha=int(SCALING * r), target_modules="all-linear", use_dora=case.use_dora,
        lora_dropout=case.dropout, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, config)
        for i in range(1, case.adapters):
            adapted.add_adapter(str(i), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    return adapted.train(case.training)


def _step(model: nn.Module, case: Case, x: Tensor) -> Callable[[], Tensor]:
    arguments: dict[str, Any] = {}
    if case.adapters > 1 and hasattr(model, "peft_config"):
        names = ["default", *map(str, range(1, case.adapters))]
        arguments["adapter_names"] = [names[i % case.adapters] for i in range(x.shape[0])]
    trained = [p for p in model.parameters() if p.requires_grad]
    # A learning rate of zero: a step costs the same and the models stay as they were checked.
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True) if trained else None

    def train() -> Tensor:
        x.grad = None
        y: Tensor = model(inputs_embeds=x)[0]
        y.float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return y

    @torch.no_grad()
    def evaluate() -> Tensor:
        y: Tensor = model(inputs_embeds=x, **arguments)[0]
        return y

    return train if case.training else evaluate


def _why_wrong(stock: nn.Module, fast: nn.Module, case: Case, x: Tensor) -> str | None:
    """What is wrong with the accelerated model, or None; dropout, whose masks differ, left out.

    It may be no further from the model in float64 than stock PEFT, as the package's contract has it.
    """
    wide = x.detach().double().requires_grad_(x.requires_grad)
    exact = _results(copy.deepcopy(stock).double(), case, wide)
    theirs, ours = (_results(model, case, x) for model in (stock, fast))
    return contract.why_any_broken(ours, contract.bounds(theirs, exact, dtype=x.dtype))


def _results(model: nn.Module, case: Case, x: Tensor) -> dict[str, Tensor]:
    """The output, and in training the gradients: of the input, and of all parameters in one vector."""
    if not case.training:
        return {"y": _step(model, case, x)()}
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.eval()
    x.grad = None
    y: Tensor = model(inputs_embeds=x)[0]
    y.float().square().mean().backward()
    for module in dropouts:
        module.train()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    dx: Any = x.grad
    found = {"y": y.detach(), "dx": dx}
    found[f"gradients of {len(gradients)} parameters"] = torch.cat(
        [gradients[name].flatten() for name in sorted(gradients)]
    )
    model.zero_grad()
    return found


def _turn(step: Callable[[], Tensor]) -> Turn:
    @contextmanager
    def turn(index: int) -> Iterator[Call]:
        yield step

    return turn


def measure(
    name: str, case: Case, r: int, dtype: str, *, device: torch.device, seconds: float
) -> list[Row]:
    """The rows of the frozen model, stock PEFT, and the accelerated model."""
    rows = {
        contender: Row(name, case.title, _BATCH, case.length, r, dtype, contender)
        for contender in (FROZEN, STOCK, FAST)
    }
    try:
        frozen = build(name, DTYPES[dtype], device).train(case.training)
    except UnavailableError as error:
        for row in rows.values():
            row.unavailable = str(error)
        return list(rows.values())
    generator = torch.Generator(device).manual_seed(2)
    config: Any = frozen.config
    shape = (_BATCH, case.length, config.hidden_size)
    x = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
    x.requires_grad_(case.training)
    models = {FROZEN: frozen, STOCK: _adapted(frozen, case, r), FAST: _adapted(frozen, case, r)}
    lorafast.accelerate(models[FAST], quiet=True)
    try:
        rows[FAST].wrong = _why_wrong(models[STOCK], models[FAST], case, x)
    except Exception as error:  # reported with the row, and the other cases go on
        rows[FAST].wrong = raised(error)
    if rows[FAST].wrong is not None:
        del models[FAST]
    turns = {contender: _turn(_step(model, case, x)) for contender, model in models.items()}
    samples = interleave(clock_for(device), turns, seconds=seconds, least=7, most=100)
    for contender, times in samples.items():
        rows[contender].samples = times
        rows[contender].frozen_samples = samples[FROZEN]
        rows[contender].stock_samples = samples[STOCK]
    return list(rows.values())


def run(
    names: Sequence[str],
    r: int,
    dtype: str,
    *,
    device: torch.device,
    record: Record,
    seconds: float | None = None,
    cases: Sequence[Case] = CASES,
) -> list[Row]:
    """Every case of every model, printed and kept in ``record``."""
    found = []
    for name, case in progress([(name, case) for name in names for case in cases], "case"):
        rows = measure(name, case, r, dtype, device=device, seconds=seconds or _SECONDS)
        say(f"\n{describe(rows[0])}")
        say(format_rows(rows))
        record.add("accelerate", rows)
        found += rows
    return found


def describe(row: Row) -> str:
    """``tiny-llama, training step: 16 x 32 tokens, fp32, r=16 on every linear layer``."""
    return (
        f"{row.model}, {row.case}: {row.batch} x {row.length} tokens, {row.dtype}, r={row.r} on every "
        "linear layer"
    )


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each contender."""
    remarks = [why_no_time(row.wrong, row.unavailable) for row in rows]
    return table(_HEADER, [_cells(row) for row in rows], remarks=remarks)


def _cells(row: Row) -> tuple[str, ...]:
    time, overhead, speedup = row.time, row.overhead, row.speedup
    if time is None or overhead is None or speedup is None:
        return (f"  {row.contender}",)
    return (
        f"  {row.contender}",
        f"{time.median * 1e3:.4g} ms",
        f"{time.low * 1e3:.4g} – {time.high * 1e3:.4g} ms",
        f"{overhead.median:.3f}",
        f"{overhead.low:.3f} – {overhead.high:.3f}",
        f"{speedup.median:.3f}",
        f"{speedup.low:.3f} – {speedup.high:.3f}",
    )
