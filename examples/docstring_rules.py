"""Labelling functions: noisy rules that guess from a docstring what a call of the function gives back.

A rule votes for one class or abstains. It sees the docstring and the function's name, not the code.
The rules were written before any truth was labelled, and not changed after. Some are right nearly
always, some are guesses: which is which, the label model must find out from their votes alone. No rule
asks whether "return" is missing: it would fire only where those that look for the word are silent, and
the label model takes rules for independent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from stdlib_texts import Function
from torch import Tensor

CLASSES = ["nothing", "yes or no", "a number", "text", "several things", "another object"]
NOTHING, YES_OR_NO, NUMBER, TEXT, SEVERAL, OBJECT = range(len(CLASSES))


@dataclass(frozen=True)
class Rule:
    """Votes for `label` where `applies`, and abstains elsewhere."""

    name: str
    label: int
    applies: Callable[[Function], bool]


def opens_with(name: str, label: int, words: str) -> Rule:
    """The docstring's first word is one of these, as an order or as a statement: set, sets."""
    forms = {form for word in words.split() for form in (word, f"{word}s", f"{word}es")}
    return Rule(name, label, lambda f: f.text.split()[0].lower().strip(".,:;") in forms)


def says(name: str, label: int, pattern: str) -> Rule:
    compiled = re.compile(pattern, re.IGNORECASE)
    return Rule(name, label, lambda f: compiled.search(f.text) is not None)


def is_called(name: str, label: int, pattern: str) -> Rule:
    compiled = re.compile(pattern, re.IGNORECASE)
    return Rule(name, label, lambda f: compiled.search(f.name.rpartition(".")[2]) is not None)


_SOON = r"\breturn(s|ed|ing)?:?\s+(\S+\s+){0,4}?"  # the next words come soon after "return"

RULES = [
    opens_with(
        "opens with an act",
        NOTHING,
        "set add write delete remove close send print clear stop register update insert handle run "
        "process configure start install flush move reset call bind append raise assert fail log "
        "destroy shut kill wait change adjust draw store save restore initialize feed emit",
    ),
    is_called("is called like an act", NOTHING, r"^_?(set|add|do|on|write|del|close|assert|handle)"),
    says("a hook", NOTHING, r"\b(called (when|by|if|for|to|after|before)|overrid)"),
    says("says true or false", YES_OR_NO, r"\b(true|false)\b"),
    says("returns true or false", YES_OR_NO, r"\breturns?:?\s+\W?(true|false|whether|1 if)\b"),
    is_called("is called like a question", YES_OR_NO, r"^_?(is|has|can|should|in|contains|use)_?"),
    opens_with("opens with a test", YES_OR_NO, "test check determine whether does compare true"),
    says("returns a number", NUMBER, _SOON + r"(number|count|size|length|index|int|integer|float)\b"),
    says("says number", NUMBER, r"\b(integers?|floats?|numbers?|decimal|seconds|digits?)\b"),
    is_called("is called like a number", NUMBER, r"(count|index|len|size|num|time|no$|width|pos)"),
    says("returns text", TEXT, _SOON + r"(strings?|text|bytes|name|path|filename|str|line|url)\b"),
    says("says text", TEXT, r"\b(strings?|text|characters?|bytes|str)\b"),
    is_called("is called like text", TEXT, r"(str|name|path|quote|encode|format|repr|title|text)"),
    says(
        "returns several",
        SEVERAL,
        _SOON + r"(lists?|tuples?|dict|dictionary|sequence|iterator|iterable|pairs?|mapping|set of)\b",
    ),
    says("says several", SEVERAL, r"\b(lists?|iterat\w+|yields?|generators?|tuples?|dict\w*|all)\b"),
    is_called("is called like several", SEVERAL, r"([a-z]{3}s|list|iter|walk|split|all)$"),
    says(
        "returns an object",
        OBJECT,
        _SOON + r"(object|instance|class|copy|function|module|element|node|decorator|socket|widget)\b",
    ),
    opens_with(
        "opens with making", OBJECT, "create make construct open build copy new get find load convert"
    ),
    is_called(
        "is called like making", OBJECT, r"^_?(open|create|make|new|copy|from|build|parse|load|get_)"
    ),
]  # fmt: skip


def fired(functions: Sequence[Function], rules: Sequence[Rule] = RULES) -> Tensor:
    """Return which rules apply to which function, bool [functions, rules]."""
    rows = [[rule.applies(f) for rule in rules] for f in functions]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(functions), len(rules))


def rule_classes(rules: Sequence[Rule] = RULES) -> Tensor:
    """Return each rule's class, int64 [rules]."""
    return torch.tensor([rule.label for rule in rules])
