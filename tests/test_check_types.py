"""The tree that types are checked on, and which of mypy's lines count."""

import check_types
from check_types import ROOT, kept, lay_out


def line_of(path, text):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(text))


def test_kernels_and_bench_lie_where_they_are_imported_from():
    lay_out()
    package = ROOT / "build" / "types" / "lorafast"
    for top in ("kernels", "bench"):
        for source in (ROOT / top).glob("*/__init__.py"):
            laid = package / top / source.parent.name / "__init__.py"
            assert laid.resolve() == source, laid
    for own in ("nn", "ops", "kernels/__init__.py", "functional.py", "py.typed"):
        assert (package / own).resolve() == ROOT / "lorafast" / own, own


def test_launchers_count_and_device_functions_do_not():
    path = "kernels/common/sum_partials.py"
    launcher = line_of(path, "def launcher(")
    device = line_of(path, "def sum_partials_kernel(")
    said = [
        f"build/types/lorafast/{path}:{line}: error: wrong"
        for line in (device - 1, device, launcher - 1, launcher)
    ]
    said += ["build/types/lorafast/nn/explain.py:1: error: wrong", "Found 5 errors in 2 files"]
    assert kept(said) == [
        f"{path}:{launcher - 1}: error: wrong",
        f"{path}:{launcher}: error: wrong",
        "lorafast/nn/explain.py:1: error: wrong",
    ]


def test_what_mypy_says_of_itself_is_said(monkeypatch, capsys):
    monkeypatch.setattr(check_types.sys, "argv", ["check_types.py", "--no-such-option"])
    assert check_types.main() == 2
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().out
