"""``compute-sanitizer`` finds no bad access, race or misused barrier, and no read of unset memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]  # so that it begins before the others

SCRIPT = Path(__file__).with_name("sanitized.py")
ROOT = Path(__file__).parents[2]
REFUSES = ("Device not supported", "LibraryNotLoaded")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    # Without PyTorch's cache every tensor is an allocation of its own, whose end is watched.
    folders = str(ROOT), str(ROOT / "tests" / "kernels"), os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, folders))
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    # PyTorch asks the driver for functions that may not be there: not our errors.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    process = subprocess.run(
        [program, "--tool", tool, *options, "--error-exitcode", "3", sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,  # most of it compiles kernels
    )
    output = process.stdout + process.stderr
    for sentence in REFUSES:
        if sentence in output:
            pytest.skip(f"compute-sanitizer can't work on this machine: {sentence}")
    found = [line for line in output.splitlines() if line.startswith("=========")]
    assert process.returncode == 0, "\n".join([*found[:60], output[-2000:]])
    assert "every kernel ran" in output
