"""Measures on this GPU what is fastest for each call, Triton's configurations, the CUDA kernels or
PyTorch, and keeps it.

Minutes, once: without it lorafast uses the rules for the GPU's architecture and a model of its speed.
Every result is kept at once; interrupted, the next run goes on where this one was.
"""

import argparse
import time

import torch

from lorafast.backends import registry
from lorafast.backends.triton import Triton, device_of
from lorafast.bench.common.output import UnwritableError
from lorafast.bench.common.problem import DTYPES, Problem, why_too_large
from lorafast.bench.common.shapes import parse
from lorafast.bench.tune import run as run_tune
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
from lorafast.ops.problems import why_not

_COMMAND = "lorafast tune"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which calls, and for how long."""
    parser.add_argument(
        "--shapes", nargs="+", default=["llama-8b"], metavar="NAMES|M,K,N",
        help="layers of named models, or sizes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=comma(positive), default=[8192], metavar="M,..")
    parser.add_argument("--rank", type=comma(rank), default=[16], metavar="R,..")
    parser.add_argument("--dtype", type=comma(one_of(DTYPES)), default=["bf16"])
    parser.add_argument("--adapter-dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--dropout", type=comma(probability), default=[0.0], metavar="P,..")
    parser.add_argument(
        "--seconds", type=seconds, default=10.0, help="for each case (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="also what has been tuned already")
    parser.add_argument("--device", default=default_device(), help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=seconds, help="begin nothing after so long")


def run(arguments: argparse.Namespace) -> int:
    """Tunes; 2 if nothing can be tuned here, 130 after Ctrl-C."""
    try:
        of = device(arguments.device)
        problems = _problems(arguments)
        reason = _why_nothing(of)
        if reason is not None:
            raise ValueError(f"nothing to tune here: {reason}")
        for problem in problems:
            reason = why_too_large(problem, of)
            if reason is not None:
                raise ValueError(reason)
    except ValueError as error:
        terminal.complain(_COMMAND, error)
        return 2
    deadline = float("inf")
    if arguments.minutes is not None:
        deadline = time.monotonic() + 60 * arguments.minutes
    try:
        rows = run_tune(
            problems, device=of, seconds=arguments.seconds, again=arguments.again,
            deadline=deadline,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted: what was done is kept, the next run goes on from there")
        return terminal.INTERRUPTED
    except UnwritableError as error:
        terminal.complain(_COMMAND, error)
        return 2
    return int(any(row.wrong is not None for row in rows))


def _why_nothing(of: torch.device) -> str | None:
    """Why there is nothing to choose from on a device, or None."""
    reason = Triton().why_unusable()
    if reason is None and device_of(of) is None:
        reason = f"the device is {of}, the kernels run on CUDA devices"
    if reason is None or of.type != "cuda":
        return reason
    sample = torch.empty((1, 1), dtype=torch.float16, device=of)
    able = [name for name in registry.names() if why_not(name, sample) is None]
    return None if len(set(able) - set(registry.plain_pytorch_names())) > 1 else reason


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    """Every shape in every dtype, at every rank and dropout."""
    return [
        Problem(shape, r, dtype, arguments.adapter_dtype, dropout_p)
        for dtype in arguments.dtype
        for shape in parse(arguments.shapes, arguments.tokens)
        for r in arguments.rank
        for dropout_p in arguments.dropout
    ]
