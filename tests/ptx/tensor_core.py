"""A kernel that multiplies with tcgen05.mma, and what it should find: what tests of sm_100 share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import matrices
from .launch import In, Machine, Out
from .snippets import run

LANES, COLUMNS = 128, 512
CHUNK = 16
"""Bytes that stay together, however shared memory is swizzled."""
NONE, BASE32, BY128, BY64, BY32 = 0, 1, 2, 4, 6
"""How a matrix descriptor calls the swizzles: of so many bytes, or of 128 by 32."""
WIDTH = {NONE: 16, BY32: 32, BY64: 64, BY128: 128, BASE32: 128}
HEAD = ".version 9.0\n.target sm_100a\n.address_size 64\n"


# ---- Matrices as shared memory holds them


@dataclass(frozen=True)
class Image:
    """A matrix laid out, its strides, and where each step along K begins."""

    data: np.ndarray
    leading: int
    stride: int
    steps: tuple[int, ...]

    def descriptor(self, swizzle: int) -> int:
        """Of a matrix that begins at 0."""
        return self.leading >> 4 << 16 | self.stride >> 4 << 32 | 1 << 46 | swizzle << 61


def laid_out(matrix: np.ndarray, swizzle: int, transposed: bool, depth: int) -> Image:
    """``matrix`` is [M or N, K], ``depth`` the elements of K of one product."""
    rows = np.ascontiguousarray(matrix.T if transposed else matrix)
    chunks = rows.view(np.uint8).reshape(rows.shape[0], -1, CHUNK)
    steps = range(matrix.shape[1] // depth)
    row = WIDTH[swizzle]
    if swizzle == NONE:
        # Core matrices of 8 rows by 16 bytes: one behind the other down the rows, then to the side.
        data = chunks.reshape(-1, 8, chunks.shape[1], CHUNK).transpose(2, 0, 1, 3).ravel()
        down, aside = 8 * CHUNK, chunks.shape[0] * CHUNK
        if transposed:
            return Image(data, down, aside, tuple(i * depth * CHUNK for i in steps))
        columns = depth * matrix.itemsize // CHUNK
        return Image(data, aside, down, tuple(i * columns * aside for i in steps))
    # Panels as wide as the swizzle, side by side; in each its rows lie one below the other.
    panels = chunks.reshape(chunks.shape[0], -1, row // CHUNK, CHUNK).transpose(1, 0, 2, 3)
    data = np.empty_like(panels)
    for i in range(panels.shape[1]):
        for chunk in range(panels.shape[2]):
            data[:, i, chunk ^ _swizzled(swizzle, i)] = panels[:, i, chunk]
    panel = panels[0].size
    if transposed:
        down = (4 if swizzle == BASE32 else 8) * row
        return Image(data.ravel(), panel, down, tuple(i * depth * row for i in steps))
    step = depth * matrix.itemsize
    starts = (i * step // row * panel + i * step % row for i in steps)
    return Image(data.ravel(), 0, 8 * row, tuple(starts))


def _swizzled(swizzle: int, row: int) -> int:
    """What the chunks of a row are XORed with: the pattern that a tensor map writes, too."""
    return {BY128: row % 8, BY64: row // 2 % 4, BY32: row // 4 % 2, BASE32: row % 4 * 2}[swizzle]


# ---- Elements


@dataclass(frozen=True)
class Type:
    """Of A and B: its kind of product, how the instruction descriptor calls it, its bytes."""

    kind: str
    code: int
    size: int

    @property
    def depth(self) -> int:
        """Elements of K of one product."""
        return 32 // self.size


TYPES = {
    "f16": Type("f16", 0, 2),
    "bf16": Type("f16", 1, 2),
    "tf32": Type("tf32", 2, 4),
    "e4m3": Type("f8f6f4", 0, 1),
    "e5m2": Type("f8f6f4", 1, 1),
}


def encoded(kind: str, integers: np.ndarray) -> np.ndarray:
    """Bits of small integers, which every type holds exactly."""
    floats = integers.astype(np.float32)
    if kind == "f16":
        return floats.astype(np.float16).view(np.uint16)
    if TYPES[kind].kind != "f8f6f4":
        words = floats.view(np.uint32)
        return (words >> 16).astype(np.uint16) if kind == "bf16" else words
    of_codes = [matrices.value(kind, code) for code in range(256)]
    return np.vectorize(of_codes.index, otypes=[np.uint8])(floats)


# ---- A kernel of one CTA


@dataclass(frozen=True)
class Product:
    """D [M, N] = A [M, K] B [N, K]' + D, and everything that an instruction says of it."""

    m: int = 128
    n: int = 32
    k: int = 64
    a: str = "bf16"
    b: str = "bf16"
    swizzles: tuple[int, int] = (BY128, BY128)
    transposed: tuple[bool, bool] = (False, False)
    negated: tuple[bool, bool] = (False, False)
    half: bool = False
    accumulates: bool = True
    lane: int = 0
    scale: int | None = None
    disabled: tuple[int, ...] | None = None
    a_in_tensor_memory: bool = False

    @property
    def depth(self) -> int:
        """Elements of K of one instruction."""
        return TYPES[self.a].depth

    @property
    def word(self) -> int:
        """The instruction descriptor."""
        types = TYPES[self.a].code << 7 | TYPES[self.b].code << 10
        flags = sum(bit << 13 + i for i, bit in enumerate((*self.negated, *self.transposed)))
        return (not self.half) << 4 | types | flags | self.n // 8 << 17 | self.m // 16 << 24

    def lanes(self) -> np.ndarray:
        """Where the rows of A and D lie."""
        if self.m == LANES:
            return np.arange(LANES)
        return np.array([32 * warp + self.lane + row for warp in range(4) for row in range(16)])


FENCE = "fence.proxy.async.shared::cta;"
READY = "bar.sync 0; // ready"
COMMIT = "@%leads tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%bar];"
WAIT = "wait: mbarrier.try_wait.parity.shared::cta.b64 %p, [%bar], 0; @!%p bra wait;"
INIT = "@%leads mbarrier.init.shared::cta.b64 [%bar], 1;"
ALLOC = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"
RELINQUISH = "@%first tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
_PROLOGUE = """
.reg .b32 %tid, %warp, %taddr, %mine, %at, %end, %piece, %bar, %word, %low, %v<64>;
.reg .b64 %base, %wide, %adesc, %bdesc; .reg .pred %p, %first, %leads, %enabled;
mov.u32 %tid, %tid.x; shr.u32 %warp, %tid, 5; mov.u32 %bar, bars;
setp.eq.u32 %first, %warp, 0; setp.eq.u32 %leads, %tid, 0;
"""
_ADDRESS = """bar.sync 0;
ld.shared.b32 %taddr, [where]; // each warp's lanes are its quarter
shl.b32 %mine, %warp, 21; add.u32 %mine, %mine, %taddr;
"""


def kernel(parameters: str, body: list[str], shared: int, columns: int = COLUMNS) -> str:
    """A kernel of 128 threads around a body that finds its tensor memory at %taddr."""
    lines = [
        f"{HEAD}.visible .entry product({', '.join(f'.param .u64 {p}' for p in parameters)})",
        f".reqntid 128 {{ .shared .align 1024 .b8 smem[{max(shared, 16)}];",
        ".shared .align 8 .b8 bars[16]; .shared .align 4 .b32 where;",
        _PROLOGUE, f"@%first {ALLOC} [where], {columns};", RELINQUISH, INIT, _ADDRESS, *body,
        dealloc(columns), "ret; }",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def dealloc(columns: int = COLUMNS) -> str:
    """How the kernel ends."""
    return f"bar.sync 0; @%first tcgen05.dealloc.cta_group::1.sync.aligned.b32 %taddr, {columns};"


def transfer(direction: str, tensor: str, columns: int, first: int = 0) -> list[str]:
    """Loads or stores columns of all lanes; a tensor in global memory has the other end."""
    size = next(size for size in (64, 32, 16, 8) if columns % size == 0)
    registers = ", ".join(f"%v{i}" for i in range(size))
    lines = [f"ld.param.u64 %base, [{tensor}];", f"mad.wide.u32 %base, %tid, {4 * columns}, %base;"]
    for column in range(0, columns, size):
        at = f"[%mine + {first + column}]"
        words = [f"[%base + {4 * (column + i)}]" for i in range(size)]
        if direction == "st":
            lines += [f"ld.global.b32 %v{i}, {word};" for i, word in enumerate(words)]
            lines.append(f"tcgen05.st.sync.aligned.32x32b.x{size}.b32 {at}, {{{registers}}};")
        else:
            lines.append(f"tcgen05.ld.sync.aligned.32x32b.x{size}.b32 {{{registers}}}, {at};")
            lines += [f"st.global.b32 {word}, %v{i};" for i, word in enumerate(words)]
    return [*lines, f"tcgen05.wait::{direction}.sync.aligned;"]


def copy_to_shared(tensor: str, size: int, to: int = 0) -> list[str]:
    """Bytes of a tensor, 16 a thread at a time."""
    return [
        f"ld.param.u64 %base, [{tensor}];", "mad.wide.u32 %base, %tid, 16, %base;",
        f"mov.u32 %at, smem; add.u32 %at, %at, {to}; add.u32 %end, %at, {size};",
        "shl.b32 %piece, %tid, 4; add.u32 %at, %at, %piece;",
        f"copy_{tensor}: setp.ge.u32 %p, %at, %end; @%p bra copied_{tensor};",
        "ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%base];",
        "st.shared.v4.b32 [%at], {%v0, %v1, %v2, %v3};",
        "add.u64 %base, %base, 2048; add.u32 %at, %at, 2048;", f"bra copy_{tensor};",
        f"copied_{tensor}:",
    ]  # fmt: skip


def describe(register: str, start: int, descriptor: int) -> list[str]:
    """A matrix descriptor of what begins there in shared memory."""
    return [
        f"mov.u32 %low, smem; add.u32 %low, %low, {start}; shr.u32 %low, %low, 4;",
        f"cvt.u64.u32 {register}, %low; or.b64 {register}, {register}, {descriptor};",
    ]


def multiply(product: Product, a: Image, b: Image, b_at: int) -> list[str]:
    """The instructions along K."""
    body = [f"mov.b32 %word, {product.word};"]
    lane = product.lane << 16
    mask = ""
    if product.disabled is not None:
        body += [f"mov.b32 %v{i}, {word};" for i, word in enumerate(product.disabled)]
        mask = "{%v0, %v1, %v2, %v3}, "
    scale = "" if product.scale is None else f", {product.scale}"
    opcode = f"tcgen05.mma.cta_group::1.kind::{TYPES[product.a].kind}"
    for i in range(product.k // product.depth):
        left = f"[%taddr + {lane + 256 + 8 * i}]" if product.a_in_tensor_memory else "%adesc"
        if not product.a_in_tensor_memory:
            body += describe("%adesc", a.steps[i], a.descriptor(product.swizzles[0]))
        body += describe("%bdesc", b_at + b.steps[i], b.descriptor(product.swizzles[1]))
        body += [
            f"setp.ne.u32 %enabled, {int(product.accumulates or i > 0)}, 0;",
            f"@%leads {opcode} [%taddr + {lane}], {left}, %bdesc, %word, {mask}%enabled{scale};",
        ]
    return body


def _text(product: Product, a: Image, b: Image) -> str:
    b_at = -(-a.data.size // 1024) * 1024
    body = copy_to_shared("b", b.data.size, b_at) + transfer("st", "c", product.n)
    if product.a_in_tensor_memory:
        body += transfer("st", "a", product.k * TYPES[product.a].size // 4, 256)
    else:
        body += copy_to_shared("a", a.data.size)
    body += [FENCE, READY, *multiply(product, a, b, b_at), COMMIT, WAIT]
    return kernel("abcd", [*body, *transfer("ld", "d", product.n)], b_at + b.data.size)


@dataclass
class Case:
    """The kernel of a product, and what it must leave in all lanes."""

    product: Product
    text: str
    arguments: list[In]
    expected: np.ndarray

    def run(self, text: str | None = None, machine: Machine | None = None) -> np.ndarray:
        """What it leaves there, or another text does."""
        found = self.arguments[-1].array
        machine = machine or Machine(seed=1)
        run(text or self.text, (1,), (LANES,), self.arguments, machine=machine)
        if self.product.half:
            return found.astype(np.uint16).view(np.float16).astype(np.float64)
        return found.view(np.float32).astype(np.float64)


def case(product: Product, draw: Callable[[tuple[int, int]], np.ndarray] | None = None) -> Case:
    """A product of small integers, whose sums are exact; or of what is drawn as bits of tf32."""
    rng = np.random.default_rng(product.word)
    if draw is None:
        left, right = (rng.integers(-3, 4, (rows, product.k)) for rows in (product.m, product.n))
        a, b = encoded(product.a, left), encoded(product.b, right)
    else:
        a, b = draw((product.m, product.k)), draw((product.n, product.k))
        left, right = (matrices.values("tf32", bits & 0xFFFFE000) for bits in (a, b))
    images = [
        laid_out(matrix, swizzle, transposed, product.depth)
        for matrix, swizzle, transposed in zip(
            (a, b), product.swizzles, product.transposed, strict=True
        )
    ]
    before = rng.integers(-9, 10, (LANES, product.n)).astype(np.float32)
    words = before.view(np.uint32)
    if product.half:
        words = before.astype(np.float16).view(np.uint16).astype(np.uint32)
    lanes = product.lanes()
    given = images[0].data
    if product.a_in_tensor_memory:
        rows = np.ascontiguousarray(a).view(np.uint32)
        given = np.zeros((LANES, rows.shape[1]), np.uint32)
        given[lanes] = rows

    expected = before.astype(np.float64)
    result = (-1) ** sum(product.negated) * (left @ right.T).astype(np.float64)
    if product.accumulates:
        scale = 0.5 ** ((product.scale or 0) * product.k // product.depth)
        result = result + scale * expected[lanes]
    disabled = np.zeros(LANES, bool)
    if product.disabled is not None:
        bits = np.array(product.disabled, np.uint32).view(np.uint8)
        disabled = np.unpackbits(bits, bitorder="little").astype(bool)
    expected[lanes] = np.where(disabled[lanes, None], expected[lanes], result)
    found = np.zeros((LANES, product.n), np.uint32)
    arguments = [In("a", given), In("b", images[1].data), In("c", words), Out("d", found)]
    return Case(product, _text(product, *images), arguments, expected)
