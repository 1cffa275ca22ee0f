"""The CNN example from end to end, small; and the pictures that it draws."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"
SMALL = [
    "--steps",
    "3",
    "--first-steps",
    "2",
    "--images",
    "40",
    "--first-images",
    "40",
    "--batch",
    "8",
    "--side",
    "16",
    "--rank",
    "2",
]


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return pytest.importorskip("drawn_shapes")


@pytest.mark.parametrize("style", ["FILLED", "OUTLINED"])
def test_pictures(shapes, style):
    style = getattr(shapes, style)
    images = shapes.draw_images(style, 45, 24, 3)
    assert images.pixels.shape == (45, 3, 24, 24)
    assert sorted(images.labels.bincount().tolist()) == [4] * 5 + [5] * 5
    again, other = (shapes.draw_images(style, 45, 24, seed) for seed in (3, 4))
    assert torch.equal(images.pixels, again.pixels)
    assert not torch.equal(images.pixels, other.pixels)


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path):
    for package in ("peft", "safetensors", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    command = [sys.executable, str(FOLDER / "finetune_cnn.py"), *SMALL, "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    # It has checked that lorafast follows PEFT and that PEFT loads what lorafast saved.
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 steps in float64: lorafast's and PEFT's loss differ by" in " ".join(
        done.stdout.split()
    )
    assert "the outputs agree" in " ".join(done.stdout.split())
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"demo_cnn.png", "demo_cnn_adapter"}
