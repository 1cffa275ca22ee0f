"""PTX of CUDA C++ as nvcc writes it; kept in ``build/ptx``, so that a source is compiled once."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# From sm_90 on with the instructions that no later architecture keeps: wgmma, setmaxnreg, tcgen05.
TARGETS = {
    75: "sm_75", 80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a",
}  # fmt: skip
BUILD = Path(__file__).resolve().parents[2] / "build" / "ptx"
_FLAGS = ("-std=c++17", "--Werror", "all-warnings")
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def why_no_nvcc() -> str | None:
    """A sentence if there is no nvcc, else None."""
    home = os.environ.get("CUDA_HOME")
    if path():
        return None
    if home:
        return f"CUDA_HOME is {home!r}, which has no bin/nvcc"
    return "there is no nvcc (CUDA_HOME says where the CUDA toolkit is)"


def ptx_of(source: Path, arch: int, flags: tuple[str, ...] = ()) -> str:
    """The PTX of a ``.cu`` file for an architecture, 90 being ``sm_90a``.

    Compiled again only if the source, a header that it includes in quotes, flags or nvcc have changed.
    Raises ValueError for an unknown architecture, RuntimeError without nvcc or if it fails or warns.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch must be one of {', '.join(map(str, TARGETS))}, not {arch}")
    target = TARGETS[arch]
    return compiled(source, ("-ptx", *flags, f"-arch={target}"), f"-{target}", ".ptx").read_text()


def compiled(source: Path, flags: tuple[str, ...], kind: str, suffix: str) -> Path:
    """What nvcc makes of a source, a file whose name begins with the source's and ``kind``.

    Raises RuntimeError as ``ptx_of``.
    """
    if why_not := why_no_nvcc():
        raise RuntimeError(why_not)
    command = [path(), *_FLAGS, *flags]
    key = hashlib.sha256("\0".join((*command, version(path()))).encode())
    for file in _with_headers(source):
        key.update(file.read_bytes())
    kept = BUILD / f"{source.stem}{kind}-{key.hexdigest()[:16]}{suffix}"
    if not kept.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with _alone(kept):
            if not kept.exists():
                _compile([*command, str(source)], kept, f" for {kind[1:]}" * (suffix == ".ptx"))
    return kept


@contextmanager
def _alone(kept: Path) -> Iterator[None]:
    """Processes that want the same file one after the other: the first compiles it."""
    lock_file = kept.with_name(f"{kept.name}.lock")
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)


def _compile(command: list[str], kept: Path, target: str) -> None:
    own = kept.with_suffix(f".{os.getpid()}{kept.suffix}")  # whole, or not there
    done = subprocess.run([*command, "-o", str(own)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc refuses {Path(command[-1]).name}{target}:\n{done.stderr}")
    own.replace(kept)


def path() -> str | None:
    """Where nvcc is, None if it is nowhere."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which(os.path.join(home, "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@cache
def version(nvcc: str) -> str:
    """What it says of itself."""
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _with_headers(source: Path) -> list[Path]:
    """The file and what it includes in quotes, and so on, each once."""
    found: list[Path] = []
    left = [source]
    while left:
        file = left.pop()
        if file not in found:
            found.append(file)
            left += [file.parent / name for name in _INCLUDE.findall(file.read_text())]
    return found
