"""What ``lorafast.parallel`` and functions of DTensors refuse, in one sentence, with nothing changed."""

import importlib.util

import pytest
import torch
from ranks import device, mesh_of, on_ranks
from small_decoder import decoder, tokens
from test_tensor_parallel import adapted, plan_of
from torch import nn

import lorafast
from lorafast import functional

pytestmark = pytest.mark.slow

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")


def state(model):
    """What is there: parameters, their kinds and all hooks."""
    parameters = {n: (id(p), type(p)) for n, p in model.named_parameters()}
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return parameters, hooks


def refuses(message, call, kind=ValueError):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def refused(message, model, plan, kind=ValueError):
    before = state(model)
    refuses(message, lambda: lorafast.parallel.parallelize(model, mesh_of(), plan), kind)
    assert state(model) == before


def _plans(rank):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from lorafast.parallel import Colwise, Replicated, Rowwise, parallelize

    good = plan_of(None)
    for name, style, message in (
        ("norm", ColwiseParallel(), "norm is a RMSNorm, expected an nn.Linear or an nn.Embedding"),
        ("mlp", RowwiseParallel(), "mlp is a small_decoder.Mlp, expected .* PyTorch's RowwiseParallel"),
        ("mlp", Colwise(), "mlp is a small_decoder.Mlp, expected an nn.Linear"),
    ):  # fmt: skip
        refused(message, adapted(), good | {name: style})
    frozen = decoder().to(device())
    nn.utils.parametrizations.weight_norm(frozen.lm_head)
    refused("has a parametrization", frozen, good | {"lm_head": ColwiseParallel()})
    once = parallelize(adapted(), mesh_of(), {"lm_head": ColwiseParallel()} | good)
    refused(
        "lm_head has a weight that is sharded over this mesh", once, {"lm_head": RowwiseParallel()}
    )
    refused("plan has 3, expected the name", adapted(), {3: Colwise()}, kind=TypeError)
    for make in (
        lambda: Colwise(input_layouts="x"),
        lambda: Rowwise(output_layouts=(Shard(1),)),
        lambda: Replicated(input_layouts="Shard"),
        lambda: Replicated(input_layouts=1),
    ):
        refuses("put_layouts is .*, expected a placement", make, TypeError)
    for name, style in (
        ("q_proj", Colwise(input_layouts=Shard(5))),
        ("o_proj", Rowwise(output_layouts=Shard(5))),
    ):
        model = parallelize(adapted(), mesh_of(), good | {name: style})
        refuses(
            r"put_layouts is S.*5.*, expected a dimension of a tensor of \[2, 8, ",
            lambda model=model: model(tokens(2)),
        )


def _meshes(rank):
    """Tensors of two meshes, and models of which a part is on another one."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    from lorafast.parallel import parallelize

    one = mesh_of()
    other = mesh_of(1, 2, mesh_dim_names=("nodes", "ranks"))["ranks"]
    x, A, B = (torch.randn(s).to(device()) for s in ((4, 64), (3, 64), (64, 3)))
    W = torch.randn(64, 64).to(device())
    for moved in ("weight", "lora_A", "lora_B"):
        given = {
            name: distribute_tensor(t, other if name == moved else one, [Replicate()])
            for name, t in {"x": x, "weight": W, "lora_A": A, "lora_B": B}.items()
        }
        refuses(
            f"^{moved} is sharded over another mesh than x",
            lambda given=given: functional.lora_linear(*given.values(), 0.5),
        )
    plan = plan_of(None)
    of_mlp = {name: plan.pop(name) for name in ("gate_proj", "up_proj", "down_proj")}
    for mesh, message in ((one, "this mesh"), (other, "another mesh, DeviceMesh")):
        model = parallelize(adapted(), mesh, of_mlp)
        refused(f"is sharded over {message}.*: parallelize it once", model, plan)


def test_tensors_of_several_meshes():
    on_ranks(_meshes)


def test_plans_are_refused_before_anything_is_moved():
    on_ranks(_plans)


def _peft(rank):
    import peft

    from lorafast.parallel import Colwise, Rowwise

    for accelerated in (False, True):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(decoder().to(device()), config)
        if accelerated:
            lorafast.accelerate(model, quiet=True)
        refused("self_attn.q_proj has an adapter of PEFT's", model, {"q_proj": Colwise()})
        inside = "q_proj.base_layer is in PEFT's layer .*self_attn.q_proj, which no style cuts"
        refused(inside, model, {"q_proj.base_layer": Colwise(), "o_proj": Rowwise()})


@needs_peft
def test_layers_of_peft_are_refused():
    on_ranks(_peft, imports=("peft",))


def _functions(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, everywhere = mesh_of(), [Replicate()]
    x, A, B, dense = (
        torch.randn(s).to(device()) for s in ((4, 64), (2, 3, 64), (2, 64, 3), (64, 64))
    )
    weight = lorafast.operands.quantize(dense, "int8")
    W, As, Bs = (distribute_tensor(t, mesh, everywhere) for t in (dense, A, B))
    for placement in (Replicate(), Shard(0)):
        cut = distribute_tensor(x, mesh, [placement])
        refuses(
            "x is sharded .*, and quantized_linear has no rule",
            lambda cut=cut: functional.quantized_linear(cut, weight),
        )
        for each in ([0, 1, 1, 0], torch.tensor([0, 1, 1, 0])):
            refuses(
                "x is sharded .*, and grouped_lora_linear has no rule",
                lambda cut=cut, each=each: functional.grouped_lora_linear(
                    cut, W, As, Bs, 0.5, each
                ),
            )
        refuses(
            "x is sharded .* and weight is not",
            lambda cut=cut: functional.lora_linear(cut, weight, As[0], Bs[0], 0.5),
        )
        refuses(
            "x is sharded .* and lora_A is not",
            lambda cut=cut: functional.lora_linear(cut, W, A[0], B[0], 0.5),
        )
    of = distribute_tensor(torch.tensor([0, 1, 1, 0]), mesh, everywhere)
    refuses(
        "adapter_of is sharded",
        lambda: functional.grouped_lora_linear(x, dense, A, B, 0.5, of),
    )


def test_functions_that_have_no_rule_for_dtensors():
    on_ranks(_functions)
