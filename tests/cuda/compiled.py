"""What the machine code of csrc/cuda needs: registers, shared memory, spills, of every kernel.

    python tests/cuda/compiled.py [LIBRARY] [--write] [--json FILE]

A line for each kernel and architecture of ``lorafast/_C_cuda.abi3.so``, or of another build; exit status
1 if one spills. ``--write`` after a kernel has changed makes ``tests/cuda/compiled`` say what was found:
a folder for each nvcc, since other versions make other code. ``--json`` records what a kernel needs at
most on each architecture, and of ``lorafast``'s own library how large it is and how long its build took.
Needs no GPU.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "lorafast" / "_C_cuda.abi3.so"
FOLDER = Path(__file__).with_name("compiled")
MOST_BYTES = 20_000_000
"""Of the library."""
MOST_SECONDS = 720
"""That processors work at the library's build: six minutes of two."""
MOST_INSTANCES = 100
"""Of kernels, of an architecture: one takes four seconds of a processor, for all of them."""
OBJECTS = ROOT / "build" / "native" / "cuda"
"""Where ``setup.py`` leaves them, each with the seconds that it took."""
_WORD = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9.a-z_]*)")


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine code for one architecture."""

    name: str
    registers: int
    stack: int
    shared: int
    """Bytes of static shared memory; from sm_90 on with 1 KB that CUDA has for itself."""
    spills: int
    instructions: dict[str, int]

    def __str__(self) -> str:
        made_of = " ".join(f"{name}:{count}" for name, count in self.instructions.items())
        needs = f"{self.registers:>3} registers {self.shared:>6} shared"
        spills = f"{self.spills} spills" if self.spills else "ok"
        return f"{self.name:<64} {needs}  {made_of}  {spills}"


def nvcc_of(library: Path) -> str | None:
    """The version of the nvcc that compiled a library, as ``13.0``."""
    said = rb"(?:compiled by nvcc|Cuda compilation tools, release) (\d+\.\d+)"
    found = re.search(said, library.read_bytes())
    return found[1].decode() if found else None


def seconds_of_build(objects: Path = OBJECTS) -> dict[str, float]:
    """That processors worked at each source; none if there is an object of which that isn't known."""
    paths = {path.stem: path.with_suffix(".seconds") for path in sorted(objects.glob("*.o"))}
    if not all(path.is_file() for path in paths.values()):
        return {}
    return {name: float(path.read_text(encoding="utf-8")) for name, path in paths.items()}


def architectures_of(library: Path) -> list[str]:
    """Those that it has machine code for, as ``sm_90a``."""
    return list(dict.fromkeys(re.findall(r"^arch = (\S+)", _dumped(library, "-res-usage"), re.M)))


def kernels_of(library: Path, arch: str = "") -> dict[str, list[Kernel]]:
    """By architecture, all or one, in the order of their names. Each takes some ten seconds."""
    from machine_code import instructions_of

    one = ("-arch", arch) if arch else ()
    lines = _dumped(library, "-res-usage", "-sass", *one).splitlines()
    needs: dict[tuple[str, str], dict[str, int]] = {}
    words: dict[tuple[str, str], list[str]] = {}
    arch = symbol = ""
    for line in lines:
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\S+):", line):
            symbol = found[1]
        elif "REG:" in line:
            numbers = re.findall(r"(REG|STACK|SHARED):(\d+)", line)
            needs[arch, symbol] = {name: int(value) for name, value in numbers}
        elif found := re.match(r"\s+Function : (\S+)", line):
            symbol = found[1]
            words[arch, symbol] = []
        elif found := _WORD.match(line):
            words[arch, symbol].append(found[1])
    names = _demangled(sorted({symbol for _, symbol in needs}))
    made: dict[str, list[Kernel]] = {}
    for (arch, symbol), need in sorted(needs.items(), key=lambda item: names[item[0][1]]):
        of = words[arch, symbol]
        spills = sum(word.split(".")[0] in ("STL", "LDL") for word in of)
        made.setdefault(arch, []).append(
            Kernel(
                names[symbol],
                need["REG"],
                need["STACK"],
                need["SHARED"],
                spills,
                instructions_of(of),
            )
        )
    return made


def _dumped(library: Path, *options: str) -> str:
    from machine_code import CUOBJDUMP

    command = [str(CUOBJDUMP), *options, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _demangled(symbols: list[str]) -> dict[str, str]:
    """Names as a kernel's author writes them: ``shrink_kernel<float, 64>``."""
    command = ["c++filt", *symbols]
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    short = (
        re.sub(r"\((lorafast::cuda::[\w:]+)?\)$|lorafast::cuda::|^void ", "", name) for name in done
    )
    return dict(zip(symbols, short, strict=True))


def written(nvcc: str, arch: str, folder: Path = FOLDER) -> list[Kernel] | None:
    """What is written down of an architecture; None if nothing is."""
    path = _path(nvcc, arch, folder)
    if not path.is_file():
        return None
    return [Kernel(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def write(nvcc: str, made: dict[str, list[Kernel]], folder: Path = FOLDER) -> None:
    """Makes the files of a version say what was found, and nothing else."""
    for path in (folder / f"nvcc-{nvcc}").glob("*.jsonl"):
        path.unlink()
    for arch, kernels in made.items():
        path = _path(nvcc, arch, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(asdict(kernel)) for kernel in kernels)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _path(nvcc: str, arch: str, folder: Path) -> Path:
    return folder / f"nvcc-{nvcc}" / f"{arch}.jsonl"


def summaries(made: dict[str, list[Kernel]]) -> Iterator[dict[str, Any]]:
    """For each kernel how many instances there are and what they need at most."""
    for arch, kernels in made.items():
        for name in dict.fromkeys(kernel.name.partition("<")[0] for kernel in kernels):
            of = [kernel for kernel in kernels if kernel.name.partition("<")[0] == name]
            multiply = {
                word for kernel in of for word in kernel.instructions if word.endswith("MMA")
            }
            yield {
                "arch": arch,
                "kernel": name,
                "instances": len(of),
                "registers": max(kernel.registers for kernel in of),
                "shared": max(kernel.shared for kernel in of),
                "spills": sum(kernel.spills for kernel in of),
                "instructions": sorted(multiply),
            }


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for everything; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, nargs="?", default=LIBRARY)
    parser.add_argument("--write", action="store_true", help="write down what was found")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    nvcc = nvcc_of(given.library) if given.library.is_file() else None
    if nvcc is None:
        print(f"{given.library} is no library that nvcc has made", file=sys.stderr)
        return 2
    made = kernels_of(given.library)
    for arch, kernels in made.items():
        for kernel in kernels:
            print(f"{arch:<8} {kernel}")
    wrong = any(kernel.spills for kernels in made.values() for kernel in kernels)
    if given.write:
        write(nvcc, made)
    if given.json:
        _record(given.json, given.library, nvcc, made, complete=not wrong)
    return int(wrong)


def _record(
    path: Path, library: Path, nvcc: str, made: dict[str, list[Kernel]], complete: bool
) -> None:
    import torch
    from lorafast.bench.common.record import Record

    command = ["python", "tests/cuda/compiled.py", *sys.argv[1:]]
    record = Record(torch.device("cpu"), command, path)
    record.add("nvcc", [{"nvcc": nvcc, **row} for row in summaries(made)])
    seconds = seconds_of_build() if library.resolve() == LIBRARY else {}
    if seconds:
        took = {"seconds": sum(seconds.values()), "of": seconds}
        record.add("build", [{"nvcc": nvcc, "bytes": library.stat().st_size, **took}])
    record.finish(complete=complete)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    sys.exit(main())
