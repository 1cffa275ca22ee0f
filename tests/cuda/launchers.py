"""Launchers of csrc/cuda without a GPU: their host code, linked with a fake CUDA runtime.

They are compiled as they are; only the device of their tensors is the CPU. A launch is a call of Python.
What ``make setup`` has compiled is taken: objects, and PTX of each architecture that it has machine code
for. What has changed since is compiled here.
"""

import ctypes
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from ptx import limits, nvcc, tensormap

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc" / "cuda"
FAKE_RUNTIME = Path(__file__).parent / "fake_runtime.cpp"
BUILT = ROOT / "build" / "native" / "cuda"
"""What ``setup.py`` leaves of CSRC: ``mask.cu.o``, ``mask.cu.d``, ``mask.compute_80.ptx``."""
HAS_DEVICE = CSRC / "device.cpp"
"""The one file that says which device tensors are on."""
SERVED_BY = {75: "75", 80: "80", 86: "80", 89: "80", 90: "90a", 100: "100a", 120: "120"}
"""Whose code a GPU executes (CUDA_ARCHITECTURES of ``setup.py``)."""
TORCH = Path(torch.__file__).parent
DEFINES = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DLORAFAST_SM90A")
PTX_FLAGS = (*DEFINES, "-isystem", str(TORCH / "include"))
# One architecture as PTX, which nobody executes: that is asked of nvcc when it is known for which.
HOST_FLAGS = (
    "-c", "-O1", "-Xcicc=-O0", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden",
    "-gencode=arch=compute_80,code=compute_80", "-DLORAFAST_TENSORS_ON=CPU", *PTX_FLAGS,
)  # fmt: skip
LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined")
FAKE_STREAM = 0x57EA4


class Launch(ctypes.Structure):
    """What the runtime is asked to launch."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint64),
        ("allowed", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("guards", ctypes.c_int32),
        ("large_clusters", ctypes.c_int32),
    ]


class _Device(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_int32),
        ("minor", ctypes.c_int32),
        ("sms", ctypes.c_int32),
        ("shared_optin", ctypes.c_int32),
        ("driver", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    ]


class _MapAsked(ctypes.Structure):
    """A tensor map that the driver is asked for."""

    _fields_ = [
        ("map", ctypes.c_void_p),
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
        ("element_strides", ctypes.c_uint32 * 5),
        ("rank", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("interleave", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
        ("fill", ctypes.c_uint32),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))
_Encoder = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_MapAsked))
_INVALID_VALUE = 1
"""CUDA_ERROR_INVALID_VALUE"""


@_Encoder
def _encode(given: "ctypes._Pointer[_MapAsked]") -> int:
    """The machine's tensor map in place of the driver's, or its error code."""
    asked, names = given.contents, list(tensormap.ELEMENTS)
    rank = asked.rank
    if asked.type >= len(names) or asked.swizzle >= len(tensormap.SWIZZLES):
        return _INVALID_VALUE
    name = names[asked.type]
    try:
        encoded = tensormap.encode(
            address=asked.address,
            element_bytes=tensormap.ELEMENTS[name],
            sizes=tuple(asked.sizes[:rank]),
            strides=tuple(asked.strides[: rank - 1]),
            box=tuple(asked.box[:rank]),
            swizzle=tensormap.SWIZZLES[asked.swizzle],
            fill_nan=bool(asked.fill),
            dtype=name,
            element_strides=tuple(asked.element_strides[:rank]),
            interleave=asked.interleave,
        )
    except ValueError:
        return _INVALID_VALUE
    ctypes.memmove(asked.map, encoded, len(encoded))
    return 0


def why_not() -> str | None:
    """A sentence if launchers can't be tested so in this process, else None."""
    if why := nvcc.why_no_nvcc():
        return why
    if torch.cuda.is_available():
        return "the extension itself may be loaded here, which has the same operations"
    return None


class Launchers:
    """A folder of kernels and launchers, loaded: its operations are in ``torch.ops``, on the CPU."""

    def __init__(self, folder: Path, *more: Path) -> None:
        if why := why_not():
            raise RuntimeError(why)
        files = [p for p in sorted(folder.glob("*")) if p.suffix in (".cu", ".cpp")]
        files += [*more, FAKE_RUNTIME]
        self.objects = {file: built(file, f"{file.name}.o") for file in files if file != HAS_DEVICE}
        left = [file for file in files if self.objects.get(file) is None]
        self.objects |= zip(left, _compiled(left), strict=True)
        self.path = _linked(tuple(self.objects.values()))
        torch.ops.load_library(self.path)
        self.library = ctypes.CDLL(str(self.path))
        self.library.fake_encoder(_encode)
        self._kept: object = None

    def _source(self, kernel: str) -> Path | None:
        """The ``.cu`` whose host code registers a kernel."""
        name = b"\0" + kernel.encode() + b"\0"
        files = (f for f in self.objects if f.suffix == ".cu")
        return next((f for f in files if name in self.objects[f].read_bytes()), None)

    def ptx_of(self, kernel: str, arch: int) -> str:
        """The PTX of a kernel's file without its other kernels; lines keep their numbers.

        Raises RuntimeError if the kernel has another name there.
        """
        source = self._source(kernel)
        text = ptx_of(source, arch) if source else ""
        if kernel not in _entries(text):
            where = source.name if source else "no .cu"
            raise RuntimeError(
                f"{kernel} is not in the PTX of {where} for {nvcc.TARGETS[arch]}: a kernel of an "
                "anonymous namespace may have another name in each compilation"
            )
        return _without_others(text, kernel)

    def device(self, arch: int, sms: int, stream: int, driver: int | None = None) -> None:
        """What the runtime says of its device from now on; its driver is as new as the toolkit."""
        optin = limits.shared_limit(nvcc.TARGETS.get(arch, f"sm_{arch}"))
        driver = self.library.fake_runtime_version() if driver is None else driver
        device = _Device(arch // 10, arch % 10, sms, optin, driver, stream)
        self.library.fake_device(ctypes.byref(device))

    def to(self, launch: Callable[[Launch], int]) -> None:
        """Launches are handed to ``launch``, which gives CUDA's error code."""
        self._kept = _Callback(lambda asked: launch(asked.contents))
        self.library.fake_launcher(self._kept)

    def fail(self, function: str, error: int) -> None:
        """From now on ``function`` of the runtime gives this error."""
        self.library.fake_failure(function.encode(), error)

    def reset(self) -> None:
        """Nothing is launched any more, and nothing fails."""
        self.library.fake_reset()

    @property
    def guarded(self) -> int:
        """The device of which there was a guard last."""
        return self.library.fake_guarded()


@cache
def launchers() -> Launchers:
    """Those of csrc/cuda, once a process."""
    return Launchers(CSRC)


def built(source: Path, name: str) -> Path | None:
    """A file that ``setup.py`` has made of a source of CSRC, if nothing it is made of has changed."""
    found, dependencies = BUILT / name, BUILT / f"{source.name}.d"
    if source.parent != CSRC or not found.is_file() or not dependencies.is_file():
        return None
    _, _, rule = dependencies.read_text().partition(":")
    needs = [Path(word) for word in rule.replace("\\\n", " ").split()]
    if not (needs and needs[0].is_file() and needs[0].samefile(source)):  # of another checkout
        return None
    made = found.stat().st_mtime_ns
    is_current = all(need.is_file() and need.stat().st_mtime_ns <= made for need in needs)
    return found if is_current else None


@cache
def ptx_of(source: Path, arch: int) -> str:
    """The PTX of a ``.cu`` whose machine code a GPU of ``arch`` executes: for 86 that of sm_80."""
    code = SERVED_BY[arch]
    found = built(source, f"{source.stem}.compute_{code}.ptx")
    if found is None:
        flags = ("-ptx", *PTX_FLAGS, f"-arch=sm_{code}")
        found = nvcc.compiled(source, flags, f"-sm_{code}", ".ptx")
    return found.read_text()


_ENTRY = re.compile(r"\.entry\s+([\w$]+)")


@cache
def _entries(ptx: str) -> dict[str, tuple[int, int]]:
    """The first line of each kernel and the one behind its last."""
    found = {}
    lines = iter(enumerate(ptx.split("\n")))
    for start, text in lines:
        if named := _ENTRY.search(text.split("//")[0]):
            depth, opened, end = 0, False, start
            for number, line in itertools.chain([(start, text)], lines):
                code, end = line.split("//")[0], number + 1
                depth += code.count("{") - code.count("}")
                opened = opened or "{" in code
                if opened and depth == 0:
                    break
            found[named[1]] = start, end
    return found


@cache
def _without_others(ptx: str, kernel: str) -> str:
    lines = ptx.split("\n")
    for name, (start, end) in _entries(ptx).items():
        if name != kernel:
            lines[start:end] = [""] * (end - start)
    return "\n".join(lines)


def _compiled(files: list[Path]) -> list[Path]:
    """An object of each file; one process compiles at a time."""
    nvcc.BUILD.mkdir(parents=True, exist_ok=True)
    with (
        (nvcc.BUILD / "launchers.lock").open("w") as lock,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        return list(pool.map(lambda file: nvcc.compiled(file, HOST_FLAGS, "-host", ".o"), files))


def _linked(objects: tuple[Path, ...]) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"linking launchers needs a C++ compiler: there is no {compiler}")
    key = hashlib.sha256("\0".join((compiler, *map(str, objects), *LINK_FLAGS)).encode())
    target = nvcc.BUILD / f"launchers-{key.hexdigest()[:16]}.so"
    if not target.exists():
        own = target.with_suffix(f".{os.getpid()}.so")
        _run(
            compiler, *LINK_FLAGS, *map(str, objects), f"-L{TORCH / 'lib'}", "-ltorch_cpu",
            "-o", str(own),
        )  # fmt: skip
        own.replace(target)
    return target


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} refuses:\n{done.stderr}")
    return done.stdout
