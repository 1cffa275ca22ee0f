"""Reads PTX: `parse(text)` is a `Module`, or a `PtxError` that names the line and what was expected.

Names are resolved as they are read, so that scopes need no second look: an operand is the register,
the variable or the label that it means where it stands. What instructions do with their operands is
the machine's concern.
"""

from dataclasses import replace

from .syntax import (
    DIRECTIVES,
    LINKAGES,
    SPACES,
    SPECIAL,
    WIDTHS,
    Address,
    Arguments,
    Function,
    Instruction,
    Integer,
    Link,
    Module,
    Not,
    Pair,
    Prototype,
    Register,
    Sink,
    Special,
    Symbol,
    Target,
    Variable,
    Vector,
)
from .tokens import Tokens


def parse(text: str) -> Module:
    return _Parser(text).parse()


class _Scope:
    def __init__(self, parent=None):
        self.parent = parent
        self.names = {}  # registers, vectors of them, variables, prototypes
        self.ranges = {}  # "%r": type and count of `.reg .b32 %r<12>`
        self.labels = {}  # an instruction's index, or a tuple of Targets
        self.targets = []  # operands whose label hasn't been found

    def find(self, name):
        """What the name means here; a register of a range is made when it is first met."""
        scope = self
        while scope is not None:
            found = scope.names.get(name) or scope._of_range(name)
            if found is not None:
                return found
            scope = scope.parent
        return None

    def _of_range(self, name):
        stem = len(name)
        while name[stem - 1].isdigit():
            stem -= 1
            kind, count = self.ranges.get(name[:stem], ("", 0))
            if int(name[stem:]) < count and (name[stem] != "0" or stem == len(name) - 1):
                return self.names.setdefault(name, Register(name, kind))
        return None


class _Parser(Tokens):
    def __init__(self, text):
        super().__init__(text)
        self.module = Module(text)
        self.scope = _Scope()

    def parse(self):
        if not self.accept(".version"):
            raise self.error(f"this is not PTX, which starts with .version: {self.found()}")
        self.module.version = self.take()
        self.expect(".target", "after .version")
        self.module.target = self.listed(lambda: self.name("the name of a target"))
        while self.tokens[self.at]:
            self.top()
        return self.module

    def top(self):
        linkage = ""
        while self.tokens[self.at][1:] in LINKAGES:
            linkage = self.take()[1:]
        token = self.tokens[self.at]
        if token in (".entry", ".func"):
            self.function()
        elif token[1:] in SPACES and token != ".reg":
            for variable in self.variables(linkage):
                self.module_variable(variable)
        elif self.accept(".address_size"):
            if self.integer("a size") != 64:
                raise self.error("only .address_size 64 is read", self.line(1))
        elif token == ".pragma":
            self.pragma()
        elif token == ".section":
            # Debuggers read them.
            self.skip_past("}", "at the end of .section")
        elif token[:1] == ".":
            raise self.error(f"unknown directive {token}")
        else:
            raise self.error(f"expected a directive, {self.found()}")

    def pragma(self):
        # Advice to the assembler, such as "nounroll".
        self.skip_past(";", "after .pragma")

    # Variables

    def module_variable(self, variable):
        known = self.module.variables.get(variable.name)
        if known is None or known.linkage == "extern":
            self.module.variables[variable.name] = self.scope.names[variable.name] = variable
        elif variable.linkage != "extern":
            raise self.error(f"{variable.name} is declared twice", variable.line)

    def variables(self, linkage=""):
        """`.space [.align n] [.v2|.v4] .type name[sizes] [= initialiser], …;`"""
        first = self.declared(linkage)
        yield self.declarator(first)
        while self.accept(","):
            like = Variable("", first.space, first.type, self.line(), linkage, first.vector)
            like.alignment = first.alignment
            yield self.declarator(like)
        self.expect(";", f"after the declaration of {first.name}")

    def declared(self, linkage=""):
        """What stands before the name in a declaration."""
        line = self.line()
        made = Variable("", self.take()[1:], "", line, linkage)
        while self.tokens[self.at][:1] == ".":
            word = self.take()[1:]
            if word == "align":
                made.alignment = self.natural("an alignment")
            elif word in ("v2", "v4", "v8"):
                made.vector = int(word[1:])
            elif word == "ptr" and made.type:
                # What it points to says nothing about the parameter's own place.
                made.pointer = True
                if self.tokens[self.at][1:] in SPACES:
                    self.at += 1
                if self.accept(".align"):
                    self.integer("an alignment")
            elif word == "attribute":
                # .managed and .unified say who else sees the memory.
                self.skip_past(")", "after .attribute")
            elif word in WIDTHS and not made.type and (word != "pred" or made.space == "reg"):
                made.type = word
            else:
                raise self.error(f"unknown type .{word}", self.line(1))
        if not made.type:
            raise self.error(f"expected a type, {self.found()}")
        return made

    def declarator(self, made):
        made.name, shape = self.name("the name of a variable"), []
        while self.accept("["):
            shape.append(None if self.tokens[self.at] == "]" else self.natural("a size"))
            self.expect("]", "after an array's size")
        if self.accept("="):
            if made.space not in ("global", "const"):
                raise self.error(
                    f"{made.name} has an initialiser, but lies in .{made.space}", made.line
                )
            made.initial = self.initialiser()
            if shape[:1] == [None] and isinstance(made.initial, tuple):
                shape[0] = len(made.initial)
        if None in shape[1:]:
            raise self.error(f"only the first size of {made.name} may be left open", made.line)
        made.shape = tuple(shape)
        if made.space in ("global", "const") and made.linkage != "extern":
            self.module.statics.append(made)
        return made

    def initialiser(self):
        """A number, `name+4`, `generic(name)+4`, `0xFF00(name)`, or these in braces."""
        if self.accept("{"):
            items = () if self.tokens[self.at] == "}" else self.listed(self.initialiser)
            self.expect("}", "after an initialiser")
            return items
        if self.tokens[self.at][:1] == "-" or self.tokens[self.at][:1].isdigit():
            number = self.number("a number")
            if not isinstance(number, Integer) or not self.accept("("):
                return number
            link = self.link()
            self.expect(")", "after a masked address")
            return replace(link, mask=number.value)
        return self.link()

    def link(self):
        name = self.name("a number or the name of a variable")
        if name == "generic" and self.accept("("):
            name = self.name("the name of a variable")
            self.expect(")", "after generic(")
        return Link(name, self.offset())

    def registers(self):
        """`.reg [.v2|.v4] .type %r<12>, name, …;`"""
        like = self.declared()
        self.listed(lambda: self.register(like))
        self.expect(";", "after .reg")

    def register(self, like):
        name, names = self.name("the name of a register"), self.scope.names
        if name in names or name in self.scope.ranges:
            raise self.error(f"register {name} is declared twice", self.line(1))
        if self.accept("<"):
            if like.vector > 1:
                raise self.error(f"vectors of registers can't be counted: {name}<…>", self.line(1))
            self.scope.ranges[name] = like.type, self.natural("a number of registers")
            self.expect(">", "after a number of registers")
        elif like.vector == 1:
            names[name] = Register(name, like.type)
        else:
            parts = [Register(f"{name}.{part}", like.type) for part in "xyzw"[: like.vector]]
            names[name] = Vector(tuple(parts))
            for letters in ("xyzw", "rgba"):
                names.update(
                    (f"{name}.{letter}", part) for letter, part in zip(letters, parts, strict=False)
                )

    # Functions

    def function(self):
        """`.entry name (parameters) … { … }`, `.func (returned) name (parameters) … { … }` or `;`"""
        line, kernel = self.line(), self.take() == ".entry"
        self.scope = outer = _Scope(self.scope)
        returns = () if kernel else self.parameters()
        name = self.name("the name of a function")
        made = Function(name, kernel, line, returns, self.parameters())
        if kernel and any(isinstance(param, Register) for param in made.params):
            raise self.error(f"kernel {made.name} has a parameter in .reg", line)
        while self.tokens[self.at][:1] == ".":
            self.directive(made)
        known = self.module.functions.setdefault(made.name, made)
        if not self.accept(";"):
            if known.body is not None:
                raise self.error(f"{made.name} is defined twice", line)
            # Instructions that have been read hold what was declared.
            known.returns, known.params = made.returns, made.params
            known.directives = made.directives
            self.body(known)
        self.scope = outer.parent

    def parameters(self):
        made = []
        if self.accept("(") and not self.accept(")"):
            made = self.listed(self.parameter)
            self.expect(")", "after parameters")
        return tuple(made)

    def parameter(self):
        if self.tokens[self.at] not in (".param", ".reg"):
            raise self.error(f"expected .param, {self.found()}")
        made = self.declared()
        if made.space == "param":
            self.declarator(made)
        else:
            made = Register(self.name("the name of a register"), made.type)
        if made.name != "_":
            self.scope.names[made.name] = made
        return made

    def directive(self, made):
        word = self.tokens[self.at][1:]
        if word == "pragma":
            self.pragma()
        elif word not in DIRECTIVES:
            raise self.error(f"unknown directive .{word} of {made.name}")
        else:
            self.at += 1
            most = DIRECTIVES[word]
            numbers = self.listed(lambda: self.natural(f"a number for .{word}")) if most else ()
            if len(numbers) > most:
                raise self.error(
                    f".{word} of {made.name} has {len(numbers)} numbers, expected at most {most}"
                )
            made.directives[word] = numbers

    def body(self, made):
        opened, outer = self.line(), self.scope
        self.expect("{", f"before the body of {made.name}")
        made.body, self.scope = [], _Scope(outer)
        while self.scope is not outer:
            token = self.tokens[self.at]
            if token == "{":
                self.scope = _Scope(self.scope)
                self.at += 1
            elif token == "}":
                self.leave(outer)
                self.at += 1
            elif token[:1] == ".":
                self.declaration(token)
            elif not token:
                raise self.error(f"the body of {made.name} has no end", opened)
            elif self.tokens[self.at + 1] == ":":
                self.label(len(made.body))
            else:
                made.body.append(self.instruction())
        made.end = self.line(1)

    def leave(self, outer):
        """Ends a scope, whose labels are what its branches go to, and those of scopes within it."""
        left, self.scope = self.scope, self.scope.parent
        for target in left.targets:
            found = left.labels.get(target.name)
            if isinstance(found, tuple):
                target.table = found
            elif found is not None:
                target.index = found
            elif self.scope is not outer:
                self.scope.targets.append(target)
            else:
                missing = "label {} is missing" if target.branch else "{} is not declared"
                raise self.error(missing.format(target.name), target.line)

    def declaration(self, token):
        if token == ".reg":
            self.registers()
        elif token == ".pragma":
            self.pragma()
        elif token[1:] in SPACES:
            for variable in self.variables():
                if variable.name in self.scope.names:
                    raise self.error(f"{variable.name} is declared twice", variable.line)
                self.scope.names[variable.name] = variable
        else:
            raise self.error(f"unknown directive {token}")

    def label(self, index):
        name = self.take()
        if name in self.scope.labels:
            raise self.error(f"label {name} stands twice", self.line(1))
        self.expect(":", "after a label")
        if self.accept(".branchtargets"):
            self.scope.labels[name] = self.listed(
                lambda: self.target(self.name("a label"), branch=True)
            )
            self.expect(";", "after .branchtargets")
        elif self.tokens[self.at] in (".callprototype", ".calltargets"):
            self.skip_past(";", f"after {name}")
            self.scope.names[name] = Prototype(name)
        else:
            self.scope.labels[name] = index

    def target(self, name, branch):
        made = Target(name, self.line(1), branch)
        self.scope.targets.append(made)
        return made

    # Instructions

    def instruction(self):
        line, guard, negated = self.line(), None, False
        if self.accept("@"):
            negated = self.accept("!")
            guard = self.predicate()
        opcode = self.tokens[self.at]
        if not opcode[:1].islower():
            raise self.error(f"expected an instruction, {self.found()}")
        self.at += 1
        while self.tokens[self.at][:1] == ".":
            opcode += self.take()
        self.branch = opcode.startswith(("bra", "brx"))
        read = self.argument if opcode.startswith("call") else self.operand
        operands = () if self.tokens[self.at] == ";" else self.listed(read)
        self.expect(";", f"or ',' after an operand of {opcode}" if operands else f"after {opcode}")
        return Instruction(line, opcode, operands, guard, negated)

    def predicate(self):
        name = self.name("a predicate")
        found = self.scope.find(name)
        if not isinstance(found, Register) or found.type != "pred":
            raise self.error(f"{name} is not declared as a predicate", self.line(1))
        return found

    def argument(self):
        """What a call has between its commas."""
        if self.accept("("):
            items = () if self.tokens[self.at] == ")" else self.listed(self.operand)
            self.expect(")", "after arguments")
            return Arguments(items)
        return self.operand()

    def operand(self):
        token = self.take()
        made = self.scope.names.get(token) or self.other_operand(token)
        if isinstance(made, Variable):
            made = Symbol(made, self.offset())
        if self.tokens[self.at] == "|":
            self.at += 1
            made = Pair(made, self.operand())
        return made

    def other_operand(self, token):
        if token == "[":
            base, offset = self.operand(), self.offset()
            rest = self.listed(self.operand) if self.accept(",") else ()
            self.expect("]", "after an address")
            return Address(base, offset, rest)
        if token == "{":
            items = self.listed(self.operand)
            self.expect("}", "after a vector")
            return Vector(items)
        if token == "!":
            return Not(self.predicate())
        if token == "_":
            return Sink()
        if token == "-" or token[:1].isdigit():
            self.at -= 1
            return self.number("a number")
        return self.named(token)

    def named(self, token):
        found = self.scope.find(token)
        if found is not None:
            return found
        if token in SPECIAL:
            return Special(token)
        if token == "WARP_SZ":
            return Integer(32)
        if token in self.module.functions:
            return Symbol(self.module.functions[token])
        if token[:1] == "%":
            raise self.error(f"register {token} is not declared", self.line(1))
        self.at -= 1
        return self.target(self.name("an operand"), self.branch)
