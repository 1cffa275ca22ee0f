"""The example of interpolation from end to end, small, and what it checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
SMALL = "--alphas 3 --steps 2 --first-steps 2 --images 16 --first-images 16 --batch 8 --side 16 --rank 2"


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path):
    for package in ("peft", "safetensors", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    command = [
        sys.executable,
        FOLDER / "robust_interpolation.py",
        *SMALL.split(),
        "--out",
        tmp_path,
    ]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    # It has checked that alpha 0 is the first network, and that the models are back.
    assert done.returncode == 0, done.stdout + done.stderr
    printed = " ".join(done.stdout.split())
    for arm in ("full tuning", "LoRA"):
        for alpha in ("0.00", "0.50", "1.00"):
            assert f"{arm} {alpha} " in printed
    assert [path.name for path in tmp_path.iterdir()] == ["demo_interpolation.png"]
