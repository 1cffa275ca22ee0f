"""Kernels in PTX that tests write by hand: their frame, and the loops that all of them need."""

import itertools
from collections.abc import Callable

import numpy as np

from .launch import Fault, In, Machine, Out, Program, Ran

_labels = itertools.count()


def kernel(body: str, parameters: str, *, shared: int = 4096, registers: str = "") -> str:
    """A kernel around a body.

    ``parameters``: names, each a pointer, in the register of its name; ``name:map`` is a tensor map.
    There are ``%tid``, ``%warp``, ``%rank``, registers ``%p``, ``%h``, ``%r``, ``%q`` (64 bits) by
    number, and ``smem`` of ``shared`` bytes.
    """
    declared, loads = [], []
    for parameter in parameters.split():
        name, _, kind = parameter.partition(":")
        if kind == "map":
            declared.append(f".param .align 64 .b8 p_{name}[128]")
            loads.append(f".reg .b64 %{name}; mov.b64 %{name}, p_{name};")
            loads.append(f"cvta.param.u64 %{name}, %{name};")
        else:
            declared.append(f".param .u64 p_{name}")
            loads.append(f".reg .b64 %{name}; ld.param.u64 %{name}, [p_{name}];")
    return "\n".join(
        [
            ".version 8.8", ".target sm_90a", ".address_size 64",
            f".visible .entry kernel({', '.join(declared)}) {{",
            ".reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %q<32>;",
            ".reg .b32 %tid, %warp, %rank;", registers,
            f".shared .align 1024 .b8 smem[{shared}];",
            "mov.u32 %tid, %tid.x; shr.u32 %warp, %tid, 5; mov.u32 %rank, %cluster_ctarank;",
            *loads, body, "ret;", "}",
        ]
    )  # fmt: skip


def waits(barrier: str, parity: str | int, kind: str = "try_wait") -> str:
    """A loop until the phase of an mbarrier's parity is complete."""
    label = f"wait{next(_labels)}"
    wait = f"mbarrier.{kind}.parity.shared::cta.b64 %p15, [{barrier}], {parity};"
    return f"{label}: {wait}\n@!%p15 bra {label};"


def dumps(to: str, begin: int, size: int) -> str:
    """Copies bytes of ``smem`` to global memory, by one thread for each four."""
    return f"""
        setp.lt.u32 %p14, %tid, {size // 4};
        mov.u32 %r30, smem;
        mad.lo.u32 %r30, %tid, 4, %r30;
        @%p14 ld.shared.b32 %r31, [%r30+{begin}];
        mad.wide.u32 %q31, %tid, 4, %{to};
        @%p14 st.global.b32 [%q31], %r31;"""


def fills(source: str, begin: int, size: int) -> str:
    """The other way."""
    return f"""
        setp.lt.u32 %p14, %tid, {size // 4};
        mov.u32 %r30, smem;
        mad.lo.u32 %r30, %tid, 4, %r30;
        mad.wide.u32 %q31, %tid, 4, %{source};
        @%p14 ld.global.b32 %r31, [%q31];
        @%p14 st.shared.b32 [%r30+{begin}], %r31;"""


def launch(
    text: str,
    arguments: list,
    *,
    threads: int = 64,
    grid: int = 1,
    seed: int = 0,
    late: str | None = None,
    cluster: int | None = 1,
    resident: int = 4,
) -> Ran:
    """Executes a kernel that `kernel` made. Without a `cluster` the launch says nothing of any."""
    machine = Machine(seed=seed, late=late, resident=resident, most_silent=50_000)
    program = Program.from_text(text, "kernel")
    return machine.launch(program, (grid,), (threads,), arguments, cluster=cluster and (cluster,))


def fault_of(act: Callable[[], object]) -> str | None:
    """What the fault of a call says."""
    try:
        act()
    except Fault as fault:
        return str(fault)
    return None


def numbers(count: int, kind: type = np.uint32, seed: int = 1) -> np.ndarray:
    """Random bits, at a multiple of 128 bytes."""
    size = count * np.dtype(kind).itemsize
    space = np.empty(size + 128, np.uint8)
    at = -space.ctypes.data % 128
    array = space[at : at + size]
    array[:] = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return array.view(kind)


# ---- Bulk copies of one thread: a buffer at the start of ``smem``, an mbarrier at BARRIER of it

BARRIER = 8192
SHARED = BARRIER + 64
BY_BYTES = "mbarrier::complete_tx::bytes"


def plain_load(size: int | str, *, to: int = 0, source: int = 0, space: str = "shared::cta") -> str:
    """A copy of bytes of ``x``."""
    return (
        f"cp.async.bulk.{space}.global.{BY_BYTES} "
        f"[%r0+{to}], [%x+{source}], {size}, [%r0+{BARRIER}];"
    )


def tensor_load(*first: int | str, to: int = 0, space: str = "shared::cta", name: str = "x") -> str:
    """A copy of the box of a tensor map that begins at these coordinates."""
    coordinates = ", ".join(map(str, first))
    return (
        f"cp.async.bulk.tensor.{len(first)}d.{space}.global.tile.{BY_BYTES} "
        f"[%r0+{to}], [%{name}, {{{coordinates}}}], [%r0+{BARRIER}];"
    )


def loaded(
    copy: str,
    parameters: str,
    arguments: list,
    size: int,
    *,
    begin: int = 0,
    seed: int = 0,
    late: str | None = None,
) -> np.ndarray:
    """What is in ``smem`` when thread 0 has made a copy of ``size`` bytes and all have waited for it."""
    y = np.zeros(size, np.uint8)
    body = f"""
        mov.u32 %r0, smem;
        setp.eq.u32 %p0, %tid, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r0+{BARRIER}], 1;
        bar.sync 0;
        @!%p0 bra WAIT;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0+{BARRIER}], {size};
        {copy}
    WAIT:
        {waits(f"%r0+{BARRIER}", 0)}
        {dumps("y", begin, size)}"""
    text = kernel(body, f"{parameters} y", shared=SHARED)
    launch(text, [*arguments, Out("y", y)], threads=max(size // 4, 32), seed=seed, late=late)
    return y


STORES = """
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.u32 %r0, smem;
    setp.eq.u32 %p0, %tid, 0;
    @%p0 {copy}
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
"""


def stored(
    copy: str,
    parameters: str,
    arguments: list,
    data: np.ndarray,
    *,
    begin: int = 0,
    seed: int = 0,
    late: str | None = None,
    grid: int = 1,
) -> None:
    """Thread 0 makes a copy of ``data``, which all have put into ``smem``."""
    body = fills("data", begin, data.nbytes) + STORES.replace("{copy}", copy)
    text = kernel(body, f"data {parameters}", shared=SHARED)
    threads = max(data.nbytes // 4, 32)
    launch(text, [In("data", data), *arguments], threads=threads, seed=seed, late=late, grid=grid)
