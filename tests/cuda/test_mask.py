"""csrc/cuda/mask.cu, executed: every bit is that of ``lorafast.reference.keep_mask``."""

import struct

import numpy as np
import pytest
import torch
from launchers import CSRC, ptx_of
from on_machine import launched, needs_nvcc, planted
from ptx.launch import Fault, In, Machine, Out, Program
from ptx.plant import after, change, drop

from lorafast.backends.cuda.mask import mask
from lorafast.reference import keep_mask, philox_4x32

pytestmark = needs_nvcc


def packed(keep):
    """Little-endian: bit j of a byte is column 8·byte + j."""
    return torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))


def made(M, K, threshold=6554, seed=77 << 33, arch=90, **options):
    seed = torch.tensor([seed])
    with launched(arch, **options) as run:
        bits = mask(seed, threshold, M, K)
    return bits, packed(keep_mask(M, K, threshold / 65536, seed)), run


@pytest.mark.parametrize("K", range(1, 18))
def test_every_width(K):
    bits, expected, _ = made(37, K)
    assert bits.equal(expected)


@pytest.mark.parametrize(
    "arch", [75, 80, 90, *(pytest.param(n, marks=pytest.mark.slow) for n in (86, 89, 100, 120))]
)
def test_every_architecture(arch):
    bits, expected, _ = made(61, 603, arch=arch)  # more than one CTA
    assert bits.equal(expected)


@pytest.mark.parametrize("seed", [0, -1, 1 << 32, -(1 << 63), (1 << 63) - 1])
def test_seeds(seed):
    bits, expected, _ = made(9, 77, seed=seed)
    assert bits.equal(expected)


@pytest.mark.parametrize("threshold", [0, 1, 32768, 65535, 65536])
def test_thresholds(threshold):
    bits, expected, _ = made(9, 77, threshold)
    assert bits.equal(expected)


@pytest.mark.parametrize(("M", "K"), [(0, 9), (1, 1), (5, 0), (4097, 4), (1, 33_000)])
def test_sizes(M, K):
    bits, expected, run = made(M, K)
    assert bits.shape == (M, -(-K // 8))
    assert bits.equal(expected)
    assert len(run.launches) == (bits.numel() > 0)


@pytest.mark.parametrize("seed", range(5))
def test_schedules(seed):
    assert made(300, 130, seed=5)[0].equal(_by_schedule(seed))


def _by_schedule(seed):
    one = torch.tensor([5])
    with launched(80, seed=seed, resident=(1, 2, 4)[seed % 3]):
        return mask(one, 6554, 300, 130)


def test_counters_beyond_32_bits():
    """The bytes from 2**32 on of a mask that has more: nothing before them is there."""
    text = ptx_of(CSRC / "mask.cu", 80)
    program_text = change_ctaid(text)
    (name,) = (line.split()[2].rstrip("(") for line in text.splitlines() if ".entry" in line)
    first, count, groups = (1 << 20) * 4096, 5000, 1_003
    seed, bits = torch.tensor([-9]), torch.zeros(count, dtype=torch.uint8)
    machine = Machine(seed=1)
    at = machine.region(Out("bits", bits)) - first
    parameters = struct.pack(
        "<QqifQqqi4x", machine.region(In("seed", seed)), groups, 6554, 1.0, at, first + count,
        4096 // 4 % groups, 0x1F,
    )  # fmt: skip
    machine.start(Program.from_text(program_text, name), (2,), (256,), parameters)
    assert machine.unwritten(Out("bits", bits)) is None
    index = first + torch.arange(count)
    zero = torch.zeros((), dtype=torch.int64)
    words = philox_4x32(
        (index & 0xFFFFFFFF, index >> 32, zero, zero),
        (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF),
    )
    halves = torch.stack([h for w in words for h in (w & 0xFFFF, w >> 16)], -1) >= 6554
    expected = packed(halves)[:, 0]
    expected[index % groups == groups - 1] &= 0x1F
    assert (index % groups == groups - 1).sum() == 5
    assert bits.equal(expected)


def change_ctaid(text):
    """CTA 0 is number 2**20."""
    edited = text.replace(", %ctaid.x;", ", %ctaid.x; add.u32 REGISTER, REGISTER, 1048576;")
    lines = []
    for line in edited.splitlines():
        if "REGISTER" in line:
            line = line.replace("REGISTER", line.split()[1].rstrip(","))
        lines.append(line)
    assert edited != text
    return "\n".join(lines)


def test_what_it_takes():
    """A store of four bytes a thread, whole sectors; no remainder where K is a multiple of 8."""
    _, _, run = made(64, 2048)
    (ran,) = run.ran()
    stores = [c for c in ran.counts if c.opcode.startswith("st.global")]
    assert sum(c.bytes for c in stores) == 64 * 2048 // 8 == 32 * sum(c.sectors for c in stores)
    assert ran.issued("rem") == 0
    assert ran.issued("mul.wide.u32") <= 64 * 2048 // 8 / 32 * 15
    assert ran.steps / (64 * 2048 // 8 / 32) < 120  # instructions of a lane for 8 elements


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((65537, 8), "threshold is 65537"),
        ((5, -1), "K is -1"),
        ((5, 17), "no contiguous matrix of 3 columns"),
    ],
)
def test_errors(arguments, said):
    bits = torch.zeros(4, 2, dtype=torch.uint8)
    with launched(90), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.mask(torch.tensor([1]), *arguments, bits)


FAULTS = {
    "a word beyond the last byte": after(r"setp\.gt\.s64", drop(r"@%p\d+ bra")),
    "bits beyond K": change(r"setp\.eq\.s64", "setp.ne.s64", 1),
    "the place in a row isn't carried on": change(r"add\.s64", "sub.s64", -2),
    "the next word is this one again": change(r"add\.s64 (.*), 1024", r"add.s64 \1, 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted(name):
    def hold_it(edit=None):
        bits, expected, _ = made(97, 597, edit=edit)
        assert bits.equal(expected)

    hold_it()
    with pytest.raises((Fault, AssertionError)):
        hold_it(planted("mask_kernel", FAULTS[name]))
