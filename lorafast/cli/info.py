"""Versions, devices, and which backends this machine can use (and why not the others)."""

import argparse
import importlib.metadata
import platform
from collections.abc import Callable

import torch

import lorafast
from lorafast.backends import forced, registry
from lorafast.kernels.tables import tuned
from lorafast.operands import packed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` has no options."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the report."""
    rows = [("lorafast", lorafast.__version__), ("Python", platform.python_version())]
    rows += [(name, _version(name)) for name in ("torch", "triton", "numpy", "safetensors", "peft")]
    rows.append(("CUDA (PyTorch's build)", torch.version.cuda or "none"))
    rows.append(("CPU", f"{torch.get_num_threads()} threads, {_cpu_capability()}"))
    rows += [line for name in registry.names() for line in registry.get(name).describe()]
    rows.append(("packed weights", _or_error(_packing)))
    rows += _devices()
    rows += [
        (f"backend {name}", "usable" if status.usable else f"not usable: {status.reason}")
        for name, status in lorafast.backends().items()
    ]
    rows.append(("chosen", _or_error(_choice)))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _devices() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none")]
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"GPU {index}",
                f"{device.name}, sm_{device.major}{device.minor}, "
                f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} SMs, "
                f"{_tuned(device.name)}",
            )
        )
    return rows


def _tuned(name: str) -> str:
    count = len(tuned.load(name))
    return f"{count} calls tuned" if count else "not tuned (lorafast tune)"


def _or_error(describe: Callable[[], str]) -> str:
    """What is wrong with an environment variable, in the row of what it sets."""
    try:
        return describe()
    except ValueError as error:
        return str(error)


def _packing() -> str:
    reason = packed.why_unavailable()
    if reason is not None:
        return reason
    memory = packed.granted()
    if not memory:
        return "usable, in bfloat16"
    return f"usable, in bfloat16; {memory / 2**20:,.0f} MiB granted"


def _choice() -> str:
    name = forced.forced()
    if name is not None:
        return f"{name} for every operation (forced by {forced.ENVIRONMENT_VARIABLE})"
    return "the fastest that was measured, else modelled: lorafast.explain says which"
