"""Recorded runs: one JSON file each, with every sample.

    {"format": "lorafast-bench/1", "started": "2026-11-23T15:00:00+00:00", "command": "lorafast bench …",
     "machine": {…}, "clock_state": {"before": {…}, "after": {…}}, "complete": true,
     "<kind>": [row, …], …}

A kind is ``layer``, ``call_overhead``, ``traffic``, ``models`` …; its rows are the fields of that
job's ``Row``, samples in seconds, sizes in bytes.
"""

import dataclasses
import datetime
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lorafast.bench.common import machine

FORMAT = "lorafast-bench/1"


class Record:
    """A run as it goes; ``write`` may be called as often as one likes."""

    def __init__(self, device: torch.device, command: Sequence[str] | None = None) -> None:
        self._device = device
        self._content: dict[str, Any] = {
            "format": FORMAT,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(command if command is not None else ("lorafast", *sys.argv[1:])),
            "machine": machine.describe(device),
            "clock_state": {"before": machine.clock_state(device), "after": None},
            "complete": False,
        }

    def add(self, kind: str, rows: Sequence[Any]) -> None:
        """Appends rows (dataclasses or dictionaries) of a kind."""
        plain = [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows]
        self._content.setdefault(kind, []).extend(plain)

    def summary(self) -> str:
        """Versions in one line."""
        described = self._content["machine"]
        packages = ", ".join(f"{name} {v}" for name, v in described["packages"].items() if v)
        return f"lorafast {described['lorafast']}, Python {described['python']}, {packages}"

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of a kind so far."""
        return list(self._content.get(kind, ()))

    def any_wrong(self) -> bool:
        """Whether a row says that a contender's results were wrong."""
        lists = (value for value in self._content.values() if isinstance(value, list))
        return any(row.get("wrong") is not None for rows in lists for row in rows)

    def finish(self, *, complete: bool = True) -> None:
        """Notes the clock's state at the end, and whether everything asked for was measured."""
        self._content["clock_state"]["after"] = machine.clock_state(self._device)
        self._content["complete"] = complete

    def write(self, path: Path) -> None:
        """Writes the file, whose folder is made if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(self._content), indent=1, ensure_ascii=False)
        # A list of samples on one line.
        text = re.sub(r"\[[\s\d.,e+-]+\]", lambda match: " ".join(match[0].split()), text)
        path.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Floats to six digits, more than any clock has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def read(path: Path) -> dict[str, Any]:
    """A recorded run.

    Raises:
        ValueError: the file is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a recorded run: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} is not a recorded run: its format is {found!r}, expected {FORMAT!r}"
        )
    return content
