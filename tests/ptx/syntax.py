"""What PTX consists of, as plain objects: modules, functions, variables, instructions, operands."""

import math
from dataclasses import dataclass, field

# Bits of a type (PTX ISA, "Fundamental Types" and "Packed Data Types").
WIDTHS = {
    **{kind + str(bits): bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{
        "pred": 1,
        "b128": 128,
        "f16": 16,
        "bf16": 16,
        "f16x2": 32,
        "bf16x2": 32,
        "f32": 32,
        "f64": 64,
    },
}
SPACES = ("reg", "param", "local", "shared", "global", "const")
LINKAGES = ("extern", "visible", "weak", "common")
# Between a function's parameters and its body, with how many numbers follow at most.
DIRECTIVES = {
    **dict.fromkeys(("reqntid", "maxntid", "reqnctapercluster"), 3),
    **dict.fromkeys(("minnctapersm", "maxnctapersm", "maxnreg", "maxclusterrank"), 1),
    **dict.fromkeys(("abi_preserve", "abi_preserve_control"), 1),
    **dict.fromkeys(("explicitcluster", "noreturn"), 0),
}
_GRIDS = (
    "tid",
    "ntid",
    "ctaid",
    "nctaid",
    "clusterid",
    "nclusterid",
    "cluster_ctaid",
    "cluster_nctaid",
)
# PTX ISA, "Special Registers".
SPECIAL = {
    *(f"%{grid}{part}" for grid in _GRIDS for part in ("", ".x", ".y", ".z", ".w")),
    *(f"%lanemask_{which}" for which in ("eq", "le", "lt", "ge", "gt")),
    *(f"%pm{i}{width}" for i in range(8) for width in ("", "_64")),
    *(f"%envreg{i}" for i in range(32)),
    *(f"%reserved_smem_offset_{which}" for which in ("begin", "end", "cap", "0", "1")),
    *("%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid", "%is_explicit_cluster"),
    *("%cluster_ctarank", "%cluster_nctarank", "%clock", "%clock_hi", "%clock64"),
    *("%globaltimer", "%globaltimer_lo", "%globaltimer_hi", "%current_graph_exec"),
    *("%total_smem_size", "%aggr_smem_size", "%dynamic_smem_size"),
}


class PtxError(ValueError):
    """One sentence about PTX that can't be read, laid out or given its arguments."""


# Declarations


@dataclass(eq=False, slots=True)
class Register:
    name: str
    type: str

    @property
    def width(self):
        """Bits in the machine, which keeps 8 bits in 16."""
        return 1 if self.type == "pred" else max(16, WIDTHS[self.type])

    def __str__(self):
        return self.name


@dataclass(eq=False, slots=True)
class Variable:
    """A variable or a parameter. `shape` holds an array's sizes, None for a first one left open."""

    name: str
    space: str
    type: str
    line: int
    linkage: str = ""
    vector: int = 1
    shape: tuple = ()
    alignment: int = 0  # 0: that of an element
    pointer: bool = False
    initial: object = None  # Integer, Float, Link or a tuple of these

    @property
    def element(self):
        """Bytes of a scalar in it."""
        return WIDTHS[self.type] // 8

    @property
    def align(self):
        return self.alignment or self.element * self.vector

    def __str__(self):
        return self.name

    @property
    def size(self):
        return self.element * self.vector * math.prod(n or 0 for n in self.shape)


@dataclass(eq=False, slots=True)
class Function:
    """A kernel (`.entry`) or a function; `body` is None where it is only declared."""

    name: str
    kernel: bool
    line: int
    returns: tuple = ()
    params: tuple = ()
    directives: dict = field(default_factory=dict)
    body: list | None = None
    end: int = 0  # line of the closing brace


@dataclass(eq=False, slots=True)
class Module:
    text: str
    version: str = ""
    target: tuple = ()
    functions: dict = field(default_factory=dict)
    variables: dict = field(default_factory=dict)  # of module scope, by name
    statics: list = field(
        default_factory=list
    )  # those in .global and .const memory, whatever their scope
    memory: dict = field(default_factory=dict)  # their storage, as soon as a kernel is laid out

    @property
    def kernels(self):
        return [f.name for f in self.functions.values() if f.kernel and f.body is not None]


@dataclass(slots=True)
class Instruction:
    line: int
    opcode: str
    operands: tuple
    guard: Register | None = None
    negated: bool = False

    @property
    def word(self):
        return self.opcode.split(".")[0]

    def __str__(self):
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {_listed(self.operands)}".rstrip() + ";"


# Operands, beside registers


def _listed(items):
    return ", ".join(map(str, items))


@dataclass(frozen=True, slots=True)
class Integer:
    value: int

    def __str__(self):
        return str(self.value)


@dataclass(frozen=True, slots=True)
class Float:
    """A pattern of 32 bits (0f…) or of 64 (0d…, 0.5)."""

    bits: int
    width: int

    def __str__(self):
        return f"0f{self.bits:08X}" if self.width == 32 else f"0d{self.bits:016X}"


@dataclass(frozen=True, slots=True)
class Special:
    name: str

    def __str__(self):
        return self.name


@dataclass(frozen=True, slots=True)
class Sink:
    def __str__(self):
        return "_"


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable, plus a constant; or a function."""

    target: Variable | Function
    offset: int = 0

    def __str__(self):
        return self.target.name + (f"+{self.offset}" if self.offset else "")


@dataclass(frozen=True, slots=True)
class Prototype:
    """What `.callprototype` and `.calltargets` give a name."""

    name: str

    def __str__(self):
        return self.name


@dataclass(frozen=True, slots=True)
class Not:
    register: Register

    def __str__(self):
        return f"!{self.register}"


@dataclass(frozen=True, slots=True)
class Vector:
    """{a, b, …}"""

    items: tuple

    def __str__(self):
        return f"{{{_listed(self.items)}}}"


@dataclass(frozen=True, slots=True)
class Pair:
    """d|p"""

    first: object
    second: object

    def __str__(self):
        return f"{self.first}|{self.second}"


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset, rest…]"""

    base: object
    offset: int = 0
    rest: tuple = ()

    def __str__(self):
        return f"[{_listed((str(self.base) + (f'+{self.offset}' if self.offset else ''), *self.rest))}]"


@dataclass(frozen=True, slots=True)
class Arguments:
    """What stands in parentheses in a call."""

    items: tuple

    def __str__(self):
        return f"({_listed(self.items)})"


@dataclass(eq=False, slots=True)
class Target:
    """A label: `index` is that of the instruction behind it, `table` the Targets of `.branchtargets`."""

    name: str
    line: int
    branch: bool  # it is an operand of a branch
    index: int | None = None
    table: tuple | None = None

    def __str__(self):
        return self.name


@dataclass(frozen=True, slots=True)
class Link:
    """In an initialiser: a variable's address plus a constant; a mask chooses one of its bytes."""

    name: str
    offset: int
    mask: int | None = None
