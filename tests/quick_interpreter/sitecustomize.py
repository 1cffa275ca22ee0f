"""Of a process that interprets Triton's kernels: its interpreter is the tests' quicker one."""

import importlib.util
import os
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    _path = Path(__file__).parents[1] / "interpreter.py"
    _spec = importlib.util.spec_from_file_location("quick_interpreter", _path)
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    _module.replace_once_a_launch()
    _module.remember_types()
