"""Maps folders to packages, and builds ``lorafast/_C_<device>.abi3.so`` from ``csrc/<device>/``.

Folders: ``kernels/`` and ``bench/`` go into ``lorafast.kernels`` and ``lorafast.bench``. Neither has an
``__init__.py`` itself: the top-level name ``kernels`` belongs to another package and must never be
importable from here.

Each device's kernels are a shared object of their own, a row of ``NATIVE``. They are compiled against
libtorch's stable ABI alone, so one binary serves every later Python and PyTorch. They need a compiler
and the headers of the PyTorch that is installed, which need not have CUDA; without them the package
works as it does, on ``aten``.

    LORAFAST_CPP       the CPU's. 0: don't build them;  1: fail if they can't be built;  auto or unset:
                       build them if possible (instructions that the compiler doesn't know are left out
                       in any case)
    LORAFAST_CUDA      the same for CUDA's, which need nvcc too
    LORAFAST_CUDA_ARCH the GPUs that CUDA's are compiled for, "80+PTX 90a"; unset: as the next one says
    TORCH_CUDA_ARCH_LIST
                       the same in PyTorch's words, "8.0;9.0+PTX" or "Ampere Hopper"; what is older than
                       7.5 is left out; unset: all that nvcc knows of CUDA_ARCHITECTURES
    CUDA_HOME          the CUDA toolkit; unset: that of the nvcc on the path, or /usr/local/cuda
    CXX, CXXFLAGS      the C++ compiler (nvcc's too), and more flags for it
    MAX_JOBS           how many compilers run at a time

Everything else is in ``pyproject.toml``.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
OLDEST_TORCH = "0x020b000000000000"  # 2.11
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
AVX512 = [
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # false, in gcc 12's own header
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512",
]  # fmt: skip
INSTRUCTION_SETS = {
    "microkernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "microkernels_avx512": AVX512,
    "microkernels_avx512_bf16": [*AVX512, "-mavx512bf16"],
}
# Code for 80 serves 86 to 89 as well, that for 120 serves 121; PTX of 80 serves whatever comes.
CUDA_ARCHITECTURES = ["75", "80+PTX", "90a", "100a", "120"]
SMALL = "--compress-mode=size"  # a fifth of the bytes; drivers for CUDA 12.4 and later read it
# Only code for this very architecture may have all of its instructions (wgmma, tcgen05).
SPECIFIC = {"90", "100", "103", "110"}
OLDEST_CUDA = 75
# Of torch.utils.cpp_extension: what TORCH_CUDA_ARCH_LIST calls a generation.
GENERATIONS = {
    "Maxwell": "5.0 5.2", "Maxwell+Tegra": "5.3", "Pascal": "6.0 6.1+PTX", "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2", "Turing": "7.5+PTX", "Ampere": "8.0 8.6+PTX", "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0 10.3 12.0 12.1+PTX",
    "Blackwell+Tegra": "11.0",
}  # fmt: skip


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows ``flags``: not those of another processor, or of a later version."""
    if Path(compiler[0]).name == "nvcc":
        check = ["--dryrun", "-c", "-x", "cu", os.devnull]
    else:
        check = ["-fsyntax-only", "-x", "c++", os.devnull]
    try:
        command = [*compiler, *flags, *check]
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


def cxx() -> list[str]:
    """The C++ compiler.

    Raises:
        ValueError: there is none that serves.
    """
    compiler = words("CXX", "c++")
    words("CXXFLAGS")
    if not compiler or not compiler[0]:
        raise ValueError(f"CXX is {os.environ['CXX']!r}, expected a C++ compiler")
    if shutil.which(compiler[0]) is None:
        raise ValueError(f"there is no C++ compiler ({compiler[0]})")
    if not accepts(compiler, ["-std=c++17"]):
        raise ValueError(f"{shlex.join(compiler)} doesn't compile C++17")
    return compiler


def cxx_flags(compiler: list[str]) -> list[str]:
    """For every C++ file."""
    flags = ["-std=c++17", "-O3", *HOST_FLAGS, "-Wno-psabi"]
    flags.append(
        "-fno-strict-aliasing"
    )  # pairs of bfloat16 are written as halves and read as words
    return [*flags, *words("CXXFLAGS")]


def nvcc() -> list[str]:
    """The CUDA compiler, on top of ``cxx()``.

    Raises:
        ValueError: there is none that serves.
    """
    home = os.environ.get("CUDA_HOME", "")
    if home:
        found = shutil.which(os.path.join(home, "bin", "nvcc"))
        if found is None:
            raise ValueError(f"CUDA_HOME is {home!r}, which has no bin/nvcc")
    else:
        found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if found is None:
            raise ValueError("there is no nvcc (CUDA_HOME says where the CUDA toolkit is)")
    host, *flags = cxx()
    compiler = [found, "-ccbin", host, *to_host(flags)]
    if not accepts(compiler, ["-std=c++17"]):
        raise ValueError(f"{found} doesn't compile C++17 with {host}")
    cuda_architectures(compiler)
    return compiler


def nvcc_flags(compiler: list[str]) -> list[str]:
    """For every file of the CUDA part. ``USE_CUDA`` declares the stream in PyTorch's headers."""
    flags = ["-std=c++17", "-O3", "-DUSE_CUDA", *to_host(HOST_FLAGS)]
    for architecture in cuda_architectures(compiler):
        flags += code_for(architecture)
    if "90a" in (name.removesuffix("+PTX") for name in cuda_architectures(compiler)):
        flags += ["-DLORAFAST_SM90A"]
    if accepts(compiler, [SMALL]):
        flags += [SMALL, "-DLORAFAST_COMPRESSED"]
    asked = words("CXXFLAGS")
    if "-Werror" in asked:
        flags += ["-Werror=all-warnings", "-Xptxas=--warn-on-spills"]
    return [*flags, *to_host(asked)]


def cuda_architectures(compiler: list[str]) -> list[str]:
    """What CUDA's kernels are compiled for, as nvcc names it; ``+PTX``: for newer GPUs too.

    Raises:
        ValueError: a variable names something that there isn't, or nothing that can be served.
    """
    asked = words("LORAFAST_CUDA_ARCH")
    for architecture in asked:
        if not accepts(compiler, code_for(architecture)):
            raise ValueError(
                f"LORAFAST_CUDA_ARCH has {architecture!r}, which {compiler[0]} doesn't know"
            )
    if asked:
        return list(dict.fromkeys(asked))
    of_torch = torch_architectures()
    found = [a for a in of_torch or CUDA_ARCHITECTURES if accepts(compiler, code_for(a))]
    if not found:
        said = "" if not of_torch else f" of TORCH_CUDA_ARCH_LIST ({', '.join(of_torch)})"
        raise ValueError(
            f"{compiler[0]} knows no architecture{said} that they could be compiled for"
        )
    return found


def torch_architectures() -> list[str]:
    """Those of ``TORCH_CUDA_ARCH_LIST`` from 7.5 on; none if it isn't set.

    Raises:
        ValueError: it has a word that is none, or only older ones.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    found, given = [], re.split(r"[\s;,]+", text.strip(" \t\n;,"))
    for name in given if given != [""] else []:
        for word in GENERATIONS.get(name, name).split():
            parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
            if parts is None:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST has {name!r}, expected compute capabilities such as 8.0 or "
                    "9.0+PTX, or generations such as Hopper"
                )
            number, feature, ptx = parts[1] + parts[2], parts[3], parts[4] or ""
            if int(number) >= OLDEST_CUDA:
                found.append(number + (feature or "a" * (number in SPECIFIC)) + ptx)
    if given != [""] and not found:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST is {text!r}, and they need 7.5 or newer")
    return list(dict.fromkeys(found))


def to_host(flags: list[str]) -> list[str]:
    """``flags`` as nvcc hands them to the C++ compiler: at a comma it would split them."""
    return ["-Xcompiler=" + flag.replace(",", r"\,") for flag in flags]


def code_for(architecture: str) -> list[str]:
    """Machine code; with ``+PTX`` that as well, without what only this architecture has."""
    name = architecture.removesuffix("+PTX")
    flags = ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    if name != architecture:
        general = name.rstrip("af")
        flags += ["-gencode", f"arch=compute_{general},code=compute_{general}"]
    return flags


class Native(NamedTuple):
    """A device's kernels: how ``csrc/<device>/`` becomes ``lorafast/_C_<device>.abi3.so``."""

    name: str  # as a sentence has it
    variable: str  # says whether they are wanted
    suffixes: tuple[str, ...]
    compiler: Callable[[], list[str]]  # or a ValueError: what is missing
    flags: Callable[[list[str]], list[str]]
    flags_of_file: dict[str, list[str]]  # those that the compiler knows, by the file's stem
    link: list[str]  # besides libtorch_cpu


NATIVE = {
    "cpu": Native(
        "CPU", "LORAFAST_CPP", (".cpp",), cxx, cxx_flags, INSTRUCTION_SETS,
        ["-Wl,--no-undefined", "-lc"],
    ),
    # What only PyTorch's CUDA library has, such as the stream, stays undefined: that library is loaded
    # where a GPU is. Each object holds all of its device code: there is nothing to link in it.
    "cuda": Native(
        "CUDA", "LORAFAST_CUDA", (".cpp", ".cu"), nvcc, nvcc_flags, {},
        ["--cudart=static", "--no-device-link"],
    ),
}  # fmt: skip
MODULE = "lorafast._C_"


def sources(device: str) -> list[str]:
    """The files of ``csrc/<device>/`` that are compiled."""
    paths = sorted((ROOT / "csrc" / device).glob("*"))
    return [
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.suffix in NATIVE[device].suffixes
    ]


def why_not(device: str) -> str | None:
    """What is missing for a device's kernels, or None."""
    if sys.platform != "linux":
        return f"they are built on Linux only, this is {sys.platform}"
    if not sources(device):
        return f"lorafast has no sources in csrc/{device}"
    try:
        NATIVE[device].compiler()
        compiler_jobs()
    except ValueError as error:
        return str(error)
    if torch_folder() is None:
        return "PyTorch 2.11 or later is not installed yet, whose headers they need"
    return None


def native_extensions() -> list[Extension]:
    """Those of ``NATIVE`` that can be built and are wanted."""
    extensions = []
    for native in NATIVE.values():
        asked = os.environ.get(native.variable, "")
        if asked not in ("", "0", "1", "auto"):
            raise SystemExit(f"{native.variable} is {asked!r}, expected 0, 1, auto or nothing")
    for device, native in NATIVE.items():
        asked = os.environ.get(native.variable, "")
        forced = asked == "1"
        if asked == "0" or (not forced and not sources(device)):
            continue
        reason = why_not(device)
        if reason is None:
            name = MODULE + device
            extensions.append(
                Extension(name, sources(device), py_limited_api=True, optional=not forced)
            )
        elif forced:
            raise SystemExit(
                f"{native.variable} is 1 and the native {native.name} kernels can't be built: {reason}"
            )
        else:
            print(f"lorafast: without native {native.name} kernels: {reason}", file=sys.stderr)
    return extensions


class BuildNative(build_ext):
    """Compiles what has changed, a few files at a time, each with flags of its own."""

    def run(self) -> None:
        """Leaves no shared object but those of this build: nothing may load or ship an earlier one."""
        self.folders = [Path(self.build_lib) / "lorafast"]
        if self.inplace or self.editable_mode:
            self.folders.append(ROOT / "lorafast")
        wanted = {Path(self.get_ext_filename(ext.name)).name for ext in self.extensions or ()}
        for folder in self.folders:
            for left in folder.glob("_C*.so"):
                if left.name not in wanted:
                    left.unlink()
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """The name under which ``lorafast`` looks: no Python's own, since none is linked."""
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        """Objects, then the shared library; an optional extension that fails is left out in one line."""
        device = ext.name.removeprefix(MODULE)
        try:
            self._build(device, NATIVE[device], ext)
        except (subprocess.CalledProcessError, OSError) as error:
            reason = str(error)
            if isinstance(error, subprocess.CalledProcessError):
                made = Path(error.cmd[-1]).name
                reason = f"{error.cmd[0]} failed with {error.returncode} to make {made}"
            # Nothing may load or ship what other sources made.
            for folder in self.folders:
                (folder / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
            if ext.optional:
                name = NATIVE[device].name
                print(f"lorafast: without native {name} kernels: {reason}", file=sys.stderr)
            raise CompileError(reason) from None

    def _build(self, device: str, native: Native, ext: Extension) -> None:
        torch = torch_folder()
        assert torch is not None
        compiler = native.compiler()
        base = [*compiler, *native.flags(compiler), f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
        base += ["-isystem", str(torch / "include")]
        # Not the temporary folder of an editable install: a second build finds the first one's objects.
        folder = ROOT / "build" / "native" / device
        folder.mkdir(parents=True, exist_ok=True)
        known = {
            stem: flags for stem, flags in native.flags_of_file.items() if accepts(compiler, flags)
        }

        def compile_(source: str) -> Path:
            return self._compile([*base, *known.get(Path(source).stem, ())], source, folder)

        # The largest first, so that it isn't the one that all wait for.
        sources = sorted(ext.sources, key=lambda source: -(ROOT / source).stat().st_size)
        with ThreadPoolExecutor(compiler_jobs()) as pool:
            objects = list(pool.map(compile_, sources))
        target = Path(self.get_ext_fullpath(ext.name))
        link = [*compiler, "-shared", *map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu"]
        link += [*native.link, "-o", str(target)]
        if not _current(target, [*objects, *self._note(folder / "link", link)]):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._run(link)

    def _compile(self, base: list[str], source: str, folder: Path) -> Path:
        path = Path(source)
        target = folder / f"{path.name}.o"
        dependencies = folder / f"{path.name}.d"
        command = [*base, "-MMD", "-MF", str(dependencies)]
        on_the_way = folder / f"{path.name}.kept"
        if path.suffix == ".cu":
            command += ["--keep", "--keep-dir", str(on_the_way)]
        command += ["-c", str(ROOT / source), "-o", str(target)]
        needs = self._note(folder / path.name, command)
        if dependencies.is_file():
            _, _, rule = dependencies.read_text(encoding="utf-8").partition(":")
            needs += [Path(word) for word in rule.replace("\\\n", " ").split()]
        if not dependencies.is_file() or not _current(target, needs):
            on_the_way.mkdir(exist_ok=True)
            try:
                seconds = self._run(command)
                # Of processors, so that it is the same on a busy machine: a test reads it.
                target.with_suffix(".seconds").write_text(f"{seconds:.1f}", encoding="utf-8")
                # Each architecture's, as mask.compute_80.ptx: tests execute it.
                for ptx in on_the_way.glob("*.ptx"):
                    ptx.replace(folder / ptx.name)
            finally:
                shutil.rmtree(on_the_way)
        return target

    def _note(self, path: Path, command: list[str]) -> list[Path]:
        """A file that is newer than what was built by another command."""
        path = path.with_name(path.name + ".command")
        text = shlex.join(command)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        return [path]

    def _run(self, command: list[str]) -> float:
        """The seconds that processors have worked at it."""
        print(shlex.join(command), flush=True)
        with subprocess.Popen(command) as process:
            try:
                _, status, used = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return used.ru_utime + used.ru_stime


class Wheel(bdist_wheel):
    """A wheel that says what it holds: without the extension it serves every machine."""

    def run(self) -> None:
        """Builds the extension first: whether that went well decides the wheel's name."""
        if not self.skip_build:
            self.run_command("build_ext")
        built = self.get_finalized_command("build_ext")
        wanted = self.distribution.ext_modules or []
        there = [ext for ext in wanted if Path(built.get_ext_fullpath(ext.name)).is_file()]
        self.distribution.ext_modules = there
        self.root_is_pure = not there
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
