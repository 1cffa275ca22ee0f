"""What is known of compiled code counts for that very code, and is looked at again."""

import json

import pytest

pytest.importorskip("triton")

import machine_code
from machine_code import Known, Machine

MACHINE = Machine(
    registers=40, stack=0, local=0, shared=1024, spills=0, serialized=False,
    instructions={"HMMA": 8},
)  # fmt: skip


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Makes a ``Known`` over one folder; a launch is its own key and compiles to MACHINE."""
    monkeypatch.setattr(machine_code, "_key", lambda launch, capability: launch)
    monkeypatch.setattr(machine_code, "_compile", lambda launch, capability: MACHINE)
    return lambda again="none": Known(90, again, tmp_path)


def test_what_is_known_is_not_compiled_again(known):
    first = known()
    assert first.machine("shrink", "0a") == (MACHINE, None)
    first.write()
    second = known()
    assert second.machine("shrink", "0a") == (MACHINE, None)
    assert (first.compiled, second.compiled) == (1, 0)
    assert second.machine("shrink", "0b") == (MACHINE, None)
    assert second.compiled == 1


@pytest.mark.parametrize("again", ["0", None])
def test_a_line_that_is_not_true_is_found(known, tmp_path, again):
    first = known()
    first.machine("shrink", "0a")
    first.write()
    (path,) = tmp_path.iterdir()
    line = json.loads(path.read_text()) | {"registers": 32}
    path.write_text(json.dumps(line) + "\n")
    assert known("1").machine("shrink", "0a")[0].registers == 32
    assert known(again).machine("shrink", "0a") == (MACHINE, "not what sm_90.jsonl says of it")


def test_writing_drops_what_no_longer_ships(known, tmp_path):
    first = known()
    first.machine("shrink", "0a")
    first.machine("shrink", "0b")
    first.write()
    second = known()
    second.machine("shrink", "0b")
    second.write()
    (path,) = tmp_path.iterdir()
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["0b"]
