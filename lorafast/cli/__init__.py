"""The command line: ``lorafast info``, ``lorafast verify``, ``lorafast bench``, ``lorafast tune``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from lorafast.backends import forced
from lorafast.cli import terminal
from lorafast.operands import packed

_COMMANDS = {
    "info": "versions, devices, and which backends this machine can use (and why not the others)",
    "verify": "runs every operation on every backend that this machine has and compares with float64",
    "bench": "what a LoRA layer costs here, against the frozen layer, PEFT and the other backends",
    "tune": "measures on this GPU what is fastest for each call, and keeps it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    1: something was wrong; 2: the command can't be run as it was asked for, and one line says why;
    130: interrupted; 141: nobody reads the output any more.
    """
    terminal.prepare()
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = next((f"lorafast {word}" for word in words if word in _COMMANDS), "lorafast")
    try:
        try:
            return _run(words, command)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        terminal.discard(sys.stdout)
        return terminal.BROKEN_PIPE
    except OSError as error:
        terminal.discard(sys.stdout)
        terminal.complain(command, error)
        return 1
    except KeyboardInterrupt:
        terminal.complain(command, "interrupted")
        return terminal.INTERRUPTED


def _run(words: Sequence[str], command: str) -> int:
    parser = argparse.ArgumentParser(
        prog="lorafast", description="LoRA layers that cost little over the frozen layer."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in _COMMANDS.items():
        sub = commands.add_parser(name, help=summary)
        # One command must not need what another one imports.
        if command == f"lorafast {name}":
            module = importlib.import_module(f"lorafast.cli.{name}")
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    parsed = parser.parse_args(words)
    if parsed.command != "info":
        try:
            forced.forced()
            packed.granted()
        except ValueError as error:
            terminal.complain(command, error)
            return 2
    status: int = parsed.run(parsed)
    return status
