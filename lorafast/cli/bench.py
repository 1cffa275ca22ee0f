"""What a LoRA layer costs on this machine, against the frozen layer, PEFT and the other backends.

Results are checked before they are timed; what is wrong is printed as WRONG and has no time.
``lorafast bench compare A.json B.json`` sets two recorded runs side by side.
"""

import argparse
import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorafast.bench import bottlenecks, executed, layer, preference, relatives, traffic
from lorafast.bench.accelerate import MODELS as PEFT_MODELS
from lorafast.bench.accelerate import run as run_accelerated
from lorafast.bench.attention import run as run_attention
from lorafast.bench.call_overhead import run as run_call_overhead
from lorafast.bench.common import bases, picture
from lorafast.bench.common.contenders import BUILDERS, FROZEN
from lorafast.bench.common.output import UnwritableError
from lorafast.bench.common.problem import DTYPES, PASSES, Problem, why_too_large
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import LARGEST_RANK, MODELS, SIZES, Shape, parse, size
from lorafast.bench.compare import compare
from lorafast.bench.convolutions import run as run_convolutions
from lorafast.bench.distributed import run as run_distributed
from lorafast.bench.models import run as run_model
from lorafast.cli import terminal
from lorafast.cli.options import (
    comma,
    default_device,
    device,
    one_of,
    positive,
    probability,
    rank,
    seconds,
)
from lorafast.operands import DENSE

_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shapes": ["minilm", "512,2048,2048"],
        "tokens": [512],
        "dtype": ["fp32"],
        "against": ["peft", "frozen"],
        "seconds": 3.0,
    },
    "cuda": {
        "shapes": ["llama-8b"],
        "tokens": [8192],
        "dtype": ["bf16"],
        "against": ["peft", "peft-compiled", "aten", "triton", "cuda", "frozen"],
        "seconds": 1.0,
    },
}
_TRAFFIC_DEFAULTS: dict[str, Any] = {
    "shapes": ["8192,4096,4096"],
    "tokens": [8192],
    "dtype": ["bf16"],
    "against": ["peft", "aten", "triton"],
}
_RELATIVES_DEFAULTS: dict[str, list[str]] = {
    "cpu": ["512,768,768", "512,2048,2048"],
    "cuda": ["8192,4096,4096"],
}
_COMMAND = "lorafast bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, of what, against whom, and where to put it."""
    commands = parser.add_subparsers(dest="bench_command", metavar="compare")
    sub = commands.add_parser("compare", help="set two recorded runs side by side")
    sub.add_argument("before", type=Path, metavar="A.json")
    sub.add_argument("after", type=Path, metavar="B.json")

    what = parser.add_argument_group("what to measure (without any of these: --layers)")
    what.add_argument("--layers", action="store_true", help="the layer table")
    what.add_argument(
        "--traffic",
        action="store_true",
        help="bytes and launches of a layer on a GPU, counted, not timed: needs no GPU",
    )
    what.add_argument(
        "--executed",
        action="store_true",
        help="instructions and memory accesses of our Triton and CUDA C++ kernels on a GPU, executed "
        "and counted, not timed, and the unit of an SM that bounds each: needs a checkout, a C++ "
        "compiler, and nvcc for the latter; no GPU",
    )
    what.add_argument(
        "--call-overhead", action="store_true", help="microseconds of a call on a tiny layer"
    )
    what.add_argument(
        "--models",
        type=comma(one_of([name for name, model in MODELS.items() if model.gated])),
        default=[],
        metavar="NAMES",
        help="training steps of whole transformers, random weights, no dropout: "
        + ", ".join(name for name, model in MODELS.items() if model.gated),
    )

    what.add_argument(
        "--accelerate",
        type=comma(one_of(PEFT_MODELS)),
        default=[],
        metavar="NAMES",
        help="training and evaluation steps of models with PEFT's adapters, stock and accelerated: "
        + ", ".join(PEFT_MODELS),
    )

    what.add_argument(
        "--convolutions",
        action="store_true",
        help="training steps of a network of ResNet-18's shape: adapters of ours and of PEFT's, the "
        "frozen network, full fine-tuning; with --traffic bytes and launches of its layers instead",
    )
    what.add_argument(
        "--attention",
        action="store_true",
        help="training steps of a stack of nn.MultiheadAttention: adapters of ours and of PEFT's, the "
        "frozen network, full fine-tuning",
    )
    what.add_argument(
        "--preference",
        action="store_true",
        help="log-probabilities of a policy and of its reference, by a small Llama: one mixed forward, "
        "two forwards, one plain forward of as many rows",
    )
    what.add_argument(
        "--distributed",
        action="store_true",
        help="training steps of a small Llama on two ranks, and what they send: DDP, FSDP2, tensor "
        "parallelism, this with FSDP2 on four; with adapters of ours and of PEFT's",
    )
    what.add_argument(
        "--relatives",
        action="store_true",
        help="PEFT's adapters of other kinds over a linear layer, stock and accelerated: "
        f"{', '.join(relatives.KINDS)}; with --traffic bytes and launches instead",
    )
    what.add_argument(
        "--bottlenecks",
        action="store_true",
        help="a bottleneck adapter behind a frozen feed-forward: ours, in plain PyTorch, and that of "
        "AdapterHub's adapters; with --traffic bytes and launches instead",
    )

    of = parser.add_argument_group("of what")
    of.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAMES|M,K,N[,R]",
        help=f"layers of {', '.join(MODELS)}, or sizes",
    )
    of.add_argument("--tokens", type=comma(positive), metavar="M", help="rows for named shapes")
    of.add_argument("--rank", type=comma(rank), default=[16], metavar="R", help="default: 16")
    of.add_argument(
        "--bottleneck",
        type=comma(rank),
        default=[64],
        metavar="B",
        help="width of a bottleneck adapter (default: 64)",
    )
    of.add_argument("--dtype", type=comma(one_of(DTYPES)), help=f"of {', '.join(DTYPES)}")
    of.add_argument(
        "--base",
        type=comma(one_of(bases.BASES)),
        default=[DENSE],
        help="format of the weights that layers and --models adapt, against the frozen ones of the "
        f"same values, dense: of {', '.join(bases.BASES)} (default: {DENSE}; others in bf16)",
    )
    of.add_argument(
        "--adapter-dtype", type=one_of(DTYPES), default="fp32", help="of A and B (default: fp32)"
    )
    of.add_argument(
        "--dropout", type=comma(probability), default=[0.0, 0.05], help="default: 0,0.05"
    )
    of.add_argument(
        "--dora", action="store_true", help="DoRA's adapters, of layers that --traffic counts"
    )
    of.add_argument(
        "--pass",
        dest="passes",
        type=comma(one_of(PASSES)),
        default=["both"],
        metavar="PASS",
        help=f"of {', '.join(PASSES)} (default: both)",
    )
    of.add_argument("--model-layers", type=positive, metavar="L", help="blocks of a whole model")

    how = parser.add_argument_group("how")
    how.add_argument("--against", type=comma(one_of(BUILDERS)), help=f"of {', '.join(BUILDERS)}")
    how.add_argument("--device", default=default_device(), help="default: %(default)s")
    how.add_argument(
        "--seconds", type=seconds, help="of samples for each problem and pass, shared by all"
    )
    how.add_argument("--json", type=Path, metavar="F", help="record the run with every sample")
    how.add_argument(
        "--plot",
        type=Path,
        metavar="F.png",
        help="sweep M and r on the largest square shape and draw the overhead (also F-dark.png); with "
        "--relatives and without --layers draw theirs",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, records; Ctrl-C keeps what is done."""
    if arguments.bench_command == "compare":
        return _compare(arguments)
    try:
        of = device(arguments.device)
        if of.type == "cuda":
            torch.cuda.set_device(of)  # events belong to the current one
        problems = _problems(arguments, _DEFAULTS[of.type])
        counted = [
            replace(problem, use_dora=arguments.dora)
            for problem in _problems(arguments, _TRAFFIC_DEFAULTS)
        ]
        if arguments.dora and (not arguments.traffic or _times_layers(arguments)):
            raise ValueError("--dora is counted, not timed: give --traffic, and not --layers")
        if arguments.executed:
            executed.check()
        if _times_layers(arguments):
            _refuse_too_large(problems, of)
        if arguments.plot is not None:
            _prepare_plot(arguments)
        record = Record(of, path=arguments.json)
    except (ValueError, OSError, UnwritableError) as error:
        terminal.complain(_COMMAND, error)
        return 2
    status = 0
    try:
        try:
            _measure(arguments, of, problems, counted, record)
        except KeyboardInterrupt:
            print("\ninterrupted: what was done is kept", file=sys.stderr)
            status = terminal.INTERRUPTED
        except executed.UnexecutedError as error:
            terminal.complain(_COMMAND, error)
            status = 2
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            terminal.complain(_COMMAND, f"out of memory: {_first_line(error)}")
            status = 2
        record.finish(complete=not status)
    except UnwritableError as error:
        terminal.complain(_COMMAND, error)
        return 2
    if arguments.json:
        print(f"recorded in {arguments.json}")
    if arguments.plot:
        status = _plot(record, arguments.plot) or status
    return status or int(record.any_wrong())


def _times_layers(arguments: argparse.Namespace) -> bool:
    others = (
        arguments.traffic, arguments.executed, arguments.call_overhead, arguments.models,
        arguments.accelerate, arguments.convolutions, arguments.attention, arguments.relatives,
        arguments.bottlenecks, arguments.distributed, arguments.preference,
    )  # fmt: skip
    return arguments.layers or _sweeps(arguments) or not any(others)


def _sweeps(arguments: argparse.Namespace) -> bool:
    """Whether layers are what is drawn."""
    of_relatives = arguments.relatives and not arguments.layers and not arguments.traffic
    return arguments.plot is not None and not of_relatives


def _refuse_too_large(problems: list[Problem], of: torch.device) -> None:
    for problem in problems:
        reason = why_too_large(problem, of)
        if reason is not None:
            raise ValueError(reason)


def _out_of_memory(error: Exception) -> bool:
    """Whether PyTorch has no memory left; on a CPU it says so in words alone."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _prepare_plot(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        arguments.plot = None
    else:
        picture.prepare(arguments.plot)


def _measure(
    arguments: argparse.Namespace,
    device: torch.device,
    problems: list[Problem],
    counted: list[Problem],
    record: Record,
) -> None:
    defaults = _DEFAULTS[device.type]
    against = arguments.against or defaults["against"]
    seconds = arguments.seconds or defaults["seconds"]
    if _times_layers(arguments):
        layer.run(
            problems, arguments.passes, against, device=device, seconds=seconds, record=record
        )
    if _sweeps(arguments):
        print("\nover M and over r, for the plot")
        layer.run(
            layer.sweep(_largest(problems), device.type), arguments.passes[:1],
            [name for name in against if name != FROZEN],
            device=device, seconds=seconds, record=record, kind="sweep",
        )  # fmt: skip
    if arguments.traffic:
        traffic.run(counted, arguments.against or _TRAFFIC_DEFAULTS["against"], record=record)
        if arguments.convolutions:
            dtypes = arguments.dtype or _TRAFFIC_DEFAULTS["dtype"]
            traffic.convolutions.run(arguments.rank, dtypes, arguments.adapter_dtype, record=record)
        _count_other_kinds(arguments, record)
    if arguments.executed:
        executed.run(record=record)
    if arguments.call_overhead:
        run_call_overhead(arguments.against or ["peft"], device=device, record=record)
    for name, base, r in itertools.product(arguments.models, arguments.base, arguments.rank):
        for dtype in _dtypes(arguments, base, defaults):
            run_model(
                MODELS[name], r, dtype, arguments.against or ["peft"], device=device, record=record,
                tokens=arguments.tokens and arguments.tokens[0], layers=arguments.model_layers,
                seconds=arguments.seconds, base=base,
            )  # fmt: skip

    for r, dtype in itertools.product(arguments.rank, arguments.dtype or defaults["dtype"]):
        run_accelerated(
            arguments.accelerate, r, dtype, device=device, record=record, seconds=arguments.seconds
        )
        if arguments.convolutions and not arguments.traffic:
            run_convolutions(r, dtype, device=device, record=record, seconds=arguments.seconds)
        if arguments.attention:
            run_attention(r, dtype, device=device, record=record, seconds=arguments.seconds)
        if arguments.preference:
            preference.run(r, dtype, device=device, record=record, seconds=arguments.seconds)
        if arguments.distributed:
            run_distributed(r, dtype, device=device, record=record, seconds=arguments.seconds)
    if not arguments.traffic:
        _measure_other_kinds(arguments, device, record)


def _measure_other_kinds(
    arguments: argparse.Namespace, device: torch.device, record: Record
) -> None:
    """Of adapters."""
    dtypes = arguments.dtype or _DEFAULTS[device.type]["dtype"]
    if arguments.relatives:
        layers = _layers(arguments, _relatives_defaults(device.type))
        relatives.run(layers, dtypes, device=device, record=record, seconds=arguments.seconds)
    if arguments.bottlenecks:
        bottlenecks.run(
            arguments.bottleneck, dtypes, device=device, record=record, seconds=arguments.seconds
        )


def _count_other_kinds(arguments: argparse.Namespace, record: Record) -> None:
    dtypes = arguments.dtype or _TRAFFIC_DEFAULTS["dtype"]
    if arguments.relatives:
        traffic.relatives.run(_layers(arguments, _TRAFFIC_DEFAULTS), dtypes, record=record)
    if arguments.bottlenecks:
        traffic.bottlenecks.run(arguments.bottleneck, dtypes, record=record)


def _relatives_defaults(kind: str) -> dict[str, Any]:
    return _DEFAULTS[kind] | {"shapes": _RELATIVES_DEFAULTS[kind]}


def _problems(arguments: argparse.Namespace, defaults: dict[str, Any]) -> list[Problem]:
    """Every shape in every dtype, at every rank and dropout."""
    layers = _layers(arguments, defaults)
    found = [
        Problem(shape, r, dtype, arguments.adapter_dtype, dropout_p, base)
        for base in arguments.base
        for dtype in _dtypes(arguments, base, defaults)
        for shape, r in layers
        for dropout_p in arguments.dropout
    ]
    for problem in found:
        reason = bases.why_not(problem.base, problem.shape.K)
        if reason is not None:
            raise ValueError(f"{problem}: {reason}")
    return found


def _layers(arguments: argparse.Namespace, defaults: dict[str, Any]) -> list[tuple[Shape, int]]:
    """Every shape at every rank."""
    layers = []
    for word in arguments.shapes or defaults["shapes"]:
        sizes, ranks = _sizes_and_ranks(word, arguments.rank)
        for shape in parse([sizes], arguments.tokens or defaults["tokens"], f"{SIZES}[,R]"):
            layers += [(shape, r) for r in ranks]
    return layers


def _dtypes(arguments: argparse.Namespace, base: str, defaults: dict[str, Any]) -> list[str]:
    dtypes: list[str] = arguments.dtype or (defaults["dtype"] if base == DENSE else ["bf16"])
    return dtypes


def _sizes_and_ranks(word: str, ranks: list[int]) -> tuple[str, list[int]]:
    """``M,K,N,R`` as ``M,K,N`` and its own rank."""
    sizes, _, last = word.rpartition(",")
    own = size(last, LARGEST_RANK) if sizes.count(",") == 2 else None
    return (word, ranks) if own is None else (sizes, [own])


def _largest(problems: list[Problem]) -> Problem:
    """The first of the largest layers, a square one if there is one."""
    return max(problems, key=lambda p: (p.shape.K == p.shape.N, p.shape.K * p.shape.N))


def _plot(record: Record, path: Path) -> int:
    """Draws what was swept, or kinds of adapters; nothing of what broke off before."""
    try:
        if record.rows("sweep"):
            written = layer.plot([layer.Row.from_json(row) for row in record.rows("sweep")], path)
        elif record.rows("relatives"):
            written = relatives.plot(
                [relatives.Row(**row) for row in record.rows("relatives")], path
            )
        else:
            return 0
    except (ValueError, OSError) as error:
        terminal.complain(_COMMAND, f"no plot: {error}")
        return 2
    print("drawn: " + ", ".join(map(str, written)))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    try:
        print(compare(arguments.before, arguments.after))
    except ValueError as error:
        terminal.complain(f"{_COMMAND} compare", error)
        return 2
    return 0
