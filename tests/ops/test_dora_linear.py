"""DoRA: the formula, every gradient by name, every backend and format, compiled, transformed."""

import contextlib
import functools
import re

import pytest
import torch
from helpers import DTYPES, covering, skip_unless_usable
from layouts import LAYOUTS, lay_out
from torch import func
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy_formats import FORMATS, held

import lorafast
from lorafast import ops, reference
from lorafast.backends import registry
from lorafast.functional import dora_linear
from lorafast.reference import contract

pytestmark = pytest.mark.usefixtures("toy_formats")

M, K, N, r = 70, 48, 40, 4
SCALING = 0.7
NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")
BACKENDS = ("reference", "aten", "cpu", "triton")


def draw(dtype=torch.float64, adapter_dtype=None, sizes=(M, K, N, r)):
    M, K, N, r = sizes
    adapter_dtype = adapter_dtype or dtype
    return {
        "x": torch.randn(M, K).to(dtype),
        "weight": (torch.randn(N, K) / K**0.5).to(dtype),
        "lora_A": (torch.randn(r, K) / K**0.5).to(adapter_dtype),
        "lora_B": torch.randn(N, r).to(adapter_dtype),
        "magnitude": (0.5 + 1.5 * torch.rand(N)).to(adapter_dtype),
        "bias": torch.randn(N).to(dtype),
    }


def fast(t, dropout_p=0.0, **options):
    """The mask is that of the seed which ``seed_of`` draws."""
    torch.manual_seed(5)
    return dora_linear(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], t["magnitude"], SCALING, t.get("bias"),
        dropout_p=dropout_p, **options,
    )  # fmt: skip


def right(t, dropout_p=0.0, **options):
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    return reference.dora_linear(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], t["magnitude"], SCALING, t.get("bias"),
        dropout_p=dropout_p, seed=seed, **options,
    )  # fmt: skip


def outputs(layer, t, dropout_p, dy, names=NAMES):
    """``y`` and the gradients by name."""
    leaves = {n: v.detach().requires_grad_() for n, v in t.items() if n in names}
    y = layer(t | leaves, dropout_p)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


def doubles(t):
    return {name: value.double() for name, value in t.items()}


def assert_right(found, t, dropout_p, dy, dtype, names=NAMES):
    eager = outputs(right, t, dropout_p, dy, names)
    exact = outputs(right, doubles(t), dropout_p, dy.double(), names)
    reason = contract.why_any_broken(found, contract.bounds(eager, exact, dtype=dtype))
    assert reason is None, reason


class TestTheFormula:
    """Of the reference, from which all else is judged."""

    def test_without_dropout_it_is_a_scaled_merged_weight(self):
        t = draw()
        merged = t["weight"] + SCALING * t["lora_B"] @ t["lora_A"]
        scale = t["magnitude"] / merged.norm(dim=1)
        expected = t["x"] @ (scale[:, None] * merged).t() + t["bias"]
        torch.testing.assert_close(right(t), expected)

    def test_with_dropout_the_frozen_layer_sees_all_of_x(self):
        t, p = draw(), 0.3
        merged = t["weight"] + SCALING * t["lora_B"] @ t["lora_A"]
        scale = t["magnitude"] / merged.norm(dim=1)
        torch.manual_seed(5)
        left = reference.dropout(t["x"], p, torch.randint(2**63 - 1, (1,)))
        change = left @ (scale[:, None] * merged - t["weight"]).t()
        expected = t["x"] @ t["weight"].t() + change + t["bias"]
        torch.testing.assert_close(right(t, p), expected)
        torch.testing.assert_close(right(t, p, training=False), right(t))

    def test_a_new_layer_is_the_frozen_one(self):
        t = draw()
        t["lora_B"].zero_()
        t["magnitude"] = t["weight"].norm(dim=1)
        for p in (0.0, 0.3):
            expected = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
            torch.testing.assert_close(right(t, p), expected)

    def test_the_norm_has_no_gradient(self):
        """Section 4.3 of the paper: dA is that of the scaled adapter alone."""
        t = draw()
        dy = torch.randn(M, N).double()
        scale = t["magnitude"] / reference.weight_norm(
            t["weight"], t["lora_A"], t["lora_B"], SCALING
        )
        expected = SCALING * ((dy * scale) @ t["lora_B"]).t() @ t["x"]
        for layer in (right, fast):
            torch.testing.assert_close(outputs(layer, t, 0.0, dy)["dlora_A"], expected)

    def test_a_seed_is_needed(self):
        t = draw()
        with pytest.raises(ValueError, match="seed is None"):
            reference.dora_linear(*(t[n] for n in NAMES[:5]), SCALING, dropout_p=0.5)


@pytest.mark.parametrize(
    ("backend", "dtype", "adapter_dtype", "dropout_p"),
    covering(BACKENDS, DTYPES, (torch.float32, None), (0.0, 0.3, 1.0)),
    ids=str,
)
def test_every_gradient_on_every_backend(poisoned, backend, dtype, adapter_dtype, dropout_p):
    skip_unless_usable(backend)
    if dropout_p and "expand" not in registry.get(backend).operations:
        pytest.skip("it has no expand")
    t, dy = draw(dtype, adapter_dtype), torch.randn(M, N).to(dtype)
    with lorafast.use_backend(backend):
        found = outputs(fast, t, dropout_p, dy)
    assert_right(found, t, dropout_p, dy, dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_every_format(format, dtype, adapter_dtype, dropout_p):
    t, dy = draw(dtype, adapter_dtype), torch.randn(M, N).to(dtype)
    names = [name for name in NAMES if name != "weight"]
    stored = t | {"weight": FORMATS[format](t["weight"])}
    found = outputs(fast, stored, dropout_p, dy, names)
    assert_right(found, t | {"weight": held(format, t["weight"])}, dropout_p, dy, dtype, names)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, dropout_p):
    dtype = torch.float32
    t, dy = draw(dtype), torch.randn(M, N)
    if "expanded" in layout:
        # Of a weight and factors of one row or column a norm may cancel nearly all of itself, and where
        # x and dy repeat one row, one rounding is repeated too.
        t["x"] = lay_out(t["x"], layout)
    else:
        dy = lay_out(dy, layout)
        t |= {n: lay_out(value, layout) for n, value in t.items() if value.dim() == 2}
    assert_right(outputs(fast, t, dropout_p, dy), t, dropout_p, dy, dtype)


def test_a_gradient_that_is_one_number_expanded():
    t, dy = draw(), torch.ones((), dtype=torch.float64).expand(M, N)
    for p in (0.0, 0.3):
        torch.testing.assert_close(outputs(fast, t, p, dy), outputs(right, t, p, dy))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_leading_dimensions(leading, dropout_p, bias):
    t = draw(sizes=(1, 12, 7, 3)) | {"x": torch.randn(*leading, 12).double()}
    if not bias:
        t.pop("bias")
    dy = torch.randn(*leading, 7).double()
    expected = outputs(right, t, dropout_p, dy)
    torch.testing.assert_close(outputs(fast, t, dropout_p, dy), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("names", [*((name,) for name in NAMES), ("lora_A", "magnitude")], ids=str)
def test_a_subset_of_gradients(names, dropout_p):
    t, dy = draw(), torch.randn(M, N).double()
    expected = outputs(right, t, dropout_p, dy, names)
    torch.testing.assert_close(outputs(fast, t, dropout_p, dy, names), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("size", ["small", "fused"])
def test_first_and_second_derivatives(size, dropout_p, never_small):
    """By the formula in which the norm is a constant: that of these very tensors."""
    if size == "fused":
        never_small()
    t = draw(sizes=(5, 6, 4, 2))
    leaves = [value.requires_grad_() for value in t.values()]
    norm = ops.weight_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING)
    seed = torch.tensor([11])

    def function(x, weight, lora_A, lora_B, magnitude, bias):
        scale = magnitude / norm
        return ops.dora_linear(
            x, weight, lora_A, lora_B, scale, SCALING, bias, dropout_p, seed if dropout_p else None
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_double_backward_is_the_references(dropout_p, never_small):
    never_small()

    def second(layer):
        t = draw(sizes=(9, 12, 7, 3))
        leaves = [value.requires_grad_() for value in t.values()]
        y = layer(t, dropout_p)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.manual_seed(1)
    found = second(fast)
    torch.manual_seed(1)
    for name, one, two in zip(NAMES, found, second(right), strict=True):
        torch.testing.assert_close(one, two, msg=name)


class TestFloat16:
    """What float32 adapters make of it, and their gradients, need not fit into float16."""

    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    @pytest.mark.parametrize("format", ["dense", "negative"])
    @pytest.mark.parametrize(
        ("of_A", "of_B", "of_dy"),
        [(1e6, 1e-6, 1.0), (1e-6, 1e6, 1.0), (1e5, 1e-5, 1e-3), (1.0, 1e-6, 1e-5)],
        ids=str,
    )
    def test_beyond_its_range(self, format, of_A, of_B, of_dy, dropout_p):
        t = draw(torch.float16, torch.float32)
        t["lora_A"] *= of_A
        t["lora_B"] *= of_B
        dy = (of_dy * torch.randn(M, N)).half()
        names = [name for name in NAMES if name != "weight"]
        stored = t | {"weight": FORMATS[format](t["weight"])}
        found = outputs(fast, stored, dropout_p, dy, names)
        assert all(value.isfinite().all() for value in found.values())
        assert_right(found, t, dropout_p, dy, torch.float16, names)

    def test_an_adapted_output_beyond_it_is_scaled_before_it_is_rounded(self):
        t = draw(torch.float16, torch.float32)
        t["lora_B"] *= 1e6
        t["magnitude"] *= 1e-3
        y = fast(t)
        assert y.dtype is torch.float16
        assert y.isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_autocast_casts_what_F_linear_would(dropout_p):
    t = draw(torch.float32)
    t["x"] = t["x"].bfloat16().float()  # the others are rounded once, whoever casts them
    dy = torch.randn(M, N).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(fast, t, dropout_p, dy)
    assert found["y"].dtype is torch.bfloat16
    norm = ops.weight_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING)
    for name in ("lora_A", "lora_B", "magnitude"):
        assert found[f"d{name}"].dtype is torch.float32
    # The norm is that of the weight before it was cast.
    scale = t["magnitude"] / norm
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,)) if dropout_p else None
    y = ops.dora_linear(
        t["x"].bfloat16(), t["weight"].bfloat16(), t["lora_A"], t["lora_B"], scale, SCALING,
        t["bias"].bfloat16(), dropout_p, seed,
    )  # fmt: skip
    assert torch.equal(found["y"], y)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_nothing_of_the_weights_size_is_made(dropout_p):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not function.is_view:
                self.numel = max(self.numel, out.numel())
            return out

    t = draw(torch.bfloat16, torch.float32, (2, 256, 320, 4))
    leaves = {n: v.requires_grad_() for n, v in t.items() if n not in ("weight", "bias")}
    with Largest() as largest:
        fast(t | leaves, dropout_p).sum().backward()
    assert largest.numel <= 256 * 320 / 8


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_what_a_mode_keeps_stays_as_it_was(dropout_p, never_small):
    """Selective checkpointing keeps what operations return."""
    never_small()
    kept = []

    class Keeping(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = isinstance(out, torch.Tensor) and not function._schema.is_mutable
            if made and not function.is_view and "empty" not in str(function):
                kept.append((str(function), out, out.clone()))
            return out

    t, dy = draw(), torch.randn(M, N).double()
    with Keeping():
        found = outputs(fast, t, dropout_p, dy)
    assert kept
    assert {name for name, out, before in kept if not torch.equal(out, before)} == set()
    torch.testing.assert_close(found, outputs(right, t, dropout_p, dy))


def test_dropout_is_for_training_and_drawn_from_pytorchs_generator():
    t = draw()
    torch.testing.assert_close(fast(t, 0.5, training=False), fast(t))
    assert torch.equal(fast(t, 0.5), fast(t, 0.5))
    torch.manual_seed(1)
    one, two = (dora_linear(*(t[n] for n in NAMES[:5]), SCALING, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(one, two)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="magnitude has shape"):
        dora_linear(*(t[n] for n in NAMES[:4]), torch.ones(3), SCALING, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)  # refused before a draw


def test_checkpointing_draws_the_same_mask():
    t, dy = draw(), torch.randn(M, N).double()

    def checkpointed(t, dropout_p):
        return checkpoint(lambda x: fast(t | {"x": x}, dropout_p), t["x"], use_reentrant=False)

    torch.testing.assert_close(outputs(checkpointed, t, 0.4, dy), outputs(fast, t, 0.4, dy))


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("format", "dropout_p", "dtype"),
        covering(("dense", "scaled"), (0.0, 0.3), (torch.float32, torch.bfloat16, torch.float16)),
        ids=str,
    )
    def test_one_graph_and_every_gradient(self, format, dropout_p, dtype):
        t, dy = draw(dtype, torch.float32), torch.randn(M, N).to(dtype)
        names = NAMES if format == "dense" else [name for name in NAMES if name != "weight"]
        compiled = torch.compile(dora_linear, fullgraph=True, backend="aot_eager")

        def layer(t, dropout_p):
            torch.manual_seed(5)
            weight = FORMATS[format](t["weight"]) if format != "dense" else t["weight"]
            return compiled(
                t["x"], weight, t["lora_A"], t["lora_B"], t["magnitude"], SCALING, t["bias"],
                dropout_p=dropout_p,
            )  # fmt: skip

        found = outputs(layer, t, dropout_p, dy, names)
        assert_right(found, t | {"weight": held(format, t["weight"])}, dropout_p, dy, dtype, names)

    def test_no_graph_for_another_scaling_or_number_of_rows(self):
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        compiled = torch.compile(dora_linear, fullgraph=True, backend=counter)
        t = [draw(torch.float32)[name] for name in NAMES[:5]]
        for rows, scaling in ((5, 0.5), (6, 0.7)):  # the second makes a variable of each
            compiled(t[0][:rows], *t[1:], scaling)
        before = counter.frame_count
        for rows, scaling in ((7, 1.5), (8, -2.0), (9, 3.0)):
            found = compiled(t[0][:rows], *t[1:], scaling)
            torch.testing.assert_close(found, dora_linear(t[0][:rows], *t[1:], scaling))
        assert counter.frame_count == before


class TestTransforms:
    """Of the reference, and so of the layer: the norm has no tangent either."""

    @pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacrev", "jacfwd", "hessian"])
    @pytest.mark.parametrize("wrt", [name for name in NAMES if name != "bias"])
    def test_one(self, transform, wrt):
        t = draw(sizes=(3, 6, 4, 2))

        def apply(layer):
            def function(value):
                return layer(t | {wrt: value}).square().sum()

            if transform == "grad":
                return func.grad(function)(t[wrt])
            if transform == "jvp":
                return func.jvp(function, (t[wrt],), (torch.ones_like(t[wrt]),))[1]
            if transform == "vmap":
                several = torch.stack([t[wrt], 2 * t[wrt], t[wrt].cos()])
                return func.vmap(lambda value: fast_or_right(layer, t | {wrt: value}))(several)
            return getattr(func, transform)(function)(t[wrt])

        def fast_or_right(layer, t):
            arguments = [t[name] for name in NAMES[:5]]
            run = dora_linear if layer is fast else reference.dora_linear
            return run(*arguments, SCALING, t["bias"])

        def without_seed(layer):
            return functools.partial(fast_or_right, layer)

        found, expected = (
            apply(layer if transform == "vmap" else without_seed(layer)) for layer in (fast, right)
        )
        torch.testing.assert_close(found, expected)

    def test_forward_mode(self):
        from torch.autograd import forward_ad as fw

        t = draw(sizes=(3, 6, 4, 2))
        found = []
        for layer in (fast, right):
            with fw.dual_level():
                duals = {n: fw.make_dual(v, torch.ones_like(v)) for n, v in t.items()}
                found.append(fw.unpack_dual(layer(duals)).tangent)
        torch.testing.assert_close(*found)


REFUSALS = {
    "magnitude-shape": ({"magnitude": torch.ones(K)}, f"magnitude has shape [{K}], expected [{N}]"),
    "magnitude-2d": (
        {"magnitude": torch.ones(N, 1)}, f"magnitude has shape [{N}, 1], expected [{N}]",
    ),
    "magnitude-dtype": (
        {"magnitude": torch.ones(N, dtype=torch.int64)},
        "magnitude is torch.int64, expected float16, bfloat16, float32 or float64",
    ),
    "magnitude-kind": ({"magnitude": 1.0}, "magnitude is a float, expected a tensor"),
    "magnitude-device": (
        {"magnitude": torch.ones(N, device="meta")},
        "magnitude is on meta, expected cpu, where x is",
    ),
    "x": ({"x": torch.ones(3, K + 1).double()}, f"x has shape [3, {K + 1}], expected [..., {K}]"),
    "sparse": (
        {"x": torch.ones(3, K).double().to_sparse()},
        "x is torch.sparse_coo, expected a strided tensor: DoRA scales what W makes of it",
    ),
    "lora_B": ({"lora_B": torch.ones(N, r + 1).double()}, f"lora_B has shape [{N}, {r + 1}]"),
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("change", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(change, sentence, autocast):
    around = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with around, pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        fast(draw() | change)


def test_other_refusals():
    t = draw()
    with pytest.raises(ValueError, match=r"dropout_p is 1\.5, expected a probability"):
        fast(t, 1.5)
    with pytest.raises(TypeError, match="dropout_p is a NoneType, expected a number"):
        fast(t, None)
    arguments = [t[name] for name in NAMES[:5]]
    with pytest.raises(TypeError, match="scaling is a Tensor, expected a number"):
        dora_linear(*arguments, torch.tensor(1.0))
