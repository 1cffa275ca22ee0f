"""Adapted models under ``torch.compile``: eager's gradients, and no graph anew for what changes."""

import contextlib
import functools

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from small_decoder import WIDTH, decoder, fill_adapters
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lorafast
from lorafast.nn import LoRALinear

TOLERANCE = 1e-5
"""Of the norm: float32, and another order of sums where PyTorch's decompositions have one."""


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def mlp(**options):
    """The SwiGLU of the decoder, its three layers adapted, in training."""
    made = lorafast.adapt(decoder().layers[0].mlp, r=4, **options)
    fill_adapters(made)
    return made


def hidden(batch, length, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator)


def outputs(model, run, x, seed=3):
    """y, and the gradients by name."""
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    found = torch.autograd.grad(y, [leaf, *trained.values()], dy)
    return {"y": y.detach()} | dict(zip(["x", *trained], found, strict=True))


def assert_as_eager(model, run, x, seed=3):
    expected, found = outputs(model, model, x, seed), outputs(model, run, x, seed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= TOLERANCE * tensor.norm(), name


@contextlib.contextmanager
def counted(model, graphs, **options):
    """A compiled ``model``, of which there are so many graphs afterwards."""
    counter = CompileCounterWithBackend("eager")
    yield torch.compile(model, fullgraph=True, backend=counter, **options)
    assert counter.frame_count == graphs


def scale(model, alpha):
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.set_scaling(alpha)


no_graph_more = functools.partial(torch.compiler.set_stance, "fail_on_recompile")


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", ""])
def test_what_changes_is_no_graph_of_its_own(dynamic):
    """After the second batch size, length and scaling nothing is compiled: no adapter either."""
    model = mlp()
    lorafast.add_adapter(model, "second", r=4, alpha=3.0)
    with counted(model, 1 if dynamic else 4, dynamic=dynamic) as run:
        for batch, length, alpha in ((2, 8, 4.0), (3, 8, 4.0), (3, 9, 4.0), (3, 9, 6.0)):
            scale(model, alpha)
            assert_as_eager(model, run, hidden(batch, length))
        with no_graph_more():
            for batch, length, alpha in ((5, 12, 7.0), (4, 30, 0.3)):
                scale(model, alpha)
                assert_as_eager(model, run, hidden(batch, length))
            lorafast.add_adapter(model, "third", r=4, alpha=7.0, use_rslora=True)
            for name in ("second", "third", "default"):
                lorafast.set_adapter(model, name)
                fill_adapters(model)
                assert_as_eager(model, run, hidden(6, 7))


@pytest.mark.parametrize(("fixed", "graphs"), [(True, 3), (False, 2)], ids=["fixed", "free"])
def test_another_rank_is_a_graph_where_sizes_of_parameters_are_fixed(fixed, graphs):
    """PyTorch's default. Where they aren't, the second rank makes the size a variable."""
    model = mlp(alpha=8.0)
    for name, r in (("five", 5), ("seven", 7)):
        lorafast.add_adapter(model, name, r=r, alpha=2.0 * r)  # the same scaling
    with (
        torch._dynamo.config.patch(force_parameter_static_shapes=fixed),
        counted(model, graphs) as run,
    ):
        for name in ("default", "five", "seven", "default", "five"):
            lorafast.set_adapter(model, name)
            fill_adapters(model)
            assert_as_eager(model, run, hidden(3, 8))


def test_a_graph_with_the_adapters_and_one_without():
    model = mlp()
    with counted(model, 2) as run, torch.no_grad():
        x, base = hidden(2, 8), decoder().layers[0].mlp
        found = run(x)
        with lorafast.disabled(model):
            torch.testing.assert_close(run(x), base(x))
        with no_graph_more():
            assert torch.equal(run(x), found)
            with lorafast.disabled(model):
                torch.testing.assert_close(run(x), base(x))
        assert not torch.allclose(found, base(x))


def keep_ours(context, operation, *arguments, **more):
    """A policy: what lorafast's own operations give is kept, all else computed again."""
    ours = operation.namespace == "lorafast"
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


OPERATIONS = {"dropout": "lora_linear", "dora": "weight_norm"}


class Checkpointed(nn.Module):
    def __init__(self, inner, **options):
        super().__init__()
        self.inner = inner
        self.options = options

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False, **self.options)


CHECKPOINTING = {
    "full": {},
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, keep_ours)},
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("dropout", "selective"),
        pytest.param("dropout", "full", marks=pytest.mark.slow),
        pytest.param("dora", "full", marks=pytest.mark.slow),
        pytest.param("dora", "selective", marks=pytest.mark.slow),
    ],
)
def test_checkpointing(kind, how):
    """The gradients of eager code without checkpoints (the mask is the forward's), and what is computed
    again: an operation of each layer, or with the policy none."""
    model = mlp(**({"dropout": 0.3} if kind == "dropout" else {"use_dora": True}))
    calls = []

    def compiler(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        calls.append(sum(f"lorafast.{OPERATIONS[kind]}.default" in target for target in targets))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
    )
    wrapped = Checkpointed(model, **CHECKPOINTING[how])
    assert_as_eager(model, torch.compile(wrapped, fullgraph=True, backend=backend), hidden(2, 8))
    assert calls == [3, 0 if how == "selective" else 3]


@pytest.mark.slow
def test_inductor():
    """Its own code, dropout too, with numbers as inputs: of another length and scaling."""
    model = mlp(dropout=0.3)
    run = torch.compile(model, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(fallback_random=True):
        assert_as_eager(model, run, hidden(2, 8))
        scale(model, 9.0)
        with no_graph_more():
            assert_as_eager(model, run, hidden(3, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_reduce_overhead(dropout, device):
    """CUDA graphs of the forward and the backward."""
    model = mlp(dropout=dropout).to(device)
    run = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x = hidden(4, 64).to(device)
    with torch._inductor.config.patch(fallback_random=True):  # the masks of eager code
        for seed in range(4):  # recorded at the second call, replayed from the third on
            torch.compiler.cudagraph_mark_step_begin()
            assert_as_eager(model, run, x, seed)
