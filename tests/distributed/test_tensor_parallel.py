"""A decoder that is cut over ranks trains as in one process: losses, gradients by name, replicas."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from ranks import device, mesh_of, on_ranks
from small_decoder import PROJECTIONS, decoder, fill_adapters, tokens
from torch import nn

import lorafast

EXACT = 1e-12
"""Relative: what float64 leaves of another order of sums."""
ROWS = ("o_proj", "down_proj")
COLUMNS = tuple(name for name in PROJECTIONS if name not in ROWS)
STEPS, P = 5, 0.3


def adapted(use_dora=False, dtype=torch.float64, heads=False, fuse=None, p=P, bottlenecks=False):
    """The same on every call. Layers cut by columns of y drop: their mask is the whole one's."""
    torch.manual_seed(3)
    model = decoder(dtype)
    if heads:  # what is left on every rank, or reads a part of the tokens, and a tied head
        model.lm_head.weight = model.embed_tokens.weight
        model = lorafast.adapt(model, 3, ["embed_tokens", *PROJECTIONS], use_dora=use_dora)
    else:
        model = lorafast.adapt(model, 3, PROJECTIONS, alpha=6, use_dora=use_dora, fuse=fuse)
    if bottlenecks:  # which are left on every rank
        lorafast.adapt(model, kind="pfeiffer", targets=["mlp"], bottleneck=4, layer_norm=True)
    model.norm.weight.requires_grad_(heads)
    for name, module in model.named_modules():
        if name.endswith(COLUMNS):
            module.dropout = p
    fill_adapters(model)
    return model.to(device())


def plan_of(model):
    from lorafast.parallel import Colwise, Rowwise

    return dict.fromkeys(COLUMNS, Colwise()) | dict.fromkeys(ROWS, Rowwise())


def by_tokens():
    """Sequence parallelism: between the layers each rank has a part of the tokens."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import PrepareModuleInput

    from lorafast.parallel import Colwise, Replicated, Rowwise

    gathered = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    return {
        "embed_tokens": Rowwise(output_layouts=Shard(1)),
        "self_attn": gathered,  # once for q, k and v
        "q_proj": Colwise(), "k_proj": Colwise(), "v_proj": Colwise(),
        "gate_proj": Colwise(input_layouts=Shard(1)), "up_proj": Colwise(input_layouts=Shard(1)),
        "o_proj": Rowwise(output_layouts=Shard(1)), "down_proj": Rowwise(output_layouts=Shard(1)),
        "norm": Replicated(input_layouts=Shard(1)), "bottleneck": Replicated(input_layouts=Shard(1)),
        "lm_head": Colwise(input_layouts=Shard(1), output_layouts=Replicate()),
    }  # fmt: skip


def loss_of(model, ids):
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def error(found, expected):
    return ((whole(found) - expected).norm() / expected.norm()).item()


def steps(model, ids, count=STEPS, optimize=contextlib.nullcontext):
    """The losses, and the gradients of the first step."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, foreach=True)
    torch.manual_seed(5)
    losses, first = [], {}
    for _ in range(count):
        loss = loss_of(model, ids)
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in trained.items()}
        nn.utils.clip_grad_norm_(trained.values(), 0.5)
        with optimize():
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), first


def _trains(rank, use_dora, sequence):
    from torch.distributed.tensor.debug import CommDebugMode

    from lorafast.parallel import check_replicas, parallelize

    mesh = mesh_of()
    one, two = (adapted(use_dora, heads=sequence, bottlenecks=True) for _ in range(2))
    if rank:  # parallelize takes the first rank's
        with torch.no_grad():
            for parameter in (p for p in two.parameters() if p.requires_grad):
                parameter.add_(1.0)
    torch.manual_seed(rank)
    parallelize(two, mesh, by_tokens() if sequence else plan_of(two))
    check_replicas(two)
    ids, sent = tokens(2), CommDebugMode()
    losses, gradients = steps(two, ids, optimize=lambda: sent)
    expected, exactly = steps(one, ids)
    assert sent.get_total_counts() == 0  # of the last step's AdamW
    assert error(losses[:1], expected[:1]) < EXACT
    for name, gradient in exactly.items():
        assert gradients[name].placements == two.get_parameter(name).placements, name
        assert error(gradients[name], gradient) < EXACT, name
    assert error(losses, expected) < 1e-10, (losses, expected)
    check_replicas(two)


@pytest.mark.parametrize(
    ("use_dora", "sequence"),
    [
        pytest.param(False, False, id="LoRA-all tokens"),
        pytest.param(True, False, id="DoRA-all tokens", marks=pytest.mark.slow),
        pytest.param(False, True, id="LoRA-a part of the tokens", marks=pytest.mark.slow),
        pytest.param(True, True, id="DoRA-a part of the tokens"),
    ],
)
def test_a_decoder_trains_as_in_one_process(use_dora, sequence):
    on_ranks(_trains, use_dora, sequence)


def _unsummed(rank, sequence):
    """What the test above would see if the gradients of replicated parameters weren't summed."""
    from lorafast.parallel import check_replicas, local, parallelize, styles

    summing = local.Local
    styles.Local = lambda mesh, summed, **options: summing(mesh, frozenset(), **options)
    one, two = (adapted(heads=sequence, bottlenecks=True) for _ in range(2))
    parallelize(two, mesh_of(), by_tokens() if sequence else plan_of(two))
    (_, found), (_, exactly) = steps(two, tokens(2), 1), steps(one, tokens(2), 1)
    wrong = {name for name, gradient in exactly.items() if error(found[name], gradient) > 1e-3}
    with pytest.raises(ValueError, match="differs between ranks"):
        check_replicas(two)
    return wrong


@pytest.mark.parametrize(
    "sequence",
    [
        pytest.param(False, id="all tokens", marks=pytest.mark.slow),
        pytest.param(True, id="a part of the tokens"),
    ],
)
def test_a_gradient_that_is_not_summed_is_noticed(sequence):
    (wrong, other) = on_ranks(_unsummed, sequence)
    assert wrong == other
    for name, _ in adapted(heads=sequence, bottlenecks=True).named_parameters():
        owner, _, last = name.rpartition(".")
        replicated = "lora_B" if owner.endswith(ROWS) else "lora_A"
        of_tokens = sequence and ("bottleneck" in name or name == "norm.weight")
        if of_tokens or (last == replicated and owner.endswith(PROJECTIONS)):
            assert name in wrong, name
        elif last in ("lora_A", "lora_B"):
            assert name not in wrong, name
