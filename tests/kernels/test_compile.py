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


# The architectures with the most variants first: workers take them in this order.
@pytest.mark.slow
@pytest.mark.parametrize(
    "capability",
    sorted(SHARED_MEMORY, key=(90, 100, 120).__contains__, reverse=True),
    ids="sm_{}".format,
)
def test_every_configuration_compiles_to_fast_code(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(COMPILE.parent), str(ROOT)))
    process = subprocess.run(
        [sys.executable, str(COMPILE), str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = process.stdout.splitlines()
    bad = [line for line in lines if not line.endswith(" ok")]
    assert bad == [], process.stderr[-3000:]
    assert process.returncode == 0, process.stderr[-3000:]
    for operation in OPERATIONS:
        for bits, M, *_ in table_of(capability)[operation]:
            dtype = "bf16" if bits == 16 else "fp32"
            assert any(f" {operation}-{dtype}-M{M}-" in line for line in lines), (operation, M)
