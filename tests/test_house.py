"""The house's own rules: floors, names, packaging."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lorafast.kernels.common import configs
from lorafast.kernels.tables import tuned

import lorafast  # noqa: F401
from lorafast.backends.triton import Triton
from lorafast.core.problem import LAYER_OPERATIONS, OPERATIONS

ROOT = Path(__file__).parents[1]
# Imports go down only. The package's own __init__ hands names on and stands above everything but the
# measurements and the command line, which use it as anyone does.
FLOORS = [
    "core", "operands", "reference", "kernels", "backends", "ops", "functional", "nn", "convert",
    "parallel", "integrations", "__init__", "bench", "cli",
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


def test_imports_go_down_only():
    for path in SOURCES:
        own = room(module_name(path))
        if own == "__main__":
            own = "cli"
        for target in imports(path):
            if target.split(".")[0] != "lorafast":
                continue
            other = room(target)
            if other in FLOORS:
                assert FLOORS.index(other) <= FLOORS.index(own), f"{path} imports {target}"
            else:  # a name of the package itself
                assert own in ("bench", "cli"), f"{path} imports {target}"


def test_reference_imports_core_alone():
    for path in (ROOT / "lorafast" / "reference").glob("*.py"):
        for target in imports(path):
            if target.startswith("lorafast."):
                assert room(target) in ("core", "reference"), path


def imports_at_import(path: Path):
    """The modules imported where the module itself is: not in functions, not for types alone."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        nodes += ast.iter_child_nodes(node)


def test_modules_import_each_other_in_no_circle():
    """As they are named: importing a module runs its package's ``__init__``, which doesn't count."""
    modules = {module_name(path): path for path in SOURCES}
    graph = {}
    for module, path in modules.items():
        found = {t if t in modules else t.rpartition(".")[0] for t in imports_at_import(path)}
        graph[module] = (found & modules.keys()) - {module}
    assert graph["lorafast.backends.registry"] >= {"lorafast.backends.composed"}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names them


def literals(path: Path) -> set[str]:
    """The string literals of a module, but for docstrings and what ``__all__`` hands on."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            aside |= {id(node.value)}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            aside |= {id(child) for child in ast.walk(node)}
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in aside
    }


BACKENDS = {path.parent.name for path in (ROOT / "lorafast" / "backends").glob("*/__init__.py")}
# Who else may say a backend's name, and what it means there. kernels/ are Triton's own rooms, and bench/
# names its contenders.
NAMES_OF_OTHER_THINGS = {
    "lorafast/cli/bench.py": "contenders of the command line",
    "lorafast/cli/info.py": "the package triton, whose version it prints",
}


# Who looks into a backend's folder, and what for.
OWN_LAUNCHES = {
    "bench/call_overhead/launches.py": "host time of Triton's launches",
    "bench/traffic/interpret.py": "bytes of Triton's launches, counted in its interpreter",
    "bench/traffic/launches.py": "the same in closed form",
    "bench/tune/choices.py": "other sizes of CUDA C++ launches",
    "bench/tune/climb.py": "other configurations of Triton's launches",
    "bench/tune/job.py": "what they are compared with, and for which problems there are any",
    "lorafast/cli/tune.py": "whether Triton is here to be tuned",
}


def of_a_backend(path: Path) -> str | None:
    """The name of the backend to whose folder a module belongs."""
    parts = path.relative_to(ROOT).parts
    return parts[2] if parts[:2] == ("lorafast", "backends") and len(parts) > 3 else None


def imported_backends(path: Path) -> set[str]:
    parts = [target.split(".") for target in imports(path)]
    return {p[2] for p in parts if p[:2] == ["lorafast", "backends"] and len(p) > 2} & BACKENDS


def test_nothing_outside_a_backends_folder_knows_its_name():
    for path in SOURCES:
        own, place = of_a_backend(path), str(path.relative_to(ROOT))
        named = set()
        if place not in NAMES_OF_OTHER_THINGS and not place.startswith(("kernels/", "bench/")):
            named |= literals(path) & (BACKENDS - {"cpu", "cuda"})  # devices too, named everywhere
        if place not in OWN_LAUNCHES and place != "lorafast/backends/__init__.py":  # the one list
            named |= imported_backends(path)
        assert named <= {own}, f"{place} knows {', '.join(named)}"


def test_the_exceptions_are_needed():
    for place in NAMES_OF_OTHER_THINGS:
        assert literals(ROOT / place) & BACKENDS, place
    for place, names in FORMATS_ELSEWHERE.items():
        assert literals(ROOT / place) & FORMATS == names, place


def test_the_one_list_registers_each_folder():
    assert imported_backends(ROOT / "lorafast/backends/__init__.py") == BACKENDS


FORMATS = {path.stem for path in (ROOT / "lorafast" / "operands").glob("*.py")} - {
    "__init__", "operand",
}  # fmt: skip
FORMATS_ELSEWHERE = {
    "lorafast/core/problem.py": {"dense"},  # that of a plain tensor, which a problem has by default
    "bench/common/machine.py": {"bitsandbytes"},  # the package, whose version is noted
    "lorafast/integrations/peft/known.py": {
        "bitsandbytes"
    },  # the package, whose releases are known
    "lorafast/convert/places.py": {"dense"},  # the name of a layer in other people's models
}


def test_only_operands_knows_the_names_of_formats():
    for path in SOURCES:
        place = str(path.relative_to(ROOT))
        if not place.startswith("lorafast/operands/"):
            assert literals(path) & FORMATS <= FORMATS_ELSEWHERE.get(place, set()), place


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_one_operation_has_one_name_in_every_room():
    with_kernels = tuple(o for o in OPERATIONS if o in Triton.operations)
    for operation in OPERATIONS:
        places = [
            f"lorafast/reference/{operation}.py",
            f"lorafast/ops/{operation}.py",
            f"bench/bench_{operation}.py",
        ]
        if operation in with_kernels:
            places += [f"kernels/{operation}/kernel.py", f"tests/kernels/test_{operation}.py"]
        for place in places:
            assert (ROOT / place).is_file(), place
        assert hasattr(torch.ops.lorafast, operation)
        for backend in ("aten", "cpu"):  # whose operations are functions
            path = ROOT / "lorafast" / "backends" / backend / "operations.py"
            assert operation in functions(path), path
    for operation in LAYER_OPERATIONS:
        assert hasattr(torch.ops.lorafast, operation)
    assert with_kernels == configs.OPERATIONS
    assert (*with_kernels, "lora_linear") == tuned.OPERATIONS
    folders = {p.parent.name for p in (ROOT / "kernels").glob("*/__init__.py")}
    beside = {
        "bottleneck", "common", "dequantize", "lora_linear", "scaled_linear", "tables", "weight_norm",
    }  # fmt: skip
    assert folders == {*with_kernels, *beside}


BESIDE_OPERATIONS = {
    "cpu": {
        "bottleneck",
        "lora_linear",
        "dequantize",
        "conv_shrink",
        "conv_shrink_backward",
        "lora_conv",
        "lora_linear_codes",
    },
    # Decoding is a file for one adapter or several; what launchers share, and whether they can run.
    # Hopper has GEMMs of its own. What says what codes are is checked in a file of its own.
    "cuda": {
        "codes",
        "decode_codes",
        "dequantize",
        "lora_linear",
        "lora_linear_backward",
        "lora_linear_sm90",
        "lora_linear_backward_sm90",
        "linear_expand_sm90",
        "decode",
        "mask",
        "device",
        "tensor_map",
        "usable",
    },
}


def test_an_operations_cpp_file_bears_its_name():
    """``expand`` serves ``linear_expand`` too: the GEMM stays with oneDNN and cuBLAS."""
    for folder in (p.parent for p in (ROOT / "csrc").glob("*/bindings.cpp")):
        stems = {p.stem for p in folder.iterdir() if p.suffix in (".cpp", ".cu")} - {"bindings"}
        stems = {s for s in stems if not s.startswith("microkernels")}
        assert stems <= {*OPERATIONS, *BESIDE_OPERATIONS[folder.name]}


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
        env=os.environ | {"LORAFAST_CPP": "0", "LORAFAST_CUDA": "0"},  # they take minutes
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
