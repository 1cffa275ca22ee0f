"""``lorafast bench compare`` on records of which something is spoilt: a table, or one sentence."""

import copy
import json
import math

import pytest
import torch
from lorafast.bench.common.problem import Problem
from lorafast.bench.common.record import Record, read
from lorafast.bench.common.shapes import Shape
from lorafast.bench.compare import compare
from lorafast.bench.layer import Row
from lorafast.bench.models import Row as Step

from lorafast.cli import main

PROBLEM = Problem(Shape("tiny", 16, 24, 40), 4, "fp32", "fp32", 0.0)
REMOVED = ...
DEEP = "[" * 100_000 + "]" * 100_000
MUTANTS = [
    REMOVED, None, True, 0, -1, 10**400, 1.5, 1e308, math.nan, math.inf, "", "x", "\ud800", [], [None],
    [0.0], ["x"], [[1.0]], [1e308, 1e-308], {}, {"x": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recorded run with a row of each kind, and where it is."""
    path = tmp_path_factory.mktemp("runs") / "a.json"
    record = Record(torch.device("cpu"), ["lorafast", "bench"], path)
    times = {"samples": [1.1, 1.2], "frozen_samples": [1.0, 1.0]}
    record.add("layer", [Row(PROBLEM, "both", "lorafast", **times)])
    record.add("sweep", [Row(PROBLEM, "both", "peft", **times)])
    record.add("call_overhead", [Row(PROBLEM, "fwd", "aten", **times)])
    record.add("models", [Step("qwen", 1, 28, 64, 8, 4, "fp32", "lorafast", **times)])
    record.finish()
    return path


def places(value, path=()):
    """The places in a record that ``compare`` asks for, a kind of rows of each type."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            if path != ("machine",) and key not in ("clock_state", "sweep", "call_overhead"):
                yield from places(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))
    if path == ("machine",):
        yield from ((*path, "device"), (*path, "commit"))


def mutated(content, path, value):
    content = copy.deepcopy(content)
    *parents, last = path
    at = content
    for parent in parents:
        at = at[parent]
    if value is REMOVED:
        del at[last]
    else:
        at[last] = value
    return content


def refusal(before, after):
    """The sentence that two runs are refused with, None if they are compared."""
    try:
        compare(before, after)
    except ValueError as error:
        return str(error)
    return None


def test_a_spoilt_record_is_compared_or_refused_in_a_sentence(whole, tmp_path):
    content = read(whole)
    file = tmp_path / "b.json"
    tried = refused = 0
    for path in places(content):
        for value in MUTANTS:
            file.write_text(json.dumps(mutated(content, path, value)), encoding="utf-8")
            tried += 1
            sentence = refusal(*((whole, file) if tried % 2 else (file, whole)))
            if sentence is not None:
                assert str(file) in sentence, (path, value)
                assert len(sentence) < 500
                refused += 1
    assert tried > 700
    assert refused > tried / 2


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("layer",), {}, "layer is {}, expected a list"),
        (("layer", 0), 7, "layer[0] is 7, expected an object"),
        (("layer", 0, "problem"), None, "layer[0].problem is None, expected an object"),
        (("layer", 0, "problem", "r"), "4", "layer[0].problem.r is '4', expected a whole number"),
        (("layer", 0, "problem", "rank"), 4, "problem has a field 'rank', which is not known"),
        (("layer", 0, "contender"), REMOVED, "layer[0] has no contender"),
        (("layer", 0, "samples", 0), 0.0, "layer[0] has a sample that is no time"),
        (("layer", 0, "samples"), [1.0], "has 1 samples beside 2 of the frozen layer"),
        (("models", 0, "tokens"), 1.5, "models[0].tokens is 1.5, expected a whole number"),
        (("machine",), [], "machine is []"),
        (("machine", "device"), 3, "its machine's device is 3"),
        (("complete",), "yes", "complete is 'yes'"),
        (("format",), ["x"] * 10_000, "its format is ['x', "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_spoilt_is_named(whole, tmp_path, capsys, path, value, said):
    file = tmp_path / "b.json"
    file.write_text(json.dumps(mutated(read(whole), path, value)), encoding="utf-8")
    assert main(["bench", "compare", str(whole), str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lorafast bench compare: {file}")
    assert said in line


@pytest.mark.parametrize("text", ["", DEEP, "1" * 5000, "\udc80"], ids=lambda text: ascii(text[:9]))
def test_what_is_no_json_is_refused(tmp_path, whole, text):
    file = tmp_path / "b.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="can't be read as a recorded run"):
        compare(whole, file)
