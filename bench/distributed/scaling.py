"""What an adapter run of a 70 B model sends and keeps on each of 8, 64 and 1,024 GPUs, on paper.

    python -m lorafast.bench.distributed.scaling

The model is built of PyTorch's fake tensors over its fake process group of that many ranks, sharded as a
real one is, and taken through a forward and a backward; ``Collectives`` counts what rank 0 sends. Models
of one and of two blocks are counted: the others send and keep as much as the second. No GPU is timed.
"""

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from lorafast.bench.common.table import markdown
from lorafast.bench.distributed.collectives import GATHER, Collectives
from lorafast.bench.distributed.layouts import llama, plan_of, shard_by_block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

import lorafast

NODE = 8
"""GPUs that a fast network joins: what is cut by tensor parallelism stays in it."""
TFLOPS = 400.0
"""Of a GPU, what its arithmetic is taken to reach."""
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """A decoder of Llama's shape, and an adapter over all linear layers of its blocks."""

    hidden: int = 8192
    intermediate: int = 28672
    blocks: int = 80
    heads: int = 64
    kv_heads: int = 8
    head_size: int = 128
    vocabulary: int = 128256
    r: int = 16
    tokens: int = 4096
    """Of a sequence, which is the batch of a data-parallel rank."""

    def of_rank(self, cut: int) -> "Sizes":
        """What a rank has where tensor parallelism cuts the blocks' linear layers into ``cut``."""
        return replace(
            self, intermediate=self.intermediate // cut, heads=self.heads // cut,
            kv_heads=self.kv_heads // cut,
        )  # fmt: skip

    def model(self, blocks: int) -> nn.Module:
        """With bfloat16 weights, frozen, and float32 adapters; each block is checkpointed."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = llama(
                hidden=self.hidden, intermediate=self.intermediate, blocks=blocks,
                heads=self.heads, kv_heads=self.kv_heads, head_size=self.head_size,
                vocabulary=self.vocabulary,
            )  # fmt: skip
        finally:
            torch.set_default_dtype(before)
        lorafast.adapt(model, self.r)
        _checkpoint(model, True)
        return model.train()


def _checkpoint(model: Any, on: bool) -> None:
    """Checkpoints each block, or none; Transformers 6 calls it another name."""
    what = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{what}", None)
    (method or getattr(model, f"gradient_checkpointing_{what}"))()


@dataclass(frozen=True)
class Layout:
    """How ``gpus`` are used: ``cut`` of them in tensor parallelism, FSDP2 over all others, or over the
    ``shards`` of a node with replicas beyond it."""

    name: str
    gpus: int
    cut: int = 1
    shards: int = 0
    by_columns: bool = False
    """Whether FSDP2 cuts what has fewer rows than there are ranks along its columns: A."""

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.gpus // self.cut

    def mesh(self) -> DeviceMesh:
        """Of FSDP2, or of tensor parallelism alone."""
        if self.shards:
            shape = (self.gpus // self.shards, self.shards)
            return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
        return init_device_mesh("cpu", (self.gpus,))

    def apply(self, model: Any, mesh: DeviceMesh) -> None:
        """Cuts the model's blocks, or shards each of them and all else."""
        if self.cut > 1:
            lorafast.parallel.parallelize(
                model, mesh, plan_of(model.model.layers), src_data_rank=None
            )
            return
        ranks = mesh.size(-1)

        def placement(p: nn.Parameter) -> Shard | None:
            return Shard(1) if self.by_columns and p.shape[0] < ranks else None

        shard_by_block(model, mesh, shard_placement_fn=placement)


def layouts(gpus: int) -> list[Layout]:
    """Those that are compared on so many GPUs."""
    if gpus == NODE:
        return [Layout("FSDP2", gpus), Layout("TP", gpus, cut=NODE)]
    return [
        Layout("FSDP2", gpus),
        Layout("FSDP2, A by columns", gpus, by_columns=True),
        Layout("FSDP2 in a node, replicas beyond", gpus, shards=NODE),
        Layout("TP in a node, FSDP2 beyond", gpus, cut=NODE),
    ]


@dataclass(frozen=True)
class Counted:
    """Bytes of one GPU."""

    sent: float
    """In a step."""
    beyond: float
    """Of these, in groups that leave its node."""
    frozen: float
    """Its part of the frozen weights."""
    adapter: float
    """Its part of the adapter, with gradients and AdamW's two moments."""
    gathered: float
    """Frozen weights that FSDP has gathered: what is in no block, a block, and the next one."""
    inputs: float
    """Of all blocks, which their checkpoints keep."""
    activations: float
    """What autograd keeps of a block's forward, or of the head's with the loss, the larger."""

    @property
    def peak(self) -> float:
        """Of all but what an operation allocates while it runs."""
        return self.frozen + self.adapter + self.gathered + self.inputs + self.activations


@contextlib.contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """This process is rank 0 of so many that aren't there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def step(model: nn.Module, sizes: Sizes) -> Collectives:
    """What a forward and a backward of a sequence send."""
    batch = _sequence(sizes)
    with Collectives() as counted:
        model(**batch).loss.backward()
    return counted


def _sequence(sizes: Sizes) -> dict[str, Tensor]:
    """One, as the model takes it."""
    x = torch.randn(1, sizes.tokens, sizes.hidden, dtype=torch.bfloat16, requires_grad=True)
    return {"inputs_embeds": x, "labels": torch.zeros(1, sizes.tokens, dtype=torch.int64)}


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def _kept(model: nn.Module, sizes: Sizes) -> float:
    """Bytes that autograd keeps of a forward that isn't checkpointed, parameters not."""
    _checkpoint(model, False)
    own = {_local(p).untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, tuple[Any, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = (storage, storage.nbytes())
        return tensor

    batch = _sequence(sizes)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return float(sum(size for _, size in found.values()))


@dataclass
class _Model:
    """Counted of a model of some blocks: as ``Counted``, the gathers one by one."""

    sent: float
    beyond: float
    frozen: float
    adapter: float
    gathers: list[int]
    kept: float


def _of(sizes: Sizes, layout: Layout, blocks: int) -> _Model:
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_ranks(layout.gpus))
        mesh = layout.mesh()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model, alone = sizes.model(blocks), sizes.model(blocks)
        layout.apply(model, mesh)
        if layout.cut > 1:
            layout.apply(alone, mesh)
        counted = step(model, sizes)
        parts = [(_local(p), p.requires_grad) for p in model.parameters()]
        return _Model(
            sent=counted.sent(),
            beyond=counted.sent(NODE),
            frozen=sum(p.nbytes for p, trained in parts if not trained),
            adapter=sum(4 * p.nbytes for p, trained in parts if trained),
            gathers=[one.bytes for one in counted.calls if one.kind == GATHER],
            kept=_kept(alone, sizes),
        )


def count(sizes: Sizes, layout: Layout) -> Counted:
    """Of all blocks, from models of one and of two.

    Tensor parallelism with FSDP2 is counted as the one, over the ranks of a node, and the other, over
    the nodes, of layers of the sizes that a rank has.
    """
    if 1 < layout.cut < layout.gpus:
        inner = count(sizes, Layout("", layout.cut, layout.cut))
        outer = count(sizes.of_rank(layout.cut), Layout("", layout.gpus // layout.cut))
        return replace(
            outer,
            sent=inner.sent + outer.sent,
            beyond=outer.sent,
            inputs=inner.inputs,
            activations=inner.activations,
        )
    one, two = (_of(sizes, layout, blocks) for blocks in (1, 2))

    def whole(first: float, second: float) -> float:
        return first + (sizes.blocks - 1) * (second - first)

    gathered = 0
    if one.gathers:
        root, block = one.gathers[:2]  # of all that is in no block, then of the first
        gathered = root + 2 * block
    of_block = two.kept - one.kept
    return Counted(
        sent=whole(one.sent, two.sent),
        beyond=whole(one.beyond, two.beyond),
        frozen=whole(one.frozen, two.frozen),
        adapter=whole(one.adapter, two.adapter),
        gathered=gathered,
        inputs=2 * sizes.blocks * sizes.tokens * sizes.hidden,
        activations=max(of_block, one.kept - of_block),
    )


def flops(sizes: Sizes, layout: Layout) -> float:
    """Of a GPU in a step: the frozen products forward, again for the checkpoints, and their dx."""
    attention = 2 * sizes.hidden * sizes.head_size * (sizes.heads + sizes.kv_heads)
    block = attention + 3 * sizes.hidden * sizes.intermediate
    weights = 3 * sizes.blocks * block + 2 * sizes.vocabulary * sizes.hidden
    return 2.0 * weights * sizes.tokens * layout.sequences / layout.gpus


def rows(sizes: Sizes, gpus: tuple[int, ...]) -> list[list[str]]:
    """A line for each layout."""
    found = []
    for layout in itertools.chain.from_iterable(map(layouts, gpus)):
        counted = count(sizes, layout)
        seconds = flops(sizes, layout) / (TFLOPS * 1e12)
        beyond = counted.beyond
        found.append(
            [
                f"{layout.gpus:,}",
                layout.name,
                f"{layout.sequences * sizes.tokens / 1e3:,.0f}",
                f"{counted.sent / GB:.1f}",
                f"{beyond / GB:.2f}" if layout.gpus > NODE else "-",
                f"{counted.sent / GB / seconds:.0f}",
                f"{beyond / GB / seconds:.2g}" if layout.gpus > NODE else "-",
                *(
                    f"{size / GB:.1f}"
                    for size in (
                        counted.frozen,
                        counted.adapter,
                        counted.gathered,
                        counted.inputs + counted.activations,
                        counted.peak,
                    )
                ),
            ]
        )
    return found


HEADER = [
    "GPUs", "layout", "1,000 tokens a step", "GB sent", "beyond the node", "GB/s", "beyond the node",
    "frozen, GB", "adapter", "gathered", "activations", "in all",
]  # fmt: skip


def table(sizes: Sizes, gpus: tuple[int, ...]) -> str:
    """In Markdown; sizes are of one GPU."""
    return markdown(HEADER, rows(sizes, gpus))


def main() -> None:
    """Prints the table."""
    default = Sizes()
    parser = argparse.ArgumentParser(
        prog="python -m lorafast.bench.distributed.scaling",
        description="Bytes that an adapter run sends and keeps on each GPU, counted on fake ranks.",
    )
    for name, value in vars(default).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024], help="multiples of 8")
    arguments = vars(parser.parse_args())
    gpus = arguments.pop("gpus")
    if any(count < NODE or count % NODE for count in gpus):
        parser.error(f"--gpus: {gpus} aren't multiples of {NODE}")
    print(table(Sizes(**arguments), tuple(gpus)))


if __name__ == "__main__":
    main()
