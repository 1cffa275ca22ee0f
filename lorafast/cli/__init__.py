"""The command line: ``lorafast info``, ``lorafast verify``, ``lorafast bench``, ``lorafast tune``."""

import argparse
import sys
from collections.abc import Sequence

from lorafast.cli import bench, info, tune, verify

_COMMANDS = {"info": info, "verify": verify, "bench": bench, "tune": tune}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lorafast", description="LoRA layers that cost almost nothing over the frozen layer."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


if __name__ == "__main__":
    sys.exit(main())
