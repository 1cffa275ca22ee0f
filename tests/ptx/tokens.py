"""PTX text as tokens, and what every statement reads of them: names, numbers, lists."""

import re
import struct
from bisect import bisect

from .syntax import Float, Integer, PtxError

_TOKEN = re.compile(
    r"""(?: \s+ | //[^\n]* | /\*.*?\*/
      # Where an instruction stands in the source language says nothing about its execution.
      | \.loc\s+\d+\s+\d+\s+\d+
          (?:\s*,\s*function_name\s+[\w$.]+(?:\s*\+\s*\d+)?\s*,\s*inlined_at\s+\d+\s+\d+\s+\d+)?
      | \.file\s+\d+\s+"[^"]*"(?:\s*,\s*\d+\s*,\s*\d+)?
    )*(?:(
        [A-Za-z_$%][\w$]*(?:(?:\.|::)[\w$]+)*  # names and opcodes
      | [{}()\[\],;:@!|+\-=<>]
      | 0[fF][0-9a-fA-F]{8}\b | 0[dD][0-9a-fA-F]{16}\b | 0[xX][0-9a-fA-F]+U?\b | 0[bB][01]+U?\b
      | \d+(?:\.\d*(?:[eE][+-]?\d+)?|[eE][+-]?\d+)(?![\w.]) | \d+U?(?![\w.])
      | \.[A-Za-z_]\w*(?:::\w+)*               # directives
      | "[^"\n]*"
      | .                                      # no statement takes it
    ) | \Z)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)


class Tokens:
    """The tokens of a text and which is next; after the last stands an empty one."""

    def __init__(self, text):
        self.tokens, self.starts, self.at = [], [], 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        for match in _TOKEN.finditer(text):
            self.tokens.append(match[1] or "")
            self.starts.append(match.end() - len(match[1] or ""))

    def line(self, back=0):
        """The line of the next token, or of one before it."""
        return bisect(self.newlines, self.starts[self.at - back] - 1) + 1

    def error(self, sentence, line=None):
        return PtxError(f"line {line or self.line()}: {sentence}")

    def found(self):
        return f"found {self.tokens[self.at]!r}" if self.tokens[self.at] else "the text ends"

    def take(self):
        token = self.tokens[self.at]
        if not token:
            raise self.error("the text ends in a statement")
        self.at += 1
        return token

    def accept(self, token):
        if self.tokens[self.at] == token:
            self.at += 1
            return True
        return False

    def expect(self, token, where):
        if not self.accept(token):
            raise self.error(f"expected {token!r} {where}, {self.found()}")

    def skip_past(self, token, where):
        while self.tokens[self.at] not in (token, ""):
            self.at += 1
        self.expect(token, where)

    def listed(self, item):
        items = [item()]
        while self.accept(","):
            items.append(item())
        return tuple(items)

    def name(self, what):
        if not re.match(r"[A-Za-z_$%]", self.tokens[self.at]):
            raise self.error(f"expected {what}, {self.found()}")
        return self.take()

    def number(self, what):
        """A number with its sign."""
        if self.accept("-"):
            number = self.number(what)
            if isinstance(number, Integer):
                return Integer(-number.value)
            return Float(number.bits ^ 1 << number.width - 1, number.width)
        token = self.tokens[self.at]
        if not token[:1].isdigit():
            raise self.error(f"expected {what}, {self.found()}")
        self.at += 1
        prefix, digits = token[:2].lower(), token.rstrip("U")
        if prefix in ("0f", "0d"):
            return Float(int(token[2:], 16), 32 if prefix == "0f" else 64)
        if prefix in ("0x", "0b"):
            return Integer(int(digits, 0))
        if not digits.isdigit():
            return Float(int.from_bytes(struct.pack("<d", float(digits)), "little"), 64)
        if digits[0] == "0" and set(digits) & set("89"):
            raise self.error(f"{token} is no octal number", self.line(1))
        return Integer(int(digits, 8 if digits[0] == "0" else 10))

    def integer(self, what):
        number = self.number(what)
        if not isinstance(number, Integer):
            raise self.error(
                f"expected {what} as an integer, found {self.tokens[self.at - 1]!r}", self.line(1)
            )
        return number.value

    def natural(self, what):
        value = self.integer(what)
        if value < 0:
            raise self.error(f"expected {what} from 0, found {value}", self.line(1))
        return value

    def offset(self):
        """`+16`, `+-4`, `-4` behind a name, or nothing."""
        total = 0
        while self.tokens[self.at] in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total += sign * self.integer("an offset")
        return total
