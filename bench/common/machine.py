"""What a record says about the machine that it was taken on."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import lorafast

_PACKAGES = ("torch", "triton", "numpy", "peft", "bitsandbytes", "transformers", "adapters")
_CLOCK_FIELDS = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "clocks_event_reasons.active",
)
_ROOT = Path(lorafast.__file__).resolve().parents[1]


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit."""
    return {
        "device": device_name(device),
        **_device_details(device),
        "host_cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "lorafast": lorafast.__version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        "settings": _settings(),
        "commit": os.environ.get("LORAFAST_COMMIT") or _commit(),
    }


def _settings() -> dict[str, Any]:
    """What changes results or speed from outside."""
    matmul = torch.backends.cuda.matmul
    names = ("LORAFAST_BACKEND", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "OMP_NUM_THREADS")
    return {
        "fp32_precision": matmul.fp32_precision,
        "allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def clock_state(device: torch.device) -> dict[str, Any]:
    """How fast the device says that it runs just now, and what else the machine does."""
    state: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    if device.type == "cuda":
        state |= _nvidia_smi(device, *_CLOCK_FIELDS)
    else:
        state["cpu_mhz"] = _cpu_info("cpu MHz")
    return state


def _device_details(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"capability": torch.backends.cpu.get_cpu_capability()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _nvidia_smi(device, "driver_version")["driver_version"],
        "cuda": torch.version.cuda,
    }


def _nvidia_smi(device: torch.device, *fields: str) -> dict[str, str | None]:
    """What ``nvidia-smi`` says of a GPU; None for a field that it doesn't know, or if it is missing."""
    program = shutil.which("nvidia-smi")
    unknown: dict[str, str | None] = dict.fromkeys(fields)
    if program is None:
        return unknown
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = [program, "-i", uuid, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    process = subprocess.run(query, capture_output=True, text=True, check=False)
    values = process.stdout.strip().split(", ")
    if process.returncode == 0 and len(values) == len(fields):
        return dict(zip(fields, values, strict=True))
    if len(fields) == 1:
        return unknown
    # One field that this driver doesn't know spoils the whole answer.
    return {name: value for field in fields for name, value in _nvidia_smi(device, field).items()}


def _cpu_info(field: str) -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    for line in info.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that the package's source is at, ``-dirty`` if it was changed; None if unknown."""
    if shutil.which("git") is None or not (_ROOT / ".git").exists():
        return None
    process = subprocess.run(
        ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return process.stdout.strip() or None
