"""Times a training step of a small Llama on two ranks, and counts what it sends: DDP, FSDP2, tensor
parallelism; lorafast, PEFT, PEFT accelerated, and the frozen model, in turn in one run.

The adapters' gradients are checked first, by name, against those of one process in float64, on the batch
of both ranks. A step is forward, backward and AdamW over the adapters; dx reaches the first block in all
arms, as it does in a larger model. Each rank has half of this machine's threads, or a GPU of its own.
"""

import contextlib
import copy
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lorafast.bench.common.check import raised
from lorafast.bench.common.contenders import FROZEN, UnavailableError
from lorafast.bench.common.problem import DTYPES, SCALING
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.steps import Arm, format_rows
from lorafast.bench.distributed.collectives import Collectives
from lorafast.bench.distributed.layouts import plan_of
from torch import Tensor, nn

import lorafast
from lorafast.reference import contract

LAYOUTS = ("ddp", "fsdp2", "tp")
ARMS = (FROZEN, "lorafast", "peft", "accelerated")
RANKS = 2
_SECONDS = 20.0
_LEAST, _MOST, _WARM_UP = 5, 60, 2
_SHOWN = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP2 by block", "tp": "tensor parallelism"}


@dataclass(frozen=True)
class Size:
    """A decoder of Llama's shape, and the sequences of a step, shared by the ranks but for ``tp``."""

    hidden: int = 512
    intermediate: int = 1408
    blocks: int = 4
    heads: int = 8
    vocabulary: int = 2048
    sequences: int = 8
    tokens: int = 64

    def model(self) -> nn.Module:
        """Frozen, in float32, the same on every call."""
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError:
            raise UnavailableError("transformers is not installed") from None
        torch.manual_seed(0)
        of_model: dict[str, Any] = {
            "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks, "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads, "vocab_size": self.vocabulary, "use_cache": False,
            "attn_implementation": "sdpa",
        }  # fmt: skip
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**of_model)).requires_grad_(False)
        return model.train()

    def batch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings ``[sequences, tokens, hidden]`` and labels ``[sequences, tokens]``."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.sequences, self.tokens, self.hidden, generator=generator)
        labels = torch.randint(self.vocabulary, (self.sequences, self.tokens), generator=generator)
        return x.to(dtype), labels


@dataclass
class Row(Arm):
    """One arm in one layout. ``samples``: the slower rank's; ``sent``: bytes of a rank in a step."""

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
    elif name != FROZEN:
        try:
            import peft
        except ImportError:
            raise UnavailableError("peft is not installed") from None
        config = peft.LoraConfig(r=r, lora_alpha=int(SCALING * r), target_modules="all-linear")
        wrapped = peft.get_peft_model(model, config)
        if name == "accelerated":
            lorafast.accelerate(wrapped, quiet=True)
        inner: Any = wrapped.base_model
        model = inner.model
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(_trained(model).items()):
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(drawn * (0.1 / p.shape[1] ** 0.5))
    return model


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by the layer's name and ``lora_A`` or ``lora_B``."""
    found = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            place, _, rest = name.removeprefix("module.").partition(".lora_")
            found[f"{place}.lora_{rest[0]}"] = p
    return found


def _wrapped(name: str, layout: str, model: nn.Module) -> nn.Module:
    """As the layout has it."""
    if layout == "ddp":
        return model if name == FROZEN else nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inner: Any = model.model
    blocks: Any = inner.layers
    device = next(model.parameters()).device.type
    if layout == "fsdp2":
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        return model
    if name not in (FROZEN, "lorafast"):
        raise UnavailableError("PEFT's layers have no style for parallelize_module")
    mesh = init_device_mesh(device, (RANKS,))
    lorafast.parallel.parallelize(model, mesh, plan_of(blocks))
    return model


def _loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    found: Tensor = model(inputs_embeds=x.detach().requires_grad_(), labels=labels).loss
    return found


def _gradients(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the adapters by name, whole; they are cleared."""
    _loss(model, x, labels).backward()
    found = {}
    for name, p in _trained(model).items():
        gradient: Any = p.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        p.grad = None
    return found


def _bounds(size: Size, r: int, dtype: torch.dtype) -> dict[str, contract.Bound]:
    """What the contract asks of the gradients of the whole batch."""
    x, labels = size.batch(dtype)
    plain = _adapted("lorafast", size.model().to(dtype), r)
    exact = copy.deepcopy(plain).double()
    with lorafast.use_backend("reference"):
        eager = _gradients(plain, x, labels)
        return contract.bounds(eager, _gradients(exact, x.double(), labels), dtype=dtype)


class _Rank:
    """One process: its arms, and what it measures of them."""

    def __init__(self, rank: int, layout: str, size: Size, r: int, dtype: str, device: str) -> None:
        self.layout, self.size, self.r = layout, size, r
        self.dtype, self.device = DTYPES[dtype], torch.device(device)
        x, labels = size.batch(self.dtype)
        if layout != "tp":
            x, labels = x.chunk(RANKS)[rank], labels.chunk(RANKS)[rank]
        self.batch = (x.to(self.device), labels.to(self.device))

    def make(self, name: str) -> nn.Module:
        """The arm's model."""
        model = _adapted(name, self.size.model().to(self.dtype), self.r).to(self.device)
        return _wrapped(name, self.layout, model)

    def why_wrong(self, model: nn.Module, bounds: dict[str, contract.Bound]) -> str | None:
        """Of the gradients, each averaged over the ranks."""
        found = {name: g.cpu() for name, g in _gradients(model, *self.batch).items()}
        return contract.why_any_broken(found, bounds)

    def step_of(self, model: nn.Module) -> Callable[[], None]:
        """Forward, backward, AdamW at a learning rate of zero."""
        trained = list(_trained(model).values())
        optimizer = torch.optim.AdamW(trained, lr=0.0, foreach=True) if trained else None

        def step() -> None:
            _loss(model, *self.batch).backward()
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


def _run(rank: int, file: str, found: Any, arguments: tuple[Any, ...]) -> None:
    layout, size, r, dtype, kind, seconds = arguments
    device = "cpu" if kind == "cpu" else f"cuda:{rank}"
    torch.set_num_threads(max(torch.get_num_threads() // RANKS, 1))
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{file}", rank=rank,
        world_size=RANKS, timeout=timedelta(seconds=300),
    )  # fmt: skip
    rows, steps = _measure_arms(_Rank(rank, layout, size, r, dtype, device), rank, dtype)
    order = list(steps)
    mine = _Rank(rank, layout, size, r, dtype, device)
    shuffle = random.Random(0).shuffle
    began = time.perf_counter()
    for index in range(_WARM_UP + _MOST):
        shuffle(order)
        for name in order:
            taken = mine.seconds(steps[name])
            if index >= _WARM_UP:
                rows[name].samples.append(taken)
        late = torch.tensor(float(time.perf_counter() - began > seconds), device=device)
        dist.all_reduce(late)
        if late and index >= _WARM_UP + _LEAST - 1:
            break
    for row in rows.values():
        row.frozen_samples = rows[FROZEN].samples if row.samples else []
    if rank == 0:
        found.put(list(rows.values()))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends by itself


def _measure_arms(
    own: _Rank, rank: int, dtype: str
) -> tuple[dict[str, Row], dict[str, Callable[[], None]]]:
    """Checks every arm, and counts what its step sends."""
    size = own.size
    bounds = _bounds(size, own.r, own.dtype)
    rows, steps = {}, {}
    for name in ARMS:
        row = rows[name] = Row(
            own.layout, RANKS, size.sequences, size.tokens, size.hidden, size.blocks, own.r, dtype,
            contender=name,
        )  # fmt: skip
        try:
            model = own.make(name)
            row.wrong = None if name == FROZEN else own.why_wrong(model, bounds)
        except UnavailableError as error:
            row.unavailable = str(error)
            continue
        except Exception as error:  # it is the arm's, reported with it, and the others go on
            row.wrong = raised(error)
        anywhere = torch.tensor(float(row.wrong is not None), device=own.device)
        dist.all_reduce(anywhere)  # all ranks go on with the same arms
        if anywhere:
            row.wrong = row.wrong or "on another rank"
            continue
        step = own.step_of(model)
        step()
        with Collectives() as counted:
            step()
        row.sent, row.collectives = round(counted.sent()), counted.counts()
        steps[name] = step
    return rows, steps


def measure(
    layout: str, size: Size, r: int, dtype: str, *, device: torch.device, seconds: float
) -> list[Row]:
    """The rows of all arms in one layout."""
    context = mp.get_context("spawn")
    found = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "rendezvous")
        arguments = (layout, size, r, dtype, device.type, seconds)
        with contextlib.closing(found):
            mp.spawn(_run, (file, found, arguments), nprocs=RANKS)
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
    if device.type == "cuda" and torch.cuda.device_count() < RANKS:
        say(f"\ndistributed: needs {RANKS} GPUs, and there is {torch.cuda.device_count()}")
        return []
    every = []
    for layout in progress(LAYOUTS, "layout"):
        rows = measure(
            layout,
            size or Size(),
            r,
            dtype,
            device=device,
            seconds=(seconds or _SECONDS) / len(LAYOUTS),
        )
        say(f"\n{describe(rows[0])}")
        say(format_rows(rows))
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
        f"{_SHOWN[row.layout]} on {row.ranks} ranks: a Llama of {row.blocks} blocks, width "
        f"{row.hidden}, random weights, training step of {row.sequences} x {row.tokens} tokens, "
        f"{row.dtype}, r={row.r}"
    )
