"""Parsers of the options that several commands have."""

import argparse
import math
import re
from collections.abc import Callable, Container
from typing import Any

import torch

from lorafast.bench.common.shapes import LARGEST, LARGEST_RANK

_DEVICE = re.compile(r"cpu(:0)?|cuda(:(?P<index>\d{1,9}))?", re.ASCII)


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(name: str) -> torch.device:
    """The device that ``--device`` names, with its index if it is a GPU.

    Raises:
        ValueError: PyTorch has no such device here, or it is of another kind; one sentence.
    """
    # Not by PyTorch, which takes cuda:256 for cuda:0.
    match = _DEVICE.fullmatch(name)
    if match is None:
        raise ValueError(f"--device is {name!r}, expected cpu, cuda or cuda:<index>")
    if match["index"] is None and name != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, and PyTorch sees no NVIDIA GPU here")
    index = torch.cuda.current_device() if name == "cuda" else int(match["index"])
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device is {name!r}, and PyTorch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def comma(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of comma-separated values."""

    def parse_list(text: str) -> list[Any]:
        return [convert(part.strip()) for part in text.split(",")]

    return parse_list


def positive(text: str, largest: int = LARGEST) -> int:
    """A whole number from 1 to ``largest``."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    if value > largest:
        raise argparse.ArgumentTypeError(f"{text[:40]} is more than {largest}")
    return value


def rank(text: str) -> int:
    """A whole number from 1 to ``LARGEST_RANK``."""
    return positive(text, LARGEST_RANK)


def seconds(text: str) -> float:
    """A positive number."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def probability(text: str) -> float:
    """From 0 to below 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def one_of(known: Container[str]) -> Callable[[str], str]:
    """A parser of one of the known words."""

    def check(text: str) -> str:
        if text not in known:
            names = ", ".join(known)  # type: ignore[arg-type]
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {names}")
        return text

    return check
