"""The machine is itself tested: faults planted in real kernels' PTX, each of which it must catch.

A fault is caught by a `Fault` of the machine, or by a result that isn't the unedited kernel's. It may
take several schedules, which are tried in turn. The unedited kernel passes in all that are tried of it.
"""

import functools

import pytest

pytest.importorskip("triton")

import triton
from lorafast.kernels.common.launch import INTERPRETED

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx import Fault, Machine
from ptx.build import BUILD
from ptx.faults import FAULTS
from ptx.nvcc import why_no_nvcc
from ptx.plant import NotPlantedError, Planted, after, before, change, delay, drop, hoist
from ptx.test_kernels import RESIDENT, same_bits

pytestmark = pytest.mark.executed

SCHEDULES = 20
UNEDITED = 5
"""Schedules in which a kernel must pass as it is."""
MOST_SILENT = 100_000
"""Steps in which nothing changes: more than a whole launch here takes, unless it hangs."""
QUICKLY = "linear_expand, sm_90"
"""The kernel whose faults ``make test`` plants. The machine changes seldom: the others' can wait."""
CAUGHT = BUILD / "planted"
"""A line for each fault, by its number: workers of one run write them."""

needs_this_compiler = pytest.mark.skipif(
    triton.__version__ != "3.9.0", reason="faults are planted in the PTX of Triton 3.9"
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Who hangs is found after fewer steps than a machine takes by itself."""
    made = functools.partialmethod(Machine.__init__, most_silent=MOST_SILENT)
    monkeypatch.setattr(Machine, "__init__", made)


@pytest.fixture(scope="module")
def table():
    """Prints how each fault was caught, and writes it to ``build/ptx/planted.txt``."""
    CAUGHT.mkdir(parents=True, exist_ok=True)
    yield
    lines = [path.read_text() for path in map(place, range(len(FAULTS))) if path.exists()]
    text = "".join(lines)
    (BUILD / "planted.txt").write_text(text)
    print(f"\n{text}{len(lines)} of {len(FAULTS)} planted faults are caught")


def place(number):
    return CAUGHT / f"{number}.txt"


@functools.cache
def unedited(subject):
    """The result that every schedule gives, and that keeps the contract."""
    found = [subject.run(None, seed, RESIDENT[seed % len(RESIDENT)]) for seed in range(UNEDITED)]
    assert all(same_bits(one, found[0]) for one in found), "schedules differ"
    subject.agrees(found[0])
    return found[0]


def caught(subject, edit):
    """How, and after how many schedules; None if all of them pass."""
    right = unedited(subject)
    for seed in range(SCHEDULES):
        try:
            found = subject.run(edit, seed, RESIDENT[seed % len(RESIDENT)])
        except Fault as fault:
            return str(fault).splitlines()[0], seed + 1
        except AssertionError:
            return "wrong result", seed + 1
        if not same_bits(found, right):
            return "wrong result", seed + 1
    return None


@needs_this_compiler
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number, marks=[pytest.mark.slow] * (fault.subject.name != QUICKLY), id=str(fault)
        )
        for number, fault in enumerate(FAULTS)
    ],
)
def test_is_caught(number, table):
    fault = FAULTS[number]
    if "CUDA" in fault.subject.name and why_no_nvcc():
        pytest.skip(why_no_nvcc())
    place(number).unlink(missing_ok=True)
    edit = Planted(fault.subject.kernel, fault.edits)
    how = caught(fault.subject, edit)
    assert edit.changes, "no launch runs the kernel that it is planted in"
    done = "; ".join(map(str, edit.changes))
    assert how is not None, f"no schedule of {SCHEDULES} shows it: {done}"
    schedules = f"{how[1]} schedule{'s' * (how[1] > 1)}"
    place(number).write_text(f"{fault} | {how[0]} | {schedules}\n")


# ---- How faults are planted

PTX = """\
.visible .entry other() {
    bar.sync 0;
    ret;
}
.visible .entry kernel(
    .param .u64 kernel_param_0
)
{
    .reg .b32 %r<4>;
    mov.u32 %r1, %tid.x; // bar.sync 7
    // bar.sync 8;
    {
    .reg .pred p;
    bar.sync 1;
}
    st.shared.b32 [%r1], %r2;
    bar.sync 2;
    ret;
}
.visible .entry last() {
    bar.sync 3;
}
"""


def edited(*edits):
    """Lines of the text before and after, where they differ."""
    planted = Planted("kernel", edits)
    both = zip(PTX.splitlines(), planted(PTX).splitlines(), strict=True)
    assert planted.changes
    return [pair for pair in both if pair[0] != pair[1]]


def test_a_statement_is_dropped():
    assert edited(drop("bar")) == [("    bar.sync 1;", "")]
    assert edited(drop("bar", 1)) == edited(drop("bar", -1)) == [("    bar.sync 2;", "")]
    assert edited(drop("bar", None)) == [("    bar.sync 1;", ""), ("    bar.sync 2;", "")]


def test_a_statement_is_changed_once():
    assert edited(change(r"%r(\d)", r"%r3\1")) == [
        ("    mov.u32 %r1, %tid.x; // bar.sync 7", "mov.u32 %r31, %tid.x;")
    ]


def test_places_are_found_from_others():
    assert edited(after("st", drop("bar"))) == [("    bar.sync 2;", "")]
    assert edited(before("st", drop("bar", -1))) == [("    bar.sync 1;", "")]


def test_a_statement_is_moved():
    store = "    st.shared.b32 [%r1], %r2;"
    assert edited(hoist("st", "bar")) == [
        ("    bar.sync 1;", "st.shared.b32 [%r1], %r2; bar.sync 1;"), (store, ""),
    ]  # fmt: skip
    assert edited(delay("st", "bar", 1)) == [
        (store, ""), ("    bar.sync 2;", "bar.sync 2; st.shared.b32 [%r1], %r2;"),
    ]  # fmt: skip
    two = "    bar.sync 1;", ""
    assert edited(delay("bar", "st")) == [two, (store, "st.shared.b32 [%r1], %r2; bar.sync 1;")]


@pytest.mark.parametrize(
    "edit",
    [
        drop("wait"),
        drop("bar", 2),
        drop("bar", -3),
        drop("wait", None),
        drop("sync 7"),
        drop("reg"),
        change("bar", "bar"),
        hoist("ret", "wait"),
        hoist("mov", "bar"),
        delay("ret", "bar"),
        after("ret", drop("bar")),
    ],
    ids=range(11),
)
def test_what_is_not_there_is_not_planted(edit):
    with pytest.raises(NotPlantedError):
        edited(edit)


def test_other_kernels_are_left_alone():
    planted = Planted("another", (drop("bar"),))
    assert planted(PTX) == PTX
    assert not planted.changes
