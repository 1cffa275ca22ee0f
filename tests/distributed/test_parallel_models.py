"""What is done with a model that is cut: saved, loaded, merged, switched, sharded by FSDP too."""

import copy

import pytest
import torch
from ranks import device, mesh_of, on_ranks
from small_decoder import PROJECTIONS, WIDTH, decoder, fill_adapters, tokens
from test_tensor_parallel import (
    EXACT,
    adapted,
    by_tokens,
    error,
    loss_of,
    plan_of,
    steps,
    whole,
)
from torch import nn

import lorafast


def cut(model, **options):
    return lorafast.parallel.parallelize(model, mesh_of(), plan_of(model), **options)


def state_of(model):
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
        for name, t in model.state_dict().items()
    }


def _files(rank, folder):
    import torch.distributed as dist

    one, two = adapted(True, p=0.0).eval(), cut(adapted(True, p=0.0)).eval()
    ids = tokens(2)
    expected, before = one(ids), state_of(one)
    assert all(torch.equal(t, before[name]) for name, t in state_of(two).items())
    lorafast.warm_up(two, [4])
    assert str(lorafast.summary(two)) == str(lorafast.summary(one))
    lorafast.save_adapter(two, folder)
    dist.barrier()
    other = lorafast.load_adapter(copy.deepcopy(one), folder)
    assert error(other(ids), expected) < EXACT
    with torch.no_grad():
        for layer in one.modules():
            if isinstance(layer, lorafast.nn.LoRALinear):
                layer.lora_B.mul_(2)
    if not rank:
        lorafast.save_adapter(one, f"{folder}/other")
    dist.barrier()
    lorafast.load_adapter(two, f"{folder}/other")
    lorafast.parallel.check_replicas(two)
    assert error(two(ids), one(ids)) < EXACT
    with lorafast.disabled(two), lorafast.disabled(one):
        assert torch.equal(two(ids), one(ids)) or error(two(ids), one(ids)) < EXACT
    layer = two.layers[0].mlp.down_proj
    layer.merge()
    assert error(two(ids), one(ids)) < EXACT
    layer.unmerge()
    lorafast.merge(two)
    merged = lorafast.merge(copy.deepcopy(one)).state_dict()
    assert error(two(ids), one(ids)) < EXACT
    for name, tensor in state_of(two).items():
        assert error(tensor, merged[name]) < EXACT, name


def test_files_and_merging(tmp_path):
    on_ranks(_files, str(tmp_path))


def _with_names_and_bottlenecks(rank):
    from lorafast.parallel import check_replicas

    def model():
        made = adapted()
        lorafast.add_adapter(made, "second", 2)
        torch.manual_seed(8)
        for name, parameter in made.named_parameters():
            if ".inactive." in name:
                nn.init.normal_(parameter, std=0.1)
        return made

    one, two = model(), cut(model())
    ids = tokens(2)
    for name in ("second", "default", "second"):
        for each in (one, two):
            lorafast.set_adapter(each, name)
        (losses, found), (expected, exactly) = steps(two, ids, 2), steps(one, ids, 2)
        assert error(losses, expected) < 1e-10
        assert max(error(found[n], g) for n, g in exactly.items()) < 1e-10
        check_replicas(two)
    with pytest.raises(ValueError, match="add adapters before"):
        lorafast.add_adapter(two, "third")


@pytest.mark.slow
def test_several_adapters():
    on_ranks(_with_names_and_bottlenecks)


def _siblings(rank):
    from lorafast.ops import siblings

    siblings.FEWEST_ROWS = siblings.FEWEST_ELEMENTS = 1
    made = []
    share = siblings.Shared.__init__
    siblings.Shared.__init__ = lambda self, x, keys: (share(self, x, keys), made.append(len(keys)))[
        0
    ]
    ids = tokens(2)
    expected, exactly = steps(adapted(p=0.0), ids, 1)
    losses, found = steps(cut(adapted(p=0.0, fuse="siblings")), ids, 1)
    assert made == [2, 2]  # gate and up of each block
    assert error(losses, expected) < EXACT
    assert max(error(found[name], gradient) for name, gradient in exactly.items()) < EXACT
    made.clear()
    model = cut(adapted(p=0.0, fuse="siblings"))
    torch.utils.checkpoint.checkpoint(loss_of, model, ids, use_reentrant=False).backward()
    assert (
        max(error(model.get_parameter(n).grad, gradient) for n, gradient in exactly.items()) < EXACT
    )
    assert made == [2] * 4  # made again in the backward


@pytest.mark.slow
def test_siblings_share_their_part_of_x():
    on_ranks(_siblings)


def _with_fsdp(rank):
    from lorafast.bench.distributed.collectives import Collectives
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(2, 2, mesh_dim_names=("dp", "tp"))
    one, two = adapted(p=0.0), adapted(p=0.0)
    lorafast.parallel.parallelize(two, mesh["tp"], plan_of(two))
    for layer in two.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(two, mesh=mesh["dp"])
    ids = tokens(4)
    lorafast.parallel.check_replicas(two)
    losses, found = steps(two, ids.chunk(2)[mesh["dp"].get_local_rank()], 3)
    expected, exactly = steps(one, ids, 3)
    lorafast.parallel.check_replicas(two)
    torch.distributed.all_reduce(losses)  # of which two ranks have the same each
    assert error(losses / 4, expected) < 1e-10
    assert max(error(found[name], gradient) for name, gradient in exactly.items()) < EXACT
    with Collectives() as sent:
        loss_of(two, ids).backward()
    # FSDP2 gathers each block's parts of this rank's parts, twice; it scatters gradients of adapters.
    block = two.layers[0]
    if rank:
        return  # of sizes that two ranks can't halve the first has more
    parts = {n: p.to_local().numel() * 2 for n, p in block.named_parameters()}
    trained = sum(size for n, size in parts.items() if "lora_" in n)
    gathered = [c for c in sent.calls if c.shape == (sum(parts.values()),)]
    assert [c.kind for c in gathered] == ["all_gather"] * 4
    assert [c.shape for c in sent.calls if c.kind == "reduce_scatter"] == [(trained,)] * 2
    assert sent.counts(backward=False)["all_reduce"] == 4  # y of two layers of each block
    sizes = {c.shape for c in sent.calls if c.kind == "all_reduce" and c.backward}
    assert sizes == {(*ids.shape, WIDTH), (3, WIDTH), (WIDTH, 3)}  # dx; dA and dB


@pytest.mark.slow
def test_with_fsdp_on_four_ranks():
    on_ranks(_with_fsdp, world=4)


def _of_other_kinds(rank, folder):
    """On four ranks what else can be cut; and what is saved there, loaded by one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(2, 2, mesh_dim_names=("dp", "tp"))

    def spread(model, plan):
        lorafast.parallel.parallelize(model, mesh["tp"], plan)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    def in_int8():
        model = lorafast.quantize(decoder(torch.float64).requires_grad_(False), "int8")
        torch.manual_seed(3)
        model = lorafast.adapt(model, 3, list(PROJECTIONS))
        fill_adapters(model)
        return model.to(device())

    def by_parts():
        return adapted(True, heads=True, bottlenecks=True, p=0.0)

    ids = tokens(4)
    for make, plan in ((in_int8, plan_of(None)), (by_parts, by_tokens())):
        one, two = make(), spread(make(), plan)
        (losses, found), (expected, exactly) = steps(two, ids, 3), steps(one, ids, 3)
        assert error(losses, expected) < 1e-10
        assert max(error(found[name], gradient) for name, gradient in exactly.items()) < EXACT
        lorafast.parallel.check_replicas(two)
    dcp.save({"run": lorafast.AdapterState(two)}, checkpoint_id=folder)
    alone = by_parts()
    dcp.load({"run": lorafast.AdapterState(alone)}, checkpoint_id=folder, no_dist=True)
    for name, parameter in alone.named_parameters():
        assert torch.equal(whole(two.get_parameter(name)), parameter), name
    assert not torch.equal(alone.get_parameter("norm.weight"), by_parts().norm.weight)


@pytest.mark.slow
def test_other_kinds_with_fsdp_on_four_ranks(tmp_path):
    on_ranks(_of_other_kinds, str(tmp_path / "checkpoint"), world=4)


def _accumulated(rank):
    """Two backwards, each of which sums what is replicated; adapters off, and in a part of a batch."""
    from lorafast.bench.distributed.collectives import Collectives

    one, two = adapted(True, p=0.0, bottlenecks=True), cut(adapted(True, p=0.0, bottlenecks=True))
    rows, sent = ["default", None, None, "default"], []
    for model in (one, two):
        for ids in tokens(4).chunk(2):
            with Collectives() as counted:
                loss_of(model, ids).backward()
            sent.append(sum(c.shape in ((3, WIDTH), (WIDTH, 3)) for c in counted.calls))
        with lorafast.mixed(model, rows):
            loss_of(model, tokens(4)).backward()
    lorafast.parallel.check_replicas(two)
    assert sent == [0, 0, 14, 14]
    for name, parameter in one.named_parameters():
        if parameter.requires_grad:
            assert error(two.get_parameter(name).grad, parameter.grad) < EXACT, name
    frozen = cut(decoder(torch.float64).requires_grad_(False).to(device()))
    with torch.no_grad(), lorafast.disabled(two):
        assert torch.equal(two(tokens(2)), frozen(tokens(2)))


def test_accumulated_mixed_and_disabled():
    on_ranks(_accumulated)


def _compiled(rank):
    one, two = adapted(), cut(adapted())
    del one.layers[1:], two.layers[1:]  # it compiles for seconds
    ids = tokens(2)
    torch.manual_seed(1)
    expected = loss_of(one, ids)
    expected.backward()
    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    loss = loss_of(compiled, ids)
    loss.backward()
    assert error(loss.detach(), expected.detach()) < EXACT
    for name, parameter in one.named_parameters():
        if parameter.requires_grad:
            assert error(two.get_parameter(name).grad, parameter.grad) < EXACT, name


@pytest.mark.slow
def test_compiled_in_one_graph():
    on_ranks(_compiled)


def _compiled_by_blocks(rank):
    """Of parts of the tokens, where gradients of what is replicated are summed: no other test compiles
    these sums. Compiled code doesn't compare them."""

    def make():
        model = adapted(heads=True, bottlenecks=True)
        del model.layers[1:]
        return model

    one, two = make(), make()
    lorafast.parallel.parallelize(two, mesh_of(), by_tokens())
    for block in two.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    (losses, found), (expected, exactly) = steps(two, tokens(2), 2), steps(one, tokens(2), 2)
    lorafast.parallel.check_replicas(two)
    assert error(losses, expected) < 1e-10
    assert max(error(found[name], gradient) for name, gradient in exactly.items()) < EXACT


@pytest.mark.slow
def test_compiled_by_blocks_with_parts_of_the_tokens():
    on_ranks(_compiled_by_blocks)


def _checkpointed(rank, use_reentrant):
    """With dropout: what is computed again has the same masks, and sends what the forward sent."""
    from lorafast.bench.distributed.collectives import Collectives

    def loss(model):
        torch.manual_seed(4)
        x = model.embed_tokens(ids).requires_grad_()
        for layer in model.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
        return model.lm_head(model.norm(x)).square().mean()

    one, two, ids = adapted(), cut(adapted()), tokens(2)
    loss(one).backward()
    with Collectives() as sent:
        loss(two).backward()
    for name, parameter in one.named_parameters():
        if parameter.requires_grad:
            assert error(two.get_parameter(name).grad, parameter.grad) < EXACT, name
    y = [c for c in sent.calls if c.kind == "all_reduce" and c.shape == (*ids.shape, WIDTH)]
    # A block sums y twice, and dx once for each x. In the backward it sums y again: by re-entering both,
    # else but the last, whose sum nobody needs.
    again = 4 if use_reentrant else 2
    assert [sum(c.backward is b for c in y) for b in (False, True)] == [4, 4 + again]


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed(use_reentrant):
    on_ranks(_checkpointed, use_reentrant)


def _left_whole(rank):
    """Kinds of layers that can't be cut, on every rank; and PyTorch's own styles beside ours."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from lorafast.parallel import Colwise, Replicated, Rowwise, check_replicas, parallelize

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = self.down(self.up(x).relu())
            return self.outer(self.inner(x).relu())

    def model():
        torch.manual_seed(3)
        made = lorafast.adapt(Model().double(), 2, ["conv", "attention", "up", "outer"])
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(len(name))
                )
        return made.to(device())

    # Between down and inner each rank has a part of the tokens; PyTorch's collectives are asynchronous.
    for layout in (None, Shard(1)):
        plan = {
            "up": Colwise(), "down": RowwiseParallel(output_layouts=layout),
            "inner": ColwiseParallel(input_layouts=layout), "outer": Rowwise(),
            "conv": Replicated(), "attention": Replicated(),
        }  # fmt: skip
        one, two = model(), parallelize(model(), mesh_of(), plan, src_data_rank=None)
        x = torch.randn(2, 4, 8, dtype=torch.float64, device=device())
        y, expected = two(x), one(x)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert error(y.detach(), expected.detach()) < EXACT
        for name, parameter in one.named_parameters():
            if parameter.grad is not None:
                assert error(two.get_parameter(name).grad, parameter.grad) < EXACT, name
        check_replicas(two)


def test_layers_left_whole_and_pytorchs_styles():
    on_ranks(_left_whole)


def _refused(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel

    from lorafast.parallel import Colwise, Replicated, Rowwise, parallelize

    def refused(message, plan=None, model=None, mesh=None, kind=ValueError):
        model = adapted() if model is None else model
        before = {name: id(p) for name, p in model.named_parameters()}
        hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
        with pytest.raises(kind, match=message) as raised:
            parallelize(
                model, mesh_of() if mesh is None else mesh, plan_of(model) if plan is None else plan
            )
        assert "\n" not in str(raised.value)
        assert before == {name: id(p) for name, p in model.named_parameters()}
        assert hooks == sum(len(m._forward_pre_hooks) for m in model.modules())

    good = plan_of(None)
    refused("'q_prj', which is the name of no module, did you mean 'q_proj'", {"q_prj": Colwise()})
    refused("expected styles", {})
    refused("expected a style", {"q_proj": "colwise"}, kind=TypeError)
    refused("and both name layers.0.self_attn.q_proj", good | {"self_attn.*": Colwise()})
    refused(
        "has an adapter, and ColwiseParallel is PyTorch's", good | {"q_proj": ColwiseParallel()}
    )
    refused("is a RMSNorm, expected an nn.Linear", good | {"norm": Colwise()})
    refused("a mesh of 2 dimensions .dp, tp.", mesh=mesh_of(1, 2, mesh_dim_names=("dp", "tp")))
    refused("a str, expected a DeviceMesh", mesh="tp")
    refused(
        "norm is trained and no style of the plan is for it.*each rank has a part of the tokens",
        {name: style for name, style in by_tokens().items() if name != "norm"},
        adapted(heads=True, bottlenecks=True),
    )
    refused("one tensor, which the plan would cut along two", by_tokens() | {"embed_tokens": Colwise()},
            adapted(heads=True, bottlenecks=True))  # fmt: skip
    refused("which has layers.0.mlp.gate_proj inside", good | {"mlp": Replicated()})
    model = adapted()
    parallelize(model, mesh_of(), good)
    refused("is sharded over this mesh: parallelize it once", model=model)
    refused("is sharded by FSDP: cut it first", model=fully_shard(adapted(), mesh=mesh_of()))
    refused("DistributedDataParallel", model=nn.parallel.DistributedDataParallel(adapted()))

    odd = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 6), "c": nn.Conv1d(2, 2, 1)})
    refused("a has weight .5, 6., and 5 can't be cut into 2 parts", {"a": Colwise()}, odd)
    refused("b has weight .6, 5., and 5 can't be cut into 2 parts", {"b": Rowwise()}, odd)
    refused("c is a Conv1d, expected", {"c": Rowwise()}, odd)
    lorafast.adapt(odd, 2, ["a"])
    refused("a has weight .5, 6., and 5 can't be cut", {"b": Colwise(), "a": Colwise()}, odd)
    for format, options, style, message in (
        (
            "nf4",
            {"block": 64},
            Rowwise(),
            "nf4, whose 96 columns can't be cut into 2 parts of whole",
        ),
        ("w8a8", {}, Rowwise(), "whose scales of x are of all its columns"),
        ("int8", {}, Colwise(), "int8, whose 7 rows can't be cut into 2 parts"),
    ):
        weight = lorafast.operands.quantize(torch.randn(7, 96), format, **options)
        layer = nn.ModuleDict({"a": lorafast.nn.QuantizedLinear.from_operand(weight)})
        lorafast.adapt(layer, 2, ["a"])
        refused(message, {"a": style}, layer)
    with pytest.raises(ValueError, match="src_data_rank is 1"):
        parallelize(adapted(), mesh_of(), good, src_data_rank=1)


def test_what_cannot_be_cut_is_refused_before_anything_is_moved():
    on_ranks(_refused)
