"""Times a training step of a small Llama on several ranks, and counts what it sends: DDP, FSDP2, tensor
parallelism, this with FSDP2; lorafast, PEFT, PEFT accelerated, and the frozen model, in turn in one run.

The gradients of the input and, by name, of the adapters are checked first, against those of one process
in float64, on the batch of all ranks. A step is forward, backward and AdamW over the adapters; dx
reaches the first block in all arms, as it does in a larger model. The ranks share this machine's
threads, or each has a GPU of its own.

PEFT adapts what Transformers has cut by its own plan: each of q, k and v, gate and up sums its dx, where
``lorafast.parallel`` sums theirs together. So where layers are cut, a frozen model of that plan is timed
too.
"""

import contextlib
import copy
import functools
import os
import pickle
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lorafast.bench.common.contenders import FROZEN, UnavailableError
from lorafast.bench.common.problem import DTYPES, SCALING
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.steps import Arm, attempt, show
from lorafast.bench.distributed.collectives import Collectives
from lorafast.bench.distributed.layouts import (
    CUT,
    LAYOUTS,
    SHARDS,
    Layout,
    cut_by_transformers,
    give_whole_sizes,
    llama,
    plan_of,
    shard_by_block,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import lorafast
from lorafast.reference import contract

BY_TRANSFORMERS = "frozen-transformers"
"""The frozen model, cut by Transformers."""
_FROZEN = (FROZEN, BY_TRANSFORMERS)
_OF_PEFT = ("peft", "accelerated")
ARMS = (FROZEN, "lorafast", *_OF_PEFT)
_SECONDS = 20.0
_LEAST, _MOST, _WARM_UP = 5, 60, 2
_IMPORTED_ONCE = [
    "lorafast.bench.distributed.job", "peft", "transformers.models.llama.modeling_llama",
]  # fmt: skip


def arms_of(layout: Layout) -> tuple[str, ...]:
    """Which are timed in this layout."""
    return (*ARMS, BY_TRANSFORMERS) if layout.cut > 1 else ARMS


@dataclass(frozen=True)
class Size:
    """A decoder of Llama's shape, and the sequences of a step, of which each replica has a part."""

    hidden: int = 512
    intermediate: int = 1408
    blocks: int = 4
    heads: int = 8
    vocabulary: int = 2048
    sequences: int = 8
    tokens: int = 64

    def model(self) -> nn.Module:
        """Frozen, in float32, the same on every call."""
        torch.manual_seed(0)
        model = llama(
            hidden=self.hidden, intermediate=self.intermediate, blocks=self.blocks,
            heads=self.heads, vocabulary=self.vocabulary,
        )  # fmt: skip
        return model.requires_grad_(False).train()

    def batch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings ``[sequences, tokens, hidden]`` and labels ``[sequences, tokens]``."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.sequences, self.tokens, self.hidden, generator=generator)
        labels = torch.randint(self.vocabulary, (self.sequences, self.tokens), generator=generator)
        return x.to(dtype), labels


@dataclass
class Row(Arm):
    """One arm in one layout. ``samples``: the slowest rank's; ``sent``: bytes of a rank in a step."""

    layout: str
    ranks: int
    sequences: int
    tokens: int
    hidden: int
    blocks: int
    r: int
    dtype: str
    sent: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    """How many of each kind in a step."""


def _adapted(name: str, model: nn.Module, r: int) -> nn.Module:
    if name == "lorafast":
        lorafast.adapt(model, r, alpha=SCALING * r)
    elif name in _OF_PEFT:
        try:
            import peft
        except ImportError:
            raise UnavailableError("peft is not installed") from None
        config = peft.LoraConfig(r=r, lora_alpha=int(SCALING * r), target_modules="all-linear")
        wrapped = peft.get_peft_model(model, config)
        if name == "accelerated":
            _accelerate(wrapped)
        inner: Any = wrapped.base_model
        model = inner.model
    _fill(model)
    return model


def _accelerate(model: nn.Module) -> None:
    lorafast.accelerate(model, quiet=True)
    reasons = set(lorafast.explain(model).layers.values())
    if None not in reasons:
        raise UnavailableError(f"nothing is fast: {', '.join(sorted(reasons))}")


def _fill(model: nn.Module) -> None:
    """Gives the adapters the same numbers in all arms."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(_trained(model).items()):
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            drawn = (drawn * (0.1 / p.shape[1] ** 0.5)).to(p.device)
            if isinstance(p, DTensor):
                drawn = distribute_tensor(drawn, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(drawn)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by the layer's name and ``lora_A`` or ``lora_B``."""
    found = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            place, _, rest = name.removeprefix("module.").partition(".lora_")
            found[f"{place}.lora_{rest[0]}"] = p
    return found


def _loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    found: Tensor = model(inputs_embeds=x, labels=labels).loss
    return found


def _gradients(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``dx``, and those of the adapters by name, whole; these are cleared."""
    x = x.detach().requires_grad_()
    _loss(model, x, labels).backward()
    assert x.grad is not None
    found = {"dx": x.grad}
    for name, p in _trained(model).items():
        gradient: Any = p.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        p.grad = None
    return found


Bounds = dict[str, contract.Bound]


@functools.cache
def _bounds(name: str, size: Size, r: int, dtype: torch.dtype) -> Bounds:
    """What the contract asks of the gradients of the whole batch, of ``lorafast`` or ``FROZEN``."""
    x, labels = size.batch(dtype)
    plain = _adapted(name, size.model().to(dtype), r)
    exact = copy.deepcopy(plain).double()
    with lorafast.use_backend("reference"):
        eager = _gradients(plain, x, labels)
        return contract.bounds(eager, _gradients(exact, x.double(), labels), dtype=dtype)


class _Rank:
    """One process: its arms, and what it measures of them."""

    def __init__(
        self, rank: int, layout: Layout, size: Size, r: int, dtype: torch.dtype, device: str
    ) -> None:
        self.layout, self.size, self.r, self.dtype = layout, size, r, dtype
        self.device = torch.device(device)
        mine = rank // layout.cut
        x, labels = (whole.chunk(layout.replicas)[mine] for whole in size.batch(dtype))
        self.batch = (x.to(self.device), labels.to(self.device))
        self.mesh = layout.mesh(self.device) if layout.cut > 1 else None

    def make(self, name: str) -> nn.Module:
        """The arm's model."""
        model: Any = self.size.model().to(self.device, self.dtype)
        if self.mesh is None:
            model = _adapted(name, model, self.r)
        elif name in (BY_TRANSFORMERS, *_OF_PEFT):  # PEFT adapts what is cut already
            cut_by_transformers(model, self.mesh)
            model = _adapted(name, model, self.r)
            give_whole_sizes(model)
        else:
            model = _adapted(name, model, self.r)
            lorafast.parallel.parallelize(model, self.mesh[CUT], plan_of(model.model.layers))
        if self.layout.sharded:
            shard_by_block(model, None if self.mesh is None else self.mesh[SHARDS])
        elif self.mesh is None and name not in _FROZEN:
            model = nn.parallel.DistributedDataParallel(model)
        return model

    def why_wrong(self, model: nn.Module, bounds: Bounds) -> str | None:
        """Of the gradients, each averaged over the ranks, and of the parts of dx together."""
        found = _gradients(model, *self.batch)
        found["dx"] = self._whole(found["dx"])
        return contract.why_any_broken({name: g.cpu() for name, g in found.items()}, bounds)

    def _whole(self, dx: Tensor) -> Tensor:
        """Of the mean over all sequences: each rank's is of the mean over its own."""
        parts = [torch.empty_like(dx) for _ in range(self.layout.ranks)]
        dist.all_gather(parts, dx.contiguous() / self.layout.replicas)
        return torch.cat(parts[:: self.layout.cut])

    def step_of(self, model: nn.Module) -> Callable[[], None]:
        """Forward, backward, AdamW at a learning rate of zero."""
        groups = defaultdict(list)
        # A multi-tensor operation takes tensors of one mesh, or of none: PEFT has both.
        for p in _trained(model).values():
            groups[getattr(p, "device_mesh", None)].append(p)
        of_optimizer = [{"params": group} for group in groups.values()]
        optimizer = torch.optim.AdamW(of_optimizer, lr=0.0, foreach=True) if groups else None
        x, labels = self.batch

        def step() -> None:
            _loss(model, x.detach().requires_grad_(), labels).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    def seconds(self, step: Callable[[], None]) -> float:
        """Of a step, from a barrier to when the last rank is done."""
        dist.barrier()
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self.device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()


def _run(rank: int, file: str, found: Any, arguments: bytes) -> None:
    layout, size, r, dtype, kind, seconds, bounds = pickle.loads(arguments)
    ranks = LAYOUTS[layout].ranks
    device = "cpu" if kind == "cpu" else f"cuda:{rank}"
    torch.set_num_threads(max(torch.get_num_threads() // ranks, 1))
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{file}", rank=rank,
        world_size=ranks, timeout=timedelta(seconds=300),
    )  # fmt: skip
    rows = {
        name: Row(
            layout, ranks, size.sequences, size.tokens, size.hidden, size.blocks, r, dtype,
            contender=name,
        )
        for name in arms_of(LAYOUTS[layout])
    }  # fmt: skip
    own = _Rank(rank, LAYOUTS[layout], size, r, DTYPES[dtype], device)
    _sample(own, rows, _steps(own, rows, bounds), seconds)
    if rank == 0:
        found.put(list(rows.values()))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends by itself


def _steps(
    own: _Rank, rows: dict[str, Row], bounds: dict[str, Bounds]
) -> dict[str, Callable[[], None]]:
    """Of every arm that isn't wrong; counts what they send."""
    steps = {}
    for name, row in rows.items():
        expected = bounds[FROZEN if name in _FROZEN else "lorafast"]
        model = attempt(
            row,
            functools.partial(own.make, name),
            functools.partial(own.why_wrong, bounds=expected),
        )
        anywhere = torch.tensor(float(model is None), device=own.device)
        dist.all_reduce(anywhere)  # all ranks go on with the same arms
        if model is None or anywhere:
            if row.unavailable is None:
                row.wrong = row.wrong or "on another rank"
            continue
        step = own.step_of(model)
        step()
        with Collectives() as counted:
            step()
        row.sent, row.collectives = round(counted.sent()), counted.counts()
        steps[name] = step
    return steps


def _sample(
    own: _Rank, rows: dict[str, Row], steps: dict[str, Callable[[], None]], seconds: float
) -> None:
    """Times every step in turn, the same one on all ranks."""
    order = list(steps)
    shuffle = random.Random(0).shuffle
    began = time.perf_counter()
    for index in range(_WARM_UP + _MOST):
        shuffle(order)
        for name in order:
            taken = own.seconds(steps[name])
            if index >= _WARM_UP:
                rows[name].samples.append(taken)
        late = torch.tensor(float(time.perf_counter() - began > seconds), device=own.device)
        dist.all_reduce(late)
        if late and index >= _WARM_UP + _LEAST - 1:
            break
    for row in rows.values():
        row.frozen_samples = rows[FROZEN].samples if row.samples else []


def measure(
    layout: str, size: Size, r: int, dtype: str, *, device: torch.device, seconds: float
) -> list[Row]:
    """The rows of all arms in one layout."""
    # Processes that are forked from one that has imported everything start at once; what libraries do
    # with CUDA when they are imported doesn't survive a fork.
    method = "spawn" if device.type == "cuda" else "forkserver"
    context = mp.get_context(method)
    context.set_forkserver_preload(_IMPORTED_ONCE)
    bounds = {name: _bounds(name, size, r, DTYPES[dtype]) for name in (FROZEN, "lorafast")}
    arguments = pickle.dumps((layout, size, r, dtype, device.type, seconds, bounds))
    found = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(found):
        file = os.path.join(folder, "rendezvous")
        mp.start_processes(
            _run, (file, found, arguments), nprocs=LAYOUTS[layout].ranks, start_method=method
        )
        rows: list[Row] = found.get()
    return rows


def run(
    r: int,
    dtype: str,
    *,
    device: torch.device,
    record: Record,
    size: Size | None = None,
    seconds: float | None = None,
) -> list[Row]:
    """All layouts, printed and kept in ``record``."""
    every = []
    for name, layout in progress(list(LAYOUTS.items()), "layout"):
        if device.type == "cuda" and torch.cuda.device_count() < layout.ranks:
            there = torch.cuda.device_count()
            say(f"\ndistributed: {layout.shown} needs {layout.ranks} GPUs, and there is {there}")
            continue
        share = (seconds or _SECONDS) / len(LAYOUTS)
        rows = measure(name, size or Size(), r, dtype, device=device, seconds=share)
        show(rows, describe)
        for row in rows:
            if row.samples:
                say(f"  {row.contender} sends {sent_by(row)}")
        every += rows
    record.add("distributed", every)
    return every


def sent_by(row: Row) -> str:
    """``1.2 MB: 4 all_gather, …``."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row.collectives.items()))
    return f"{row.sent / 1e6:.2f} MB in a step{': ' if kinds else ''}{kinds}"


def describe(row: Row) -> str:
    """``FSDP2 by block: …``."""
    return (
        f"{LAYOUTS[row.layout].shown} on {row.ranks} ranks: a Llama of {row.blocks} blocks, width "
        f"{row.hidden}, random weights, training step of {row.sequences} x {row.tokens} tokens, "
        f"{row.dtype}, r={row.r}"
    )
