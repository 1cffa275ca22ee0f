"""What is counted on fake ranks, of one block and of two, is what real ranks send, of three."""

import dataclasses
import warnings
from pathlib import Path

import pytest
from lorafast.bench.distributed import scaling
from lorafast.bench.distributed.collectives import GATHER
from lorafast.bench.distributed.layouts import plan_of
from ranks import mesh_of, on_ranks

import lorafast

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")

SIZES = scaling.Sizes(
    hidden=64, intermediate=96, blocks=3, heads=4, kv_heads=2, head_size=16, vocabulary=96, r=4,
    tokens=8,
)  # fmt: skip
IMPORTS = ("lorafast.bench.distributed.scaling", "transformers.models.llama.modeling_llama")
COUNTED = "lorafast.bench counts on the CPU, where it also makes its batch"


def _on_rank(rank, layout):
    """What this rank sends, and its parts of the weights and of the adapter with what trains it."""
    from torch.distributed.fsdp import fully_shard

    model = SIZES.model(SIZES.blocks)
    if 1 < layout.cut < layout.gpus:
        shape = (layout.gpus // layout.cut, layout.cut)
        mesh = mesh_of(*shape, mesh_dim_names=("dp", "tp"))
        lorafast.parallel.parallelize(model, mesh["tp"], plan_of(model.model.layers))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    else:
        layout.apply(model, layout.mesh())
    sent = scaling.step(model, SIZES)
    parts = [(p.to_local().nbytes, p.requires_grad) for p in model.parameters() if is_cut(p)]
    frozen = sum(size for size, trained in parts if not trained)
    adapter = sum(4 * size for size, trained in parts if trained)
    gathers = [one.bytes for one in sent.calls if one.kind == GATHER]
    return sent.sent(), frozen, adapter, gathers[:2]


def is_cut(parameter):
    return hasattr(parameter, "to_local")


@pytest.mark.parametrize(
    "layout",
    [
        scaling.Layout("FSDP2", 2),
        scaling.Layout("FSDP2, A by columns", 8, by_columns=True),
        scaling.Layout("FSDP2 in a node, replicas beyond", 4, shards=2),
        scaling.Layout("TP", 2, cut=2),
        scaling.Layout("TP in a node, FSDP2 beyond", 4, cut=2),
    ],
    ids=lambda layout: layout.name,
)
def test_counts_of_fake_ranks_are_those_of_real_ones(layout):
    expected = scaling.count(SIZES, layout)
    ranks = {"world": layout.gpus, "imports": IMPORTS, "cpu_because": COUNTED}
    found = on_ranks(_on_rank, layout, **ranks)
    for sent, frozen, adapter, gathers in found:
        assert sent == expected.sent
        assert adapter == expected.adapter
        if layout.cut == 1:
            assert frozen == expected.frozen
            assert expected.gathered == gathers[0] + 2 * gathers[1]


def test_no_address_of_a_fake_tensor_is_asked():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        scaling.count(SIZES, scaling.Layout("TP", 2, cut=2))
    assert [str(one.message) for one in found if "data pointer" in str(one.message)] == []


def test_a_table():
    sizes = dataclasses.replace(SIZES, heads=8, kv_heads=8)
    lines = scaling.table(sizes, (8, 16)).splitlines()
    assert len(lines) == 2 + 2 + 4
    assert {line.count("|") for line in lines} == {len(scaling.HEADER) + 1}


def test_the_page_shows_what_is_counted():
    page = Path(__file__).parents[2] / "docs" / "scaling.md"
    assert scaling.table(scaling.Sizes(), (8, 64, 1024)) in page.read_text(encoding="utf-8")
