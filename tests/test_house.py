"""The house's own rules: floors, names, packaging."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Imports go down only. The package's own __init__ hands names on and stands above everything but the
# measurements and the command line, which use it as anyone does.
FLOORS = [
    "core", "operands", "reference", "kernels", "backends", "ops", "functional", "nn", "convert",
    "integrations", "__init__", "bench", "cli",
]  # fmt: skip
OWN_FOLDERS = ("kernels", "bench")  # at the top, imported from lorafast
SOURCES = [
    *sorted((ROOT / "lorafast").rglob("*.py")),
    *(path for top in OWN_FOLDERS for path in sorted((ROOT / top).rglob("*/*.py"))),
]


def room(module: str) -> str:
    """The floor of ``lorafast.<room>...``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in OWN_FOLDERS:
        parts.insert(0, "lorafast")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = room(module_name(path))
    if own == "__main__":
        own = "cli"
    for target in imports(path):
        if target.split(".")[0] != "lorafast":
            continue
        other = room(target)
        if other in FLOORS:
            assert FLOORS.index(other) <= FLOORS.index(own), f"{own} imports {target}"
        else:  # a name of the package itself
            assert own in ("bench", "cli"), f"{own} imports {target}"


def test_reference_imports_core_alone():
    for path in (ROOT / "lorafast" / "reference").glob("*.py"):
        for target in imports(path):
            if target.startswith("lorafast."):
                assert room(target) in ("core", "reference"), path


def test_one_operation_has_one_name_in_every_room():
    operations = {"shrink", "linear_expand", "expand_backward", "shrink_backward"}
    for operation in operations:
        for place in (
            f"lorafast/reference/{operation}.py",
            f"lorafast/ops/{operation}.py",
            f"kernels/{operation}/kernel.py",
            f"tests/kernels/test_{operation}.py",
        ):
            assert (ROOT / place).is_file(), place
    folders = {p.parent.name for p in (ROOT / "kernels").glob("*/__init__.py")}
    assert folders == operations | {"common", "lora_linear", "tables"}


def test_the_name_kernels_is_not_ours():
    assert not any((ROOT / top / "__init__.py").exists() for top in OWN_FOLDERS)
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    )
    assert process.stdout.strip() == "None"


def test_the_factor_of_the_contract_stands_in_one_place():
    folders = ("lorafast", "kernels", "bench", "tests", "examples")
    found = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\b1\.25\b", path.read_text(encoding="utf-8"))
    }
    own = {"lorafast/reference/contract.py", "tests/reference/test_contract.py"}
    assert found == own


def test_nobody_is_told_to_install_our_name_from_an_index():
    told = re.compile(r"pip install[^#)\n]*?[\s'\"]lorafast\b(?!')")
    texts = [*SOURCES, *(ROOT / "examples").glob("*.py"), *(ROOT / "docs").rglob("*.md")]
    for path in (*texts, ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        # A sentence may be written in several pieces.
        text = re.sub(r"[\"']?\n\s*f?[\"']", "", path.read_text(encoding="utf-8"))
        assert not told.search(text), path


@pytest.mark.slow
def test_the_wheel_has_every_kernel(tmp_path):
    source = tmp_path / "source"
    subprocess.run(
        ["git", "clone", "-q", "--local", str(ROOT), str(source)], check=True, capture_output=True
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel],
        check=True,
        capture_output=True,
    )
    code = (
        "import lorafast, lorafast.kernels.shrink as k, lorafast.kernels.common.configs as c; "
        "import lorafast.bench.layer as b; "
        "print(lorafast.__file__); print(k.__file__); print(c.__file__); print(b.__file__)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"},
    )
    assert all(line.startswith(str(target)) for line in process.stdout.splitlines())
    assert (target / "lorafast" / "py.typed").is_file()
