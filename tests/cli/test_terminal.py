"""What a command prints where the terminal can't show it, and how it ends when it is interrupted."""

import io
import sys

import pytest

from lorafast.cli import main, terminal, verify


def stream(encoding, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def written(output):
    output.flush()
    return output.buffer.getvalue()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_an_ascii_terminal_gets_readable_text(monkeypatch, errors):
    monkeypatch.setattr(sys, "stdout", stream("ascii", errors))
    terminal.prepare()
    print("12 µs – 13 µs, 2 × 3 → x·Wᵀ, 2², 中 \udcff")
    assert written(sys.stdout) == b"12 us - 13 us, 2 x 3 -> x*WT, 22, ? \xff\n"


def test_a_terminal_that_can_show_it_gets_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream("utf-8"))
    terminal.prepare()
    print("12 µs – 13 µs")
    assert written(sys.stdout).decode() == "12 µs – 13 µs\n"


def test_what_the_user_chose_for_such_characters_stays(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream("ascii", "backslashreplace"))
    terminal.prepare()
    print("µ")
    assert written(sys.stdout) == b"\\xb5\n"


def test_a_table_can_be_printed_in_ascii(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream("ascii"))
    words = ["--shapes", "8,16,24", "--rank", "2", "--dropout", "0", "--seconds", "0.01"]
    assert main(["bench", *words, "--device", "cpu", "--against", "frozen"]) == 0
    assert b" us " in written(sys.stdout)


def test_without_streams_nothing_is_written(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    terminal.prepare()
    assert main(["info"]) == 0
    terminal.complain("lorafast", "nobody reads it")


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "lorafast verify: interrupted\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (OSError(28, "No space left"), 1, "lorafast verify: [Errno 28] No space left\n"),
    ],
    ids=["Ctrl-C", "closed pipe", "full disk"],
)
def test_how_a_command_ends(monkeypatch, capsys, raised, status, said):
    def interrupted(*arguments):
        raise raised

    monkeypatch.setattr(verify, "_verify", interrupted)
    assert main(["verify"]) == status
    assert capsys.readouterr().err == said


def test_what_is_no_fault_of_the_machine_is_not_hidden(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(verify, "_verify", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["verify"])
