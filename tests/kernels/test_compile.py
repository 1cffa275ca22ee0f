"""Every configuration that ships, compiled for the architecture it ships for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lorafast.kernels.common.configs import OPERATIONS, SHARED_MEMORY
from lorafast.kernels.tables import table_of

COMPILE = Path(__file__).parent / "compile_configs.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled():
    """All architectures in one process, which imports PyTorch and Triton once."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(COMPILE.parent), str(ROOT)))
    command = [sys.executable, str(COMPILE), *map(str, SHARED_MEMORY)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY, ids="sm_{}".format)
def test_every_configuration_compiles_to_fast_code(compiled, capability):
    every = compiled.stdout.splitlines()
    lines = [line for line in every if line.startswith(f"sm_{capability} ")]
    assert [line for line in lines if not line.endswith(" ok")] == [], compiled.stderr[-3000:]
    wrong = any(not line.endswith(" ok") for line in every)
    assert compiled.returncode == int(wrong), compiled.stderr[-3000:]
    for operation in OPERATIONS:
        for bits, M, *_ in table_of(capability)[operation]:
            dtype = "bf16" if bits == 16 else "fp32"
            assert any(f" {operation}-{dtype}-M{M}-" in line for line in lines), (operation, M)
