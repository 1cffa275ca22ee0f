"""Single layers cut over two ranks: what they compute, what they send, and what can't be cut."""

import pytest
import torch
import torch.nn.functional as F
from lorafast.bench.distributed.collectives import Collectives
from ranks import device, mesh_of, on_ranks, own_draws
from torch import nn

import lorafast
import lorafast.operands
from lorafast import reference
from lorafast.nn import LoRAEmbedding, LoRALinear
from lorafast.reference import contract

EXACT = 1e-12
M, K, N, R = 6, 32, 24, 3


def error(found, expected):
    found = found.full_tensor() if hasattr(found, "full_tensor") else found
    return ((found - expected).norm() / expected.norm()).item()


def filled(layer, seed=1):
    torch.manual_seed(seed)
    for parameter in (*layer.parameters(), *layer.buffers()):
        if parameter.is_floating_point():
            nn.init.normal_(parameter)
    return layer.to(device())


def linear(dtype=torch.float64, use_dora=False, adapter_dtype=None, **options):
    layer = LoRALinear(
        K, N, R, alpha=6, dtype=dtype, use_dora=use_dora, adapter_dtype=adapter_dtype, **options
    )
    return filled(layer)


def run(module, x, weights):
    """y, and the gradients by name, of x too."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = module(x)
    (y * weights).sum().backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return y.detach(), found | ({} if x.grad is None else {"x": x.grad})


def compare(style, layer, x, cut_x=False, sends=None):
    """Holds the cut layer to the one that is whole: y, dx, and each gradient."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of()
    one = nn.Sequential(layer())
    two = lorafast.parallel.parallelize(nn.Sequential(layer()), mesh, {"0": style})
    torch.manual_seed(2)
    y = one(x)
    weights = torch.randn_like(y)
    y, expected = run(one, x, weights)
    placement = Shard(-1) if cut_x else Replicate()
    given = distribute_tensor(x, mesh, [placement]).to_local()
    with Collectives() as sent:
        found, gradients = run(two, given, weights)
    assert error(found, y) < EXACT
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        its = gradients[name]
        if name == "x" and cut_x:
            gradient = distribute_tensor(gradient, mesh, [placement]).to_local()
        assert error(its, gradient) < EXACT, name
    if sends is not None:
        assert sorted((c.kind, c.shape, c.backward) for c in sent.calls) == sorted(sends)
    return two


def _linear(rank):
    from torch.distributed.tensor import Replicate

    from lorafast.parallel import Colwise, Rowwise

    x = filled(nn.Embedding(M, K, dtype=torch.float64)).weight.detach()
    columns = Colwise(output_layouts=Replicate())
    gathered = [("all_gather", (2 * M, N // 2), False)]
    dx, norms = ("all_reduce", (M, K), True), ("all_reduce", (N,), False)
    dA, dB, dm = (("all_reduce", shape, True) for shape in ((R, K), (N, R), (N,)))
    y = [("all_reduce", (M, N), False)]
    for use_dora in (False, True):
        # The forward sends what a plain layer's does; the backward its dx, and dA or dB besides.
        def lora(use_dora=use_dora):
            return linear(use_dora=use_dora)

        two = compare(columns, lora, x)
        assert two[0].lora_B.to_local().shape == (N // 2, R)
        compare(Rowwise(), lora, x, cut_x=True)
    compare(columns, linear, x, sends=[*gathered, dA, dx])
    compare(Rowwise(), linear, x, cut_x=True, sends=[*y, dB])
    compare(columns, lora, x, sends=[*gathered, dA, dx])
    compare(Rowwise(), lora, x, cut_x=True, sends=[norms, *y, dB, dm])

    def trained_bias():
        layer = linear(bias=True)
        layer.bias.requires_grad_()
        return layer

    compare(columns, trained_bias, x)
    compare(Rowwise(), trained_bias, x, cut_x=True)
    two = compare(Rowwise(), linear, x, cut_x=True)
    with pytest.raises(ValueError, match="x has shape"):
        two(x)  # the whole one; what the layer holds is whole again too
    assert two[0].weight.shape == (N, K)
    assert two[0].weight.to_local().shape == (N, K // 2)


def plain():
    return filled(nn.Linear(K, N, dtype=torch.float64))


def test_both_cuts_of_a_linear_layer():
    on_ranks(_linear)


def _as_pytorch_sends(rank):
    """The forward of a plain layer under PyTorch's own style, and the backward but for dA or dB."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from lorafast.parallel import Colwise, Rowwise

    mesh = mesh_of()
    x = torch.randn(2, M, K, dtype=torch.float64, device=device())
    cases = [
        (Colwise, ColwiseParallel, {}, (R, K)),
        (Rowwise, RowwiseParallel, {}, (N, R)),
        (Colwise, ColwiseParallel, {"input_layouts": Shard(1)}, (R, K)),
        (Rowwise, RowwiseParallel, {"output_layouts": Shard(1)}, (N, R)),
        (Colwise, ColwiseParallel, {"use_local_output": False}, (R, K)),
    ]
    for ours, pytorchs, options, factor in cases:
        given = x.chunk(2, -1)[rank] if ours is Rowwise else x
        calls = []
        # PyTorch's own parallelize_module takes both.
        for module, style in ((linear(), ours(**options)), (plain(), pytorchs(**options))):
            two = parallelize_module(nn.Sequential(module), mesh, {"0": style})
            if isinstance(module, nn.Linear):
                module.requires_grad_(False)
            with Collectives() as sent:
                y = two(given.clone().requires_grad_())
                y.sum().backward()
            calls.append([(c.kind, c.shape, c.backward) for c in sent.calls])
        lora, frozen = calls
        lora.remove(("all_reduce", factor, True))
        assert lora == frozen, (ours, options, calls)


def test_no_collective_beside_those_of_pytorchs_styles():
    on_ranks(_as_pytorch_sends)


def _embeddings(rank):
    from lorafast.parallel import Colwise, Rowwise

    tokens = torch.tensor([[3, 0, 7, 7], [15, 8, 1, 3]], device=device())
    for use_dora in (False, True):
        for style in (Colwise(output_layouts=replicate()), Rowwise()):
            for padding in (None, 3, 15):

                def layer(use_dora=use_dora, padding=padding):
                    made = LoRAEmbedding(
                        16, N, R, use_dora=use_dora, padding_idx=padding, dtype=torch.float64
                    )
                    return filled(made)

                compare(style, layer, tokens)
    compare(Rowwise(), lambda: filled(nn.Embedding(16, N, dtype=torch.float64)), tokens)


def replicate():
    from torch.distributed.tensor import Replicate

    return Replicate()


def test_embeddings():
    on_ranks(_embeddings)


def _quantized(rank):
    from lorafast.parallel import Colwise, Rowwise

    x = torch.randn(M, 2 * K, dtype=torch.float64, device=device())
    for format, options in (
        ("nf4", {"block": 16}),  # nested: float32 scales for columns of x
        ("nf4", {"block": 16, "nested_block": 24}),
        ("int8", {}),
        ("fp8", {}),
    ):
        for use_dora in (False, True):

            def layer(format=format, options=options, use_dora=use_dora):
                weight = filled(nn.Linear(2 * K, N)).weight.detach().double()
                operand = lorafast.operands.quantize(weight, format, **options)
                bias = (
                    torch.randn(N, generator=torch.Generator().manual_seed(5)).double().to(device())
                )
                return filled_adapter(
                    LoRALinear.from_operand(operand, R, bias=bias, use_dora=use_dora)
                )

            merged = layer().to_linear().weight
            for style, cut_x in ((Colwise(output_layouts=replicate()), False), (Rowwise(), True)):
                two = compare(style, layer, x, cut_x)
                codes = two[0].weight
                assert codes.dtype == layer().weight.dtype or codes.dtype is torch.uint8
                assert codes.to_local().numel() * 2 == codes.numel()
                lorafast.merge(two)
                assert isinstance(two[0], nn.Linear)
                assert error(two[0].weight, merged) < EXACT
                y = two(x.chunk(2, -1)[rank] if cut_x else x)
                assert error(y, F.linear(x, merged, layer().bias)) < EXACT


def filled_adapter(layer):
    for seed, parameter in enumerate(layer.adapter_parameters().values()):
        torch.manual_seed(seed)
        nn.init.normal_(parameter)
    return layer


def test_quantized_weights_are_cut_by_their_codes():
    on_ranks(_quantized)


def _dropout(rank):
    """By columns of y the mask is the whole one's. By columns of x each part has one of its own, whose
    seed is made of what all have drawn, and of the part."""
    from lorafast.core.columns import Columns
    from lorafast.parallel import Colwise, Rowwise, parallelize

    p, x = 0.4, torch.randn(M, K, dtype=torch.float64, device=device())
    torch.manual_seed(100 + rank)  # which parallelize sets alike
    for use_dora in (False, True):
        for style, cut_x in ((Colwise(output_layouts=replicate()), False), (Rowwise(), True)):
            layer = linear(use_dora=use_dora, dropout=p)
            two = parallelize(
                nn.Sequential(linear(use_dora=use_dora, dropout=p)), mesh_of(), {"0": style}
            )
            with own_draws():
                seed = torch.randint(2**63 - 1, (1,), device=device())
            seeds = [Columns(i, nn.Identity()).seed(seed) for i in range(2)] if cut_x else [seed]
            assert len({int(one) for one in seeds}) == len(seeds)
            assert all(one >= 0 for one in seeds)
            parts = x.chunk(len(seeds), -1)
            left = torch.cat(
                [reference.dropout(part, p, one) for part, one in zip(parts, seeds, strict=True)],
                -1,
            )
            W, A, B = layer.weight, layer.lora_A, layer.lora_B
            frozen, low_rank = F.linear(x, W), layer.scaling * left @ A.t() @ B.t()
            if use_dora:
                scale = layer.lora_magnitude / (W + layer.scaling * B @ A).norm(dim=1)
                expected = frozen + (scale - 1) * F.linear(left, W) + scale * low_rank
            else:
                expected = frozen + low_rank
            expected = expected + layer.bias
            given = parts[rank] if cut_x else x
            for _ in range(2):  # as checkpointing does: the same state, the same mask
                with own_draws():
                    assert error(two(given), expected) < EXACT, (use_dora, cut_x)
            assert torch.equal(two.eval()(given), two(given))


def test_masks():
    on_ranks(_dropout)


def _bf16(rank):
    from lorafast.parallel import Colwise, Rowwise, parallelize

    mesh, half = mesh_of(), torch.bfloat16
    names = ("y", "x", "lora_A", "lora_B")
    for style, cut_x in ((Colwise(output_layouts=replicate()), False), (Rowwise(), True)):
        layer = linear(half, adapter_dtype=torch.float32)
        torch.manual_seed(6)
        x, weights = (torch.randn(64, n).to(device(), half) for n in (K, N))

        def eager(dtype, adapter_dtype, layer=layer, x=x, weights=weights):
            tensors = [x, layer.lora_A, layer.lora_B]
            x, A, B = (t.detach().to(dtype).requires_grad_() for t in tensors)
            A, B = (t.detach().to(adapter_dtype).requires_grad_() for t in (A, B))
            y = reference.lora_linear(
                x, layer.weight.to(dtype), A, B, layer.scaling, layer.bias.to(dtype)
            )
            found = torch.autograd.grad((y * weights.to(dtype)).sum(), (x, A, B))
            return dict(zip(names, (y.detach(), *found), strict=True))

        exactly, rounded = eager(torch.float64, torch.float64), eager(half, torch.float32)
        allowed = contract.bounds(rounded, exactly, dtype=half)
        two = parallelize(
            nn.Sequential(linear(half, adapter_dtype=torch.float32)), mesh, {"0": style}
        )
        choices = lorafast.explain(two, x.chunk(2, -1)[rank] if cut_x else x).layers["0"]
        # The kernels of the part, whose sizes are the rank's.
        problem = part_of(two[0], x)
        assert ([N, K // 2] if cut_x else [N // 2, K]) == [problem.N, problem.K]
        assert choices[0].backend not in (None, "reference")
        y, gradients = run(two, x.chunk(2, -1)[rank].contiguous() if cut_x else x, weights)
        found = {"y": y, "x": whole(gradients["x"], cut_x)}
        found |= {n: gradients[f"0.{n}"].full_tensor() for n in ("lora_A", "lora_B")}
        assert contract.why_any_broken(found, allowed) is None


def part_of(layer, x):
    with layer._local.shown(layer):
        return layer.problems(x)[0]


def whole(tensor, cut):
    from torch.distributed.tensor import DTensor, Shard

    made = DTensor.from_local(tensor, mesh_of(), [Shard(-1)]) if cut else tensor
    return made.full_tensor() if cut else made


def test_bfloat16_keeps_the_contract_by_the_kernels_of_the_part():
    on_ranks(_bf16)


def _rules(rank):
    """DTensors through the registered operations: results of the whole, and nothing is sent but what is
    asked for in the end."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, everywhere = mesh_of(), Replicate()
    torch.manual_seed(9)
    shapes = (4, M, K), (N, K), (R, K), (N, R), (N,), (4 * M, N), (4 * M, R)
    x, W, A, B, bias, dy, ds = (torch.randn(s).to(device()).double() for s in shapes)
    cases = {
        "rows": (Shard(0), everywhere, everywhere, everywhere, everywhere),
        "N": (everywhere, Shard(0), everywhere, Shard(0), Shard(0)),
        "K": (Shard(2), Shard(1), Shard(1), everywhere, everywhere),
        "W alone": (everywhere, Shard(0), everywhere, everywhere, everywhere),
    }
    whole = [t.clone().requires_grad_(t is not W) for t in (x, W, A, B, bias)]
    y = reference.lora_linear(*whole[:4], 0.5, whole[4])
    names = ("x", "lora_A", "lora_B", "bias")
    trained = [whole[i] for i in (0, 2, 3, 4)]
    expected = dict(zip(names, torch.autograd.grad(y.square().sum(), trained), strict=True))
    for case, placements in cases.items():
        for watched in (False, True):
            cut = [
                distribute_tensor(t, mesh, [p]).requires_grad_(t is not W)
                for t, p in zip((x, W, A, B, bias), placements, strict=True)
            ]
            sent = Collectives()
            if watched:
                with sent:
                    found = lorafast.functional.lora_linear(*cut[:4], 0.5, cut[4])
                assert sent.calls == [], case
            else:
                found = lorafast.functional.lora_linear(*cut[:4], 0.5, cut[4])
            assert error(found, y) < EXACT, case
            gradients = torch.autograd.grad(
                found.full_tensor().square().sum(), [cut[i] for i in (0, 2, 3, 4)]
            )
            for name, gradient in zip(names, gradients, strict=True):
                assert error(gradient, expected[name]) < EXACT, (case, name)
    # The operations that it is made of, one by one, by every axis that they have.
    flat = x.view(-1, K)
    s = flat @ A.t()
    ops = torch.ops.lorafast
    calls = [
        (lambda x, A: ops.shrink(x, A), (flat, A), "MK rK"),
        (lambda ds, x: ops.shrink_backward(ds, x), (ds, flat), "Mr MK"),
        (lambda s, B: ops.expand(s, B, 0.5), (s, B), "Mr Nr"),
        (lambda dy, s, B: ops.expand_backward(dy, s, B, 0.5), (dy, s, B), "MN Mr Nr"),
        (
            lambda x, s, B, W: ops.linear_expand(x, [W], "dense", s, B, 0.5),
            (flat, s, B, W), "MK Mr Nr NK",
        ),
        (
            lambda dy, ds, A, W: ops.linear_expand(dy, [W], "dense", ds, A, 1.0, transposed=True),
            (dy, ds, A.t().contiguous(), W), "MN Mr Kr NK",
        ),
    ]  # fmt: skip
    for call, tensors, axes in calls:
        results = as_tuple(call(*tensors))
        for axis in "MNK":
            cut = [
                distribute_tensor(t, mesh, [Shard(a.index(axis)) if axis in a else everywhere])
                for t, a in zip(tensors, axes.split(), strict=True)
            ]
            for found, expected in zip(as_tuple(call(*cut)), results, strict=True):
                assert not expected.numel() or error(found, expected) < EXACT, (axes, axis)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def test_dtensors_through_the_operations():
    on_ranks(_rules)
