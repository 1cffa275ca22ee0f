"""What an access costs: bytes, sectors of global memory, passes over the banks of shared memory."""

import numpy as np
import pytest

from ptx import InOut
from ptx.handwritten import kernel, launch, numbers


def cost(code, lanes=32, **inputs):
    text = kernel(
        f"{inputs.get('address', '')} setp.lt.u32 %p1, %tid, {lanes}; @%p1 {code}",
        "x",
        registers=".reg .b32 %v<9>;",
    )
    ran = launch(text, [InOut("x", numbers(1 << 15, np.uint8))], threads=32)
    (count,) = [c for c in ran.counts if c.opcode == code.split()[0]]
    return count


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("lanes", [32, 13, 1])
def test_sectors_of_global_memory(size, stride, lanes):
    vector = {
        1: "b8 %h1",
        2: "b16 %h1",
        4: "b32 %r1",
        8: "v2.b32 {%r1, %r2}",
        16: "v4.b32 {%r1, %r2, %r3, %r4}",
    }[size]
    count = cost(
        f"ld.global.{vector}, [%q1];",
        lanes,
        address=f"mad.wide.u32 %q1, %tid, {size * stride}, %x;",
    )
    touched = {(lane * size * stride + i) // 32 for lane in range(lanes) for i in range(size)}
    assert (count.issued, count.lanes, count.bytes, count.sectors, count.wavefronts) == (
        1,
        lanes,
        lanes * size,
        len(touched),
        0,
    )


def wavefronts(addresses, size):
    """128 bytes of requests at once; in each of them, as many as the fullest bank has words."""
    at_once = min(32, 128 // max(size, 4))
    passes = 0
    for first in range(0, 32, at_once):
        words = {
            a // 4 + i
            for a in addresses[first : first + at_once]
            if a is not None
            for i in range(max(size // 4, 1))
        }
        banks = [word % 32 for word in words]
        passes += max((banks.count(bank) for bank in banks), default=0)
    return passes


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stride", [0, 1, 2, 3, 8, 9, 32, 33])
@pytest.mark.parametrize("lanes", [32, 13])
def test_wavefronts_of_shared_memory(size, stride, lanes):
    vector = {
        1: "b8 {0}",
        2: "b16 {0}",
        4: "b32 {0}",
        8: "v2.b32 {{{0}, {0}}}",
        16: "v4.b32 {{{0}, {0}, {0}, {0}}}",
    }[size]
    kind, value = vector.format(5).split(" ", 1)
    address = f"mov.u32 %r1, smem; mad.lo.u32 %r1, %tid, {size * stride}, %r1;"
    if stride * size * 31 + size > 4096:
        stride = 7
        address = f"mov.u32 %r1, smem; mad.lo.u32 %r1, %tid, {size * stride}, %r1;"
    count = cost(f"st.shared.{kind} [%r1], {value};", lanes, address=address)
    expected = wavefronts(
        [lane * size * stride if lane < lanes else None for lane in range(32)], size
    )
    assert (count.bytes, count.wavefronts, count.sectors) == (lanes * size, expected, 0)


def test_generic_addresses_count_where_they_lead():
    address = """mov.u64 %q2, smem; cvta.shared.u64 %q2, %q2;
        mad.wide.u32 %q1, %tid, 32, %x; mad.wide.u32 %q2, %tid, 8, %q2;
        and.b32 %r1, %tid, 1; setp.eq.u32 %p2, %r1, 0; selp.b64 %q1, %q1, %q2, %p2;"""
    count = cost("st.u32 [%q1], 5;", address=address)
    # Even lanes are in global memory, a sector each; odd ones in shared, two words in eight banks.
    assert (count.bytes, count.sectors, count.wavefronts) == (128, 16, 2)
