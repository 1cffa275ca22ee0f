"""One kernel of a module, laid out for the machine: `layout(module, kernel_name)` is a `Program`.

Registers, shared and local memory, parameters and the `.param` space of calls get their places here.
Functions that the kernel calls are laid out beside it, each with registers and memory of its own: that
is why recursion is refused.
"""

from dataclasses import dataclass, replace

from .params import Param, packed_argument
from .storage import Buffer, allocate, pattern
from .syntax import (
    Address,
    Arguments,
    Float,
    Function,
    Instruction,
    Integer,
    Module,
    Not,
    Pair,
    PtxError,
    Register,
    Sink,
    Special,
    Symbol,
    Target,
    Variable,
    Vector,
)

# How an address in a space is written, and which of the program's sizes it counts in.
PLACES = {"shared": ("H", "shared"), "local": ("D", "local"), "param": ("Q", "scratch")}
DYNAMIC_ALIGNMENT = 1024  # of `.extern .shared` memory, as TMA's and wgmma's swizzles want it


@dataclass(frozen=True)
class Program:
    """A kernel as the machine reads it (`text`), and what its launches and reports need."""

    name: str
    text: str
    params: tuple[Param, ...]
    params_size: int
    shared: int  # bytes known before a launch
    static: int  # of these, without what aligns a launch's own shared memory behind them
    dynamic: int | None  # where that starts; None: the kernel names none
    variables: tuple[tuple[int, str], ...]  # offsets and names of those in shared memory, ascending
    memory: tuple[Buffer, ...]
    lines: tuple[str, ...]  # the PTX
    registers: tuple[str, ...]  # names, by number
    directives: dict[str, tuple[int, ...]]  # .maxnreg and the like: their numbers
    target: str  # the module's, as sm_90a

    def pack(self, *values: int | float | bytes) -> bytes:
        """The parameter buffer: an int or a float for each parameter, bytes for an array."""
        if len(values) != len(self.params):
            raise PtxError(f"{self.name} takes {len(self.params)} arguments, not {len(values)}")
        packed = bytearray(self.params_size)
        for param, value in zip(self.params, values, strict=True):
            argument = packed_argument(self.name, param, value)
            packed[param.offset : param.offset + param.size] = argument
        return bytes(packed)


def layout(module: Module, kernel_name: str) -> Program:
    kernel = module.functions.get(kernel_name)
    if kernel is None or not kernel.kernel or kernel.body is None:
        there = ", ".join(module.kernels) or "none"
        raise PtxError(f"there is no kernel {kernel_name}; the module's kernels: {there}")
    return _Layout(module, kernel).program()


@dataclass(frozen=True)
class _Entry:
    """A function's first instruction, as the operand of a lowered call."""

    function: Function


def _aligned(offset, alignment):
    return -(-offset // alignment) * alignment


def _three(sizes):
    return (*sizes, 1, 1)[:3] if sizes else (0, 0, 0)


def _symbols(operands):
    for o in operands:
        if isinstance(o, Symbol):
            yield o
        elif isinstance(o, Vector):
            yield from _symbols(o.items)
        elif isinstance(o, Pair):
            yield from _symbols((o.first, o.second))
        elif isinstance(o, Address):
            yield from _symbols((o.base, *o.rest))


class _Layout:
    def __init__(self, module, kernel):
        self.module, self.kernel, self.line = module, kernel, kernel.line
        self.sizes = dict.fromkeys(("shared", "local", "params", "scratch"), 0)
        self.dynamic = None
        self.places = {}  # variable: its letter and its offset or address
        self.registers = {}  # register: its number
        self.starts = {}  # function: for each of its instructions, the index of the first that it became
        self.code = []  # function and instruction, with calls lowered

    def error(self, sentence):
        return PtxError(f"line {self.line}: {sentence}")

    def program(self):
        allocate(self.module)
        for variable in self.kernel.params:
            self.place(variable, "M", "params")
        for function in list(self.reached(self.kernel, ())):
            self.lower(function)
        self.place_symbols()
        code = [self.instruction(function, instruction) for function, instruction in self.code]
        return Program(
            name=self.kernel.name,
            text="\n".join((*self.head(), *code, "")),
            params=tuple(map(self.param, self.kernel.params)),
            params_size=self.sizes["params"],
            shared=self.sizes["shared"],
            static=self.static,
            dynamic=self.dynamic,
            variables=tuple(
                sorted((at, v.name) for v, (letter, at) in self.places.items() if letter == "H")
            ),
            memory=tuple(self.module.memory.values()),
            lines=tuple(self.module.text.split("\n")),
            registers=tuple(register.name for register in self.registers),
            directives=self.kernel.directives,
            target=self.module.target[0],
        )

    def head(self):
        widths = [register.width for register in self.registers]
        yield f"kernel {self.kernel.name}"
        yield " ".join(map(str, ("regs", len(widths), *widths)))
        yield from (f"{space} {size}" for space, size in self.sizes.items())
        yield "cluster {} {} {}".format(*_three(self.kernel.directives.get("reqnctapercluster")))
        yield f"code {len(self.code)}"

    # Places

    def place(self, variable, letter, space):
        if None in variable.shape:
            raise self.error(f"{variable.name} has no size")
        offset = _aligned(self.sizes[space], variable.align)
        self.sizes[space] = offset + variable.size
        self.places[variable] = letter, offset

    def param(self, variable):
        array = bool(variable.shape) or variable.vector > 1
        offset, size = self.places[variable][1], variable.size
        return Param(
            variable.name, variable.type, offset, size, variable.align, array, variable.pointer
        )

    def place_symbols(self):
        """Gives each variable that the code names its place; a launch's shared memory lies behind."""
        launched = []
        for _, instruction in self.code:
            self.line = instruction.line
            for variable in (symbol.target for symbol in _symbols(instruction.operands)):
                if isinstance(variable, Function):
                    raise self.error(
                        f"the address of {variable.name}: indirect calls are not executed"
                    )
                if variable in self.places:
                    continue
                if variable.space in ("global", "const"):
                    self.places[variable] = "I", self.buffer(variable).address
                elif variable.space == "shared" and variable.linkage == "extern":
                    launched.append(variable)
                else:
                    self.place(variable, *PLACES[variable.space])
        self.static = self.sizes["shared"]
        if launched:
            self.dynamic = self.sizes["shared"] = _aligned(self.sizes["shared"], DYNAMIC_ALIGNMENT)
            self.places.update((variable, ("H", self.dynamic)) for variable in launched)

    def buffer(self, variable):
        if variable.linkage == "extern":
            variable = self.module.variables.get(variable.name, variable)
        if variable not in self.module.memory:
            raise self.error(f"{variable.name} is extern, and the module doesn't define it")
        return self.module.memory[variable]

    # Calls

    def reached(self, function, path):
        """The function and all that it calls, each once."""
        if function in path:
            cycle = " calls ".join(f.name for f in (*path[path.index(function) :], function))
            raise self.error(f"recursion is not executed: {cycle}")
        if function in self.starts:
            return
        self.starts[function] = []
        yield function
        for instruction in function.body:
            if instruction.word == "call":
                self.line = instruction.line
                callee = self.callee(instruction)
                if callee.name != "__assertfail":
                    yield from self.reached(callee, (*path, function))

    def callee(self, call):
        functions = [o.target for o in call.operands if isinstance(o, Symbol)]
        if len(functions) != 1 or not isinstance(functions[0], Function):
            raise self.error("indirect calls are not executed")
        function = functions[0]
        if function.kernel:
            raise self.error(f"{function.name} is a kernel, which can't be called")
        if function.body is None and function.name != "__assertfail":
            raise self.error(f"{function.name} is an extern function, which is not executed")
        return function

    def lower(self, function):
        starts = self.starts[function]
        for instruction in function.body:
            starts.append(len(self.code))
            self.line = instruction.line
            lowered = self.call(instruction) if instruction.word == "call" else (instruction,)
            self.code.extend((function, each) for each in lowered)
        # Whoever runs past the last instruction, or branches there, returns.
        starts.append(len(self.code))
        self.code.append((function, Instruction(function.end, "ret", ())))

    def call(self, call):
        """Copies arguments to the function's parameters, calls, copies back what it returns."""
        function = self.callee(call)
        if function.name == "__assertfail":
            return [replace(call, opcode="assertfail", operands=())]
        at = next(i for i, o in enumerate(call.operands) if isinstance(o, Symbol))
        returned, given = (
            [o for part in parts if isinstance(part, Arguments) for o in part.items]
            for parts in (call.operands[:at], call.operands[at + 1 :])
        )
        if (len(given), len(returned)) != (len(function.params), len(function.returns)):
            takes = f"takes {len(function.params)} arguments and returns {len(function.returns)}"
            raise self.error(f"{function.name} {takes}, not {len(given)} and {len(returned)}")
        before = [self.copy(*both) for both in zip(function.params, given, strict=True)]
        after = [
            self.copy(*both)
            for both in zip(returned, function.returns, strict=True)
            if not isinstance(both[0], Sink)
        ]
        lowered = [*before, ("call", (_Entry(function),)), *after]
        return [replace(call, opcode=opcode, operands=operands) for opcode, operands in lowered]

    def copy(self, to, source):
        """An instruction that copies between `.param` variables, registers and numbers."""
        to, source = (o.target if isinstance(o, Symbol) else o for o in (to, source))
        variables = [o for o in (to, source) if isinstance(o, Variable)]
        if any(v.space != "param" or v.size != variables[0].size for v in variables):
            raise self.error(f"{source} can't be passed as {to}")
        if len(variables) == 2:
            return "copy.scratch", (Symbol(to), Symbol(source), Integer(to.size))
        if isinstance(to, Variable):
            return f"st.param.{to.type}", (Address(Symbol(to)), source)
        if isinstance(source, Variable):
            return f"ld.param.{source.type}", (to, Address(Symbol(source)))
        return f"mov.{to.type}", (to, source)

    # Text

    def instruction(self, function, instruction):
        self.function, self.opcode, self.line = function, instruction.opcode, instruction.line
        guard = self.register(instruction.guard) if instruction.guard else -1
        operands = [self.operand(o) for o in instruction.operands]
        head = f"I {self.line} {self.opcode} {guard} {int(instruction.negated)} {len(operands)}"
        return " ".join((head, *operands))

    def register(self, register):
        return self.registers.setdefault(register, len(self.registers))

    def operand(self, o):
        match o:
            case Register():
                return f"R {self.register(o)}"
            case Integer(value):
                return self.integer(value)
            case Address(base, offset, rest):
                return " ".join((f"A {offset} {1 + len(rest)}", *map(self.operand, (base, *rest))))
            case Vector(items):
                return " ".join((f"V {len(items)}", *map(self.operand, items)))
            case Symbol(variable, offset):
                letter, start = self.places[variable]
                return f"{letter} {start + offset}"
            case Special(name):
                return f"S {name}"
            case Float():
                return self.integer(self.bits(o))
            case Not(register):
                return f"N {self.register(register)}"
            case Pair(first, second):
                return f"P {self.operand(first)} {self.operand(second)}"
            case Sink():
                return "Z"
            case Target(table=None, index=index):
                return f"L {self.starts[self.function][index]}"
            case Target(table=table):
                return " ".join((f"T {len(table)}", *(self.operand(each)[2:] for each in table)))
            case _Entry(function):
                return f"L {self.starts[function][0]}"
        raise self.error(f"{o} is no operand of {self.opcode}")

    def integer(self, value):
        if not -(1 << 63) <= value < 1 << 64:
            raise self.error(f"{value} has more than 64 bits")
        return f"I {(value + (1 << 63)) % (1 << 64) - (1 << 63)}"

    def bits(self, number):
        """A literal in the type of the instruction's sources, which is its last."""
        types = [word for word in self.opcode.split(".") if word in ("f32", "f64", "b64")]
        if number.width == 64 and (not types or self.opcode == "slct.f64.f32"):
            raise self.error(f"{self.opcode} takes no double such as {number}")
        return pattern(number, int(types[-1][1:]) if types else 32)
