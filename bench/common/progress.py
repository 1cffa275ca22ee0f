"""A progress bar on stderr that lets text through; a line for each step where tqdm is not installed."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], unit: str) -> Iterator[Item]:
    """Hands ``items`` on, showing how many are done."""
    total = len(items) if isinstance(items, Sized) else None
    try:
        from tqdm import tqdm
    except ImportError:
        for index, item in enumerate(items):
            print(f"{unit} {index + 1} of {total}: {item}", file=sys.stderr)
            yield item
        return
    with tqdm(items, unit=unit, total=total, disable=None, leave=False) as bar:
        for item in bar:
            bar.set_postfix_str(str(item), refresh=True)
            yield item


def say(text: str) -> None:
    """Prints a line of results, above a progress bar if one is shown."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, flush=True)
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
