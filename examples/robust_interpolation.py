"""Fine-tune a CNN on shifted pictures, then go back part of the way: WiSE-FT (Wortsman et al., 2022).

    pip install .                      # in lorafast's checkout
    pip install peft safetensors tqdm matplotlib
    python examples/robust_interpolation.py                # under 3 minutes on two CPU cores
    python examples/robust_interpolation.py --alphas 21 --steps 400 --seed 1

A small network of the shape of ResNet-18 (He et al., 2016) learns to tell ten filled shapes apart. Then
it sees outlines of the same shapes among stray lines, learns these, and forgets some of the filled ones.
Two arms are trained: full tuning, of convolutions and norms, and LoRA over the convolutions. In both the
stem, the first of four stages and the head are frozen, and norms keep the statistics of the first task.

Both are then taken back towards the first network. `lorafast.interpolation_curve` gives the accuracy on
test pictures of both tasks for alpha from 0, the first network, to 1, the fine-tuned one: of full tuning
at the weights `(1 - alpha) a + alpha b`, of LoRA at the change `alpha * scaling * B A`. The script
prints them and draws `demo_interpolation.png`.

It exits with status 1 if a check fails: at 0 both arms must have the first network's accuracy,
the models must be back afterwards, bit for bit, and with the default settings an alpha between must beat
both ends of full tuning in the mean of the two accuracies. (For LoRA, which forgets less, the gain is
small beside the noise of 1000 test pictures.)

A run that is stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

try:
    import torch
    from comparing import Arm, Batch, accuracy, bounded_int, say, table, train
    from drawn_shapes import FILLED, Style, draw_images
    from finetune_cnn import Batches, learn_first_task, targets, test_batches
    from lorafast.bench.convolutions.network import Network
    from matplotlib.figure import Figure
    from resuming import State
    from torch import nn
    from tqdm import tqdm

    import lorafast
except ImportError as error:
    sys.exit(
        f"{error}. This demo needs lorafast (pip install . in its checkout), and: pip install peft "
        "safetensors tqdm matplotlib"
    )

SHIFTED = Style(FILLED.shapes, outlined=True, strokes=1, noise=0.15)
LAST_FROZEN = "blocks.1"  # the first stage
FULL_LR = 1e-3
LORA_LR = 5e-3
COLORS = ("#CC79A7", "#D55E00")
Curve = list[tuple[float, tuple[float, float]]]
"""For each alpha the accuracy on the original task and on the target."""


def full_arm(network: Network) -> Arm:
    """Everything behind the first stage but the head."""
    model = copy.deepcopy(network).requires_grad_(True)
    lorafast.freeze(model, until=LAST_FROZEN)
    lorafast.freeze(model, ["head"])
    groups = lorafast.parameters(model, lr=FULL_LR, weight_decay=0.0)
    return Arm("full tuning", model, torch.optim.AdamW(groups))


def lora_arm(network: Network, rank: int) -> Arm:
    """Adapters over the convolutions behind the first stage."""
    model = lorafast.adapt(copy.deepcopy(network), rank, targets(network), alpha=2 * rank)
    groups = lorafast.parameters(model, lr=LORA_LR, weight_decay=0.0)
    return Arm("LoRA", model, torch.optim.AdamW(groups))


def curves(
    network: Network, arms: list[Arm], tests: tuple[list[Batch], list[Batch]], count: int
) -> list[Curve]:
    """Both accuracies of each arm at `count` values of alpha."""
    full, lora = arms
    alphas = [i / (count - 1) for i in range(count)]
    progress = tqdm(total=2 * count, desc="interpolating", unit="alpha", dynamic_ncols=True)

    def evaluate(model: nn.Module) -> tuple[float, float]:
        original, target = (accuracy(model, batches) for batches in tests)
        progress.update()
        return original, target

    with progress:
        return [
            lorafast.interpolation_curve(network, full.model, alphas, evaluate),
            lorafast.interpolation_curve(lora.model, None, alphas, evaluate),
        ]


def results(arms: list[Arm], found: list[Curve]) -> str:
    rows = [["", "", "original", "target", "mean"], ["", "alpha", "accuracy", "accuracy", ""]]
    for arm, curve in zip(arms, found, strict=True):
        for alpha, (original, target) in curve:
            mean = (original + target) / 2
            rows.append(
                [arm.name, f"{alpha:.2f}", f"{original:.3f}", f"{target:.3f}", f"{mean:.3f}"]
            )
    return table(rows, header=2)


def draw(arms: list[Arm], found: list[Curve], path: Path, args: argparse.Namespace) -> None:
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 2.4])
    for row, style in enumerate((FILLED, SHIFTED)):
        count = len(style.shapes)
        images = draw_images(style, count, args.side, args.seed + 5)
        for i, label in enumerate(images.labels.argsort().tolist()):
            axes = top.add_subplot(2, count, row * count + i + 1)
            axes.imshow((images.pixels[label].movedim(0, -1) / 5 + 0.5).clamp(0, 1).numpy())
            axes.set_title(style.shapes[i].name if row == 0 else "", fontsize=7)
            axes.axis("off")
    plane, means = bottom.subplots(1, 2)
    for arm, curve, color in zip(arms, found, COLORS, strict=True):
        alphas = [alpha for alpha, _ in curve]
        original, target = zip(*(scores for _, scores in curve), strict=True)
        plane.plot(original, target, "o-", color=color, label=arm.name, markersize=4)
        for i in (0, len(curve) // 2, len(curve) - 1):
            plane.annotate(f" {alphas[i]:g}", (original[i], target[i]), fontsize=8, color=color)
        mean = [(a + b) / 2 for a, b in zip(original, target, strict=True)]
        means.plot(alphas, mean, "o-", color=color, label=arm.name, markersize=4)
    plane.set_xlabel("accuracy on filled shapes (original)")
    plane.set_ylabel("accuracy on outlines (target)")
    means.set_xlabel("alpha: from the first network to the fine-tuned one")
    means.set_ylabel("mean of both accuracies")
    for axes in (plane, means):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def check(
    first: tuple[float, float], arms: list[Arm], found: list[Curve], default: bool
) -> list[str]:
    """Print what the best alpha of each arm gives; return a sentence for each check that fails.

    `first`: both accuracies of the first network, as it was before the curves.
    """
    failed = []
    for arm, curve in zip(arms, found, strict=True):
        if curve[0][1] != first:
            failed.append(f"{arm.name}: at alpha 0 the accuracy is not the first network's")
        means = {alpha: (original + target) / 2 for alpha, (original, target) in curve}
        best = max(means, key=lambda alpha: means[alpha])
        ends = f"{means[0.0]:.3f} at 0 and {means[1.0]:.3f} at 1"
        say(
            f"{arm.name}: the mean of both accuracies is best at {best:g}, {means[best]:.3f}; {ends}."
        )
        if default and arm is arms[0] and best in (0.0, 1.0):
            failed.append(f"{arm.name}: no alpha between beats both ends ({ends})")
    return failed


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors, and the scalings of adapters, which are in no `state_dict`."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, lorafast.nn.AdapterLayer)]
    scalings = {f"{name}.scaling": torch.tensor(layer.scaling) for name, layer in layers}
    return {key: tensor.clone() for key, tensor in model.state_dict().items()} | scalings


def is_back(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = state_of(model)
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--alphas", type=bounded_int(2), default=11, help="values of alpha, from 0 to 1")
    add("--steps", type=bounded_int(1), default=150, help="training steps of both arms")
    add("--batch", type=bounded_int(1), default=32, help="pictures in a batch")
    add("--rank", type=bounded_int(1), default=8, help="rank of the adapters")
    add("--images", type=bounded_int(1), default=2000, help="pictures of the shifted task")
    add("--first-steps", type=bounded_int(1), default=500, help="training steps of the first task")
    add("--first-images", type=bounded_int(1), default=5000, help="pictures of the first task")
    add("--side", type=bounded_int(16), default=48, help="height and width of a picture")
    add("--seed", type=bounded_int(0), default=0, help="of weights, pictures and batches")
    add("--out", type=Path, default=Path(), help="folder for the picture")
    return parser


def parse_arguments() -> tuple[argparse.Namespace, bool]:
    """Return the options, and whether all that decide the result are the defaults."""
    parser = make_parser()
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    defaults = vars(parser.parse_args([])).items()
    return args, all(getattr(args, k) == v for k, v in defaults if k != "out")


def main() -> int:
    args, default = parse_arguments()
    started = time.perf_counter()
    options = {name: value for name, value in vars(args).items() if name not in ("out", "alphas")}
    options["torch"] = torch.__version__
    states = [
        State(args.out / f"demo_interpolation_{t}.state", options) for t in ("first", "shifted")
    ]
    network = learn_first_task(args, states[0])

    images = draw_images(SHIFTED, args.images, args.side, args.seed + 2)
    arms = [full_arm(network), lora_arm(network, args.rank)]
    trained = [sum(p.numel() for p in a.model.parameters() if p.requires_grad) for a in arms]
    say(
        f"Shifted task: outlines of the same shapes, {args.images} pictures, {args.steps} steps. "
        f"Trained: {trained[0]:,} parameters by full tuning, {trained[1]:,} by LoRA of rank {args.rank}."
    )
    train(arms, Batches(images, args.batch, args.steps, args.seed), states[1])
    tests = test_batches(FILLED, args, args.seed + 1), test_batches(SHIFTED, args, args.seed + 3)
    models = [network, *(arm.model for arm in arms)]
    before = list(map(state_of, models))
    first = accuracy(network, tests[0]), accuracy(network, tests[1])
    found = curves(network, arms, tests, args.alphas)
    picture = args.out / "demo_interpolation.png"
    draw(arms, found, picture, args)

    print(f"\n{results(arms, found)}\n")
    failed = check(first, arms, found, default)
    if not all(map(is_back, models, before)):
        failed.append("a model is not what it was before the curve")
    for state in states:
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
