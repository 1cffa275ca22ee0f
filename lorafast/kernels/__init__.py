"""The Triton kernels, one folder an operation: ``lorafast.kernels.<operation>``.

Their source is the top-level folder ``kernels/``. An installed package holds those folders here; in a
checkout this package looks there, so that a new operation needs no reinstall.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels").is_dir():
    __path__.append(str(_ROOT / "kernels"))
