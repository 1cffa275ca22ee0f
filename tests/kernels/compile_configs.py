"""Compiles what every row of an architecture's table launches and checks the machine code.

    python tests/kernels/compile_configs.py [90 ...] [--json bench/results/compiled-2026-11-23.json]

A line for each configuration and variant; exit status 1 if one spills, is too large for the chip, lacks
the instructions that it should be made of, or reads with narrow accesses. Needs no GPU; must not run
with ``TRITON_INTERPRET`` set. What has been compiled before by the same Triton is read from
``build/compiled``. ``--json`` records what a kernel needs at most on each architecture.
"""

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from lorafast.bench.common.record import Record
from lorafast.kernels.common.configs import OPERATIONS, SHARED_MEMORY, LaunchConfig
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.linear_expand import linear_expand
from lorafast.kernels.lora_linear import lora_linear, lora_linear_backward
from lorafast.kernels.shrink import shrink
from lorafast.kernels.shrink_backward import shrink_backward
from lorafast.kernels.tables import table_of
from lorafast.kernels.tables.find import WHOLE
from recorded import Launch, launches_of
from triton.backends.compiler import GPUTarget

_CACHE = Path(__file__).parents[2] / "build" / "compiled"
_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Half precision multiplies on the tensor cores: their instruction on each architecture.
_TENSOR_CORE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_PRODUCT = "linear_expand"
_WARP_GROUP_ROWS = 64  # HGMMA and UTCHMMA multiply so many rows; fewer go to HMMA


@dataclass(frozen=True)
class Machine:
    """What the machine code of one launch needs, and what it is made of."""

    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    instructions: dict[str, int]


@dataclass(frozen=True)
class Checked:
    """One configuration in one variant; ``violations`` says what is wrong with its machine code."""

    name: str
    kernel: str
    machine: Machine
    violations: list[str]

    def __str__(self) -> str:
        m = self.machine
        made_of = " ".join(f"{name}:{count}" for name, count in m.instructions.items())
        verdict = "; ".join(self.violations) or "ok"
        needs = f"{m.registers:>3} registers {m.shared:>6} shared"
        return f"{self.name:<48} {needs}  {made_of}  {verdict}"


def _calls(
    operation: str, c: LaunchConfig, dtype: torch.dtype, M: int, K: int, N: int, r: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the layer asks of an operation, on contiguous inputs without memory."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, dy, s, weight = empty(M, K), empty(M, N), empty(M, r), empty(N, K)
    lora_A, lora_B, bias = empty(r, K), empty(N, r), empty(N)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    masks = (("", 0.0, None), ("-dropout", 0.05, seed))
    if operation == "shrink":
        for name, p, of in masks:
            yield f"plain{name}", lambda p=p, of=of: shrink(x, lora_A, p, of, config=c)
    elif operation == "expand_backward":
        yield "plain", lambda: expand_backward(dy, s, lora_B, 2.0, config=c)
    elif operation == "shrink_backward":
        for name, p, of in masks:
            yield f"plain{name}", lambda p=p, of=of: shrink_backward(s, x, p, of, config=c)
    else:
        yield "forward", lambda: linear_expand(x, weight, s, lora_B, 2.0, bias, config=c)
        for name, p, of in masks:
            yield (
                f"dx{name}",
                lambda p=p, of=of: linear_expand(
                    dy, weight.t(), s, lora_A.t(), 1.0, None, p, of, config=c
                ),
            )
        if c.riders:
            yield (
                "riders-forward",
                lambda: lora_linear(x, weight, lora_A, lora_B, 2.0, bias, config=c),
            )
            for name, p, of in masks:
                yield (
                    f"riders-backward{name}",
                    lambda p=p, of=of: lora_linear_backward(
                        dy, x, weight, lora_A, lora_B, s, 2.0, p, of, config=c
                    ),
                )


def check_all(capability: int, dtypes: tuple[str, ...]) -> Iterator[Checked]:
    """Every row of the table in every variant; what launches the same code is compiled once."""
    seen = set()
    for operation in OPERATIONS:
        rows = table_of(capability)[operation]
        for (bits, M, K, N, most, config), dtype in itertools.product(rows, dtypes):
            if 8 * _DTYPES[dtype].itemsize != bits:
                continue
            for r in _ranks(operation, most, dtype, max(row[1] for row in rows) == M):
                for variant, call in _calls(operation, config, _DTYPES[dtype], M, K, N, r):
                    for launch in launches_of(capability, call):
                        if launch.code in seen:
                            continue
                        seen.add(launch.code)
                        name = f"{operation}-{dtype}-M{M}-r{r}-{variant}"
                        machine = compiled(launch, capability)
                        kernel = launch.kernel.__name__.removesuffix("_kernel")
                        bad = list(why_bad(launch, config, dtype, capability, machine))
                        yield Checked(name, kernel, machine, bad)


def _ranks(operation: str, most: int, dtype: str, most_rows: bool) -> tuple[int, ...]:
    """The ranks to compile a row for. A product takes the rank in blocks of its own: one, several, and
    so many that they are looped over, the last two where there are most rows."""
    if operation != _PRODUCT:
        return (most,) if dtype != "fp16" else ()
    if dtype != "bf16":
        return (16,)
    return (16, 64, 80) if most_rows else (16,)


def why_bad(
    launch: Launch,
    config: LaunchConfig,
    dtype: str,
    capability: int,
    machine: Machine,
) -> Iterator[str]:
    """What the machine code must not have, and what it must."""
    if machine.spills or machine.local:
        yield f"{machine.spills} spills, {machine.local} bytes of local memory"
    if machine.shared > SHARED_MEMORY[capability]:
        yield f"{machine.shared} bytes of shared memory of {SHARED_MEMORY[capability]}"
    product = launch.kernel.__name__.removesuffix("_kernel") in (_PRODUCT, *WHOLE)
    has = machine.instructions
    if product and dtype != "fp32":
        wide = config.block_m >= _WARP_GROUP_ROWS
        expected = _TENSOR_CORE[capability] if wide else "HMMA"
        if expected not in has:
            yield f"no {expected}"
        if launch.constant("WARP_SPECIALIZE") and "USETMAXREG" not in has:
            yield "the warps are not specialised"
    bulk = product and launch.constant("DESCRIPTORS")
    if bulk:
        if "UTMALDG" not in has:
            yield "no bulk copies"
    elif "LDGSTS.128" not in has and "LDG.128" not in has:
        yield "no 16-byte accesses"


def compiled(launch: Launch, capability: int) -> Machine:
    """The machine code of a launch, compiled or remembered."""
    source = launch.source()
    options = dict(launch.options)
    parts = (triton.__version__, source.hash(), capability, sorted(options.items()))
    path = _CACHE / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"
    if path.is_file():
        return Machine(**json.loads(path.read_text(encoding="utf-8")))
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    machine = _read(result.asm["cubin"], result.metadata.shared)
    _CACHE.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(machine)), encoding="utf-8")
    return machine


def _read(cubin: bytes, shared: int) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    need = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9.a-z_]*)", text, re.M)
    return Machine(
        registers=need["REG"],
        stack=need["STACK"],
        local=need["LOCAL"],
        shared=shared,
        spills=sum(word.split(".")[0] in ("STL", "LDL") for word in words),
        instructions=_instructions(words),
    )


def _instructions(words: list[str]) -> dict[str, int]:
    """How often the instructions occur that tell fast code from slow; an access by its width in bits."""
    counts: Counter[str] = Counter()
    for word in words:
        name, *modifiers = word.split(".")
        if name in ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "USETMAXREG"):
            counts[name] += 1
        elif name in ("LDGSTS", "LDG", "STG"):
            width = next((m for m in modifiers if m in ("128", "64", "U8", "U16")), "32")
            counts[f"{name}.{width}"] += 1
    return dict(sorted(counts.items()))


def summaries(capability: int, checked: list[Checked]) -> Iterator[dict[str, Any]]:
    """For each kernel how many variants were compiled and what they need at most."""
    for kernel in dict.fromkeys(c.kernel for c in checked):
        machines = [c.machine for c in checked if c.kernel == kernel]
        multiply = {name for m in machines for name in m.instructions if name.endswith("MMA")}
        yield {
            "capability": capability,
            "kernel": kernel,
            "variants": len(machines),
            "registers": max(m.registers for m in machines),
            "shared": max(m.shared for m in machines),
            "shared_limit": SHARED_MEMORY[capability],
            "spills": sum(m.spills for m in machines),
            "instructions": sorted(multiply),
        }


def main(words: list[str] | None = None) -> int:
    """Prints a line for everything; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", type=int, nargs="*", metavar="SM")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    command = ["python", "tests/kernels/compile_configs.py", *sys.argv[1:]]
    record = Record(torch.device("cpu"), command, arguments.json)
    wrong = False
    for capability in arguments.capabilities or SHARED_MEMORY:
        # fp16 differs from bf16 in one instruction's operand type: both are compiled where the
        # instruction is asked for by name.
        dtypes = ("bf16", "fp16", "fp32") if capability == 90 else ("bf16", "fp32")
        found = []
        for checked in check_all(capability, dtypes):
            print(f"sm_{capability:<4} {checked}", flush=True)
            found.append(checked)
            wrong |= bool(checked.violations)
        record.add("compiled", list(summaries(capability, found)))
    record.finish(complete=not wrong)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
