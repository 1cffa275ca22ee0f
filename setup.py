"""Maps folders to packages, and builds ``lorafast._C`` from ``csrc/``.

Folders: ``kernels/`` and ``bench/`` go into ``lorafast.kernels`` and ``lorafast.bench``. Neither has an
``__init__.py`` itself: the top-level name ``kernels`` belongs to another package and must never be
importable from here.

The extension is compiled against libtorch's stable ABI alone, so one binary serves every later Python
and PyTorch. It needs a C++ compiler and the headers of the PyTorch that is installed; without them the
package works as it does, on ``aten``.

    LORAFAST_CPP=0     don't build it;  1: fail if it can't be built;  unset: build it if possible
                       (instructions that the compiler doesn't know are left out in any case)
    LORAFAST_CUDA=1    fail if the CUDA part can't be built;  0, auto or unset: without it
    CXX, CXXFLAGS      the compiler, and more flags for it
    MAX_JOBS           how many compilers run at a time

Everything else is in ``pyproject.toml``.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
OLDEST_TORCH = "0x020b000000000000"  # 2.11
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
    "-fno-strict-aliasing",  # pairs of bfloat16 are written as halves and read as words
]  # fmt: skip
AVX512 = [
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # false, in gcc 12's own header
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512",
]  # fmt: skip
INSTRUCTION_SETS = {
    "microkernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "microkernels_avx512": AVX512,
    "microkernels_avx512_bf16": [*AVX512, "-mavx512bf16"],
}


def sources() -> list[str]:
    """``csrc/`` of the CPU."""
    cpu = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    return ["csrc/bindings.cpp", *(path.relative_to(ROOT).as_posix() for path in cpu)]


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows ``flags``: not those of another processor, or of a later version."""
    command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def words(variable: str, default: str = "") -> list[str]:
    """The words of a variable as a shell splits them.

    Raises:
        ValueError: a quote in it has no end.
    """
    text = os.environ.get(variable, default)
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{variable} is {text!r}: {str(error).lower()}") from None


def compiler_jobs() -> int:
    """How many compilers run at a time.

    Raises:
        ValueError: ``MAX_JOBS`` is no such number.
    """
    text = os.environ.get("MAX_JOBS", "").strip()
    if not text:
        return os.cpu_count() or 1
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise ValueError(f"MAX_JOBS is {text!r}, expected a whole number of at least 1")
    return int(text)


def torch_folder() -> Path | None:
    """The installed PyTorch, also from within pip's isolated build, where it can't be imported."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    return next((f for f in folders if (f / "include/torch/csrc/stable/library.h").is_file()), None)


def why_not_native() -> str | None:
    """What is missing for the extension, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux only, this is {sys.platform}"
    try:
        compiler = words("CXX", "c++")
        words("CXXFLAGS")
        compiler_jobs()
    except ValueError as error:
        return str(error)
    if not compiler or not compiler[0]:
        return f"CXX is {os.environ['CXX']!r}, expected a C++ compiler"
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler ({compiler[0]})"
    if not accepts(compiler, ["-std=c++17"]):
        return f"{shlex.join(compiler)} doesn't compile C++17"
    if torch_folder() is None:
        return "PyTorch 2.11 or later is not installed yet, whose headers it needs"
    return None


def native_extensions() -> list[Extension]:
    """``lorafast._C``, or nothing where it can't be built or isn't wanted."""
    asked = os.environ.get("LORAFAST_CPP", "")
    cuda = os.environ.get("LORAFAST_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"LORAFAST_CPP is {asked!r}, expected 0, 1 or nothing")
    if cuda not in ("", "0", "1", "auto"):
        raise SystemExit(f"LORAFAST_CUDA is {cuda!r}, expected 0, 1, auto or nothing")
    if cuda == "1":
        raise SystemExit("LORAFAST_CUDA is 1: lorafast has no CUDA C++ sources yet")
    if asked == "0":
        return []
    reason = why_not_native()
    if reason is None:
        return [Extension("lorafast._C", sources(), py_limited_api=True, optional=asked != "1")]
    if asked == "1":
        raise SystemExit(f"LORAFAST_CPP is 1 and the native CPU kernels can't be built: {reason}")
    print(f"lorafast: without native CPU kernels: {reason}", file=sys.stderr)
    return []


class BuildNative(build_ext):
    """Compiles what has changed, a few files at a time, each with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Objects, then the shared library; an optional extension that fails is left out in one line."""
        try:
            self._build(ext)
        except (subprocess.CalledProcessError, OSError) as error:
            reason = str(error)
            if isinstance(error, subprocess.CalledProcessError):
                made = Path(error.cmd[-1]).name
                reason = f"{error.cmd[0]} failed with {error.returncode} to make {made}"
            # Nothing may load or ship what other sources made.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if self.editable_mode:
                (ROOT / "lorafast" / "_C.abi3.so").unlink(missing_ok=True)
            if ext.optional:
                print(f"lorafast: without native CPU kernels: {reason}", file=sys.stderr)
            raise CompileError(reason) from None

    def _build(self, ext: Extension) -> None:
        torch = torch_folder()
        assert torch is not None
        compiler = words("CXX", "c++")
        base = [*compiler, *FLAGS, *words("CXXFLAGS")]
        base += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
        base += ["-isystem", str(torch / "include")]
        # Not the temporary folder of an editable install: a second build finds the first one's objects.
        folder = ROOT / "build" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        known = {
            name: flags for name, flags in INSTRUCTION_SETS.items() if accepts(compiler, flags)
        }

        def compile_(source: str) -> Path:
            return self._compile([*base, *known.get(Path(source).stem, ())], source, folder)

        with ThreadPoolExecutor(compiler_jobs()) as pool:
            objects = list(pool.map(compile_, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        library = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,--no-undefined", "-lc"]
        link = [*compiler, *map(str, objects), *library, "-o", str(target)]
        if not _current(target, [*objects, *self._note(folder / "link", link)]):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._run(link)

    def _compile(self, base: list[str], source: str, folder: Path) -> Path:
        path = Path(source)
        target = folder / f"{path.stem}.o"
        dependencies = target.with_suffix(".d")
        command = [*base, "-MMD", "-MF", str(dependencies)]
        command += ["-c", str(ROOT / source), "-o", str(target)]
        needs = self._note(folder / path.stem, command)
        if dependencies.is_file():
            words = dependencies.read_text(encoding="utf-8").replace("\\\n", " ").split()
            needs += [Path(word) for word in words[1:]]
        if not dependencies.is_file() or not _current(target, needs):
            self._run(command)
        return target

    def _note(self, path: Path, command: list[str]) -> list[Path]:
        """A file that is newer than what was built by another command."""
        path = path.with_suffix(".command")
        text = shlex.join(command)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        return [path]

    def _run(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


class Wheel(bdist_wheel):
    """A wheel that says what it holds: without the extension it serves every machine."""

    def run(self) -> None:
        """Builds the extension first: whether that went well decides the wheel's name."""
        if not self.skip_build:
            self.run_command("build_ext")
        built = self.get_finalized_command("build_ext")
        wanted = self.distribution.ext_modules or []
        if not all(Path(built.get_ext_fullpath(ext.name)).is_file() for ext in wanted):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


def _current(target: Path, needs: list[Path]) -> bool:
    """Whether ``target`` is newer than everything that it is made of."""
    if not target.is_file() or not all(need.is_file() for need in needs):
        return False
    return all(need.stat().st_mtime_ns <= target.stat().st_mtime_ns for need in needs)


folders = {
    f"lorafast.{top}.{init.parent.name}": f"{top}/{init.parent.name}"
    for top in ("kernels", "bench")
    for init in sorted((ROOT / top).glob("*/__init__.py"))
}
extensions = native_extensions()

setup(
    packages=[*find_packages(include=["lorafast", "lorafast.*"]), *folders],
    package_dir=folders,
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
