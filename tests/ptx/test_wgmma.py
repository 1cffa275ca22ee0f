"""wgmma against whole products of operands laid out by the PTX ISA's figures, and its protocol."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from .launch import Fault, In, InOut, Machine, Out, Ran, UnknownInstruction
from .matrices import (
    BITS,
    SUMS,
    aligned,
    assert_rounded,
    exact_sum,
    fragment_a,
    random_bits,
    values,
    words,
)
from .snippets import run

ROWS, GROUP = 64, 128  # of A and D; threads of a warpgroup
SWIZZLES = {16: 0, 32: 3, 64: 2, 128: 1}  # bytes, and how a descriptor says so


@dataclass(frozen=True)
class Layout:
    """How an operand lies in shared memory: its major, and within how many bytes it is swizzled."""

    k_major: bool = True
    swizzle: int = 128
    lines: int = 2
    """Groups of eight lines from one to the next, of which only the first is the operand's."""

    def __str__(self) -> str:
        return f"{'k' if self.k_major else 'mn'}{self.swizzle}"

    @property
    def near(self) -> int:
        """Bytes from a group of eight lines to the next."""
        return 8 * self.swizzle * self.lines

    def far(self, length: int, depth: int) -> int:
        """Bytes from a column of such groups, or from a panel, to the next."""
        groups = length // 8 if self.k_major or self.swizzle == 16 else depth // 8
        return groups * self.near

    def offsets(self, length: int, depth: int, item: int) -> np.ndarray:
        """Where element [m or n, k] lies. PTX ISA, "Strides" and "Canonical Layouts" of wgmma; a row of
        eight has its chunks of 16 bytes exchanged as the tensor copies' swizzles are drawn."""
        mn, k = np.meshgrid(np.arange(length), np.arange(depth), indexing="ij")
        line, along = (mn, k * item) if self.k_major else (k, mn * item)
        chunk, byte = along // 16, along % 16
        far = self.far(length, depth)
        if self.swizzle == 16:
            # Core matrices of eight lines of 16 bytes.
            if self.k_major:
                return line // 8 * self.near + line % 8 * 16 + chunk * far + byte
            return chunk * self.near + line % 8 * 16 + line // 8 * far + byte
        exchanged = chunk % (self.swizzle // 16) ^ (line % 8) // (128 // self.swizzle)
        panel = chunk // (self.swizzle // 16)
        return line // 8 * self.near + line % 8 * self.swizzle + panel * far + exchanged * 16 + byte

    def descriptor(self, length: int, depth: int) -> int:
        """Without a start."""
        near, far = self.near // 16, self.far(length, depth) // 16
        return far << 16 | near << 32 | SWIZZLES[self.swizzle] << 62

    def step(self, depth: int, length: int, full: int) -> int:
        """Bytes from a step of ``depth`` along k to the next, of ``full``; 16 bits an element."""
        if not self.k_major:
            return depth // 8 * (self.far(length, full) if self.swizzle == 16 else self.near)
        return 2 * self.far(length, full) if self.swizzle == 16 else 32


PANELS = [Layout(k_major, swizzle) for k_major in (True, False) for swizzle in SWIZZLES]


@dataclass(frozen=True)
class Case:
    """One wgmma, or a chain of them along k."""

    n: int = 40
    a: str = "bf16"
    b: str = "bf16"
    d: str = "f32"
    a_layout: Layout | None = field(default_factory=Layout)
    """None: A is in registers."""
    b_layout: Layout = field(default_factory=Layout)
    steps: int = 1
    accumulates: int = 1
    scales: tuple[int, int] = (1, 1)
    satfinite: bool = False

    @property
    def depth(self) -> int:
        return 256 // BITS[self.a]

    @property
    def opcode(self) -> str:
        types = f"{'satfinite.' if self.satfinite else ''}{self.d}.{self.a}.{self.b}"
        return f"wgmma.mma_async.sync.aligned.m64n{self.n}k{self.depth}.{types}"

    def __str__(self) -> str:
        a = self.a_layout or "registers"
        return f"n{self.n}-{self.a}-{self.b}-{self.d}-{a}-{self.b_layout}-{self.steps}"


def vector(prefix: str, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{i}" for i in range(count)) + "}"


def places_of_sums(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of element i of a thread, [128, N / 2] each.

    PTX ISA, "Register Fragments" of wgmma: pairs of columns, 8 rows below, the next eight columns."""
    thread, i = np.meshgrid(np.arange(GROUP), np.arange(n // 2), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2


def kernel(case: Case, image: int, threads: int = GROUP) -> str:
    """Copies the operands' bytes into shared memory, loads registers, multiplies, stores."""
    registers = case.n // 2 if case.d != "f16" else case.n // 4
    a_registers = 0 if case.a_layout else 4 * case.steps
    tail = ""
    if BITS[case.a] != 8 or case.a[0] == "e":
        tail = ", {}, {}".format(*case.scales)
    if BITS[case.a] == 16:
        if case.a_layout:
            tail += f", {int(not case.a_layout.k_major)}"
        tail += f", {int(not case.b_layout.k_major)}"
    lines = [f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry product(.param .u64 image, .param .u64 a, .param .u64 c, .param .u64 d,
                        .param .u64 a_descriptor, .param .u64 b_descriptor,
                        .param .u32 a_step, .param .u32 b_step, .param .u32 accumulates) {{
  .reg .b32 %t, %s, %to, %v<4>, %a<{max(a_registers, 1)}>, %d<{registers}>, %e<8>;
  .reg .b32 %start, %lane, %warp, %word;
  .reg .b64 %base, %at, %pa, %pb, %sa, %sb, %wide;
  .reg .pred %p, %q;
  .shared .align 1024 .b8 smem[{image}];
  mov.u32 %t, %tid.x; mov.u32 %s, smem;
  and.b32 %lane, %t, 31; shr.u32 %warp, %t, 5;
  ld.param.u64 %base, [image];
  mad.wide.u32 %at, %t, 16, %base; mad.lo.u32 %to, %t, 16, %s;
"""]  # fmt: skip
    for first in range(0, image, 16 * threads):
        lines.append(
            f"  ld.global.v4.b32 {vector('v', 4)}, [%at+{first}];"
            f" st.shared.v4.b32 [%to+{first}], {vector('v', 4)};"
        )
    for name, count in (("a", a_registers), ("c", registers)):
        lines += [f"  ld.param.u64 %base, [{name}]; mad.wide.u32 %at, %t, {4 * count}, %base;"]
        to = "a" if name == "a" else "d"
        lines += [f"  ld.global.b32 %{to}{i}, [%at+{4 * i}];" for i in range(count)]
    lines.append("""
  ld.param.u32 %word, [accumulates]; setp.ne.u32 %p, %word, 0;
  shr.u32 %start, %s, 4; mul.wide.u32 %wide, %start, 1;
  ld.param.u64 %pa, [a_descriptor]; add.u64 %pa, %pa, %wide;
  ld.param.u64 %pb, [b_descriptor]; add.u64 %pb, %pb, %wide;
  ld.param.u32 %word, [a_step]; mul.wide.u32 %sa, %word, 1;
  ld.param.u32 %word, [b_step]; mul.wide.u32 %sb, %word, 1;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  wgmma.fence.sync.aligned;
""")
    for step in range(case.steps):
        a = "%pa" if case.a_layout else "{" + ", ".join(f"%a{4 * step + i}" for i in range(4)) + "}"
        lines.append(f"  {case.opcode} {vector('d', registers)}, {a}, %pb, %p{tail};")
        lines.append("  add.u64 %pa, %pa, %sa; add.u64 %pb, %pb, %sb; setp.eq.u32 %p, %t, %t;")
    lines.append(
        "  wgmma.commit_group.sync.aligned;\n  wgmma.wait_group.sync.aligned 0;\n  // waited"
    )
    lines.append(f"  ld.param.u64 %base, [d]; mad.wide.u32 %at, %t, {4 * registers}, %base;")
    lines += [f"  st.global.b32 [%at+{4 * i}], %d{i};" for i in range(registers)]
    return "\n".join([*lines, "  ret;", "}"])


class Operands:
    """Random operands of a case, in memory, and what their product is."""

    def __init__(self, case: Case, threads: int = GROUP) -> None:
        self.case, self.threads = case, threads
        random = np.random.default_rng([case.n, case.depth, case.steps])
        full = case.depth * case.steps
        self.a = random_bits(case.a, (ROWS, full), random)
        self.b = random_bits(case.b, (case.n, full), random)
        if case.d == "s32":
            self.c = random.integers(-(2**20), 2**20, (ROWS, case.n)).astype(np.int32)
        else:
            self.c = random.standard_normal((ROWS, case.n)).astype(SUMS[case.d])
        pieces, self.descriptors, self.steps = [], [], []
        start = 0
        for layout, bits in ((case.a_layout, self.a), (case.b_layout, self.b)):
            if layout is None:
                self.descriptors.append(0)
                self.steps.append(0)
                continue
            at = layout.offsets(*bits.shape, bits.itemsize)
            size = -(-(int(at.max()) + bits.itemsize) // 1024) * 1024
            piece = np.full(size // bits.itemsize, 0x7E, bits.dtype)
            piece[at // bits.itemsize] = bits
            pieces.append(piece.view(np.uint8))
            self.descriptors.append(layout.descriptor(*bits.shape) + start // 16)
            self.steps.append(layout.step(case.depth, bits.shape[0], full) // 16)
            start += size
        image = np.concatenate(pieces)
        padded = -(-len(image) // (16 * threads)) * 16 * threads
        self.image = aligned(np.pad(image, (0, padded - len(image)), constant_values=0xEE))
        groups = threads // GROUP
        warps = [
            np.concatenate([
                fragment_a(case.a, self.a[16 * w : 16 * w + 16, s * case.depth : (s + 1) * case.depth])
                for s in range(case.steps)
            ], 1)
            for w in range(4)
        ]  # fmt: skip
        self.of_a = aligned(np.concatenate(warps * groups))
        self.of_c = aligned(np.concatenate([self.fragment(self.c)] * groups))
        self.of_d = aligned(np.zeros_like(self.of_c))

    def fragment(self, sums: np.ndarray) -> np.ndarray:
        elements = sums[places_of_sums(self.case.n)]
        return words("f16", elements.view(np.uint16)) if self.case.d == "f16" else elements

    def arguments(self) -> list:
        return [
            In("image", self.image), In("a", self.of_a), In("c", self.of_c), Out("d", self.of_d),
            *self.descriptors, *self.steps, self.case.accumulates,
        ]  # fmt: skip

    def run(self, text: str | None = None, **options) -> Ran:
        text = text or kernel(self.case, len(self.image), self.threads)
        return run(text, (1,), (self.threads,), self.arguments(), **options)

    def found(self) -> np.ndarray:
        """D of every warpgroup, [groups, 64, N]."""
        elements = self.of_d.view(SUMS[self.case.d]).reshape(-1, GROUP, self.case.n // 2)
        d = np.zeros((len(elements), ROWS, self.case.n), elements.dtype)
        rows, columns = places_of_sums(self.case.n)
        d[:, rows, columns] = elements
        return d

    def expected(self) -> np.ndarray:
        """Rounded after each step but the last."""
        case = self.case
        a, b = values(case.a, self.a) * case.scales[0], values(case.b, self.b) * case.scales[1]
        sums = self.c.astype(np.float64) * case.accumulates
        for step in range(case.steps):
            part = slice(step * case.depth, (step + 1) * case.depth)
            sums = exact_sum(a[:, part], b[:, part].T, sums)
            if step + 1 < case.steps:
                sums = sums.astype(SUMS[case.d]).astype(np.float64)
        return sums


def check(case: Case) -> None:
    operands = Operands(case)
    ran = operands.run()
    (found,) = operands.found()
    assert_rounded(found, operands.expected(), case.d)
    assert sum(c.multiplies for c in ran.counts) == ROWS * case.n * case.depth * case.steps


@pytest.mark.parametrize("b_layout", PANELS, ids=str)
@pytest.mark.parametrize("a_layout", PANELS, ids=str)
def test_layouts_of_16_bits(a_layout: Layout, b_layout: Layout) -> None:
    # Four steps: a whole row of 128 bytes, two of 64, four of 32.
    steps = {16: 3, 32: 1, 64: 2, 128: 4}
    count = min(steps[x.swizzle] if x.k_major else 3 for x in (a_layout, b_layout))
    check(Case(n=136, a_layout=a_layout, b_layout=b_layout, steps=count))


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("kinds", ["tf32 tf32", "e4m3 e5m2", "s8 u8"])
def test_layouts_of_other_sizes(kinds: str, swizzle: int) -> None:
    a, b = kinds.split()
    layout = Layout(swizzle=swizzle, lines=1)
    check(Case(n=48, a=a, b=b, d="s32" if a == "s8" else "f32", a_layout=layout, b_layout=layout))


@pytest.mark.parametrize(
    "case",
    [
        *(Case(n=n) for n in (8, 24, 64, 256)),
        *(Case(n=n, a="f16", b="f16", d=d, steps=2) for n in (8, 16, 136) for d in ("f16", "f32")),
        *(Case(n=n, a="tf32", b="tf32") for n in (8, 40, 256)),
        *(Case(n=n, a=a, b=b, d=d) for n in (8, 32) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")
          for d in ("f16", "f32")),
        *(Case(n=n, a=a, b=b, d="s32") for n in (8, 24, 64) for a in ("s8", "u8") for b in ("s8", "u8")),
        *(Case(a=kind, b=kind, a_layout=None, steps=2) for kind in ("f16", "bf16", "tf32")),
        Case(a_layout=None, b_layout=Layout(k_major=False)),
        Case(n=32, a="e4m3", b="e5m2", a_layout=None, steps=2),
        Case(n=32, a="s8", b="u8", d="s32", a_layout=None, steps=2),
        Case(n=16, a="f16", b="f16", d="f16", a_layout=None),
    ],
    ids=str,
)  # fmt: skip
def test_product(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("scales", [(1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("a_layout", [Layout(), None], ids=["shared", "registers"])
def test_scales(scales: tuple[int, int], a_layout: Layout | None) -> None:
    check(Case(scales=scales, a_layout=a_layout))


def test_without_accumulators() -> None:
    check(Case(accumulates=0, steps=2))
    # They need have no value then.
    operands = Operands(Case(accumulates=0))
    text = kernel(operands.case, len(operands.image))
    text = "\n".join(
        line for line in text.splitlines() if not line.startswith("  ld.global.b32 %d")
    )
    operands.run(text)
    assert_rounded(operands.found()[0], operands.expected(), "f32")


@pytest.mark.parametrize("satfinite", [False, True])
def test_integer_sums_wrap_or_are_clamped(satfinite: bool) -> None:
    operands = Operands(Case(n=16, a="s8", b="s8", d="s32", satfinite=satfinite))
    operands.of_c[...] = 2**31 - 1
    operands.c[...] = 2**31 - 1
    operands.run()
    exact = operands.expected().astype(np.int64)
    expected = np.minimum(exact, 2**31 - 1) if satfinite else exact.astype(np.int32)
    np.testing.assert_array_equal(operands.found()[0], expected)


def test_two_warpgroups() -> None:
    operands = Operands(Case(n=72, steps=2), threads=2 * GROUP)
    for seed in range(5):
        operands.of_d[...] = 0
        operands.run(machine=Machine(seed=seed))
        for found in operands.found():
            assert_rounded(found, operands.expected(), "f32")


def test_base_offset() -> None:
    """Operands whose pattern starts 256 bytes beyond a multiple of 1,024, as descriptors say."""
    operands = Operands(Case())
    shifted = np.roll(operands.image, 256)
    operands.image = aligned(np.concatenate([shifted, np.zeros(16 * GROUP, np.uint8)]))
    operands.image[len(shifted) : len(shifted) + 256] = shifted[:256]
    operands.descriptors = [d + (256 >> 4) + (2 << 49) for d in operands.descriptors]
    operands.run()
    assert_rounded(operands.found()[0], operands.expected(), "f32")


# ---- What is undefined


def test_undefined_elements_reach_their_row_and_column() -> None:
    case = Case(n=16, a_layout=Layout(lines=1), b_layout=Layout(lines=1))
    operands = Operands(case)
    a_bytes = int(case.a_layout.offsets(ROWS, 16, 2).max()) // 1024 * 1024 + 1024
    rows, columns = places_of_sums(case.n)
    whole = kernel(case, len(operands.image))
    # Row 37 of A, or column 5 of B, is left out of the copy: eight threads' chunks.
    for start, line, where in ((0, 37, rows == 37), (a_bytes, 5, columns == 5)):
        first = start + line * 128
        thread, offset = first // 16 % GROUP, first // (16 * GROUP) * 16 * GROUP
        text = whole.replace(
            f"st.shared.v4.b32 [%to+{offset}]",
            f"and.b32 %word, %t, -8; setp.ne.u32 %q, %word, {thread};"
            f" @%q st.shared.v4.b32 [%to+{offset}]",
        )
        # In registers, where a lane holds one of the elements.
        for t, i in ((0, 0), (*np.argwhere(where)[0],), (*np.argwhere(where)[-1],), (127, 7)):
            stored = "\n".join(
                f"setp.eq.u32 %q, %t, {t}; @%q{line.rstrip()}"
                if line.startswith("  st.global.b32")
                else line
                for line in text.splitlines()
                if not line.startswith("  st.global.b32") or line.endswith(f"%d{i};")
            )
            arguments = operands.arguments()
            arguments[3] = InOut("d", operands.of_d)
            if where[t, i]:
                with pytest.raises(Fault, match="stores an undefined value"):
                    run(stored, (1,), (GROUP,), arguments)
            else:
                run(stored, (1,), (GROUP,), arguments)


# ---- The protocol

_COMMIT = "  wgmma.commit_group.sync.aligned;\n"
_WAIT = "  wgmma.wait_group.sync.aligned 0;\n"
_FENCE = "  wgmma.fence.sync.aligned;\n"
_PROXY = "  fence.proxy.async.shared::cta;\n"
_SHARED, _REGISTERS = Case(n=16, steps=2), Case(n=16, steps=2, a_layout=None)
_OTHER = f"{replace(_SHARED, n=8).opcode} {vector('d', 4)}, %pa, %pb, %p, 1, 1, 0, 0;\n"
_INTO_A = _OTHER.replace("%d", "%a")
_FROM_D = f"{_SHARED.opcode} {vector('e', 8)}, {vector('d', 4)}, %pb, 0, 1, 1, 0;\n"


@pytest.mark.parametrize(
    ("case", "old", "new", "says"),
    [
        (_SHARED, _FENCE, "", "needs a wgmma.fence before it"),
        (_SHARED, _FENCE, _FENCE + "mov.b32 %d3, %d3;\n", "fence: a register of its accumulators"),
        (_REGISTERS, _FENCE, _FENCE + "mov.b32 %a1, %a1;\n", "needs a wgmma.fence: a register of its A"),
        (_SHARED, _COMMIT, _OTHER + _COMMIT, "accumulators was an accumulator of another shape"),
        (_SHARED, _COMMIT, _FENCE + _OTHER + _COMMIT, "still uses, without a wait"),
        (_REGISTERS, _COMMIT, _INTO_A + _COMMIT, "still uses, without a wait"),
        (_SHARED, _WAIT, _WAIT + _FROM_D, "a register of its A was an accumulator in line"),
        (_SHARED, _WAIT, _FENCE + _FROM_D + _WAIT, "takes for A what the wgmma"),
        (_SHARED, _COMMIT, "", "stores an undefined value"),
        (_SHARED, _WAIT, "", "stores an undefined value"),
        (_SHARED, _WAIT, _WAIT.replace("0", "1"), "stores an undefined value"),
        (_SHARED, _COMMIT + _WAIT, _WAIT + _COMMIT, "stores an undefined value"),
        (_SHARED, _WAIT, "mov.b32 %d3, %t;\n" + _WAIT, "still uses, without a wait"),
        (_REGISTERS, _WAIT, "mov.b32 %a7, %t;\n" + _WAIT, "still uses, without a wait"),
        (_SHARED, _WAIT, "mov.b32 %word, %d3; st.shared.b32 [%s], %word;\n" + _WAIT, "an undefined"),
        (_SHARED, _WAIT, "st.shared.b32 [%to], %t;\n" + _WAIT, r"still be reading|no barrier between"),
        (_SHARED, _PROXY, "", "with no fence.proxy.async between"),
        (_SHARED, "  bar.sync 0;\n", "", "with no barrier between"),
        (_SHARED, _FENCE, _FENCE + "and.b32 %word, %warp, 1; mul.wide.u32 %wide, %word, 64; "
         "add.u64 %pa, %pa, %wide;\n", "has other descriptors"),
        (_SHARED, _FENCE, _FENCE + "setp.ne.u32 %p, %warp, 2;\n", "another scale-d"),
        (_SHARED, _FENCE, _FENCE + "setp.ne.u32 %p, %lane, 2;\n", "scale-d that differs between lanes"),
        (_SHARED, _FENCE, _FENCE + "mul.wide.u32 %wide, %lane, 1; add.u64 %pa, %pa, %wide;\n",
         "a descriptor that differs between lanes"),
        (_SHARED, _FENCE, _FENCE + "setp.eq.u32 %q, %warp, 3; @%q bra other;\n", "is what another warp"),
        (_SHARED, _FENCE, _FENCE + "or.b64 %pb, %pb, 0x4000;\n", "bits that must be zero"),
        (_SHARED, _FENCE, _FENCE + "or.b64 %pb, %pb, 0x3f00;\n", r"reads .* bytes at .* of shared"),
        (_SHARED, _WAIT, "setp.eq.u32 %q, %warp, 1; @%q bra out;\n" + _WAIT, None),
        (_SHARED, _FENCE, "setp.eq.u32 %q, %warp, 1; @%q bra out;\n" + _FENCE, "wait_group"),
    ],
)  # fmt: skip
def test_faults(case: Case, old: str, new: str, says: str | None) -> None:
    operands = Operands(case)
    text = kernel(case, len(operands.image))
    assert text.count(old) == 1
    text = text.replace(old, new).replace("  ret;", "  ret;\nout: ret;\nother:\n" + _OTHER + "ret;")
    arguments = operands.arguments()
    arguments[3] = InOut("d", operands.of_d)
    for seed in range(3):
        machine = Machine(seed=seed, most_silent=20_000)
        if says is None:
            run(text, (1,), (GROUP,), arguments, machine=machine)
            continue
        with pytest.raises(Fault, match=says):
            run(text, (1,), (GROUP,), arguments, machine=machine)


def test_needs_a_warpgroup() -> None:
    operands = Operands(_SHARED)
    text = kernel(_SHARED, len(operands.image), 64)
    with pytest.raises(Fault, match="needs four whole warps"):
        run(text, (1,), (64,), operands.arguments())


def test_each_warp_must_have_seen_the_operands() -> None:
    """Warp 0 has waited for the others' stores, they haven't for its own, and issue later."""
    operands = Operands(_SHARED)
    text = kernel(_SHARED, len(operands.image))
    text = text.replace("  bar.sync 0;", """
  mov.u32 %word, 500;
  setp.eq.u32 %q, %warp, 0;
  @%q bar.sync 1, 128;
  @%q bra seen;
  bar.arrive 1, 128;
spin:
  sub.u32 %word, %word, 1; setp.ne.u32 %q, %word, 0;
  @%q bra spin;
seen:""")  # fmt: skip
    for seed in range(3):
        with pytest.raises(Fault, match=r"that warp 0 writes in line .*, with no barrier between"):
            operands.run(text, machine=Machine(seed=seed))


@pytest.mark.parametrize("threads", [GROUP, 2 * GROUP])
@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
def test_operands_are_free_for_who_has_waited(threads: int, barrier: str) -> None:
    """A warp that has waited may overwrite its group's, not what a second group reads."""
    operands = Operands(_SHARED, threads)
    text = kernel(_SHARED, len(operands.image), threads)
    writes = "st.shared.v4.b32 [%to], {%t, %t, %t, %t};\n"
    text = text.replace("  // waited", barrier + writes)
    for seed in range(3):
        if threads == GROUP or barrier:
            operands.run(text, machine=Machine(seed=seed))
            for found in operands.found():
                assert_rounded(found, operands.expected(), "f32")
        else:
            with pytest.raises(Fault, match=r"may still be reading|with no barrier between"):
                operands.run(text, machine=Machine(seed=seed))


def test_groups_are_waited_for_in_order() -> None:
    """Two products in two groups, of which the first is stored while the second is under way."""
    case = Case(n=16)
    operands = Operands(case)
    text = kernel(case, len(operands.image))
    second = f"  {case.opcode} {vector('e', 8)}, %pa, %pb, 0, 1, 1, 0, 0;\n" + _COMMIT
    text = text.replace("add.u64 %pa, %pa, %sa; add.u64 %pb, %pb, %sb;", "")
    for pending, faults in ((1, False), (2, True)):
        wait = _WAIT.replace("0;", f"{pending};")
        operands.of_d[...] = 0
        if faults:
            with pytest.raises(Fault, match="stores an undefined value"):
                operands.run(text.replace(_COMMIT + _WAIT, _COMMIT + second + wait))
        else:
            operands.run(text.replace(_COMMIT + _WAIT, _COMMIT + second + wait))
            assert_rounded(operands.found()[0], operands.expected(), "f32")


def test_registers_of_a_may_be_read_meanwhile() -> None:
    operands = Operands(_REGISTERS)
    text = kernel(_REGISTERS, len(operands.image)).replace(
        _WAIT, "add.u32 %word, %a0, %a7;\n" + _WAIT
    )
    operands.run(text)
    assert_rounded(operands.found()[0], operands.expected(), "f32")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("m64n16k16.f32.bf16.bf16", "m64n12k16.f32.bf16.bf16"),
        ("m64n16k16.f32.bf16.bf16", "m64n264k16.f32.bf16.bf16"),
        ("m64n16k16.f32.bf16.bf16", "m64n16k16.f16.bf16.bf16"),
        ("m64n16k16.f32.bf16.bf16", "m64n16k16.f32.bf16.f16"),
        ("m64n16k16.f32.bf16.bf16", "m64n16k256.s32.b1.b1.and.popc"),
        ("wgmma.mma_async.sync", "wgmma.mma_async.sp.sync"),
        ("%p, 1, 1, 0, 0;", "%p, 1, 1;"),
        ("%p, 1, 1, 0, 0;", "%p, 2, 1, 0, 0;"),
        ("%p, 1, 1, 0, 0;", "%p, 1, 1, 0, 2;"),
        ("%d6, %d7}", "%d6}"),
        ("wgmma.fence.sync.aligned", "wgmma.fence.aligned"),
        ("wgmma.fence.sync.aligned", "wgmma.wait.sync.aligned"),
    ],
)
def test_refuses_what_it_does_not_have(old: str, new: str) -> None:
    operands = Operands(_SHARED)
    text = kernel(_SHARED, len(operands.image))
    assert old in text
    with pytest.raises(UnknownInstruction, match="wgmma"):
        operands.run(text.replace(old, new))
