"""Compiles what every row of an architecture's table launches and checks the machine code.

    python tests/kernels/compile_configs.py [90 ...] [--all] [--write] [--json FILE] [--serialized]

A line for each configuration and variant; exit status 1 if one spills, is too large for the chip, lacks
the instructions that it should be made of, or reads with narrow accesses. Needs no GPU; must not run
with ``TRITON_INTERPRET`` set. What ``tests/kernels/compiled`` knows is not compiled again, but for one
of 128 drawn by lot (``--all``: all of it); ``--write`` after a kernel or a table has changed makes
those files say what was found. ``--serialized`` asks only whether ``ptxas`` serializes a ``wgmma``: for
a Triton that the tables aren't made with. ``--json`` records what a kernel needs at most on each
architecture.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lorafast.bench.common.record import Record
from lorafast.kernels.common.configs import OPERATIONS, SHARED_MEMORY, LaunchConfig
from lorafast.kernels.common.plan import may_help
from lorafast.kernels.expand import expand
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.linear_expand import linear_expand
from lorafast.kernels.lora_linear import lora_linear
from lorafast.kernels.shrink import shrink
from lorafast.kernels.shrink_backward import shrink_backward
from lorafast.kernels.tables import table_of
from lorafast.kernels.tables.find import GEMMS
from machine_code import Known, Machine
from recorded import Launch, launches_of

from lorafast.reference import wide

# Half precision multiplies on the tensor cores: their instruction on each architecture.
_TENSOR_CORE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_PRODUCT = "linear_expand"
SERIALIZED = "its wgmma instructions are serialized"
_WARP_GROUP_ROWS = 64  # HGMMA and UTCHMMA multiply so many rows; fewer go to HMMA


@dataclass(frozen=True)
class Kind:
    """The dtypes of a layer, and whether its float32 products may be rounded to TF32."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype
    tf32: bool = False

    def bits(self, operation: str) -> int:
        """Of an element as the operation multiplies it: what a table's rows are for."""
        dtype = self.dtype if operation == _PRODUCT else wide(self.dtype)
        return 8 * dtype.itemsize

    @property
    def on_tensor_cores(self) -> bool:
        """Whether the product has an instruction of its own."""
        return self.bits(_PRODUCT) == 16 or self.tf32


_KINDS = {
    "bf16": Kind(torch.bfloat16, torch.bfloat16),
    "bf16+fp32": Kind(torch.bfloat16, torch.float32),  # PEFT's default: adapters in float32
    "fp16": Kind(torch.float16, torch.float16),
    "fp16+fp32": Kind(torch.float16, torch.float32),
    "fp32": Kind(torch.float32, torch.float32),
    "tf32": Kind(torch.float32, torch.float32, tf32=True),
}


# What a backward asks of a pass over dy: the most, and dB alone. ds alone is a shrink.
_ASKED = {"plain": {}, "dbias": {"dbias": True}, "dB": {"ds": False}}


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
    operation: str, c: LaunchConfig, kind: Kind, M: int, K: int, N: int, r: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the layer asks of an operation, on contiguous inputs without memory."""

    def empty(*size: int, dtype: torch.dtype = kind.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, dy, weight, bias = empty(M, K), empty(M, N), empty(N, K), empty(N)
    s = empty(M, r, dtype=wide(kind.dtype))
    lora_A, lora_B = (empty(*size, dtype=kind.adapter_dtype) for size in ((r, K), (N, r)))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    masks = (("", 0.0, None), ("-dropout", 0.05, seed))
    if operation == "shrink":
        for name, p, of in masks:
            yield f"plain{name}", lambda p=p, of=of: shrink(x, lora_A, p, of, config=c)
        yield "scaled", lambda: shrink(dy, lora_B.t(), scale=2.0, config=c)  # ds alone
    elif operation == "expand_backward":
        for name, asked in _ASKED.items():
            yield name, lambda asked=asked: expand_backward(dy, s, lora_B, 2.0, **asked, config=c)
    elif operation == "shrink_backward":
        for name, p, of in masks:
            yield (
                f"plain{name}",
                lambda p=p, of=of: shrink_backward(s, x, p, of, kind.adapter_dtype, config=c),
            )
    elif operation == "expand":
        dtype = kind.dtype
        yield "bias", lambda: expand(s, lora_B, 2.0, dtype=dtype, bias=bias, config=c)
        for name, p, of in masks:
            yield (
                f"plain{name}",
                lambda p=p, of=of: expand(s, lora_B, 2.0, p, of, dtype=dtype, config=c),
            )
            yield (
                f"dx{name}",
                lambda p=p, of=of: expand(s, lora_A.t(), 1.0, p, of, dtype=dtype, config=c),
            )
    else:
        yield "forward", lambda: linear_expand(x, weight, s, lora_B, 2.0, bias, config=c)
        for name, p, of in masks:
            yield (
                f"dx{name}",
                lambda p=p, of=of: linear_expand(
                    dy, weight, s, lora_A.t(), 1.0, None, p, of, transposed=True, config=c
                ),
            )
        if c.helpers and may_help(kind.dtype):
            yield (
                "helpers",
                lambda: lora_linear(x, weight, lora_A, lora_B, 2.0, bias, config=c),
            )


def check_all(capability: int, kinds: Iterable[str], known: Known) -> Iterator[Checked]:
    """Every row of the table in every variant; what launches the same code is compiled once."""
    seen = set()
    for operation in OPERATIONS:
        rows = table_of(capability)[operation]
        for (bits, M, K, N, most, config), name_of_kind in itertools.product(rows, kinds):
            kind = _KINDS[name_of_kind]
            if kind.bits(operation) != bits:
                continue
            last = most == max(row[4] for row in rows if row[0] == bits)
            for r in _ranks(operation, most, name_of_kind, max(row[1] for row in rows) == M, last):
                for variant, call in _calls(operation, config, kind, M, K, N, r):
                    for launch in _launches(capability, kind, call):
                        if launch.code in seen:
                            continue
                        seen.add(launch.code)
                        name = f"{operation}-{name_of_kind}-M{M}-r{r}-{variant}"
                        machine, unlike = known.machine(name, launch)
                        kernel = launch.kernel.__name__.removesuffix("_kernel")
                        bad = list(why_bad(launch, config, kind, capability, machine))
                        bad += [unlike] if unlike else []
                        yield Checked(name, kernel, machine, bad)


def _launches(capability: int, kind: Kind, call: Callable[[], object]) -> list[Launch]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if kind.tf32 else "ieee"
    try:
        return launches_of(capability, call)
    finally:
        matmul.fp32_precision = before


def _ranks(operation: str, most: int, kind: str, most_rows: bool, last: bool) -> tuple[int, ...]:
    """The ranks to compile a row for. A product takes the rank in blocks of its own: one, several, and
    so many that they are looped over, the last two where there are most rows. ``expand`` loops over
    blocks beyond the ``last`` of its ranks."""
    if operation == "expand" and last:
        return most, most + 8
    if operation != _PRODUCT:
        return (most,)
    if kind not in ("bf16", "fp16+fp32"):
        return (16,)
    return (16, 64, 80) if most_rows else (16,)


def why_bad(
    launch: Launch,
    config: LaunchConfig,
    kind: Kind,
    capability: int,
    machine: Machine,
) -> Iterator[str]:
    """What the machine code must not have, and what it must."""
    if machine.serialized:
        yield SERIALIZED
    if machine.spills or machine.local:
        yield f"{machine.spills} spills, {machine.local} bytes of local memory"
    if machine.shared > SHARED_MEMORY[capability]:
        yield f"{machine.shared} bytes of shared memory of {SHARED_MEMORY[capability]}"
    kernel = launch.kernel.__name__.removesuffix("_kernel")
    product = kernel in GEMMS
    has = machine.instructions
    if product and kind.on_tensor_cores:
        wide = config.block_m >= _WARP_GROUP_ROWS
        expected = _TENSOR_CORE[capability] if wide else "HMMA"
        if expected not in has:
            yield f"no {expected}"
    if product and launch.constant("DESCRIPTORS"):
        if "UTMALDG" not in has:
            yield "no TMA"
    elif kernel == "expand":  # which reads next to nothing
        if "STG.128" not in has:
            yield "no 16-byte accesses"
    elif "LDGSTS.128" not in has and "LDG.128" not in has:
        # A tile that was cut for float32 has half as many bytes in float16.
        halved = not product and kind.dtype is torch.float16
        if not (halved and "LDGSTS.64" in has):
            yield "no 16-byte accesses"


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
    parser.add_argument("--all", action="store_true", help="compile what is known, too")
    parser.add_argument("--write", action="store_true", help="write down what was found")
    parser.add_argument("--serialized", action="store_true", help="ask for nothing else")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    command = ["python", "tests/kernels/compile_configs.py", *sys.argv[1:]]
    record = Record(torch.device("cpu"), command, arguments.json)
    wrong = False
    for capability in arguments.capabilities or SHARED_MEMORY:
        # float16 adapters differ from float32 ones in a conversion: both are compiled where the
        # instruction is asked for by name.
        kinds = [kind for kind in _KINDS if kind != "fp16" or capability == 90]
        found = []
        known = Known(capability, None if arguments.all else ())
        for checked in check_all(capability, kinds, known):
            if arguments.serialized:
                checked.violations[:] = [v for v in checked.violations if v == SERIALIZED]
            print(f"sm_{capability:<4} {checked}", flush=True)
            found.append(checked)
            wrong |= bool(checked.violations)
        summary = f"sm_{capability}: {len(found)} variants, {known.compiled} of them compiled now"
        print(summary, file=sys.stderr, flush=True)
        if arguments.write:
            known.write()
        record.add("compiled", list(summaries(capability, found)))
    record.finish(complete=not wrong)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
