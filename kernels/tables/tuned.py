"""What ``lorafast tune`` measured on this machine: for each call the fastest backend and configuration.

A JSON file a device, in ``$LORAFAST_CACHE``, else ``$XDG_CACHE_HOME/lorafast``, else in
``~/.cache/lorafast``. It names the device and the versions it was measured with; records of another
Triton, PyTorch or build of the CUDA kernels are not used. Anyone may have written to it: what
``why_unusable`` has a reason against is left out, in one warning, before a call can come across it.
"""

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from lorafast.kernels.common.configs import INTERPRETER_CAPABILITY, LaunchConfig, why_invalid
from lorafast.kernels.common.configs import OPERATIONS as SINGLE
from lorafast.kernels.common.from_json import from_json
from lorafast.kernels.tables.find import GEMMS, distance, nearest_architecture

from lorafast.core.files import locked, write_whole

DECODED = 16
"""Rows up to which a layer is a decode step."""
_NEAR = 1.0
"""A record serves sizes that are together within a factor of two of its own."""
_FORMAT = 6
_MOST = 2**31
OPERATIONS = (*SINGLE, "lora_linear")
"""Those with a launch of their own, which can be tuned."""
_NOT_TUNED = "lora_linear_backward"
"""Its parts are. A file may have records of it as one launch: no call asks for them."""
INTERPRETER = "interpreter"
"""The name of the device off CUDA."""
_ELEMENT_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "tf32": 4}


@dataclass(frozen=True)
class Key:
    """A call: operation, dtypes (as ``dtypes`` says them), sizes as ``linear_expand`` has them, whether
    masked, whether its GEMM is dy·W, as that of dx is, and whether the rows of what it reads and writes
    begin at multiples of 16 bytes."""

    operation: str
    dtypes: str
    M: int
    K: int
    N: int
    r: int
    masked: bool = False
    transposed: bool = False
    aligned: bool = True


@dataclass(frozen=True)
class Record:
    """The fastest backend for a call, the fastest configuration of the Triton kernels, and of every
    backend that was measured the median in seconds. ``choices``: what was chosen for the launch of
    the CUDA C++ kernels, which refuse what can't be."""

    key: Key
    backend: str
    config: LaunchConfig | None
    seconds: dict[str, float] = field(default_factory=dict)
    choices: dict[str, int] | None = None


def dtypes(dtype: torch.dtype, adapter_dtype: torch.dtype, tf32: bool) -> str:
    """``bfloat16``, or ``bfloat16+float32`` with adapters that are wider; ``tf32`` for float32 whose
    products PyTorch may round so."""
    name = str(dtype).removeprefix("torch.")
    if dtype is torch.float32 and tf32:
        name = "tf32"
    if adapter_dtype is dtype:
        return name
    return f"{name}+{str(adapter_dtype).removeprefix('torch.')}"


_versions: dict[str, Callable[[], str]] = {}


def depend_on(name: str, version: Callable[[], str]) -> None:
    """Lets measurements depend on what ``version`` gives: records of another one are not used."""
    _versions[name] = version


def versions() -> dict[str, str]:
    """What the measurements depend on."""
    try:
        triton = __import__("triton").__version__
    except ImportError:
        triton = "none"
    known = {"torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda or "none"}
    return known | {name: version() for name, version in _versions.items()}


def path_for(device: str) -> Path:
    """The file for a device of this name.

    Raises:
        OSError: the folder is in the home of a user who is not known.
    """
    cache = os.environ.get("LORAFAST_CACHE")
    if not cache:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lorafast")
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    try:
        return Path(cache).expanduser() / f"tuned-{name}.json"
    except RuntimeError:
        raise OSError(f"there is no home folder for the {cache!r} of the records") from None


def prepare(device: str) -> None:
    """Makes the folder of the records, before anything is measured that would be kept there.

    Raises:
        OSError: nothing can be written there.
    """
    folder = path_for(device).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def save(device: str, records: Iterable[Record]) -> Path:
    """Adds records to the file, in place of those of the same calls.

    What others add at the same time, here or in another process, is kept. Records of other versions are
    dropped, and those that can't be used.

    Raises:
        OSError: the file can't be written.
    """
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        known = {record.key: record for record in _read(path, device)[0]}
        known |= {record.key: record for record in records}
        content = {
            "format": _FORMAT,
            "device": device,
            "versions": versions(),
            "records": [asdict(record) for record in known.values()],
        }
        write_whole(path, json.dumps(content, indent=1).encode())
    load.cache_clear()
    nearest.cache_clear()
    return path


@functools.cache
def load(device: str) -> tuple[Record, ...]:
    """The records for a device that can be used; a warning says what of the file can't."""
    try:
        records, remark = _read(path_for(device), device)
    except OSError as error:
        records, remark = (), f"what lorafast tune found is not used: {error}"
    if remark is not None:
        warnings.warn(remark, stacklevel=2)
    return records


def _read(path: Path, device: str) -> tuple[tuple[Record, ...], str | None]:
    """The records of a file that can be used, and a sentence about those that can't."""
    try:
        if path.exists() and not path.is_file():
            return (), f"{path} is not used: it is no regular file"
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["versions"] != versions():
            return (
                (),
                f"{path} was measured with other versions and isn't used: lorafast tune again",
            )
        entries = list(content["records"])
    except FileNotFoundError:
        return (), None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        # An error's own sentence may quote the file.
        return (), f"{path} can't be read ({str(error)[:200]}): lorafast tune writes it anew"
    capability = _capability_of(device)
    records, refused = [], []
    for index, fields in enumerate(entries):
        if _is_left_out(fields):
            continue
        try:
            records.append(_checked(fields, f"records[{index}]", capability))
        except ValueError as error:
            refused.append(str(error))
    if not refused:
        return tuple(records), None
    return tuple(records), (
        f"{path}: {len(refused)} of {len(entries)} records are not used, the first because "
        f"{refused[0]}: lorafast tune measures those calls again"
    )


def _is_left_out(fields: object) -> bool:
    """Whether a record is one of ``_NOT_TUNED``."""
    key = fields.get("key") if isinstance(fields, dict) else None
    return isinstance(key, dict) and key.get("operation") == _NOT_TUNED


def _checked(fields: object, where: str, capability: int) -> Record:
    record = from_json(Record, fields, where)
    reason = why_unusable(record, capability)
    if reason is not None:
        raise ValueError(f"{where} can't be used: {reason}")
    return record


def _capability_of(device: str) -> int:
    """The architecture whose rules hold for a device of this name; of one that isn't here, sm_90's."""
    if device != INTERPRETER and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_name(index) == device:
                major, minor = torch.cuda.get_device_capability(index)
                return nearest_architecture(10 * major + minor)
    return INTERPRETER_CAPABILITY


def why_unusable(record: Record, capability: int) -> str | None:
    """The reason for which calls on this architecture can't go by ``record``, or None."""
    key = record.key
    if key.operation not in OPERATIONS:
        return f"operation is {key.operation!r}, expected one of {', '.join(OPERATIONS)}"
    x_dtype, *adapter_dtype = key.dtypes.split("+")
    if not {x_dtype, *adapter_dtype} <= _ELEMENT_SIZES.keys() or len(adapter_dtype) > 1:
        return f"dtypes is {key.dtypes!r}, expected one or two of {', '.join(_ELEMENT_SIZES)}"
    for name in ("M", "K", "N", "r"):
        if getattr(key, name) < 1:
            return f"{name} is {getattr(key, name)}, expected at least 1"
    for name, seconds in record.seconds.items():
        if not seconds > 0:
            return f"the time of {name} is {seconds}, expected seconds"
    if record.backend not in record.seconds:
        known = ", ".join(record.seconds) or "nothing"
        return f"backend is {record.backend!r}, and there are times of {known} alone"
    for name, value in (record.choices or {}).items():
        if not 0 <= value < _MOST:
            return f"{name} is {value}, expected 0 to {_MOST - 1}"
    if record.config is None:
        return None
    if record.config.hybrid and key.operation == "lora_linear":
        return f"hybrid is a way to do linear_expand, and this is {key.operation}"
    if record.config.hybrid and x_dtype == "float16":
        return "hybrid would round the low-rank term to float16 before the GEMM"
    operation = "linear_expand" if key.operation in GEMMS else key.operation
    return why_invalid(operation, record.config, _ELEMENT_SIZES[x_dtype], capability)


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
    decodes = key.operation == "lora_linear" and key.M <= DECODED  # by kernels of its own
    return key.operation, key.dtypes, key.masked, key.transposed, key.aligned, rank, decodes
