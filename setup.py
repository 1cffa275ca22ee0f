"""Maps every operation folder of ``kernels/`` to ``lorafast.kernels.<operation>``.

``kernels/`` itself has no ``__init__.py``: the top-level name ``kernels`` belongs to another package
and must never be importable from here. Everything else is in ``pyproject.toml``.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
operations = sorted(init.parent.name for init in (ROOT / "kernels").glob("*/__init__.py"))

setup(
    packages=find_packages(include=["lorafast", "lorafast.*"])
    + [f"lorafast.kernels.{name}" for name in operations],
    package_dir={f"lorafast.kernels.{name}": f"kernels/{name}" for name in operations},
)
