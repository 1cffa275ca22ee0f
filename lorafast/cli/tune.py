"""Measures on this GPU what is fastest for each call, Triton's configurations or PyTorch, and keeps it.

Minutes, once: without it lorafast uses the rules for the GPU's architecture and a model of its speed.
Every result is kept at once; interrupted, the next run goes on where this one was.
"""

import argparse
import sys
import time

import torch

from lorafast.bench.common.problem import DTYPES, Problem
from lorafast.bench.common.shapes import parse
from lorafast.bench.tune import run as run_tune
from lorafast.cli.bench import comma, one_of, positive, probability, seconds
from lorafast.ops import backend

_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which calls, and for how long."""
    parser.add_argument(
        "--shapes", nargs="+", default=["llama-8b"], metavar="NAMES|M,K,N",
        help="layers of named models, or sizes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=comma(positive), default=[8192], metavar="M,..")
    parser.add_argument("--rank", type=comma(positive), default=[16], metavar="R,..")
    parser.add_argument("--dtype", type=comma(one_of(DTYPES)), default=["bf16"])
    parser.add_argument("--adapter-dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--dropout", type=comma(probability), default=[0.0], metavar="P,..")
    parser.add_argument(
        "--seconds", type=seconds, default=10.0, help="for each case (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="also what has been tuned already")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help=argparse.SUPPRESS
    )
    parser.add_argument("--minutes", type=seconds, help="begin nothing after so long")


def run(arguments: argparse.Namespace) -> int:
    """Tunes; 2 if nothing can be tuned here, 130 after Ctrl-C."""
    device = torch.device(arguments.device)
    reason = backend.TRITON.why_unusable()
    if reason is None and device.type != "cuda" and not backend.interpreting():
        reason = f"the device is {device}, the kernels run on CUDA devices"
    if reason is not None:
        print(f"lorafast tune: nothing to tune here: {reason}", file=sys.stderr)
        return 2
    try:
        shapes = parse(arguments.shapes, arguments.tokens)
    except ValueError as error:
        print(f"lorafast tune: {error}", file=sys.stderr)
        return 2
    problems = [
        Problem(shape, r, dtype, arguments.adapter_dtype, dropout_p)
        for dtype in arguments.dtype
        for shape in shapes
        for r in arguments.rank
        for dropout_p in arguments.dropout
    ]
    deadline = float("inf")
    if arguments.minutes is not None:
        deadline = time.monotonic() + 60 * arguments.minutes
    try:
        rows = run_tune(
            problems, device=device, seconds=arguments.seconds, again=arguments.again,
            deadline=deadline,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted: what was done is kept, the next run goes on from there")
        return _INTERRUPTED
    return int(any(row.wrong is not None for row in rows))
