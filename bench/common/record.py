"""Recorded runs: one JSON file each, with every sample.

    {"format": "lorafast-bench/1", "started": "2026-11-23T15:00:00+00:00", "command": "lorafast bench …",
     "machine": {…}, "clock_state": [{…}, …], "complete": true, "skipped": ["…"],
     "<kind>": [row, …], …}

A kind is ``layer``, ``sweep``, ``operations``, ``call_overhead``, ``models``, ``accelerate``,
``convolutions``, ``attention``, ``preference``, ``distributed``, ``relatives``, ``bottlenecks``,
``traffic``, ``executed``, ``tune``, ``compiled``, ``nvcc`` or ``tests``; its rows are the fields of that
job's ``Row``, samples in seconds, sizes in bytes. The clock's state is noted at the start, whenever
rows are added, and at the end.
``complete`` means that everything that was asked for was measured; ``skipped`` is what wasn't.
"""

import dataclasses
import datetime
import json
import re
import reprlib
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lorafast.bench.common import machine, output
from lorafast.kernels.common.from_json import from_json

FORMAT = "lorafast-bench/1"
_HEADINGS = {"started": str, "command": str, "machine": dict, "complete": bool}
T = TypeVar("T")
_START = time.monotonic()


class Record:
    """A run as it goes, written to ``path`` (None: nowhere) whenever something is added.

    A ``path`` that is no file but a pipe or a device is written to once, at the end.

    Raises:
        output.UnwritableError: ``path`` can't be written, also from every method that adds something.
    """

    def __init__(
        self, device: torch.device, command: Sequence[str] | None = None, path: Path | None = None
    ) -> None:
        self._device = device
        self._path = path
        if path is not None:
            output.check(path)
        self._content: dict[str, Any] = {
            "format": FORMAT,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(command if command is not None else ("lorafast", *sys.argv[1:])),
            "machine": machine.describe(device),
            "clock_state": [],
            "complete": False,
            "skipped": [],
        }
        self._note()

    def add(self, kind: str, rows: Sequence[Any]) -> None:
        """Appends rows (dataclasses or dictionaries) of a kind."""
        plain = [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows]
        self._content.setdefault(kind, []).extend(plain)
        self._note()

    def skip(self, what: str) -> None:
        """Something that was asked for is not measured."""
        self._content["skipped"].append(what)

    def finish(self, *, complete: bool = True) -> None:
        """The end; ``complete`` unless the run broke off."""
        self._content["complete"] = complete and not self._content["skipped"]
        self._note(last=True)

    def _note(self, last: bool = False) -> None:
        state = {"seconds": time.monotonic() - _START, **machine.clock_state(self._device)}
        self._content["clock_state"].append(state)
        if self._path is not None and (last or not output.is_stream(self._path)):
            output.write(self._path, self._text())

    @property
    def commit(self) -> str | None:
        """The commit of the package's source, None if unknown."""
        commit: str | None = self._content["machine"]["commit"]
        return commit

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
        rows = (row for rows in lists for row in rows if isinstance(row, dict))
        return any(row.get("wrong") is not None for row in rows)

    def _text(self) -> str:
        text = json.dumps(_rounded(self._content), indent=1, ensure_ascii=False)
        # A list of samples on one line.
        return re.sub(r"\[[\s\d.,e+-]+\]", lambda match: " ".join(match[0].split()), text) + "\n"


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
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ValueError(f"{path} can't be read as a recorded run: {reason}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} is not a recorded run: its format is {reprlib.repr(found)}, expected {FORMAT!r}"
        )
    missing = [key for key in _HEADINGS if key not in content]
    if missing:
        raise ValueError(f"{path} is not a whole recorded run: it lacks {', '.join(missing)}")
    for key, kind in _HEADINGS.items():
        if type(content[key]) is not kind:
            raise ValueError(
                f"{path} is not a whole recorded run: {key} is {reprlib.repr(content[key])}"
            )
    for key, kinds in (("device", (str,)), ("commit", (str, types.NoneType))):
        found = content["machine"].get(key)
        if not isinstance(found, kinds):
            raise ValueError(
                f"{path} is not a whole recorded run: its machine's {key} is {reprlib.repr(found)}"
            )
    run: dict[str, Any] = content
    return run


def rows_of(run: dict[str, Any], kind: str, cls: type[T], path: Path) -> list[T]:
    """The rows of a kind in a recorded run, which was read from ``path``.

    Raises:
        ValueError: one of them is no such row; the message says which.
    """
    rows = run.get(kind, [])
    if type(rows) is not list:
        raise ValueError(f"{path}: {kind} is {reprlib.repr(rows)}, expected a list")
    return [from_json(cls, row, f"{path}: {kind}[{i}]") for i, row in enumerate(rows)]
