"""Atomics and reductions against Python's integers and fractions, and what makes them atomic."""

import re
from fractions import Fraction

import numpy as np
import pytest

from ptx import Fault, In, InOut, Out, UnknownInstruction
from ptx.handwritten import fault_of, kernel, launch, numbers

THREADS = 64


# ---- What an operation makes of a place: each definition as the ISA words it


def wrapped(bits, signed, f):
    def g(a, b):
        value = f(a, b) % (1 << bits)
        return value - (1 << bits) if signed and value >> (bits - 1) else value

    return g


def inc(r, s):
    return 0 if r >= s else r + 1


def dec(r, s):
    return s if r == 0 or r > s else r - 1


INTEGERS = {
    **{
        f"{op}.b{bits}": f
        for bits in (32, 64)
        for op, f in (
            ("and", lambda a, b: a & b),
            ("or", lambda a, b: a | b),
            ("xor", lambda a, b: a ^ b),
        )
    },
    **{
        f"add.{kind}": wrapped(int(kind[1:]), kind[0] == "s", lambda a, b: a + b)
        for kind in ("u32", "s32", "u64")
    },
    **{f"{f.__name__}.{kind}": f for f in (min, max) for kind in ("u32", "s32", "u64", "s64")},
    "inc.u32": inc,
    "dec.u32": dec,
}


def dtype_of(op):
    kind = op.split(".")[-1]
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")


def pairs(dtype, seed=3):
    """Old values and operands: random ones, equal ones, extreme ones."""
    a, b = numbers(THREADS, dtype, seed), numbers(THREADS, dtype, seed + 1)
    a[:8] = np.array([0, 0, 1, 5, 5, 6], dtype)[[0, 1, 2, 3, 4, 5, 0, 0]]
    b[:8] = np.array([0, 5, 1, 5, 6, 5], dtype)[[0, 1, 2, 3, 4, 5, 0, 0]]
    info = np.iinfo(dtype)
    a[8:12] = [info.min, info.max, info.min, info.max]
    b[8:12] = [info.max, info.min, info.min, info.max]
    return a, b


# Where each thread's place of so many bytes is, for %q9; shared memory is filled and read back.
WHERE = {
    "global": "mov.u64 %q9, %q1;",
    "shared": "mov.u64 %q9, smem; mad.wide.u32 %q9, %tid, {size}, %q9;",
}


def each(code, size, places, operands, space, generic, second=None):
    """Every thread executes ``code`` on its own place, [%q10], with operands %q2 and %q3."""
    returned = np.zeros_like(places)
    bits = 8 * size
    where = WHERE[space].format(size=size)
    to_generic = f"cvta.{space}.u64 %q10, %q9;" if generic else "mov.u64 %q10, %q9;"
    load = {2: "ld.global.b16 %r3, [%q3]; cvt.u64.u32 %q3, %r3;"}.get(
        size, f"ld.global.b{bits} %q3, [%q3];"
    )
    text = kernel(
        f"""mad.wide.u32 %q1, %tid, {size}, %places; mad.wide.u32 %q2, %tid, {size}, %b;
        mad.wide.u32 %q4, %tid, {size}, %y;
        mad.wide.u32 %q3, %tid, {size}, %c;
        ld.global.b{bits} %q2, [%q2]; {load} cvt.u32.u64 %r2, %q2; cvt.u32.u64 %r3, %q3;
        cvt.u16.u32 %h2, %r2; cvt.u16.u32 %h3, %r3;
        {where} ld.global.b{bits} %q5, [%q1]; st.{space}.b{bits} [%q9], %q5;
        {to_generic}
        {code}
        ld.{space}.b{bits} %q5, [%q9]; st.global.b{bits} [%q1], %q5;""",
        "places b c y",
    )
    found = places.copy()
    c = operands if second is None else second
    launch(
        text,
        [InOut("places", found), In("b", operands), In("c", c), InOut("y", returned)],
        threads=len(places),
    )
    return found, returned


def register(size):
    return {2: "%h", 4: "%r", 8: "%q"}[size]


@pytest.mark.parametrize("space", WHERE)
@pytest.mark.parametrize("generic", [False, True], ids=["", "generic"])
@pytest.mark.parametrize("op", INTEGERS)
def test_an_integer_operation(op, space, generic):
    a, b = pairs(dtype_of(op))
    size = a.itemsize
    r = register(size)
    where = "" if generic else f".{space}"
    expected = np.array([INTEGERS[op](int(x), int(y)) for x, y in zip(a, b, strict=True)], a.dtype)
    code = f"atom{where}.{op} {r}6, [%q10], {r}2; st.global.b{8 * size} [%q4], {r}6;"
    found, returned = each(code, size, a, b, space, generic)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(returned, a)
    found, _ = each(f"red{where}.relaxed.gpu.{op} [%q10], {r}2;", size, a, b, space, generic)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("space", WHERE)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_compare_and_swap(space, size):
    a, b = pairs(np.dtype(f"u{size}"))
    c = numbers(THREADS, a.dtype, 9)
    b[::2] = a[::2]
    r = register(size)
    code = (
        f"atom.{space}.cas.b{8 * size} {r}6, [%q10], {r}2, {r}3; st.global.b{8 * size} [%q4], {r}6;"
    )
    found, returned = each(code, size, a, b, space, False, c)
    np.testing.assert_array_equal(found, np.where(a == b, c, a))
    np.testing.assert_array_equal(returned, a)


@pytest.mark.parametrize("space", WHERE)
@pytest.mark.parametrize("size", [4, 8])
def test_exchange(space, size):
    a, b = pairs(np.dtype(f"u{size}"))
    r = register(size)
    code = f"atom.{space}.exch.b{8 * size} {r}6, [%q10], {r}2; st.global.b{8 * size} [%q4], {r}6;"
    found, returned = each(code, size, a, b, space, False)
    np.testing.assert_array_equal(found, b)
    np.testing.assert_array_equal(returned, a)


def test_128_bits():
    x = numbers(32, np.uint64).reshape(8, 2, 2)
    y, old = np.zeros((8, 2), np.uint64), np.zeros((8, 2), np.uint64)
    y[:] = x[:, 0]
    text = kernel(
        """mad.wide.u32 %q1, %tid, 32, %x; mad.wide.u32 %q2, %tid, 16, %y;
        mad.wide.u32 %q3, %tid, 16, %old;
        ld.global.b128 %o1, [%q1]; ld.global.b128 %o2, [%q1+16];
        setp.lt.u32 %p1, %tid, 4;
        @%p1 atom.global.cas.b128 %o3, [%q2], %o1, %o2;
        @!%p1 atom.global.exch.b128 %o3, [%q2], %o2;
        st.global.b128 [%q3], %o3;
        atom.global.cas.b128 %o3, [%q2], %o1, %o1;""",
        "x y old",
        registers=".reg .b128 %o<4>;",
    )
    launch(text, [In("x", x), InOut("y", y), Out("old", old)], threads=8)
    np.testing.assert_array_equal(y, x[:, 1])
    np.testing.assert_array_equal(old, x[:, 0])


# ---- Floats


class Format:
    def __init__(self, exponent, mantissa):
        self.exponent, self.mantissa, self.bits = exponent, mantissa, 1 + exponent + mantissa
        self.bias = (1 << exponent - 1) - 1
        self.infinity = ((1 << exponent) - 1) << mantissa

    def value(self, code):
        """A fraction, or None if it is none."""
        magnitude = code & ((1 << self.bits - 1) - 1)
        if magnitude >= self.infinity:
            return None
        exponent, mantissa = divmod(magnitude, 1 << self.mantissa)
        if exponent:
            mantissa += 1 << self.mantissa
        value = Fraction(mantissa) * Fraction(2) ** (max(exponent, 1) - self.bias - self.mantissa)
        return -value if code >> (self.bits - 1) else value

    def nearest(self, value, negative_zero=False):
        """The code next to a fraction, the even one of two, by search among all of its sign."""
        sign = (1 << self.bits - 1) if value < 0 or (value == 0 and negative_zero) else 0
        low, high = 0, self.infinity
        limit = Fraction(2) ** (self.bias + 1)
        at = lambda code: limit if code == self.infinity else self.value(code)  # noqa: E731
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if at(middle) <= abs(value) else (low, middle)
        below, above = abs(value) - at(low), at(high) - abs(value)
        if above < 0 or (below, low % 2) > (above, high % 2):
            low = high
        return sign | low

    def add(self, a, b, flushed=False):
        if flushed:
            a, b = self.flush(a), self.flush(b)
        x, y = self.value(a), self.value(b)
        nan = (1 << self.bits - 1) - 1
        sign = 1 << self.bits - 1
        if x is None or y is None:
            if (a & ~sign) > self.infinity or (b & ~sign) > self.infinity:
                return nan
            if x is None and y is None:
                return a if a == b else nan
            return a if x is None else b
        code = self.nearest(x + y, bool(a & b & sign))
        return self.flush(code) if flushed else code

    def flush(self, code):
        sign = 1 << self.bits - 1
        return code & sign if (code & ~sign) < 1 << self.mantissa else code

    def extreme(self, a, b, largest):
        sign = 1 << self.bits - 1
        nans = [(code & ~sign) > self.infinity for code in (a, b)]
        if all(nans):
            return sign - 1
        if any(nans):
            return b if nans[0] else a
        # Codes in the order of their values; -0 is below +0.
        order = sorted((a, b), key=lambda code: -(code & ~sign) - 1 if code & sign else code)
        return order[largest]


HALF, BFLOAT, SINGLE, DOUBLE = Format(5, 10), Format(8, 7), Format(8, 23), Format(11, 52)


def floats(of, seed=5):
    """Codes, most of them of numbers that meet: close exponents, subnormals, zeros, infinities, NaN."""
    random = np.random.default_rng(seed)
    dtype = np.dtype(f"u{of.bits // 8}")
    a, b = numbers(THREADS, dtype, seed), numbers(THREADS, dtype, seed + 1)
    near = np.array([int(x) ^ int(random.integers(1 << of.mantissa)) for x in a], dtype)
    b[:24] = near[:24]
    b[24:32] = a[24:32] ^ dtype.type(1 << of.bits - 1)
    sign, top = 1 << of.bits - 1, of.infinity
    special = [
        0,
        sign,
        1,
        sign | 1,
        (1 << of.mantissa) - 1,
        top,
        sign | top,
        top + 1,
        top - 1,
        sign | top - 1,
    ]
    a[32:42] = special
    b[32:42] = special[::-1]
    a[42:52] = special
    b[42:52] = special
    a[52:58] = special[2]
    return a, b


SCALARS = {
    "add.noftz.f16": HALF,
    "add.noftz.bf16": BFLOAT,
    "add.f32": SINGLE,
    "add.f64": DOUBLE,
}


@pytest.mark.parametrize("space", WHERE)
@pytest.mark.parametrize("generic", [False, True], ids=["", "generic"])
@pytest.mark.parametrize("op", SCALARS)
def test_a_sum_of_floats_is_rounded_once(op, space, generic):
    of = SCALARS[op]
    a, b = floats(of)
    size = a.itemsize
    r = register(size)
    where = "" if generic else f".{space}"
    code = f"atom{where}.{op} {r}6, [%q10], {r}2; st.global.b{8 * size} [%q4], {r}6;"
    found, returned = each(code, size, a, b, space, generic)
    flushed = of is SINGLE and space == "global"
    expected = np.array(
        [of.add(int(x), int(y), flushed) for x, y in zip(a, b, strict=True)], a.dtype
    )
    if of is DOUBLE:  # which NaN it is, the ISA does not say
        found[np.isnan(found.view(float))] = expected[np.isnan(expected.view(float))].max(initial=0)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(returned, a)


@pytest.mark.parametrize("space", WHERE)
@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_two_halves_are_two_sums(kind, space):
    of = HALF if kind == "f16x2" else BFLOAT
    (a, b), (c, d) = floats(of, 5), floats(of, 15)
    places, operands = (
        np.stack([a, c], axis=1).view(np.uint32).ravel(),
        np.stack([b, d], axis=1).view(np.uint32).ravel(),
    )
    found, returned = each(
        f"atom.{space}.add.noftz.{kind} %r6, [%q10], %r2; st.global.b32 [%q4], %r6;",
        4,
        places,
        operands,
        space,
        False,
    )
    expected = [
        [of.add(int(x), int(y)) for x, y in zip(*both, strict=True)] for both in ((a, b), (c, d))
    ]
    np.testing.assert_array_equal(found.view(np.uint16).reshape(-1, 2).T, expected)
    np.testing.assert_array_equal(returned, places)


VECTORS = [
    (kind, count, op)
    for kind, counts in {
        "f16": (2, 4, 8),
        "bf16": (2, 4, 8),
        "f16x2": (2, 4),
        "bf16x2": (2, 4),
        "f32": (2, 4),
    }.items()
    for count in counts
    for op in (("add",) if kind == "f32" else ("add", "min", "max"))
]


@pytest.mark.parametrize(("kind", "count", "op"), VECTORS)
def test_a_vector_is_so_many_operations(kind, count, op):
    of = {"f32": SINGLE, "f16": HALF, "f16x2": HALF}.get(kind, BFLOAT)
    a, b = floats(of)
    word = 2 if kind.endswith("f16") else 4
    r, noftz = register(word), "" if kind == "f32" else ".noftz"
    size = word * count
    threads = a.nbytes // size
    braces = lambda first: "{" + ", ".join(f"{r}{first + i}" for i in range(count)) + "}"  # noqa: E731
    load = "".join(f"ld.global.b{8 * word} {r}{8 + i}, [%q2+{word * i}];" for i in range(count))
    store = "".join(f"st.global.b{8 * word} [%q3+{word * i}], {r}{i};" for i in range(count))
    text = kernel(
        f"""mad.wide.u32 %q1, %tid, {size}, %x; mad.wide.u32 %q2, %tid, {size}, %b;
        mad.wide.u32 %q3, %tid, {size}, %y;
        {load}
        red.global.v{count}.{kind}.{op}{noftz} [%q1], {braces(8)};
        atom.global.{op}{noftz}.v{count}.{kind} {braces(0)}, [%q1], {braces(8)};
        {store}""",
        "x b y",
    )
    x, y = a.copy(), np.zeros_like(a)
    launch(text, [InOut("x", x), In("b", b), Out("y", y)], threads=threads)
    act = (
        (lambda r, s: of.add(r, s, of is SINGLE))
        if op == "add"
        else lambda r, s: of.extreme(r, s, op == "max")
    )
    once = [act(int(r), int(s)) for r, s in zip(a, b, strict=True)]
    np.testing.assert_array_equal(y, np.array(once, a.dtype))
    np.testing.assert_array_equal(
        x, np.array([act(r, int(s)) for r, s in zip(once, b, strict=True)], a.dtype)
    )


# ---- Many threads at one place


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("seed", range(6))
def test_tickets_are_all_different(space, seed):
    y, count = np.zeros(256, np.uint32), np.zeros(1, np.uint32)
    grid = 4 if space == "global" else 1
    place = "%count" if space == "global" else "smem"
    text = kernel(
        f"""setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.u32 [smem], 0; bar.sync 0;
        atom.{space}.add.u32 %r1, [{place}], 1;
        mad.wide.u32 %q1, %r1, 4, %y; st.global.u32 [%q1], %r1;""",
        "y count",
    )
    launch(text, [Out("y", y), InOut("count", count)], threads=256 // grid, grid=grid, seed=seed)
    assert y.tolist() == list(range(256))
    assert count[0] == (256 if space == "global" else 0)


def test_lanes_of_a_warp_come_in_any_order():
    text = kernel(
        "atom.global.add.u32 %r1, [%count], 1; mad.wide.u32 %q1, %tid, 4, %y; st.global.u32 [%q1], %r1;",
        "y count",
    )
    orders = set()
    for seed in range(8):
        y = np.zeros(32, np.uint32)
        launch(text, [Out("y", y), InOut("count", np.zeros(1, np.uint32))], threads=32, seed=seed)
        orders.add(tuple(y))
    assert len(orders) > 1


@pytest.mark.parametrize("seed", range(6))
def test_a_lock_of_compare_and_swap(seed):
    # A counter that only who has the lock may read and write, in plain memory.
    text = kernel(
        """and.b32 %r9, %tid, 31; setp.ne.u32 %p1, %r9, 0; @%p1 bra END;
        LOCK: atom.global.acquire.gpu.cas.b32 %r1, [%x], 0, 1; setp.ne.u32 %p2, %r1, 0; @%p2 bra LOCK;
        ld.global.u32 %r2, [%x+4]; add.u32 %r2, %r2, 1; st.global.u32 [%x+4], %r2;
        atom.global.release.gpu.exch.b32 %r3, [%x], 0;
        END:""",
        "x",
    )
    x = np.zeros(2, np.uint32)
    launch(text, [InOut("x", x)], threads=96, grid=3, seed=seed, resident=3)
    assert x.tolist() == [0, 9]


@pytest.mark.parametrize("weak", ["acquire.gpu.cas", "release.gpu.exch"])
def test_orders_of_a_lock_matter(weak):
    text = kernel(
        """LOCK: atom.global.acquire.gpu.cas.b32 %r1, [%x], 0, 1;
        setp.ne.u32 %p2, %r1, 0; @%p2 bra LOCK;
        ld.global.u32 %r2, [%x+4]; add.u32 %r2, %r2, 1; st.global.u32 [%x+4], %r2;
        atom.global.release.gpu.exch.b32 %r3, [%x], 0;""".replace(
            weak, f"relaxed.gpu.{weak.split('.')[-1]}"
        ),
        "x",
    )
    x = InOut("x", np.zeros(2, np.uint32))
    found = []
    for seed in range(20):
        x.array[:] = 0
        found.append(fault_of(lambda: launch(text, [x], threads=1, grid=4, seed=seed)))  # noqa: B023
    assert any(found)
    assert all(re.search(r"x\[1\], which CTA \d stores to in line \d+", f) for f in found if f)


def test_a_scope_that_does_not_include_the_other():
    code = "atom.global{}.add.u32 %r1, [%x], 1;"
    for scope, clusters_meet, ctas_meet in (
        (".cta", False, False),
        (".cluster", False, True),
        (".gpu", True, True),
        ("", True, True),
    ):
        for cluster, meets in ((1, clusters_meet), (2, ctas_meet)):
            x = np.zeros(1, np.uint32)
            text = kernel(code.format(scope), "x")
            act = lambda: launch(text, [InOut("x", x)], threads=32, grid=2, cluster=cluster)  # noqa: B023, E731
            if meets:
                act()
                assert x[0] == 64
            else:
                with pytest.raises(
                    Fault,
                    match=r"x\[0\], which .* in line \d+, in a scope that does not include it",
                ):
                    act()


# ---- Places that are not for it

PLACES = {
    "an input": ("atom.global.add.u32 %r1, [%x], 1;", r"updates x\[0\], an input"),
    "an output that nobody has written": (
        "red.global.add.u32 [%y], 1;",
        r"updates y\[0\], which nobody has written",
    ),
    "shared memory that nobody has written": (
        "red.shared.add.u32 [smem], 1;",
        "updates shared memory at 0, which nobody has written",
    ),
    "misaligned": ("atom.global.add.u32 %r1, [%y+2];".replace(";", ", 1;"), "not a multiple of 4"),
    "a misaligned vector": ("red.global.add.v2.f32 [%y+4], {%r9, %r9};", "not a multiple"),
    "shared memory misaligned": (
        "atom.shared.exch.b64 %q1, [smem+4], %q9;",
        "at 4, not a multiple of 8",
    ),
    "past the end": ("atom.global.add.u32 %r1, [%y+64], 1;", "4 bytes past the end of y"),
    "an undefined operand": (
        "atom.global.exch.b32 %r1, [%y], %r2;",
        "undefined value for a stored value",
    ),
    "an undefined address": (
        "atom.global.exch.b32 %r1, [%q1], 1;",
        "undefined value for an address",
    ),
    "local memory": (
        "mov.u64 %q1, own; cvta.local.u64 %q1, %q1; red.add.u32 [%q1], 1;",
        "neither in global nor in shared",
    ),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_place_that_is_not_for_it(what):
    code, message = PLACES[what]
    text = kernel(
        "mov.u32 %r9, 0; mov.u64 %q9, 0;" + code, "x y", registers=".local .align 8 .b8 own[8];"
    )
    with pytest.raises(Fault, match=message):
        launch(
            text, [In("x", np.zeros(16, np.uint32)), Out("y", np.zeros(16, np.uint32))], threads=1
        )


def test_what_an_exchange_replaces_need_not_have_a_value():
    for place in ("global", "shared"):
        at = "%y" if place == "global" else "smem"
        code = f"""atom.{place}.exch.b32 %r1, [{at}], 7; atom.{place}.add.u32 %r2, [{at}], 1;
            st.global.u32 [%y+4], %r2;"""
        y = np.zeros(2, np.uint32)
        launch(kernel(code, "y"), [InOut("y", y) if place == "shared" else Out("y", y)], threads=1)
        assert y[1] == 7
        with pytest.raises(Fault, match="stores an undefined value"):
            launch(kernel(code.replace("%r2;", "%r1;"), "y"), [Out("y", y)], threads=1)


@pytest.mark.parametrize("place", ["global", "shared"])
def test_a_plain_store_races_with_an_atomic(place):
    at = "%x" if place == "global" else "smem"
    code = f"""setp.eq.u32 %p1, %tid, 0; @%p1 st.{place}.u32 [{at}], 0; bar.sync 0;
        setp.eq.u32 %p2, %tid, 32; @%p1 red.{place}.add.u32 [{at}], 1;
        @%p2 st.{place}.u32 [{at}], 5;"""
    text = kernel(code, "x")
    x = InOut("x", np.zeros(1, np.uint32))
    found = [fault_of(lambda: launch(text, [x], seed=seed)) for seed in range(10)]  # noqa: B023
    assert any(found)
    both = r"line \d+: CTA .* in line \d+, with no barrier between"
    assert all(re.search(both, f) for f in found if f)


REFUSED = """
    atom.global.add.s64 %q1, [%q2], %q3
    atom.global.add.b32 %r1, [%q2], %r3
    atom.global.min.b32 %r1, [%q2], %r3
    atom.global.min.f32 %r1, [%q2], %r3
    atom.global.and.u32 %r1, [%q2], %r3
    atom.global.xor.f32 %r1, [%q2], %r3
    atom.global.exch.u32 %r1, [%q2], %r3
    atom.global.cas.u32 %r1, [%q2], %r3, %r4
    atom.global.cas.b32 %r1, [%q2], %r3
    atom.global.inc.s32 %r1, [%q2], %r3
    atom.global.inc.u64 %q1, [%q2], %q3
    atom.global.add.f16 %h1, [%q2], %h3
    atom.global.add.noftz.f32 %r1, [%q2], %r3
    atom.global.min.noftz.f16x2 %r1, [%q2], %r3
    atom.global.add.u32 %r1, %q2, %r3
    atom.global.add.u64 %r1, [%q2], %q3
    atom.global.add.u64 %q1, [%q2], %r3
    atom.global.add.v2.u32 {%r1, %r2}, [%q2], {%r3, %r4}
    atom.shared.add.v2.f32 {%r1, %r2}, [%q2], {%r3, %r4}
    red.global.add.v8.f32 [%q2], {%r3, %r3, %r3, %r3, %r3, %r3, %r3, %r3}
    atom.local.add.u32 %r1, [%q2], %r3
    atom.global.add.u32.sometimes %r1, [%q2], %r3
    atom.global.multiply.u32 %r1, [%q2], %r3
    red.global.exch.b32 [%q2], %r3
    red.acquire.gpu.global.add.u32 [%q2], %r3
    red.global.add.u32 %r1, [%q2], %r3
    fence
    fence.acq_rel
    fence.weak.gpu
    fence.gpu.gpu
    fence.proxy
    fence.proxy.texture
    fence.proxy.async.local
    fence.proxy.tensormap::generic.acquire.gpu
    fence.acquire.sync_restrict::shared::cta.cluster
    membar.gpu
    membar.proxy.async
    griddepcontrol.sleep
"""


@pytest.mark.parametrize("code", [line.strip() for line in REFUSED.strip().split("\n")])
def test_what_is_no_instruction_is_refused(code):
    with pytest.raises(UnknownInstruction, match=re.escape(code.split()[0])):
        launch(kernel(f"{code};", "x"), [In("x", np.zeros(64))], threads=1)


def test_fences_and_dependent_launches_are_known():
    scopes = [
        f"fence{sem}.{scope};"
        for sem in ("", ".sc", ".acq_rel", ".acquire", ".release")
        for scope in ("cta", "cluster", "gpu", "sys")
    ]
    code = (
        " ".join(scopes)
        + """
        membar.cta; membar.gl; membar.sys; membar.proxy.alias; fence.proxy.alias;
        fence.proxy.async; fence.proxy.async.global;
        fence.proxy.async.shared::cta; fence.proxy.async.shared::cluster;
        fence.mbarrier_init.release.cluster;
        fence.acquire.sync_restrict::shared::cluster.cluster;
        fence.release.sync_restrict::shared::cta.cluster;
        fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;
        fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;
        fence.proxy.tensormap::generic.release.gpu; fence.proxy.tensormap::generic.acquire.gpu [%x], 128;
        griddepcontrol.wait; griddepcontrol.launch_dependents;"""
    )
    ran = launch(kernel(code, "x"), [In("x", np.zeros(64))], threads=32)
    assert ran.issued("fence") == code.count("fence")
    assert ran.issued("membar") == 4
    assert ran.issued("griddepcontrol") == 2


def test_what_atomics_cost():
    text = kernel(
        """st.shared.u32 [smem], 0; mad.wide.u32 %q1, %tid, 8, %x;
        atom.global.add.u32 %r1, [%q1], 1; red.shared.or.b32 [smem], 0;""",
        "x",
    )
    ran = launch(text, [InOut("x", numbers(64))], threads=32)
    costs = {c.opcode: (c.bytes, c.sectors, c.wavefronts) for c in ran.counts}
    assert costs["atom.global.add.u32"] == (128, 8, 0)
    assert costs["red.shared.or.b32"] == (128, 0, 1)
