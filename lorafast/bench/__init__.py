"""The measurements behind ``lorafast bench``, one folder a job: ``lorafast.bench.<job>``.

Their source is the top-level folder ``bench/``. An installed package holds those folders here; in a
checkout this package looks there. Nothing but the command line imports it.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "bench").is_dir():
    __path__.append(str(_ROOT / "bench"))
