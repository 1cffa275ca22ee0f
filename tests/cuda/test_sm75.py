"""What is particular to the skinny kernels of sm_75, executed: float32 factors in parts of float16, and
tiles that come through registers. Faults planted there, and what they take.

``F16`` cases of test_shrink.py and its kin have the rest.
"""

from dataclasses import dataclass

import pytest
import torch
from on_machine import Fault, launched, needs_nvcc, planted
from ptx.plant import EVERY, change, drop
from skinny_cases import F16, F32, LAYOUTS, Case, bits, check, executed

from lorafast.reference import contract

pytestmark = needs_nvcc
ARCH = 75


def wide_ranging(matrix):
    """A float32 factor whose neighbours, along either dimension, differ by up to 2**60; others as they
    are."""
    if matrix.dtype != F32:
        return matrix
    rows, columns = (torch.arange(n) for n in matrix.shape)
    powers = (rows[:, None] * 7 + columns * 13) % 5 * 15 - 30
    return matrix * torch.exp2(powers.float())


def wide_ranging_in_one(matrix):
    """The same of one rank of ``lora_A``, whose neighbours are as they are."""
    if matrix.dtype != F32:
        return matrix
    of = torch.arange(matrix.shape[0]) == 3
    return torch.where(of[:, None], wide_ranging(matrix), matrix)


@dataclass(frozen=True)
class Sparse(Case):
    """x is 0 but for every fifth term of a sum: the largest of eight neighbours of the factor counts in
    some sums alone, in the others all bits of a small one do."""

    def tensors(self):
        given = super().tensors()
        along = 1 if self.operation == "shrink" else 0
        is_zero = torch.arange(given["large"].shape[along]) % 5 != 1
        given["large"] = given["large"].masked_fill(is_zero if along else is_zero[:, None], 0.0)
        return given


OPERATIONS = {
    "shrink": ("shrink", 70, 200),
    "shrink_backward": ("shrink_backward", 200, 70),
    "expand_backward": ("expand_backward", 130, 150),
}


@pytest.mark.parametrize("kind", [Case, Sparse])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("r", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_all_bits_of_a_factor_count(operation, r, kind):
    """Also of what is 2**60 times smaller than its neighbours, where those meet zeros: each element of
    the result, held to what float32 gives."""
    case = kind(*OPERATIONS[operation], r, F16, F32, arch=ARCH, lay_out=wide_ranging)
    found, given = check(case), case.tensors()
    exact = {name: tensor.double() for name, tensor in given.items()}
    ref64 = case.reference(exact)
    size64 = case.reference({name: tensor.abs() for name, tensor in exact.items()})
    for name, tensor in found.items():
        if tensor.dtype == F32:
            off = (tensor.double() - ref64[name]).abs() / size64[name].abs().clamp_min(1e-300)
            assert off.max() < 2.0**-20, name


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-126, 1.0, 2.0**96])
def test_any_exponent(scale):
    """One term a sum, of odd numbers of 24 bits, or of as many as a subnormal number has."""
    r, rows = 16, 40
    generator = torch.Generator().manual_seed(3)
    odd = torch.randint(1 << 22, 1 << 23, (r,), generator=generator) * 2 + 1
    A = torch.zeros(r, 24)
    A[:, 5] = (odd * 2.0**-23).float() * scale
    x = torch.zeros(rows, 24, dtype=F16)
    x[:, 5] = torch.exp2(torch.randint(-8, 8, (rows,), generator=generator).float())
    case = Case("shrink", rows, 24, r, F16, F32, arch=ARCH)
    with launched(ARCH, sms=case.sms):
        s = case.run(case.tensors() | {"large": x, "factor": A})["s"]
    assert s.equal(x.float() @ A.t())


def test_beyond_float16():
    """A factor and a result that float16 can't hold; x at the end of its range and below its normals."""
    case = Case("shrink", 40, 136, 12, F16, F32, arch=ARCH)
    given = case.tensors()
    given["factor"] *= 1e6
    given["large"][::2] = (given["large"][::2].sign() + 0.5).sign() * 65504
    given["large"][1::2] *= 2.0**-20
    with launched(ARCH, sms=case.sms):
        found = case.run(given)
    assert found["s"].abs().max() > 1e11
    assert contract.why_any_broken(found, case.bounds(given)) is None


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["large", "factor"])
def test_what_is_not_finite_is_where_it_belongs(special, where):
    case = Case("shrink", 70, 200, 20, F16, F32, arch=ARCH)
    given = case.tensors()
    given[where][3, 77] = special
    given["factor" if where == "large" else "large"][5, 77] = 0.0
    with launched(ARCH, sms=case.sms):
        found = case.run(given)
    assert contract.why_any_broken(found, case.bounds(given)) is None
    touched = found["s"][3] if where == "large" else found["s"][:, 3]
    assert not touched.isfinite().any()
    assert found["s"].isfinite().sum() == found["s"].numel() - touched.numel()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_long_sums(operation):
    """They are rounded to float32 after eight terms, in tiles apart."""
    sizes = {"shrink": (16, 9000), "shrink_backward": (9000, 24), "expand_backward": (3000, 24)}
    check(Case(operation, *sizes[operation], 8, F16, F32, arch=ARCH, sms=1))


# ---- Faults


def aligned(matrix):
    """Rows that are loaded 16 bytes at a time."""
    return LAYOUTS["rows with a gap"](matrix)


CASES = {  # the sums of each are shared by several CTAs, in two calls on the same counters
    "shrink": Case("shrink", 140, 900, 16, F16, F32, arch=ARCH, sms=4, lay_out=aligned),
    "dropout": Case("shrink", 140, 900, 16, F16, F32, 0.2, arch=ARCH, sms=4),
    "shrink_backward": Case("shrink_backward", 900, 140, 16, F16, F32, arch=ARCH, lay_out=aligned),
    "expand_backward": Case("expand_backward", 300, 530, 16, F16, F32, arch=ARCH),
    "float32": Case("shrink_backward", 900, 140, 16, F32, arch=ARCH),
    "sparse": Sparse("shrink", 70, 200, 16, F16, F32, arch=ARCH, lay_out=wide_ranging_in_one),
}
NO_BARRIER = change(r"bar\.red\.or\.pred\s+(%p\d+), 0, (%p\d+);", r"mov.pred \1, \2;")
NO_CARE = change(r"bar\.red\.or", "bar.red.and")
ONE_IS_ENOUGH = change(r"vote\.sync\.all", "vote.sync.any", EVERY)
SCALE_OF_ANOTHER = change(r"(ld\.shared\.v2\.f32\s+\{[^}]*\}, \[%r\d+)\+\d+\]", r"\1]")
EXCHANGED = change(r"(mma\.\S+ \{[^}]*\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2")
FAULTS = {
    "shrink": {
        "a tile is put where the last one is read": drop(r"bar\.sync", 0),
        "no barrier before a tile is read": NO_BARRIER,
        "the warps' sums are written over the tile": drop(r"bar\.sync", 1),
        "no barrier before the warps' sums are added": drop(r"bar\.sync", 2),
        "counted before all have stored": drop(r"bar\.sync", 3),
        "parts of sums are loaded before the count": drop(r"bar\.sync", 4),
        "a chunk of a tile stays where it is": drop(r"st\.shared\.v4", 0),
        "a product of a part is left out": drop(r"mma\.sync", 2),
        "the scale of other neighbours": SCALE_OF_ANOTHER,
        "fragments exchanged": EXCHANGED,
    },
    "dropout": {
        "no barrier before a tile is read": NO_BARRIER,
        "a tile is dropped where the last one is read": drop(r"bar\.sync", 0),
    },
    "shrink_backward": {
        "a tile is put where the last one is read": drop(r"bar\.sync", 0),
        "no barrier before a tile is read": NO_BARRIER,
        "counted before all have stored": drop(r"bar\.sync", 1),
        "parts of sums are loaded before the count": drop(r"bar\.sync", 2),
        "the scale of other neighbours": SCALE_OF_ANOTHER,
    },
    "expand_backward": {
        "no barrier before B and a tile are read": NO_BARRIER,
        "a tile is put, and sums are added, while others multiply": drop(r"bar\.sync", 0),
        "ds is counted before all have stored": drop(r"bar\.sync", 1),
        "parts of ds are loaded before the count": drop(r"bar\.sync", 2),
    },
    "float32": {
        "a tile is put where the last one is read": drop(r"bar\.sync", 0),
        "no barrier before a tile is read": NO_BARRIER,
    },
    "sparse": {
        "nobody hears that a factor isn't all in its parts": NO_CARE,
        "one lane's neighbours are taken for all": ONE_IS_ENOUGH,
    },
}


QUICK = ("dropout", "sparse")


def run(case, seed, edit=None):
    return executed(case, seed, 1 + seed % 5, times=2, edit=edit)[0]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(name, fault, marks=[] if name in QUICK else pytest.mark.slow)
        for name, faults in FAULTS.items()
        for fault in faults
    ],
)
def test_caught(name, fault):
    case, edit = CASES[name], planted("skinny_kernel", FAULTS[name][fault])
    right = run(case, 0)
    for seed in range(20):
        try:
            found = run(case, seed, edit)
        except (Fault, AssertionError):
            return
        if any(not bits(found[output]).equal(bits(right[output])) for output in right):
            return
    pytest.fail(f"{fault}: no schedule of twenty shows it")


# ---- Counts


def counted(operation, r, along, dtype=F16):
    """What a walk of so many terms takes: of one row block, or of one column block."""
    sizes = (64, along) if operation == "shrink" else (along, 128)
    given = Case(operation, *sizes, r, dtype, F32, arch=ARCH, sms=1, wants=("ds", "dB"))
    with launched(ARCH, resident=1, sms=1) as run:
        given.run(given.tensors())
    (ran,) = run.ran()
    return ran.counts


def total(counts, what, *opcodes):
    return sum(getattr(c, what) for c in counts if c.opcode.startswith(opcodes))


@pytest.mark.parametrize(
    ("operation", "r", "most"),
    [
        ("shrink", 16, 21), ("shrink", 64, 77), ("shrink_backward", 16, 19),
        ("shrink_backward", 64, 61), ("expand_backward", 16, 35),
    ],
)  # fmt: skip
def test_what_a_tile_takes(operation, r, most):
    """Instructions an element of a lane; three products of each part; no banks collide where fragments
    are read; x comes once, in whole sectors."""
    few, many = (counted(operation, r, along) for along in (1024, 2048))
    elements = (64 if operation == "shrink" else 128) * 1024

    def more(what, *opcodes):
        return total(many, what, *opcodes) - total(few, what, *opcodes)

    assert more("issued", "") * 32 / elements < most
    products = 2 if operation == "expand_backward" else 1
    multiplied = more("multiplies", "mma") / (3 * products * r * elements)
    assert 0.99 < multiplied <= 1  # the rest is added by fma
    reads = ("ldmatrix",)
    assert more("wavefronts", *reads) * 128 == more("bytes", *reads)
    of_x = more("sectors", "ld.global.nc.v4") if operation != "shrink" else elements * 2 / 32
    assert of_x * 32 == elements * 2
