"""Tensor memory: loads and stores cell by cell, allocation, and who may access it when."""

import numpy as np
import pytest

from ptx.launch import Fault, In, Machine, Out
from ptx.snippets import run
from ptx.tensor_core import (
    ALLOC,
    COLUMNS,
    COMMIT,
    FENCE,
    INIT,
    LANES,
    READY,
    RELINQUISH,
    WAIT,
    Product,
    case,
    dealloc,
    kernel,
    transfer,
)

LATE = ("late", "random", "soon")


# ---- Transfers


def owner(shape, row, column):
    """Who has a cell in the figures of "Data Movement Shape": lane and register, of .x1."""
    match shape:
        case "32x32b" | "16x32bx2":
            return row, 0
        case "16x64b":
            return row % 8 * 4 + column * 2 + row // 8, 0
        case "16x128b":
            return row % 8 * 4 + column, row // 8
        case "16x256b":
            return row % 8 * 4 + column // 2, column % 2 + row // 8 * 2


OF_X1 = {
    "32x32b": (1, 1),
    "16x64b": (2, 1),
    "16x128b": (4, 2),
    "16x256b": (8, 4),
    "16x32bx2": (1, 1),
}
"""Columns, and registers of a lane."""
SPLIT = 70
FIRST, WIDTH = 3, 160
"""The column that a transfer begins in, of how many."""


def cells(shape, times, packed):
    """[32 lanes, registers, halves] of (row, column), as one warp's transfer reaches them."""
    columns, registers = OF_X1[shape]
    each = 2 if packed else 1
    found = np.zeros((32, registers * times, 2, 2), int)
    for repeat in range(times):
        for row in range(32 if shape == "32x32b" else 16):
            for column in range(columns):
                lane, register = owner(shape, row, column)
                at = FIRST + (repeat * columns + column) * each
                found[lane, repeat * registers + register] = [(row, at), (row, at + 1)]
                if shape == "16x32bx2":
                    halves = [(row, at + SPLIT), (row, at + SPLIT + 1)]
                    found[lane + 16, repeat * registers + register] = halves
    return found


TRANSFERS = [
    (shape, times, lane, packed)
    for shape, several in {
        "32x32b": (1, 2, 64, 128), "16x64b": (1, 16, 64), "16x128b": (1, 16, 32),
        "16x256b": (1, 2, 16), "16x32bx2": (1, 4, 32, 64),
    }.items()
    for times in several
    for lane in ((0,) if shape == "32x32b" else (0, 16))
    for packed in (False, True)
    if cells(shape, times, packed)[..., 1].max() < WIDTH
]  # fmt: skip


def transfer_body(direction, shape, times, lane, packed):
    registers = OF_X1[shape][1] * times
    names = ", ".join(f"%w{i}" for i in range(registers))
    at = f"[%mine + {(lane << 16) + FIRST}]"
    modifier = {"ld": ".pack::16b", "st": ".unpack::16b"}[direction] if packed else ""
    opcode = f"tcgen05.{direction}.sync.aligned.{shape}.x{times}{modifier}.b32"
    split = f", {SPLIT}" if shape == "16x32bx2" else ""
    tensor = {"ld": "d", "st": "a"}[direction]
    body = [f".reg .b32 %w<{registers}>;", *transfer("st", "c", WIDTH)]
    base = [
        f"ld.param.u64 %base, [{tensor}];",
        f"mad.wide.u32 %base, %tid, {4 * registers}, %base;",
    ]
    words = [f"[%base + {4 * i}]" for i in range(registers)]
    if direction == "ld":
        body += [f"{opcode} {{{names}}}, {at}{split};", *base]
        body += [f"st.global.b32 {word}, %w{i};" for i, word in enumerate(words)]
        return [*body, "tcgen05.wait::ld.sync.aligned;"]
    body += [*base, *(f"ld.global.b32 %w{i}, {word};" for i, word in enumerate(words))]
    body += [f"{opcode} {at}{split}, {{{names}}};", "tcgen05.wait::st.sync.aligned;"]
    return [*body, *transfer("ld", "d", WIDTH)]


@pytest.mark.parametrize(("shape", "times", "lane", "packed"), TRANSFERS)
@pytest.mark.parametrize("direction", ["ld", "st"])
def test_transfer(direction, shape, times, lane, packed):
    reach = cells(shape, times, packed)
    rng = np.random.default_rng(7)
    before = rng.integers(0, 1 << 32, (LANES, WIDTH), dtype=np.uint32)
    given = rng.integers(0, 1 << 32, (LANES, reach.shape[1]), dtype=np.uint32)
    thread = np.arange(LANES)
    rows = 32 * (thread // 32)[:, None] + lane + reach[thread % 32, :, 0, 0]
    low, high = reach[thread % 32, :, 0, 1], reach[thread % 32, :, 1, 1]
    if direction == "ld":
        expected = before[rows, low]
        if packed:
            expected = expected & 0xFFFF | before[rows, high] << 16
    else:
        expected = before.copy()
        expected[rows, low] = given & 0xFFFF if packed else given
        if packed:
            expected[rows, high] = given >> 16
    found = np.zeros_like(expected)
    text = kernel("acd", transfer_body(direction, shape, times, lane, packed), 0)
    run(text, (1,), (LANES,), [In("a", given), In("c", before), Out("d", found)])
    np.testing.assert_array_equal(found, expected)


def test_undefined_values_pass_through():
    one = case(Product())
    text = one.text.replace("ld.global.b32 %v5, [%base + 20];", "")
    assert text != one.text
    with pytest.raises(Fault, match="undefined"):
        one.run(text)


# ---- What a program does wrong


def without(*pieces):
    return lambda text: [text := text.replace(piece, "") for piece in pieces][-1]


def instead(old, new, count=-1):
    return lambda text: text.replace(old, new, count)


ASKED_AGAIN = f"@%first {ALLOC} [where], 512;\n{RELINQUISH}"
DEALLOC = "@%first tcgen05.dealloc"
BUSY = "tcgen05.%s in line .* may still be %s"
FAULTS = {
    "no commit": (without(COMMIT), "wait for ever"),
    "no wait": (without(WAIT), f"{BUSY % ('mma', 'writing')}, with no wait for its tcgen05.commit"),
    "no proxy fence": (without(FENCE), "no fence.proxy.async between"),
    "no barrier": (without(READY), "no barrier between"),
    "no wait::st": (without("tcgen05.wait::st.sync.aligned;"), BUSY % ("st", "writing")),
    "no wait::ld": (without("tcgen05.wait::ld.sync.aligned;"), BUSY % ("ld", "reading")),
    "no dealloc": (instead(DEALLOC, "@!%p tcgen05.dealloc"), "512 columns of tensor memory are not"),
    "dealloc of less": (
        instead("b32 %taddr, 512;", "b32 %taddr, 256;"), "256 columns of an allocation of 512"
    ),
    "dealloc elsewhere": (
        instead(DEALLOC, f"add.u32 %taddr, %taddr, 32; {DEALLOC}"), "where no allocation begins"
    ),
    "used after dealloc": (
        instead("ret; }", "bar.sync 0; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v0}, [%mine]; ret; }"),
        "reads column 0 of tensor memory, which is not allocated",
    ),
    "too few columns": (instead("[where], 512", "[where], 24"), "24 columns, not a power of two"),
    "outside the allocation": (
        lambda text: text.replace("512;", "32;").replace("[%mine + 0], {", "[%mine + 1], {"),
        "which is not allocated",
    ),
    "by every thread": (instead("@%leads tcgen05.mma", "tcgen05.mma"), BUSY % ("mma", "writing")),
    "another warp's lanes": (instead("%warp, 21;", "%warp, 20;"), "warp . may access lanes"),
    "no room": (instead(RELINQUISH, ASKED_AGAIN), "everyone waits for ever"),
    "allocated without a permit": (
        instead(INIT, f"@%first {ALLOC} [where], 32; {INIT}"), "after tcgen05.relinquish_alloc_permit"
    ),
    "one lane's load": (instead("tcgen05.ld.sync", "@%leads tcgen05.ld.sync"), "is .aligned"),
    "no mbarrier": (without(INIT), "which is not initialised"),
    "written while it is read": (
        instead(COMMIT, f"{COMMIT}\n@%leads st.shared.b32 [smem], 0;"),
        "asynchronous, may still be reading",
    ),
}  # fmt: skip


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("what", FAULTS)
def test_fault(what, late):
    edit, sentence = FAULTS[what]
    one = case(Product())
    text = edit(one.text)
    assert text != one.text
    with pytest.raises(Fault, match=sentence):
        one.run(text, Machine(seed=5, late=late, most_silent=100_000))


# ---- Allocation


def test_more_columns_than_before():
    one = case(Product(n=8))
    text = one.text.replace("512", "32").replace(RELINQUISH, f"@%first {ALLOC} [where], 64;")
    with pytest.raises(Fault, match="allocates 64 columns after 32"):
        one.run(text)


def test_dealloc_lets_another_warp_allocate():
    again = (
        f"setp.eq.u32 %p, %warp, 1; @%p {ALLOC} [again], 512; @%p ld.shared.b32 %taddr, [again];"
    )
    again += "@%p tcgen05.dealloc.cta_group::1.sync.aligned.b32 %taddr, 512;"
    one = case(Product(n=8))
    text = one.text.replace(RELINQUISH, ".shared .align 4 .b32 again;")
    one.run(text.replace("ret; }", f"{again} ret; }}"))
    with pytest.raises(Fault, match="everyone waits for ever"):
        one.run(text.replace(dealloc(), again))


def test_allocations_begin_anywhere():
    store = "ld.param.u64 %base, [d]; @%leads st.global.b32 [%base], %taddr;"
    text = kernel("d", [store], 0, columns=64)
    found = np.zeros(1, np.uint32)
    addresses = set()
    for seed in range(20):
        run(text, (1,), (LANES,), [Out("d", found)], machine=Machine(seed=seed))
        addresses.add(int(found[0]))
    assert len(addresses) > 3
    assert all(address % 64 == 0 and address < COLUMNS for address in addresses)
