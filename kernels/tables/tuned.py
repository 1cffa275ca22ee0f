"""What ``lorafast tune`` measured on this machine: for each call the fastest backend and configuration.

A JSON file a device, in ``$LORAFAST_CACHE``, else ``$XDG_CACHE_HOME/lorafast``, else in
``~/.cache/lorafast``. It names the device and the versions it was measured with; records of another
Triton or PyTorch are not used.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.tables.find import distance

_NEAR = 1.0
"""A record serves sizes that are together within a factor of two of its own."""
_FORMAT = 2


@dataclass(frozen=True)
class Key:
    """A call: operation, dtypes (as ``dtypes`` says them), sizes as ``linear_expand`` has them, whether
    masked, and whether its product reads Wᵀ, as that of dx does."""

    operation: str
    dtypes: str
    M: int
    K: int
    N: int
    r: int
    masked: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Record:
    """The fastest backend for a call, the fastest configuration of ``triton``, medians in seconds."""

    key: Key
    backend: str
    config: LaunchConfig | None
    seconds: dict[str, float] = field(default_factory=dict)


def dtypes(dtype: torch.dtype, adapter_dtype: torch.dtype) -> str:
    """``bfloat16``, or ``bfloat16+float32`` with adapters that are wider; ``tf32`` for float32 whose
    products PyTorch may round so."""
    name = str(dtype).removeprefix("torch.")
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        name = "tf32"
    if adapter_dtype is dtype:
        return name
    return f"{name}+{str(adapter_dtype).removeprefix('torch.')}"


def versions() -> dict[str, str]:
    """What the measurements depend on."""
    triton = __import__("triton").__version__
    return {"torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda or "none"}


def path_for(device: str) -> Path:
    """The file for a device of this name."""
    cache = os.environ.get("LORAFAST_CACHE")
    if not cache:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = str(Path(base) / "lorafast")
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(cache) / f"tuned-{name}.json"


def save(device: str, records: Iterable[Record]) -> Path:
    """Writes the records; a reader sees the old file or the new one, never half of one."""
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": _FORMAT,
        "device": device,
        "versions": versions(),
        "records": [asdict(record) for record in records],
    }
    half = path.with_name(f"{path.name}.{os.getpid()}")
    half.write_text(json.dumps(content, indent=1), encoding="utf-8")
    half.replace(path)
    load.cache_clear()
    nearest.cache_clear()
    return path


@functools.cache
def load(device: str) -> tuple[Record, ...]:
    """The records for a device; none if there are none, or if they are of other versions."""
    path = path_for(device)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["versions"] != versions():
            warnings.warn(
                f"{path} was measured with other versions and isn't used: lorafast tune again",
                stacklevel=2,
            )
            return ()
        return tuple(_from_json(fields) for fields in content["records"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} can't be read ({error}): lorafast tune writes it anew", stacklevel=2)
        return ()


def _from_json(fields: dict[str, Any]) -> Record:
    config = fields["config"] and LaunchConfig(**fields["config"])
    return Record(Key(**fields["key"]), fields["backend"], config, fields["seconds"])


@functools.lru_cache(maxsize=4096)
def nearest(device: str, key: Key) -> Record | None:
    """The record for a call on a device, or of the nearest one within a factor of two.

    The rank's bucket is its power of two, at least 16.
    """
    found = [
        (distance((key.M, key.K, key.N), (at.M, at.K, at.N)), record)
        for record in load(device)
        for at in (record.key,)
        if _bucket(at) == _bucket(key)
    ]
    near = min(found, key=lambda pair: pair[0], default=None)
    return None if near is None or near[0] > _NEAR else near[1]


def _bucket(key: Key) -> tuple[object, ...]:
    """What a record and a call must have in common: of the rank, the power of two that holds it."""
    rank = max(1 << (key.r - 1).bit_length(), 16)
    return key.operation, key.dtypes, key.masked, key.transposed, rank
