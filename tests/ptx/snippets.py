"""One instruction, or a few, executed for a block of threads: how instructions are tested.

evaluate("add.s32 %d, %a, %b;", {"d": np.int32}, a=a, b=b)["d"]
"""

import numpy as np

from .launch import In, Machine, Out, Program, Ran

VERSION, TARGET = "9.0", "sm_90a"


def evaluate(
    code: str,
    outputs: dict[str, type],
    *,
    registers: str = "",
    shared: int = 0,
    machine: Machine | None = None,
    **inputs: np.ndarray,
) -> dict[str, np.ndarray]:
    """What ``code`` leaves in registers named by ``outputs``, of one thread for each element.

    Registers are called as the inputs and outputs are, with a %; ``registers`` declares others. A dtype
    gives a register its width (8 bits are in one of 16); bool is a predicate. ``shared``: bytes of an
    array ``smem``.
    """
    (threads,) = {len(array) for array in inputs.values()} or {32}
    declared = {name: np.dtype(kind) for name, kind in outputs.items()}
    declared |= {name: array.dtype for name, array in inputs.items()}
    text = [
        f".version {VERSION}", f".target {TARGET}", ".address_size 64", ".visible .entry snippet(",
        ",".join(f".param .u64 p{i}" for i in range(len(inputs) + len(outputs))), ") {",
        ".reg .b64 %base, %at, %lane; .reg .b32 %thread, %byte; .reg .pred %bit;",
        f".shared .align 1024 .b8 smem[{max(shared, 16)}];", registers,
        *(f".reg {_register(kind)} %{name};" for name, kind in declared.items()),
        "mov.u32 %thread, %tid.x; cvt.u64.u32 %lane, %thread;",
    ]  # fmt: skip
    for i, name in enumerate(inputs):
        text += _at(i, declared[name])
        if declared[name].kind == "b":
            text += ["ld.global.u8 %byte, [%at];", f"setp.ne.u32 %{name}, %byte, 0;"]
        else:
            text.append(f"ld.global.{_access(declared[name])} %{name}, [%at];")
    text.append(code)
    for i, name in enumerate(outputs, len(inputs)):
        text += _at(i, declared[name])
        if declared[name].kind == "b":
            text += [f"selp.u32 %byte, 1, 0, %{name};", "st.global.u8 [%at], %byte;"]
        else:
            text.append(f"st.global.{_access(declared[name])} [%at], %{name};")
    text += ["ret;", "}"]
    found = {name: np.zeros(threads, kind) for name, kind in outputs.items()}
    arguments = [In(name, np.ascontiguousarray(array)) for name, array in inputs.items()]
    arguments += [Out(name, array) for name, array in found.items()]
    run("\n".join(text), (1,), (threads,), arguments, machine=machine)
    return found


def run(
    text: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: list,
    *,
    kernel: str | None = None,
    machine: Machine | None = None,
    **options,
) -> Ran:
    """Executes the kernel of a text, its first one unless ``kernel`` names another."""
    name = kernel or text.split(".entry", 1)[1].split("(", 1)[0].strip()
    return (machine or Machine()).launch(
        Program.from_text(text, name), grid, block, arguments, **options
    )


def _register(kind: np.dtype) -> str:
    return ".pred" if kind.kind == "b" else f".b{max(8 * kind.itemsize, 16)}"


def _access(kind: np.dtype) -> str:
    return f"b{8 * kind.itemsize}"


def _at(index: int, kind: np.dtype) -> list[str]:
    return [f"ld.param.u64 %base, [p{index}];", f"mad.lo.u64 %at, %lane, {kind.itemsize}, %base;"]
