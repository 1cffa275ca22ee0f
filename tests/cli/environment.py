"""The command line in a process of its own that sees PyTorch alone, or what a test names beside it."""

import os
import subprocess
import sys
from pathlib import Path

import lorafast

# What PyTorch itself needs, and what carries lorafast.
TORCH = (
    "torch", "torchgen", "functorch", "nvidia", "cuda", "typing_extensions", "sympy", "mpmath",
    "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "setuptools", "_distutils_hack",
    "pkg_resources", "lorafast",
)  # fmt: skip
_HIDE = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *arguments):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {visible!r} or top.startswith("_"):
            return self.finder.find_spec(name, *arguments)
        return None

sys.meta_path[:] = map(Hidden, sys.meta_path)
"""


def bare(folder: Path, *packages: str, **variables: str) -> dict[str, str]:
    """The variables of a process that sees PyTorch and ``packages`` alone; none of ours is set."""
    hide = folder / "bare"
    hide.mkdir(exist_ok=True)
    code = _HIDE.format(visible=(*TORCH, *packages))
    (hide / "sitecustomize.py").write_text(code, encoding="utf-8")
    ours = ("LORAFAST_", "TRITON_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = (str(hide), str(Path(lorafast.__file__).parents[1]))
    return kept | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LORAFAST_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    } | variables  # fmt: skip


def lorafast_command(*words: str, flags: tuple[str, ...] = ()) -> list[str]:
    """``python -m lorafast`` with ``words``."""
    return [sys.executable, *flags, "-m", "lorafast", *words]


def run(
    *words: str, env: dict[str, str], flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """The command, ended."""
    return subprocess.run(
        lorafast_command(*words, flags=flags), env=env, capture_output=True, text=True, timeout=120
    )
