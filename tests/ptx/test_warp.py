"""Instructions of a warp's lanes together, against loops over lanes; lanes that have parted; faults."""

import numpy as np
import pytest

from ptx.launch import Fault, Machine, UnknownInstruction
from ptx.snippets import evaluate

FULL = 0xFFFF_FFFF
LANE = np.arange(32, dtype=np.uint32)
WORD = {"d": np.uint32}
BOTH = {"d": np.uint32, "p": bool}


def warps(array):
    return array.reshape(-1, 32)


def bits_of(lanes):
    return sum(1 << int(lane) for lane in lanes)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def words(random, threads=256, high=1 << 32):
    return random.integers(0, high, threads, np.uint32)


# ---- shfl


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_within_segments(mode, width, random):
    """As __shfl_sync and its kin are defined: a lane whose source is elsewhere keeps its own."""
    a, by = words(random), words(random, high=32)
    last = 0 if mode == "up" else 31
    code = f"shfl.sync.{mode}.b32 %d|%p, %a, %b, {32 - width << 8 | last}, {FULL};"
    found = evaluate(code, BOTH, a=a, b=by)
    for values, moves, d, p in zip(*map(warps, (a, by, found["d"], found["p"])), strict=True):
        for lane in range(32):
            segment = range(lane - lane % width, lane - lane % width + width)
            move = int(moves[lane])
            source = {
                "up": lane - move,
                "down": lane + move,
                "bfly": lane ^ move,
                "idx": segment.start + move % width,
            }[mode]
            # A butterfly may reach back into an earlier segment.
            inside = source < segment.stop if mode == "bfly" else source in segment
            assert (d[lane], p[lane]) == (values[source if inside else lane], inside)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_with_any_clamp(mode, random):
    """The clamp is c's bits 0-4 and the segment's mask bits 8-12, of each lane."""
    a, b, c = words(random, 1024), words(random, 1024), words(random, 1024)
    found = evaluate(f"shfl.sync.{mode}.b32 %d|%p, %a, %b, %c, {FULL};", BOTH, a=a, b=b, c=c)
    rows = zip(*map(warps, (a, b, c, found["d"], found["p"])), strict=True)
    for values, moves, clamps, d, p in rows:
        for lane in range(32):
            move, clamp, mask = (int(moves[lane]) % 32, int(clamps[lane]) % 32,
                                 int(clamps[lane]) >> 8 & 31)  # fmt: skip
            # The bits of the mask are the lane's own, the others go from 0 to the clamp's.
            least = sum(lane & 1 << i for i in range(5) if mask >> i & 1)
            most = least + sum(clamp & 1 << i for i in range(5) if not mask >> i & 1)
            rest = sum(move & 1 << i for i in range(5) if not mask >> i & 1)
            source = {
                "up": lane - move,
                "down": lane + move,
                "bfly": lane ^ move,
                "idx": least + rest,
            }[mode]
            inside = source >= most if mode == "up" else source <= most
            assert (d[lane], p[lane]) == (values[source if inside else lane], inside)


def test_a_shuffle_into_its_own_source():
    found = evaluate(f"mov.b32 %d, %a; shfl.sync.bfly.b32 %d, %d, 1, 31, {FULL};", WORD, a=LANE)
    assert (found["d"] == LANE ^ 1).all()


def test_a_shuffle_without_a_value():
    code = f"shfl.sync.down.b32 _|%p, %a, 4, 31, {FULL};"
    assert (evaluate(code, {"p": bool}, a=LANE)["p"] == (LANE < 28)).all()


def test_what_a_lane_outside_the_mask_has_is_undefined():
    """Lanes 0 to 15 are together; each reads the next one's, and lane 15 what nobody gives."""
    code = "@%h shfl.sync.down.b32 %d, %a, 1, 31, 0xffff; @!%h mov.b32 %d, %a; {}mov.b32 %d, %a;"
    near = LANE < 16
    found = evaluate(code.format("@%q "), WORD, a=LANE, h=near, q=LANE == 15)["d"]
    assert (found == np.where(LANE < 15, LANE + 1, LANE)).all()
    with pytest.raises(Fault, match=r"thread \(15, 0, 0\).*undefined"):
        evaluate(code.format("@%q "), WORD, a=LANE, h=near, q=LANE == 31)


def test_what_a_lane_that_has_ended_has_is_undefined():
    code = f"shfl.sync.down.b32 %d, %a, 1, 31, {FULL}; @%q mov.b32 %d, %a;"
    threads = LANE[:20]
    found = evaluate(code, WORD, a=threads, q=threads == 19)["d"]
    assert (found == np.minimum(threads + 1, 19)).all()
    with pytest.raises(Fault, match=r"thread \(19, 0, 0\).*undefined"):
        evaluate(code, WORD, a=threads, q=threads == 99)


def test_a_shuffle_moves_what_is_undefined():
    """Lane 3 has no value: who reads it has none, and it reads another's."""
    code = f"@%p mov.b32 %u, %a; shfl.sync.bfly.b32 %d, %u, 1, 31, {FULL}; @%q mov.b32 %d, %a;"
    inputs = {"a": LANE, "p": LANE != 3}
    registers = ".reg .b32 %u;"
    found = evaluate(code, WORD, registers=registers, q=LANE == 2, **inputs)["d"]
    assert (found == np.where(LANE == 2, 2, LANE ^ 1)).all()
    with pytest.raises(Fault, match=r"thread \(2, 0, 0\).*undefined"):
        evaluate(code, WORD, registers=registers, q=LANE == 3, **inputs)


# ---- Lanes that have parted

BRANCHES = """
    @%p bra OTHER;
    {0}
    bra.uni TOGETHER;
OTHER:
    {1}
TOGETHER:
"""


@pytest.mark.parametrize("seed", range(5))
def test_lanes_in_two_branches_shuffle_apart(seed, random):
    a, p = words(random, 32), LANE % 3 == 0
    masks = [bits_of(np.flatnonzero(~p)), bits_of(np.flatnonzero(p))]
    # Each goes around its own: to the next lane of the branch.
    following = np.array(
        [min((x for x in LANE if p[x] == p[n] and x > n), default=n) for n in LANE]
    )
    code = BRANCHES.format(*(f"shfl.sync.idx.b32 %d, %a, %b, 31, {mask};" for mask in masks))
    inputs = {"a": a, "b": following.astype(np.uint32), "p": p}
    assert (evaluate(code, WORD, machine=Machine(seed), **inputs)["d"] == a[following]).all()


@pytest.mark.parametrize("seed", range(5))
def test_lanes_wait_for_those_of_their_mask(seed):
    """Lane n comes after n rounds of a loop."""
    code = f"""
        mov.b32 %i, 0;
    ROUND:
        setp.eq.u32 %q, %i, %a;
        @%q bra COME;
        add.u32 %i, %i, 1;
        bra ROUND;
    COME:
        shfl.sync.bfly.b32 %d, %i, 31, 31, {FULL};
    """
    registers = ".reg .b32 %i; .reg .pred %q;"
    found = evaluate(code, WORD, registers=registers, machine=Machine(seed), a=LANE)["d"]
    assert (found == 31 - LANE).all()


@pytest.mark.parametrize("seed", range(5))
def test_several_masks_at_one_place(seed, random):
    """Lanes with one remainder by 5 are together, converged and not."""
    a = words(random, 32, 100)
    groups = [np.flatnonzero(np.equal(LANE % 5, lane % 5)) for lane in LANE]
    m = np.array([bits_of(g) for g in groups], np.uint32)
    sums = np.array([a[g].sum() for g in groups])
    for late in (LANE < 0, LANE == 7, LANE % 2 == 0):
        code = BRANCHES.format("", "mov.b32 %d, 0;") + "redux.sync.add.u32 %d, %a, %m;"
        found = evaluate(code, WORD, machine=Machine(seed), a=a, m=m, p=late)["d"]
        assert (found == sums).all()


def test_a_group_goes_on_without_another_that_waits():
    """Lane 31 comes, at another place, only after lanes 0 to 15 have told it that they passed."""
    code = """
        @%q st.shared.b32 [smem], %z;
        bar.warp.sync 0xffffffff;
        @%p bra LAST;
        bar.warp.sync %m;
        @%q st.shared.b32 [smem], %a;
        bra.uni END;
    LAST:
        ld.volatile.shared.b32 %d, [smem];
        setp.ne.u32 %r, %d, 77;
        @%r bra LAST;
        bar.warp.sync %m;
    END:
        mov.b32 %d, %a;
    """
    m = np.where(LANE < 16, 0xFFFF, 0xFFFF_0000).astype(np.uint32)
    inputs = {"a": np.full(32, 77, np.uint32), "z": LANE * 0, "m": m, "p": LANE == 31}
    found = evaluate(code, WORD, registers=".reg .pred %r;", shared=16, q=LANE == 0, **inputs)["d"]
    assert (found == 77).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_barrier_of_the_warp_in_two_branches(seed):
    """Both pass, and are together at what follows."""
    code = BRANCHES.format(*[f"bar.warp.sync {FULL};"] * 2) + f"redux.sync.add.u32 %d, %a, {FULL};"
    found = evaluate(code, WORD, machine=Machine(seed), a=LANE, p=LANE % 3 == 0)["d"]
    assert (found == LANE.sum()).all()


def test_a_lane_whose_guard_is_false_does_not_come():
    """It goes on and ends, and the others do without it."""
    p = LANE % 2 == 0
    code = f"mov.b32 %d, 0; @%p vote.sync.ballot.b32 %d, 1, {FULL};"
    assert (evaluate(code, WORD, p=p)["d"] == np.where(p, 0x5555_5555, 0)).all()


def test_lanes_that_wait_at_two_places_for_each_other():
    code = f"@%p redux.sync.add.u32 %d, %a, {FULL};\n@!%p redux.sync.add.u32 %d, %a, {FULL};"
    with pytest.raises(Fault, match=r"waits for ever\n.*16 threads at .*redux"):
        evaluate(code, WORD, a=LANE, p=LANE < 16)


# ---- vote, activemask


@pytest.mark.parametrize("negated", ["", "!"])
@pytest.mark.parametrize("mode", ["all", "any", "uni"])
def test_votes(mode, negated, random):
    p = np.concatenate([np.full(32, True), np.full(32, False), random.random(192) < 0.5, LANE != 5])
    code = f"vote.sync.{mode}.pred %d, {negated}%p, {FULL};"
    found = warps(evaluate(code, {"d": bool}, p=p)["d"])
    for votes, results in zip(warps(p != bool(negated)), found, strict=True):
        assert (results == {"all": votes.all(), "any": votes.any(),
                            "uni": votes.all() or not votes.any()}[mode]).all()  # fmt: skip


@pytest.mark.parametrize("negated", ["", "!"])
def test_ballots_of_groups(negated, random):
    p = random.random(32) < 0.5
    m = np.where(LANE < 8, 0xFF, 0xFFFF_FF00).astype(np.uint32)
    found = evaluate(f"vote.sync.ballot.b32 %d, {negated}%p, %m;", WORD, p=p, m=m)["d"]
    assert (found == (bits_of(np.flatnonzero(p != bool(negated))) & m)).all()


@pytest.mark.parametrize(
    ("mode", "vote", "decided"),
    [("all", False, True), ("all", True, False), ("any", True, True), ("any", False, False)],
)
def test_an_undefined_vote_counts_unless_others_decide(mode, vote, decided):
    code = f"@%q setp.ne.u32 %u, %v, 0; vote.sync.{mode}.pred %d, %u, {FULL};"
    inputs = {"q": LANE != 9, "v": np.full(32, vote, np.uint32)}
    if decided:
        found = evaluate(code, {"d": bool}, registers=".reg .pred %u;", **inputs)["d"]
        assert (found == vote).all()
    else:
        with pytest.raises(Fault, match="undefined"):
            evaluate(code, {"d": bool}, registers=".reg .pred %u;", **inputs)


def test_the_lanes_of_a_branch_are_active():
    p = LANE % 3 == 0
    code = BRANCHES.format("activemask.b32 %d;", "activemask.b32 %d;")
    found = evaluate(code, WORD, p=p)["d"]
    assert (found == np.where(p, bits_of(LANE[p]), bits_of(LANE[~p]))).all()
    found = evaluate("mov.b32 %d, 1; @%p activemask.b32 %d;", WORD, p=p)["d"]
    assert (found == np.where(p, bits_of(LANE[p]), 1)).all()


# ---- match


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
@pytest.mark.parametrize("mode", ["any", "all"])
def test_matches(mode, kind, random):
    few = random.integers(0, 3, 224).astype(kind)
    # Numbers of 64 bits that differ in their upper half alone.
    few = few << kind(40) if kind == np.uint64 else few
    a = np.concatenate([few, np.full(32, 7, kind)])
    bits = 8 * np.dtype(kind).itemsize
    if mode == "any":
        found = evaluate(f"match.any.sync.b{bits} %d, %a, {FULL};", WORD, a=a)
    else:
        found = evaluate(f"match.all.sync.b{bits} %d|%p, %a, {FULL};", BOTH, a=a)
    for values, d in zip(warps(a), warps(found["d"]), strict=True):
        for lane in range(32):
            equal = bits_of(np.flatnonzero(values == values[lane]))
            assert d[lane] == (equal if mode == "any" or equal == FULL else 0)
    if mode == "all":
        assert (found["p"] == (found["d"] == FULL)).all()


def test_matches_of_groups():
    m = np.where(LANE < 8, 0xFF, 0xFFFF_FF00).astype(np.uint32)
    code = "match.all.sync.b32 %d|%p, %a, %m;"
    found = evaluate(code, BOTH, a=np.where(LANE == 9, 1, 0).astype(np.uint32), m=m)
    assert (found["d"] == np.where(LANE < 8, 0xFF, 0)).all()
    assert (found["p"] == (LANE < 8)).all()


# ---- redux


@pytest.mark.parametrize(
    ("operation", "kind", "plain"),
    [
        ("add.u32", np.uint32, lambda x: sum(x) % 2**32),
        ("add.s32", np.int32, lambda x: (sum(x) + 2**31) % 2**32 - 2**31),
        ("min.u32", np.uint32, min),
        ("max.u32", np.uint32, max),
        ("min.s32", np.int32, min),
        ("max.s32", np.int32, max),
        ("and.b32", np.uint32, lambda x: bits_of(i for i in range(32) if all(v >> i & 1 for v in x))),
        ("or.b32", np.uint32, lambda x: bits_of(i for i in range(32) if any(v >> i & 1 for v in x))),
        ("xor.b32", np.uint32, lambda x: bits_of(i for i in range(32) if sum(v >> i for v in x) % 2)),
    ],
)  # fmt: skip
def test_reductions(operation, kind, plain, random):
    a = words(random, 64)
    if operation[:2] in ("an", "or"):  # so that some bits are left, and some not
        mask = np.uint32(0xF0F0_1234)
        a = a | mask if operation == "and.b32" else a & mask
    m = np.where(LANE % 4 == 0, 0x1111_1111, 0xEEEE_EEEE).astype(np.uint32)
    m = np.concatenate([np.full(32, FULL, np.uint32), m])
    a = a.view(kind)
    found = evaluate(f"redux.sync.{operation} %d, %a, %m;", {"d": kind}, a=a, m=m)["d"]
    for values, masks, results in zip(*map(warps, (a, m, found)), strict=True):
        for lane in range(32):
            assert results[lane] == plain([int(values[n]) for n in LANE if masks[lane] >> n & 1])


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("modifiers", "values", "least", "most"),
    [
        ("", (1.0, -2.0, 3.0), -2.0, 3.0),
        ("", (-1.0, -2.0, -0.5), -2.0, -0.5),
        ("", (0.0, -0.0), -0.0, 0.0),
        ("", (-INF, NAN, 2.0), -INF, 2.0),
        (".NaN", (-INF, NAN, 2.0), NAN, NAN),
        (".NaN", (-1.0, INF, 2.0), -1.0, INF),
        ("", (NAN, -NAN), NAN, NAN),
        (".abs", (1.0, -2.0, -0.5), 0.5, 2.0),
        (".abs", (-0.0, -0.0), 0.0, 0.0),
        (".abs.NaN", (-1.0, NAN), NAN, NAN),
    ],
)
@pytest.mark.parametrize("first", [0, 9])
def test_reductions_of_floats(modifiers, values, least, most, first):
    a = np.roll(np.resize(np.float32(values), 32), first)
    code = f"redux.sync.min{modifiers}.f32 %d, %a, {FULL}; redux.sync.max{modifiers}.f32 %e, %a, {FULL};"
    found = evaluate(code, {"d": np.float32, "e": np.float32}, a=a)
    for name, want in (("d", least), ("e", most)):
        bits = 0x7FFF_FFFF if np.isnan(want) else np.float32(want).view(np.uint32)
        assert (found[name].view(np.uint32) == bits).all()


# ---- elect, bar.warp, nanosleep, brkpt


@pytest.mark.parametrize("threads", [32, 20, 64])
def test_one_lane_is_elected(threads):
    lane = np.arange(threads, dtype=np.uint32) % 32
    found = evaluate(f"elect.sync %d|%p, {FULL};", BOTH, a=lane)
    assert (found["d"] == 0).all()
    assert (found["p"] == (lane == 0)).all()


def test_a_leader_of_each_group():
    m = np.where(LANE % 4 == 3, 0x8888_8888, 0x7777_7777).astype(np.uint32)
    found = evaluate("elect.sync %d|%p, %m;", BOTH, m=m)
    assert (found["d"] == np.where(LANE % 4 == 3, 3, 0)).all()
    assert (found["p"] == np.isin(LANE, (0, 3))).all()
    found = evaluate("elect.sync _|%p, %m;", {"p": bool}, m=m)
    assert (found["p"] == np.isin(LANE, (0, 3))).all()


EXCHANGE = """
    mov.u32 %s, smem;
    add.u32 %t, %s, %b;
    add.u32 %s, %s, %a;
    st.shared.b32 [%s], %a;
    {}
    ld.shared.b32 %d, [%t];
"""


@pytest.mark.parametrize("barrier", [f"bar.warp.sync {FULL};", "bar.warp.sync %m;", ""])
def test_lanes_see_each_others_stores_after_a_barrier_of_the_warp(barrier):
    """The lanes of %m are the first and the last sixteen, and each reads from its own half."""
    registers = ".reg .b32 %s, %t;"
    m = np.where(LANE < 16, 0xFFFF, 0xFFFF_0000).astype(np.uint32)
    inputs = {"a": 4 * LANE, "b": 4 * (LANE ^ 1), "m": m}
    code = EXCHANGE.format(barrier)
    if not barrier:
        with pytest.raises(Fault, match="shared memory"):
            evaluate(code, WORD, registers=registers, shared=128, **inputs)
        return
    found = evaluate(code, WORD, registers=registers, shared=128, **inputs)["d"]
    assert (found == inputs["b"]).all()


def test_a_shuffle_is_no_barrier():
    code = EXCHANGE.format(f"shfl.sync.idx.b32 %d, %a, 0, 31, {FULL};")
    inputs = {"a": 4 * LANE, "b": 4 * (LANE ^ 1)}
    with pytest.raises(Fault, match="shared memory"):
        evaluate(code, WORD, registers=".reg .b32 %s, %t;", shared=128, **inputs)


def test_nothing_happens():
    code = "nanosleep.u32 100; nanosleep.u32 %a; brkpt; mov.b32 %d, %a;"
    assert (evaluate(code, WORD, a=LANE)["d"] == LANE).all()


# ---- Faults

TOGETHER = [
    "shfl.sync.idx.b32 %d, %a, 0, 31, {};",
    "vote.sync.any.pred %q, %p, {};",
    "vote.sync.ballot.b32 %d, %p, {};",
    "match.any.sync.b32 %d, %a, {};",
    "redux.sync.add.u32 %d, %a, {};",
    "elect.sync %d|%q, {};",
    "bar.warp.sync {};",
]
REGISTERS = ".reg .pred %q; .reg .b32 %u;"


def fault(code):
    code += " mov.b32 %d, %a;"
    return evaluate(code, WORD, registers=REGISTERS, a=LANE, p=LANE < 16)


@pytest.mark.parametrize("code", TOGETHER)
def test_a_lane_must_be_in_its_mask(code):
    with pytest.raises(Fault, match=r"thread \(16, 0, 0\).* is not in its membermask 0xffff\b"):
        fault(code.format("0xffff"))


@pytest.mark.parametrize("code", TOGETHER)
def test_a_mask_must_be_defined(code):
    with pytest.raises(Fault, match="undefined value for a membermask"):
        fault(code.format("%u"))


@pytest.mark.parametrize("code", TOGETHER)
def test_lanes_of_a_mask_must_have_the_same(code):
    code = f"mov.b32 %u, 0xffffffff; @%p mov.b32 %u, 0xffff; {code.format('%u')}"
    with pytest.raises(Fault, match="lane 0, which is in it, has 0xffff"):
        fault(code)


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.idx.b32 %d, %a, 0, 31",
        "shfl.sync.b32 %d, %a, 0, 31, -1",
        "shfl.sync.idx.b64 %d, %a, 0, 31, -1",
        "shfl.sync.idx.b32 %d, %a, 0, -1",
        "shfl.sync.idx.b32 %q, %a, 0, 31, -1",
        "shfl.sync.idx.b32 %d|%u, %a, 0, 31, -1",
        "vote.ballot.b32 %d, %p",
        "vote.sync.any.b32 %d, %p, -1",
        "vote.sync.ballot.b32 %q, %p, -1",
        "vote.sync.all.pred %d, %p, -1",
        "vote.sync.all.pred %q, %a, -1",
        "activemask.u32 %d",
        "match.any.sync.b32 %d|%q, %a, -1",
        "match.sync.b32 %d, %a, -1",
        "match.all.sync.b64 %d, %a, -1",
        "redux.add.u32 %d, %a, -1",
        "redux.sync.add.f32 %d, %a, -1",
        "redux.sync.and.u32 %d, %a, -1",
        "redux.sync.min.abs.s32 %d, %a, -1",
        "elect.sync %d, -1",
        "bar.warp -1",
        "nanosleep 3",
    ],
)
def test_what_the_isa_does_not_have_is_refused(instruction):
    with pytest.raises(UnknownInstruction, match=instruction.split()[0].replace(".", r"\.")):
        fault(f"{instruction};")
