"""The machine, compiled: a shared object in ``build/ptx/machine``, made when a source has changed."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build" / "ptx" / "machine"
_SOURCES = Path(__file__).parent / "machine"
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror")


def library() -> ctypes.CDLL:
    """The machine, loaded."""
    return ctypes.CDLL(str(_built()))


def _built() -> Path:
    named = os.environ.get("CXX", "g++")
    compiler = shutil.which(named)
    if compiler is None:
        raise RuntimeError(
            f"executing PTX needs a C++ compiler: there is no {named} (CXX names it)"
        )
    headers = b"".join(path.read_bytes() for path in sorted(_SOURCES.glob("*.h")))
    objects = {
        source: BUILD / f"{source.stem}-{_digest(source.read_bytes(), headers)}.o"
        for source in sorted(_SOURCES.glob("*.cpp"))
    }
    names = " ".join(path.name for path in objects.values()).encode()
    target = BUILD / f"machine-{_digest(names)}.so"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    # Workers of one test run come here together: one of them compiles.
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            missing = [(source, to) for source, to in objects.items() if not to.exists()]
            if missing:
                print("compiling the machine that executes PTX, once", file=sys.stderr, flush=True)
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                list(threads.map(lambda pair: _compile(compiler, *pair), missing))
            _run(compiler, "-shared", *map(str, objects.values()), to=target)
            kept = {target, *objects.values()}
            for old in (*BUILD.glob("*.o"), *BUILD.glob("machine-*.so")):
                if old not in kept:
                    old.unlink()
    return target


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join((*parts, repr(_FLAGS).encode()))).hexdigest()[:16]


def _compile(compiler: str, source: Path, to: Path) -> None:
    _run(compiler, *_FLAGS, "-c", str(source), to=to)


def _run(compiler: str, *options: str, to: Path) -> None:
    partial = to.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [compiler, *options, "-o", str(partial)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the machine does not compile:\n{done.stderr}")
    partial.rename(to)
