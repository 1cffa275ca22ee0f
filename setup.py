"""Maps the folders of ``kernels/`` and ``bench/`` into ``lorafast.kernels`` and ``lorafast.bench``.

Neither has an ``__init__.py`` itself: the top-level name ``kernels`` belongs to another package and
must never be importable from here. Everything else is in ``pyproject.toml``.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
folders = {
    f"lorafast.{top}.{init.parent.name}": f"{top}/{init.parent.name}"
    for top in ("kernels", "bench")
    for init in sorted((ROOT / top).glob("*/__init__.py"))
}

setup(
    packages=[*find_packages(include=["lorafast", "lorafast.*"]), *folders],
    package_dir=folders,
)
