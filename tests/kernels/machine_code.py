"""What the machine code of a launch is made of, compiled now or known from before.

``compiled/triton-*/sm_*.jsonl`` holds, a line a variant, what every configuration that ships compiled to
with that Triton; the folders beside these files hold what each ``test_compiled_*.py`` compiles. A line
counts only for the very source, constants, options and Triton that its key is the hash of, so whatever
changed is compiled again; and each run compiles a few known ones again, one of 128 drawn by lot, to see
that the lines are true.
"""

import hashlib
import json
import random
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from recorded import Launch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
FOLDER = (
    Path(__file__).with_name("compiled") / f"triton-{'.'.join(triton.__version__.split('.')[:2])}"
)
_KEY_DIGITS = 16


@dataclass(frozen=True)
class Machine:
    """What the machine code of one launch needs, and what it is made of."""

    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    serialized: bool
    """``ptxas`` makes each ``wgmma`` wait for the one before, which costs a GEMM a fifth of its speed:
    measured on an H100."""
    instructions: dict[str, int]


class Known:
    """The lines for one architecture, and what this run made of them.

    ``again`` are the first digits of keys that are compiled whether known or not; all with None. Unless
    they are given they are drawn: two pairs of digits.
    """

    def __init__(
        self, capability: int, again: str | tuple[str, ...] | None = (), folder: Path = FOLDER
    ) -> None:
        self._capability = capability
        self._path = folder / f"sm_{capability}.jsonl"
        self._again = (
            tuple(f"{n:02x}" for n in random.sample(range(256), 2)) if again == () else again
        )
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        self._before = {line["key"]: _machine(line) for line in map(json.loads, lines)}
        self._now: dict[str, tuple[str, Machine]] = {}
        self.compiled = 0

    def machine(self, name: str, launch: Launch) -> tuple[Machine, str | None]:
        """The machine code of a launch, and how it differs from what its line says, if it does."""
        key = _key(launch, self._capability)
        before = machine = self._before.get(key)
        if machine is None or self._again is None or key.startswith(self._again):
            machine = _compile(launch, self._capability)
            self.compiled += 1
        self._now[key] = name, machine
        same = before is None or before == machine
        return machine, None if same else f"not what {self._path.name} says of it"

    def write(self) -> None:
        """Makes the file say what this run saw, and nothing else."""
        lines = (
            {"name": name, "key": key, **asdict(machine)}
            for key, (name, machine) in sorted(self._now.items(), key=lambda item: item[1][0])
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def _machine(line: dict[str, Any]) -> Machine:
    return Machine(**{field.name: line[field.name] for field in fields(Machine)})


def _key(launch: Launch, capability: int) -> str:
    parts = (triton.__version__, launch.source().hash(), capability, sorted(launch.options))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_KEY_DIGITS]


def _compile(launch: Launch, capability: int) -> Machine:
    target = GPUTarget("cuda", capability, 32)
    result = triton.compile(launch.source(), target=target, options=dict(launch.options))
    serialized = "wgmma" in result.asm["ptx"] and _serialized(result.asm["ptx"], capability)
    return _read(result.asm["cubin"], result.metadata.shared, serialized)


def _serialized(ptx: str, capability: int) -> bool:
    """Whether ``ptxas`` says so."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        options = ["-v", f"--gpu-name=sm_{capability}a", "-o", "/dev/null"]
        command = [get_ptxas(capability).path, *options, file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return "instructions are serialized" in said


def _read(cubin: bytes, shared: int, serialized: bool) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    need = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9.a-z_]*)", text, re.M)
    return Machine(
        registers=need["REG"],
        stack=need["STACK"],
        local=need["LOCAL"],
        shared=shared,
        spills=sum(word.split(".")[0] in ("STL", "LDL") for word in words),
        serialized=serialized,
        instructions=instructions_of(words),
    )


def instructions_of(words: list[str]) -> dict[str, int]:
    """How often the instructions occur that tell fast code from slow; an access by its width in bits."""
    counts: Counter[str] = Counter()
    for word in words:
        name, *modifiers = word.split(".")
        if name in ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG"):
            counts[name] += 1
        elif name in ("LDGSTS", "LDG", "STG"):
            width = next((m for m in modifiers if m in ("128", "64", "U8", "U16")), "32")
            counts[f"{name}.{width}"] += 1
    return dict(sorted(counts.items()))
