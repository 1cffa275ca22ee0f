"""``LoRAEmbedding``: the formula, what it takes over from the plain layer, merging, state, export."""

import copy
import io
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafast
from lorafast import reference
from lorafast.functional import lora_embedding
from lorafast.nn import LoRAEmbedding
from lorafast.nn.lora_embedding import dora_embedding
from lorafast.reference import contract

TOKENS = torch.tensor([[3, 0, 8], [8, 5, 1]])


def layer(V=9, N=5, r=3, *, dtype=torch.float64, **options):
    made = LoRAEmbedding(V, N, r, dtype=dtype, **options)
    nn.init.normal_(made.lora_embedding_A)
    return made


def table(made):
    """W + scaling · (B·A)ᵀ."""
    return made.weight + made.scaling * (made.lora_embedding_B @ made.lora_embedding_A).t()


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1.0),
        ({"alpha": 8}, 2.0),
        ({"alpha": 8, "use_rslora": True}, 4.0),
        ({"padding_idx": 8}, 1.0),
    ],
    ids=str,
)
def test_it_is_the_formula(options, scaling):
    made = layer(r=4, **options)
    assert made.scaling == scaling
    same(made(TOKENS), table(made)[TOKENS])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_keeps_the_contract(dtype):
    made = layer(200, 48, 8, dtype=dtype)
    tokens = torch.randint(200, (64,))

    def call(functions, cast):
        return functions(
            tokens, cast(made.weight), made.lora_embedding_A, made.lora_embedding_B, made.scaling
        )

    y = made(tokens)
    assert y.dtype is dtype
    exact = call(reference.lora_embedding, lambda t: t.double())
    eager = call(reference.lora_embedding, lambda t: t)
    assert contract.why_broken(y, eager, exact) is None


def test_parameters_and_which_are_trained():
    made = LoRAEmbedding(9, 5, 3)
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert shapes == {"weight": (9, 5), "lora_embedding_A": (3, 9), "lora_embedding_B": (5, 3)}
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"lora_embedding_A", "lora_embedding_B"}
    assert list(made.state_dict()) == ["weight", "lora_embedding_A", "lora_embedding_B"]


def test_the_adapter_starts_as_in_peft():
    torch.manual_seed(0)
    made = LoRAEmbedding(9, 5000, 8)
    assert not made.lora_embedding_A.any()
    assert made.lora_embedding_B.std().item() == pytest.approx(1, rel=0.02)
    assert torch.equal(made(TOKENS), made.weight[TOKENS])


def test_gradients_are_those_of_the_formula():
    made = layer(padding_idx=8)
    dy = torch.randn(2, 3, 5, dtype=torch.float64)
    made(TOKENS).backward(dy)
    A, B = (t.detach().requires_grad_() for t in (made.lora_embedding_A, made.lora_embedding_B))
    reference.lora_embedding(TOKENS, made.weight, A, B, 1.0, padding_idx=8).backward(dy)
    same(made.lora_embedding_A.grad, A.grad)
    same(made.lora_embedding_B.grad, B.grad)
    assert not made.lora_embedding_A.grad[:, 8].any()
    assert made.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adapter_dtype(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer(dtype=dtype).lora_embedding_A.dtype == expected
    made = layer(dtype=dtype, adapter_dtype=torch.bfloat16)
    assert made.lora_embedding_B.dtype == torch.bfloat16
    assert made(TOKENS).dtype is dtype


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, x):
        return super().forward(x) * 3


class Named(nn.Embedding):
    """A subclass with state and the forward of nn.Embedding."""

    def __init__(self):
        super().__init__(9, 5, padding_idx=2, sparse=True)
        self.register_buffer("mean", torch.arange(5.0))
        self.note = "kept"


class TestFromEmbedding:
    def test_shares_the_weight_and_takes_over_the_rest(self):
        plain = Named().eval()
        calls = []
        plain.register_forward_hook(lambda *_: calls.append("after"))
        made = LoRAEmbedding.from_embedding(plain, 3)
        assert made.weight is plain.weight
        assert not made.weight.requires_grad
        assert not made.training
        assert (made.num_embeddings, made.embedding_dim, made.padding_idx) == (9, 5, 2)
        assert (made.in_features, made.out_features) == (9, 5)
        assert made.note == "kept"
        assert made.mean is plain.mean
        made(TOKENS)
        assert calls == ["after"]

    def test_merging_gives_the_class_and_all_it_held_back(self):
        plain = Named()
        model = lorafast.adapt(nn.Sequential(plain), 3, ["0"])
        nn.init.normal_(model[0].lora_embedding_A)
        expected = model(TOKENS)
        (back,) = lorafast.merge(model)
        assert type(back) is Named
        assert repr(back) == repr(plain)
        assert back.state_dict().keys() == plain.state_dict().keys()
        assert vars(back).keys() == vars(plain).keys()
        assert (back.note, back.sparse, back.padding_idx) == ("kept", True, 2)
        torch.testing.assert_close(back(TOKENS), expected)

    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda: nn.Linear(3, 3), "it is a Linear, expected an nn.Embedding"),
            (lambda: Scaled(3, 3), "its forward is not that of nn.Embedding (Scaled)"),
            (lambda: nn.Embedding(3, 3, max_norm=1.0), "its max_norm is 1.0, which changes"),
            (
                lambda: nn.Embedding(3, 3, scale_grad_by_freq=True),
                "its scale_grad_by_freq is True, which the adapter's gradients don't follow",
            ),
            (
                lambda: nn.utils.parametrizations.weight_norm(nn.Embedding(3, 3)),
                "its weight is computed by a parametrization",
            ),
            (lambda: nn.Embedding(3, 3).to(torch.complex64), "its weight is torch.complex64"),
            (
                lambda: _with(bias=torch.zeros(3)),
                "its attribute 'bias' has the name of one that a LoRAEmbedding has",
            ),
        ],
        ids=[
            "linear",
            "forward",
            "max_norm",
            "scale_grad_by_freq",
            "parametrized",
            "dtype",
            "name",
        ],
    )
    def test_refusals(self, make, sentence):
        plain = make()
        before = dict(vars(plain))
        with pytest.raises(TypeError, match=re.escape(sentence)):
            LoRAEmbedding.from_embedding(plain, 2)
        assert vars(plain) == before
        assert all(p.requires_grad for p in plain.parameters())

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"r": 0}, "r is 0, expected an integer of at least 1"),
            ({"alpha": math.nan}, "alpha is nan, expected a finite number"),
        ],
        ids=["r", "alpha"],
    )
    def test_bad_arguments(self, options, sentence):
        plain = nn.Embedding(3, 3)
        with pytest.raises(ValueError, match=sentence):
            LoRAEmbedding.from_embedding(plain, **{"r": 2} | options)
        assert plain.weight.requires_grad


def _with(**attributes):
    plain = nn.Embedding(3, 3)
    for name, value in attributes.items():
        setattr(plain, name, value)
    return plain


class TestMerging:
    def test_merge_and_unmerge(self):
        made = layer(alpha=5)
        expected = made(TOKENS)
        made.merge()
        same(made(TOKENS), expected)
        made.alpha = 2
        same(made(TOKENS), table(made)[TOKENS])
        made.unmerge()
        same(made(TOKENS), table(made)[TOKENS])

    def test_a_merged_layer_trains_nothing_and_saves_the_adapter(self):
        made = layer()
        made.merge()
        assert not made(TOKENS).requires_grad
        assert list(made.state_dict()) == ["weight", "lora_embedding_A", "lora_embedding_B"]

    def test_delta_weight(self):
        made = layer(alpha=2)
        same(made.delta_weight(), table(made).detach() - made.weight)

    def test_values_that_are_not_finite_are_refused(self):
        made = layer()
        with torch.no_grad():
            made.lora_embedding_A[1, 0] = math.nan
        with pytest.raises(
            ValueError, match=r"^its lora_embedding_A is NaN or infinite in 1 of 27 elements$"
        ):
            made.merge()
        assert not made.merged

    def test_to_embedding_is_a_plain_layer(self):
        made = layer(padding_idx=1)
        plain = made.to_embedding()
        assert type(plain) is nn.Embedding
        assert plain.padding_idx == 1
        same(plain(TOKENS), made(TOKENS))


class TestState:
    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, clone):
        made = layer(alpha=5, padding_idx=1)
        twin = clone(made)
        assert torch.equal(twin(TOKENS), made(TOKENS))
        assert twin.weight is not made.weight
        assert repr(twin) == repr(made)

    def test_a_plain_checkpoint_leaves_the_adapter_alone(self):
        made = layer()
        before = made.lora_embedding_A.clone()
        plain = nn.Embedding(9, 5, dtype=torch.float64)
        assert made.load_state_dict(plain.state_dict()) == ([], [])
        assert torch.equal(made.weight, plain.weight)
        assert torch.equal(made.lora_embedding_A, before)

    def test_half_a_checkpoint_is_refused(self):
        made = layer()
        state = made.state_dict()
        del state["lora_embedding_B"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"lora_embedding_B"'):
            made.load_state_dict(state)

    def test_an_adapter_on_meta_comes_along(self):
        plain = nn.Sequential(nn.Embedding(9, 5))
        with torch.device("meta"):
            model = lorafast.adapt(nn.Sequential(nn.Embedding(9, 5)), 2, ["0"])
        model.load_state_dict(plain.state_dict(), assign=True)
        assert torch.equal(model(TOKENS), plain(TOKENS))
        assert model[0].lora_embedding_B.any()

    def test_reset_parameters(self):
        made = layer(padding_idx=4)
        with torch.no_grad():
            made.weight.zero_()
        made.reset_parameters()
        assert made.weight.any(1).tolist() == [row != 4 for row in range(9)]
        assert not made.lora_embedding_A.any()

    def test_repr(self):
        made = layer(alpha=6, padding_idx=1, use_rslora=True)
        made.merge()
        assert repr(made) == (
            "LoRAEmbedding(9, 5, r=3, alpha=6, padding_idx=1, use_rslora=True, merged=True)"
        )


def dora(**options):
    made = layer(use_dora=True, **options)
    with torch.no_grad():
        made.lora_magnitude.mul_(torch.rand(5) + 0.5)
    return made


def dora_table(made):
    """The table with columns of the norms that the magnitude says."""
    whole = table(made)
    return made.lora_magnitude / whole.norm(dim=0) * whole


class TestDoRA:
    @pytest.mark.parametrize("options", [{}, {"alpha": 8, "use_rslora": True}], ids=str)
    def test_it_is_the_formula(self, options):
        made = dora(**options)
        same(made(TOKENS), dora_table(made)[TOKENS])
        assert list(made.state_dict())[3:] == ["lora_magnitude"]
        assert made.lora_magnitude.requires_grad
        assert "use_dora=True" in repr(made)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_fresh_layer_is_the_plain_one_bit_for_bit(self, dtype):
        made = LoRAEmbedding(9, 5, 3, dtype=dtype, use_dora=True)
        assert torch.equal(made(TOKENS), made.weight[TOKENS])
        torch.testing.assert_close(made.lora_magnitude, made.weight.float().norm(dim=0))

    def test_autocast_changes_nothing(self):
        made = dora(dtype=torch.float32)
        expected, merged = made(TOKENS), made.merged_weight()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made(TOKENS), expected)
            assert torch.equal(made.merged_weight(), merged)
            fresh = LoRAEmbedding.from_embedding(nn.Embedding(9, 5), 3, use_dora=True)
        assert torch.equal(fresh(TOKENS), fresh.weight[TOKENS])

    def test_no_gradient_flows_through_the_norm(self):
        made = dora()
        dy = torch.randn(2, 3, 5, dtype=torch.float64)
        made(TOKENS).backward(dy)
        A, B, m = (p.detach().requires_grad_() for p in made.adapter_parameters().values())
        low = reference.lora_embedding(TOKENS, made.weight, A, B, 1.0)
        (m / table(made).detach().norm(dim=0) * low).backward(dy)
        same(made.lora_embedding_A.grad, A.grad)
        same(made.lora_embedding_B.grad, B.grad)
        same(made.lora_magnitude.grad, m.grad)

    def test_merging(self):
        made = dora()
        expected = made(TOKENS)
        made.merge()
        same(made(TOKENS), expected)
        made.alpha = 7
        same(made(TOKENS), dora_table(made)[TOKENS])
        plain = made.to_embedding()
        assert type(plain) is nn.Embedding
        assert not {"lora_magnitude", "_use_dora", "_aside"} & {*vars(plain), *plain._parameters}
        same(plain(TOKENS), dora_table(made)[TOKENS])

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, clone):
        made = dora()
        assert torch.equal(clone(made)(TOKENS), made(TOKENS))

    def test_a_plain_checkpoint_under_a_fresh_adapter_is_the_plain_layer(self):
        made = LoRAEmbedding(9, 5, 3, dtype=torch.float64, use_dora=True)
        plain = nn.Embedding(9, 5, dtype=torch.float64)
        assert made.load_state_dict(plain.state_dict()) == ([], [])
        same(made(TOKENS), plain(TOKENS))
        trained = dora()
        before = trained.lora_magnitude.clone()
        trained.load_state_dict(plain.state_dict())
        assert torch.equal(trained.lora_magnitude, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [layer, dora])
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("how", ["trace", "script", "export"])
def test_what_leaves_python(how, merged, make):
    made = make(dtype=torch.float32, padding_idx=1).eval()
    if merged:
        made.merge()
    if how == "export":
        found = torch.export.export(made, (TOKENS,)).module()
    else:
        script = torch.jit.trace(made, TOKENS) if how == "trace" else torch.jit.script(made)
        buffer = io.BytesIO()
        torch.jit.save(script, buffer)
        buffer.seek(0)
        found = torch.jit.load(buffer)
    torch.testing.assert_close(found(TOKENS), made(TOKENS))


@pytest.mark.parametrize(
    ("make", "function"), [(layer, lora_embedding), (dora, dora_embedding)], ids=["lora", "dora"]
)
def test_fx_has_a_node_for_it(make, function):
    model = nn.Sequential(make())
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == [function]
    same(traced(TOKENS), model(TOKENS))


@pytest.mark.parametrize("make", [layer, dora])
def test_compiled_without_a_graph_break(make):
    made = make()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    compiled(TOKENS).sum().backward()
    found = made.lora_embedding_A.grad
    made.zero_grad()
    made(TOKENS).sum().backward()
    same(found, made.lora_embedding_A.grad)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_offloaded_by_accelerate(use_dora):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Embedding(9, 5))
    expected = model[0].weight.detach().clone()
    accelerate.cpu_offload(model, torch.device("cpu"))
    lorafast.adapt(model, 3, ["0"], use_dora=use_dora)
    nn.init.normal_(model[0].lora_embedding_A)
    assert model[0].weight.is_meta
    whole = expected + model[0].delta_weight()
    if use_dora:
        whole = expected.norm(dim=0) / whole.norm(dim=0) * whole
    torch.testing.assert_close(model(TOKENS), whole[TOKENS])
    lorafast.merge(model)
    torch.testing.assert_close(model(TOKENS), F.embedding(TOKENS, whole))
