"""The LoRA embedding: the contract, every gradient by name, and what surrounds a call."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_contract, problems, several, stacked
from hypothesis import given
from layouts import LAYOUTS, lay_out
from torch._dynamo.testing import CompileCounterWithBackend

import lorafast
from lorafast.functional import lora_embedding

V, N, r = 11, 5, 3
SHAPES = {"weight": (V, N), "lora_A": (r, V), "lora_B": (N, r), "scaling": ()}
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(SHAPES, n)]
TOKENS = torch.tensor([[1, 4, 4, 0], [9, 4, 10, 2]])
PADDING = 6  # none of them: no derivative of its row is that of the output


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()


def draw(dtype=torch.float64, grad=()):
    return {
        name: torch.randn(shape, dtype=dtype).requires_grad_(name in grad)
        for name, shape in SHAPES.items()
    }


def formula(tokens, weight, lora_A, lora_B, scaling):
    """By the table that the adapter makes."""
    return (weight + scaling * (lora_B @ lora_A).t())[tokens]


def gradients(y, t):
    wanted = [name for name, tensor in t.items() if tensor.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    found = torch.autograd.grad(y, [t[name] for name in wanted], dy)
    return dict(zip(wanted, found, strict=True))


def assert_close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@given(p=problems())
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("one_dtype", [False, True], ids=["adapters apart", "one dtype"])
def test_output_and_gradients_against_float64(device, poisoned, one_dtype, padded, p):
    if one_dtype:
        p = replace(p, adapter_dtype=p.dtype)
    drawn = several(p, device)
    generator = torch.Generator().manual_seed(p.draw_seed)
    tokens = [torch.randint(p.K, (p.M,), generator=generator).to(device) for _ in drawn]
    padding_idx = p.K // 2 if padded else None

    def outputs(t, tokens, layer, cast):
        leaves = [
            p.lay_out(cast(t.weight).t()),
            p.lay_out(cast(t.lora_A, p.adapter_dtype)),
            cast(t.lora_B, p.adapter_dtype),
        ]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = layer(tokens, *leaves, 0.5, padding_idx=padding_idx)
        return y.detach(), *torch.autograd.grad(y, leaves, cast(t.dy))

    def call(operations, cast):
        layer = operations.lora_embedding
        return stacked(outputs(t, x, layer, cast) for t, x in zip(drawn, tokens, strict=True))

    assert_contract(call, lorafast.functional, p.dtype, rounded_to=p.dtype)


@pytest.mark.parametrize("padding_idx", [None, PADDING])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_a_matrix_of_other_strides(name, layout, padding_idx):
    t = draw(grad=SHAPES)
    laid = lay_out(t[name].detach(), layout)
    found = t | {name: laid.requires_grad_()}
    expected = t | {name: laid.detach().contiguous().requires_grad_()}
    y, y_expected = (
        lora_embedding(TOKENS, **x, padding_idx=padding_idx) for x in (found, expected)
    )
    torch.testing.assert_close(y, y_expected)
    assert_close(gradients(y, found), gradients(y_expected, expected))


@pytest.mark.parametrize("factor", [1e6, 1e-6], ids="A x {}".format)
def test_float32_adapters_make_what_float16_has_not(factor):
    tokens = torch.randint(40, (60,))
    drawn = [torch.randn(s, dtype=torch.float64) for s in ((40, 24), (4, 40), (24, 4), (60, 24))]
    W, A, B, dy = drawn[0], drawn[1] * factor, drawn[2] / factor, drawn[3]

    def call(operations, cast):
        leaves = [cast(W), cast(A, torch.float32), cast(B, torch.float32)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = operations.lora_embedding(tokens, *leaves, 0.5)
        return y.detach(), *torch.autograd.grad(y, leaves, cast(dy))

    assert_contract(call, lorafast.functional, torch.float16, rounded_to=torch.float16)


@pytest.mark.parametrize("padding_idx", [None, PADDING])
def test_a_sum_of_many_terms_is_as_exact_as_PyTorchs(padding_idx):
    tokens = torch.randint(V, (60,))
    drawn = [torch.randn(s, dtype=torch.float64) for s in ((V, 2), (1024, V), (2, 1024))]

    def call(operations, cast):
        return operations.lora_embedding(tokens, *map(cast, drawn), 0.5, padding_idx=padding_idx)

    assert_contract(call, lorafast.functional, torch.float32)


@pytest.mark.parametrize("padding_idx", [None, PADDING])
@pytest.mark.parametrize("grad", SUBSETS, ids="+".join)
def test_first_and_second_derivatives(grad, padding_idx):
    t = draw(grad=grad)

    def function(*leaves):
        return lora_embedding(
            TOKENS, **t | dict(zip(grad, leaves, strict=True)), padding_idx=padding_idx
        )

    leaves = [t[name] for name in grad]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("padding_idx", [4, 4 - V])
def test_the_padding_row_is_read_and_gets_no_gradient(padding_idx):
    t = draw(grad=SHAPES)
    y = lora_embedding(TOKENS, **t, padding_idx=padding_idx)
    plain = lora_embedding(TOKENS, **t)
    expected = gradients(plain, t)
    assert expected["weight"][4].all()
    assert expected["lora_A"][:, 4].all()
    expected["weight"][4] = 0
    expected["lora_A"][:, 4] = 0
    torch.testing.assert_close(y, plain)
    assert_close(gradients(y, t), expected)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("rank", [1, 13], ids=["r=1", "r>V,N"])
@pytest.mark.parametrize("padding_idx", [None, PADDING])
def test_tokens_of_any_shape(shape, rank, padding_idx):
    t = draw() | {"lora_A": torch.randn(rank, V).double(), "lora_B": torch.randn(N, rank).double()}
    t = {name: tensor.requires_grad_() for name, tensor in t.items()}
    tokens = torch.randint(PADDING, shape)
    y = lora_embedding(tokens, **t, padding_idx=padding_idx)
    expected = formula(tokens, **t)
    torch.testing.assert_close(y, expected)
    assert_close(gradients(y, t), gradients(expected, t))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_tokens_of_any_integer_dtype(dtype):
    t = draw(grad=SHAPES)
    expected = lora_embedding(TOKENS, **t)
    y = lora_embedding(TOKENS.to(getattr(torch, dtype)), **t)
    assert torch.equal(y, expected)
    assert_close(gradients(y, t), gradients(expected, t), 0)


def test_tokens_of_other_strides():
    t = draw()
    for tokens in (TOKENS.t(), TOKENS[:, ::2], TOKENS[:1].expand(3, 4)):
        assert torch.equal(lora_embedding(tokens, **t), lora_embedding(tokens.contiguous(), **t))


@pytest.mark.parametrize("padding_idx", [None, PADDING])
@pytest.mark.parametrize("token", [-1, V])
def test_a_token_out_of_range_is_PyTorchs_error(token, padding_idx):
    t, tokens = draw(), torch.tensor([0, token])
    with pytest.raises(IndexError) as expected:
        F.embedding(tokens, t["weight"])
    with pytest.raises(IndexError, match=f"^{re.escape(str(expected.value))}$"):
        lora_embedding(tokens, **t, padding_idx=padding_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero", ["lora_A", "lora_B"])
def test_a_fresh_adapter_changes_no_bit(dtype, zero):
    t = draw(dtype) | {"scaling": 2.0}
    t[zero] = torch.zeros_like(t[zero])
    assert torch.equal(lora_embedding(TOKENS, **t), F.embedding(TOKENS, t["weight"]))


@pytest.mark.parametrize("scaling", [2, 0.3, torch.tensor(0.3), torch.tensor(2)], ids=str)
def test_scaling_of_any_kind(scaling):
    t = draw() | {"scaling": scaling}
    torch.testing.assert_close(
        lora_embedding(TOKENS, **t), formula(TOKENS, **t | {"scaling": float(scaling)}),
        rtol=1e-7, atol=1e-7,
    )  # fmt: skip


def test_kept_for_the_backward_are_the_tokens_B_and_s():
    t = draw(torch.float32, grad=("lora_A", "lora_B"))
    t["scaling"] = 0.5
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        lora_embedding(TOKENS, **t)
    floats = [x for x in saved if x.is_floating_point() and x.data_ptr() != t["lora_B"].data_ptr()]
    assert [x.numel() for x in floats] == [TOKENS.numel() * r]
    assert all(x.numel() == TOKENS.numel() for x in saved if not x.is_floating_point())


def test_the_output_can_be_changed_in_place():
    t = draw(grad=SHAPES)
    expected = gradients(2 * lora_embedding(TOKENS, **t), t)
    assert_close(gradients(lora_embedding(TOKENS, **t).mul_(2), t), expected)


def test_autocast_changes_nothing():
    """``F.embedding`` is in the dtype of its weight there too."""
    t = draw(torch.float32, grad=SHAPES)
    expected = lora_embedding(TOKENS, **t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_embedding(TOKENS, **t)
    assert torch.equal(y, expected)
    assert_close(gradients(y, t), gradients(expected, t), 0)


def test_a_forced_backend_has_no_part_in_it():
    t = draw()
    expected = lora_embedding(TOKENS, **t)
    for backend in lorafast.backends():
        with lorafast.use_backend(backend):
            assert torch.equal(lora_embedding(TOKENS, **t), expected)


@pytest.mark.parametrize("padding_idx", [None, PADDING])
def test_no_value_is_asked_for(padding_idx):
    """Tensors without values have none to wait for on a device."""
    t = {name: tensor.to("meta").requires_grad_() for name, tensor in draw().items()}
    y = lora_embedding(TOKENS.to("meta"), **t, padding_idx=padding_idx)
    assert y.is_meta
    assert y.shape == (*TOKENS.shape, N)
    found = torch.autograd.grad(y, list(t.values()), torch.empty_like(y))
    assert [tuple(gradient.shape) for gradient in found] == list(SHAPES.values())


DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, fp32 adapters": (torch.bfloat16, torch.float32),
    "fp16, fp32 adapters": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("padding_idx", [None, 4])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_compiled_without_a_break(fresh_dynamo, dtypes, padding_idx):
    dtype, adapter_dtype = DTYPES[dtypes]
    drawn = draw()
    compiled = torch.compile(lora_embedding, fullgraph=True, backend="aot_eager", dynamic=True)

    def call(operations, cast):
        leaves = [
            cast(drawn["weight"]),
            cast(drawn["lora_A"], adapter_dtype),
            cast(drawn["lora_B"], adapter_dtype),
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        layer = compiled if operations is None else operations.lora_embedding
        y = layer(TOKENS, *leaves, 0.5, padding_idx=padding_idx)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    assert_contract(call, None, dtype, rounded_to=dtype)


@pytest.mark.slow
def test_inductor(fresh_dynamo):
    t = draw(torch.float32, grad=SHAPES)
    compiled = torch.compile(lora_embedding, fullgraph=True)
    y, expected = compiled(TOKENS, **t), lora_embedding(TOKENS, **t)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, t), gradients(expected, t))


def test_no_new_graph_for_another_number_of_tokens(fresh_dynamo):
    t = draw(grad=("lora_A", "lora_B")) | {"scaling": 0.5}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lora_embedding, fullgraph=True, backend=counter)
    for M in (3, 4, 5, 7, 100):
        tokens = torch.randint(V, (2, M))
        torch.testing.assert_close(compiled(tokens, **t), lora_embedding(tokens, **t))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_no_new_graph_for_another_scaling(fresh_dynamo, kind):
    t = draw()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lora_embedding, fullgraph=True, backend=counter)
    for value in (0.5, 0.7, 1.5, -2.0):
        t["scaling"] = kind(value)
        torch.testing.assert_close(compiled(TOKENS, **t), lora_embedding(TOKENS, **t))
    # PyTorch takes the first value of a number for a constant, the second for a variable.
    assert counter.frame_count <= (2 if kind is float else 1)


def test_an_exported_program_needs_no_lorafast():
    class Model(torch.nn.Module):
        def forward(self, tokens, weight, lora_A, lora_B):
            return lora_embedding(tokens, weight, lora_A, lora_B, 0.5)

    t = draw()
    inputs = (TOKENS, t["weight"], t["lora_A"], t["lora_B"])
    dynamic = ({1: torch.export.Dim.DYNAMIC}, None, None, None)
    exported = torch.export.export(Model(), inputs, dynamic_shapes=dynamic)
    assert not any("lorafast" in str(node.target) for node in exported.graph.nodes)
    others = (TOKENS[:, :3], *inputs[1:])
    torch.testing.assert_close(exported.module()(*others), Model()(*others))


TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(lambda A: f(A).sum())(t["lora_A"]),
    "jacrev": lambda f, t: torch.func.jacrev(f)(t["lora_A"]),
    "jacfwd": lambda f, t: torch.func.jacfwd(f)(t["lora_A"]),
    "vmap": lambda f, t: torch.func.vmap(f)(torch.stack([t["lora_A"], 2 * t["lora_A"]])),
    "jvp": lambda f, t: torch.func.jvp(f, (t["lora_A"],), (t["lora_A"],))[1],
    "hessian": lambda f, t: torch.func.hessian(lambda A: f(A).square().sum())(t["lora_A"]),
}


@pytest.mark.parametrize("padding_idx", [None, PADDING])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(transform, padding_idx):
    t = draw()

    def layer(lora_A):
        return lora_embedding(TOKENS, **t | {"lora_A": lora_A}, padding_idx=padding_idx)

    def by_the_table(lora_A):
        return formula(TOKENS, **t | {"lora_A": lora_A})

    torch.testing.assert_close(transform(layer, t), transform(by_the_table, t))


def test_tokens_can_be_batched():
    t = draw()
    found = torch.func.vmap(lambda tokens: lora_embedding(tokens, **t))(TOKENS)
    torch.testing.assert_close(found, lora_embedding(TOKENS, **t))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_weight_that_the_head_shares(fresh_dynamo, trained, compiled):
    """Through the head alone where it is frozen, and through both, summed, where it is not."""
    t = draw(grad=SHAPES if trained else ("lora_A", "lora_B", "scaling"))

    def model(embedding, t):
        h = embedding(TOKENS, t["weight"], t["lora_A"], t["lora_B"], t["scaling"])
        return F.linear(h.tanh(), t["weight"])

    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    logits, expected = run(lora_embedding, t), model(formula, t)
    assert logits.shape == (*TOKENS.shape, V)
    torch.testing.assert_close(logits, expected)
    assert_close(gradients(logits, t), gradients(expected, t))


def bad(**changes):
    return {"tokens": TOKENS} | draw(torch.float32) | {"scaling": 0.5} | changes


REFUSALS = {
    "tokens-list": (bad(tokens=[1]), "tokens is a list, expected a tensor"),
    "tokens-float": (bad(tokens=torch.ones(2)), "tokens is torch.float32, expected integers"),
    "tokens-bool": (bad(tokens=torch.ones(2) > 0), "tokens is torch.bool, expected integers"),
    "tokens-sparse": (
        bad(tokens=TOKENS.to_sparse()), "tokens is torch.sparse_coo, expected a strided tensor"
    ),
    "tokens-nested": (
        bad(tokens=torch.nested.nested_tensor([TOKENS[0], TOKENS[1, :2]])),
        "tokens is nested, expected a strided tensor",
    ),
    "tokens-device": (bad(tokens=TOKENS.to("meta")), "tokens is on meta, expected cpu, where"),
    "weight-integer": (
        bad(weight=torch.ones(V, N, dtype=torch.int8)), "weight is torch.int8, expected float16"
    ),
    "weight-1d": (
        bad(weight=torch.ones(V)), "weight has shape [11], expected [num_embeddings, embedding_dim]"
    ),
    "A-list": (bad(lora_A=[[1.0]]), "lora_A is a list, expected a tensor"),
    "A-transposed": (bad(lora_A=torch.ones(V, r)), "lora_A has shape [11, 3], expected [r, 11]"),
    "A-device": (bad(lora_A=torch.ones(r, V, device="meta")), "lora_A is on meta, expected cpu"),
    "B-rank": (bad(lora_B=torch.ones(N, 4)), "lora_B has shape [5, 4], expected [5, 3]"),
    "B-dtype": (bad(lora_B=torch.ones(N, r).half()), "lora_B is torch.float16, expected torch"),
    "r=0": (bad(lora_A=torch.ones(0, V), lora_B=torch.ones(N, 0)), "the rank r is 0"),
    "scaling-shape": (bad(scaling=torch.ones(1)), "scaling has shape [1], expected a number or"),
    "scaling-device": (
        bad(scaling=torch.ones((), device="meta")),
        "scaling is on meta, expected cpu, where weight is, or the CPU",
    ),
    "scaling-none": (bad(scaling=None), "scaling is a NoneType, expected a number"),
    "scaling-bool": (bad(scaling=True), "scaling is a bool, expected a number"),
    "padding-float": (bad(padding_idx=1.0), "padding_idx is a float, expected an int or None"),
    "padding-high": (bad(padding_idx=V), "padding_idx is 11, expected one of the 11 rows"),
    "padding-low": (bad(padding_idx=-V - 1), "padding_idx is -12, expected one of the 11 rows"),
    "max_norm": (bad(max_norm=1.0), "unexpected keyword argument 'max_norm'"),
    "sparse": (bad(sparse=True), "unexpected keyword argument 'sparse'"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(arguments, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        lora_embedding(**arguments)
