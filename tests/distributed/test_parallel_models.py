"""What is done with a model that is cut: saved, loaded, merged, switched, sharded by FSDP too."""

import copy
import re

import pytest
import torch
from ranks import on_ranks
from small_decoder import PROJECTIONS, tokens
from test_tensor_parallel import (
    EXACT, adapted, by_tokens, error, loss_of, plan_of, steps,
)  # fmt: skip
from torch import nn

import lorafast
from lorafast.nn import Bottleneck


def mesh_of(*shape, **names):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (2,), **names)


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
    try:
        lorafast.add_adapter(two, "third")
    except ValueError as reason:
        assert "add adapters before" in str(reason)
    else:
        raise AssertionError


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
    losses, found = steps(two, ids.chunk(2)[mesh["dp"].get_local_rank()], 3)
    expected, exactly = steps(one, ids, 3)
    torch.distributed.all_reduce(losses)  # of which two ranks have the same each
    assert error(losses / 4, expected) < 1e-10
    assert max(error(found[name], gradient) for name, gradient in exactly.items()) < EXACT
    with Collectives() as sent:
        loss_of(two, ids).backward()
    return sent.calls


def test_with_fsdp_on_four_ranks():
    for call in on_ranks(_with_fsdp, world=4)[0]:
        print(call)


def _refused(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel

    from lorafast.parallel import Colwise, Replicated, Rowwise, parallelize

    def refused(message, plan=None, model=None, mesh=None, kind=ValueError):
        model = adapted() if model is None else model
        before = {name: id(p) for name, p in model.named_parameters()}
        hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
        try:
            parallelize(
                model, mesh_of() if mesh is None else mesh, plan_of(model) if plan is None else plan
            )
        except kind as error:
            assert re.search(message, str(error)), str(error)
            assert "\n" not in str(error)
        else:
            raise AssertionError(message)
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
        adapted(heads=True),
    )
    refused("one tensor, which the plan would cut along two", by_tokens() | {"embed_tokens": Colwise()},
            adapted(heads=True))  # fmt: skip
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
    try:
        parallelize(adapted(), mesh_of(), good, src_data_rank=1)
    except ValueError as error:
        assert "src_data_rank is 1" in str(error)
    del Shard


def test_what_cannot_be_cut_is_refused_before_anything_is_moved():
    on_ranks(_refused)
