"""Fine-tune a CNN on a shifted task: LoRA in PEFT and lorafast, the whole network, the head only.

    pip install .                      # in lorafast's checkout
    pip install peft safetensors tqdm matplotlib
    python examples/finetune_cnn.py                        # under 3 minutes on two CPU cores
    python examples/finetune_cnn.py --rank 16 --steps 400 --seed 1

A small network of the shape of ResNet-18 (He et al., 2016) learns to tell ten filled shapes apart. Then
come outlines of ten other shapes among stray lines, and few of them. The stem and the first of four
stages stay frozen; the convolutions of the others get adapters, and the head is trained. Pictures are
drawn by `drawn_shapes.py`: nothing is downloaded.

The four arms start from the same weights (both LoRA arms from the same A; B is zero), see the same
batches, and take turns step by step. Norms keep the statistics of the first task in all of them. The
script then compares accuracy on pictures that no arm has seen, loss curves, time and memory, draws
`demo_cnn.png`, saves the lorafast adapter in PEFT's format and loads it with PEFT. It exits with status
1 if a check fails: the outputs of the saved adapter must agree, and with the default settings the LoRA
arms must beat the head alone. In float32 the curves of the two LoRA arms part after some steps, as
rounding decides which ReLUs are on; so the first steps are taken in float64 too, where lorafast must
follow PEFT's loss within 1e-9.

A run that is stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is chatty

try:
    import peft
    import torch
    from comparing import (
        Arm,
        Batch,
        accuracy,
        bounded_int,
        check_in_peft,
        check_loss_curves,
        draw_losses,
        largest,
        loss_differences,
        peak_bytes,
        say,
        table,
        train,
        train_step,
    )
    from drawn_shapes import FILLED, OUTLINED, Images, Style, draw_images
    from lorafast.bench.convolutions.network import Network, calibrated, convolutions
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from resuming import State
    from torch import nn

    import lorafast
except ImportError as error:
    sys.exit(
        f"{error}. This demo needs lorafast (pip install . in its checkout), and: pip install peft "
        "safetensors tqdm matplotlib"
    )

WIDTHS = (32, 64, 128, 256)
FROZEN_BLOCKS = 2  # the first stage
TEST_IMAGES = 1000
ALPHA_PER_RANK = 2
FLOAT64_STEPS = 10
FLOAT64_TOLERANCE = 1e-9
# From a small sweep for each arm, so that none is held back; judged by test accuracy, so compare the
# arms with each other and not with results from elsewhere.
FIRST_LR = 2e-3
LORA_LR = 5e-3
FULL_LR = 1e-3
HEAD_LR = 5e-3
HEAD_ONLY_LR = 2e-2
COLORS = ("#56B4E9", "#D55E00", "#CC79A7", "#009E73")
NOTE = (
    "* of one training step, as PyTorch's allocator counts it: activations, gradients, temporaries "
    "and AdamW's state; without the network's weights. Time per step is the median over the run."
)


class Batches(Sequence[Batch]):
    """Batches of epoch after epoch, each epoch in its own order, channels last."""

    def __init__(self, images: Images, size: int, steps: int, seed: int) -> None:
        self.images, self.size, self.steps = images, size, steps
        generator = torch.Generator().manual_seed(seed)
        count = len(images.labels)
        epochs = -(-steps * size // count)
        self.order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:  # type: ignore[override]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rows = self.order[step * self.size : (step + 1) * self.size]
        pixels = self.images.pixels[rows].contiguous(memory_format=torch.channels_last)
        return Batch((pixels,), self.images.labels[rows])


def test_batches(style: Style, args: argparse.Namespace, seed: int) -> list[Batch]:
    images = draw_images(style, TEST_IMAGES, args.side, seed)
    return list(Batches(images, 100, TEST_IMAGES // 100, seed))


def make_arm(name: str, model: nn.Module, rate: float, head_rate: float) -> Arm:
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trainable.items() if "head" in n]
    body = [p for n, p in trainable.items() if "head" not in n]
    groups = [{"params": head, "lr": head_rate}]
    if body:
        groups.append({"params": body, "lr": rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    return Arm(name, model, optimizer)


def learn_first_task(args: argparse.Namespace, state: State) -> Network:
    """Train the network on filled shapes and say how well it tells them apart."""
    torch.manual_seed(args.seed)
    network = Network(WIDTHS, len(FILLED.shapes))
    network.to(memory_format=torch.channels_last)
    images = draw_images(FILLED, args.first_images, args.side, args.seed)
    arm = make_arm("network", network.train(), FIRST_LR, FIRST_LR)
    batches = Batches(images, args.batch, args.first_steps, args.seed)
    train([arm], batches, state, "first task")
    calibrated(network, images.pixels[:1000].contiguous(memory_format=torch.channels_last))
    score = accuracy(network, test_batches(FILLED, args, args.seed + 1))
    say(
        f"First task: {len(FILLED.shapes)} filled shapes, {args.first_images} pictures, "
        f"{args.first_steps} steps; test accuracy {score:.3f}."
    )
    return network


def for_shifted_task(network: Network, seed: int) -> Network:
    """Return the network with a head for the other shapes."""
    torch.manual_seed(seed)
    other = copy.deepcopy(network)
    dtype = network.head.weight.dtype
    other.head = nn.Linear(network.head.in_features, len(OUTLINED.shapes), dtype=dtype)
    return other.eval()


def targets(network: Network) -> list[str]:
    """The convolutions behind the frozen stage."""
    frozen = tuple(f"blocks.{i}." for i in range(FROZEN_BLOCKS))
    return [name for name in convolutions(network) if not name.startswith(frozen)]


def peft_model(network: Network, args: argparse.Namespace) -> nn.Module:
    config = peft.LoraConfig(
        r=args.rank,
        lora_alpha=ALPHA_PER_RANK * args.rank,
        target_modules=targets(network),
        modules_to_save=["head"],
    )
    return peft.get_peft_model(network, config).eval()  # for the norms; there is no dropout


def lorafast_model(network: Network, args: argparse.Namespace) -> nn.Module:
    lorafast.adapt(network, args.rank, targets(network), alpha=ALPHA_PER_RANK * args.rank)
    network.head.requires_grad_(True)
    return network


def copy_lora_a(source: nn.Module, target: nn.Module) -> None:
    """Copy PEFT's random A to the same convolutions of the lorafast model."""
    with torch.no_grad():
        for name, a in source.named_parameters():
            if ".lora_A." in name:
                layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
                target.get_parameter(f"{layer}.lora_A").copy_(a)


def lora_arms(network: Network, args: argparse.Namespace) -> list[Arm]:
    """PEFT's and lorafast's, with the same values, in the dtype of the network."""
    dtype = network.head.weight.dtype
    with_peft = peft_model(for_shifted_task(network, args.seed), args).to(dtype)
    with_lorafast = lorafast_model(for_shifted_task(network, args.seed), args)
    copy_lora_a(with_peft, with_lorafast)
    return [
        make_arm("PEFT", with_peft, LORA_LR, HEAD_LR),
        make_arm("lorafast", with_lorafast, LORA_LR, HEAD_LR),
    ]


def make_arms(network: Network, args: argparse.Namespace) -> list[Arm]:
    with_peft, with_lorafast = lora_arms(network, args)
    full = for_shifted_task(network, args.seed).requires_grad_(True)
    head_only = for_shifted_task(network, args.seed).requires_grad_(False)
    head_only.head.requires_grad_(True)
    trained = sum(p.numel() for p in with_lorafast.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in full.parameters())
    say(
        f"LoRA: rank {args.rank}, alpha {ALPHA_PER_RANK * args.rank}, on {len(targets(network))} "
        f"convolutions; trained, with the head: {trained:,} parameters, of all of them {total:,}. "
        f"AdamW, learning rates: adapters {LORA_LR:g}, the whole network {FULL_LR:g}, their heads "
        f"{HEAD_LR:g}, the head alone {HEAD_ONLY_LR:g}."
    )
    return [
        with_peft,
        with_lorafast,
        make_arm("full tuning", full, FULL_LR, HEAD_LR),
        make_arm("head only", head_only, 0.0, HEAD_ONLY_LR),
    ]


def check_in_float64(network: Network, batches: Batches, args: argparse.Namespace) -> list[str]:
    """Take the first steps in float64; return a sentence if lorafast doesn't follow PEFT."""
    with_peft, with_lorafast = arms = lora_arms(copy.deepcopy(network).double(), args)
    for step in range(min(FLOAT64_STEPS, args.steps)):
        batch = batches[step]
        doubled = Batch(tuple(x.double() for x in batch.inputs), batch.labels)
        for arm in arms:
            arm.losses.append(train_step(arm, doubled))
    worst = largest(loss_differences(with_lorafast, with_peft))
    found = f"{len(with_peft.losses)} steps in float64: lorafast's and PEFT's loss differ by {worst:.1e}"
    say(f"{found} at most.")
    return [] if worst <= FLOAT64_TOLERANCE else [f"{found}, more than {FLOAT64_TOLERANCE:g}"]


def milliseconds(arm: Arm) -> float:
    return statistics.median(arm.seconds) * 1e3


def results(arms: list[Arm]) -> str:
    rows = [
        ["", "test", "time", "peak", "trained"],
        ["", "accuracy", "per step", "memory *", "size"],
    ]
    for arm in arms:
        trained = sum(p.nbytes for p in arm.model.parameters() if p.requires_grad)
        rows.append(
            [
                arm.name,
                f"{arm.accuracy:.3f}",
                f"{milliseconds(arm):.1f} ms",
                f"{arm.peak_bytes / 1e6:.1f} MB",
                f"{trained / 1e6:.2f} MB",
            ]
        )
    return table(rows, header=2)


def draw_bars(axes: Axes, arms: list[Arm], title: str, values: list[float], text: str) -> None:
    names = [arm.name for arm in arms]
    axes.barh(names, values, color=COLORS)
    for name, value in zip(names, values, strict=True):
        axes.text(value, name, f" {value:{text}}", va="center", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.25)


def draw(arms: list[Arm], path: Path, args: argparse.Namespace) -> None:
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[1.5, 3, 1.3])
    for row, style in enumerate((FILLED, OUTLINED)):
        count = len(style.shapes)
        images = draw_images(style, count, args.side, args.seed + 5)
        for i, label in enumerate(images.labels.argsort().tolist()):
            axes = top.add_subplot(2, count, row * count + i + 1)
            axes.imshow((images.pixels[label].movedim(0, -1) / 5 + 0.5).clamp(0, 1).numpy())
            axes.set_title(style.shapes[i].name, fontsize=7)
            axes.axis("off")
    losses = middle.subplots()
    for arm, color, line in zip(arms, COLORS, ("-", "--", "-", "-"), strict=True):
        draw_losses(losses, arm, color, 5.0 if arm is arms[0] else 1.8, line)
    losses.set_ylabel("training loss (cross-entropy)")
    losses.set_xlabel("step")
    losses.set_title(
        f"From filled shapes to outlines among lines: rank {args.rank}, {args.images} pictures, "
        f"{args.steps} steps of {args.batch}",
        fontsize=11,
    )
    losses.legend(frameon=False)
    accuracies, times, memories = bottom.subplots(1, 3, sharey=True)
    draw_bars(accuracies, arms, "test accuracy", [arm.accuracy for arm in arms], ".3f")
    draw_bars(times, arms, "time per step, ms", list(map(milliseconds, arms)), ".0f")
    draw_bars(memories, arms, "peak of a step, MB", [arm.peak_bytes / 1e6 for arm in arms], ".0f")
    for axes in (losses, accuracies, times, memories):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def check_accuracy(arms: list[Arm], default: bool) -> list[str]:
    """Print whether both LoRA arms beat the head alone; by default they must."""
    *_, head = arms
    scores = ", ".join(f"{arm.name} {arm.accuracy:.3f}" for arm in arms)
    if all(arm.accuracy > head.accuracy for arm in arms[:2]):
        say(f"LoRA beats the frozen network with only a head on pictures not seen: {scores}.")
        return []
    say(f"LoRA does not beat the frozen network with only a head here: {scores}.")
    if default:
        return [f"with the default settings LoRA must beat the head alone: {scores}"]
    return []


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=bounded_int(1), default=250, help="training steps of every arm")
    add("--batch", type=bounded_int(1), default=32, help="pictures in a batch")
    add("--rank", type=bounded_int(1), default=8, help="rank of the adapters")
    add("--images", type=bounded_int(1), default=2000, help="pictures of the shifted task")
    add("--first-steps", type=bounded_int(1), default=600, help="training steps of the first task")
    add("--first-images", type=bounded_int(1), default=5000, help="pictures of the first task")
    add("--side", type=bounded_int(16), default=48, help="height and width of a picture")
    add("--seed", type=bounded_int(0), default=0, help="of weights, pictures and batches")
    add("--out", type=Path, default=Path(), help="folder for the picture and the adapter")
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
    return args, all(getattr(args, k) == v for k, v in defaults if k not in ("out", "seed"))


def main() -> int:
    args, default = parse_arguments()
    started = time.perf_counter()
    options = {name: value for name, value in vars(args).items() if name != "out"}
    options["torch"] = torch.__version__
    states = [State(args.out / f"demo_cnn_{task}.state", options) for task in ("first", "shifted")]
    network = learn_first_task(args, states[0])

    images = draw_images(OUTLINED, args.images, args.side, args.seed + 2)
    tests = test_batches(OUTLINED, args, args.seed + 3)
    say(
        f"Shifted task: outlines of {len(OUTLINED.shapes)} other shapes, {args.images} pictures to "
        f"learn from and {TEST_IMAGES} to test with. A guess scores {1 / len(OUTLINED.shapes):.1f}."
    )
    arms = make_arms(network, args)
    batches = Batches(images, args.batch, args.steps, args.seed)
    train(arms, batches, states[1])
    for arm in arms:
        arm.peak_bytes = peak_bytes(arm, batches[0])
        arm.accuracy = accuracy(arm.model, tests)
    adapter, picture = args.out / "demo_cnn_adapter", args.out / "demo_cnn.png"
    lorafast.save_adapter(arms[1].model, adapter, modules_to_save=("head",))
    draw(arms, picture, args)

    print(f"\n{results(arms)}")
    say(NOTE)
    print()
    check_loss_curves(arms[1], arms[0], "rounding grows from step to step")
    failed = check_in_float64(network, batches, args) + check_accuracy(arms, default)
    # Another seed, another head: the trained one must come from the file.
    fresh = for_shifted_task(network, args.seed + 1)
    failed += check_in_peft(arms[1], fresh, adapter, tests[::4])
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
