"""The layer's autograd: every gradient by name, on every path that a call can take, in every format."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from circumstances import MEMORY, ORDER, WORK, assert_same_bits, together
from helpers import assert_contract, covering, problems, several, skip_unless_usable, stacked
from hypothesis import given
from torch.utils.checkpoint import checkpoint
from toy_formats import FORMATS, held

import lorafast
from lorafast import operands, reference
from lorafast.functional import lora_linear, quantized_linear

pytestmark = pytest.mark.usefixtures("toy_formats")

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
SHAPES = ((3, 6), (5, 6), (2, 6), (5, 2), (5,))
SMALL = ((3, 4), (5, 4), (2, 4), (5, 2), (5,))
"""Of these derivatives are taken: element by element where all that can have gradients do, and of a
random combination of the elements for each subset of them, where an element is a small part of it."""
CLOSE = {"rtol": 1e-6, "atol": 1e-8}
"""Of polynomials central differences in float64 are closer than that."""
# x is kept for the backward only if A or W has a gradient; without it dB has no second derivative.
WITHOUT_X = [("x", "lora_B"), ("x", "lora_B", "bias")]
SUBSETS = [s for n in range(1, 6) for s in itertools.combinations(NAMES, n)]
# Small layers are differentiated by PyTorch, others by the fused formula: both must be right. A weight
# that is not stored dense has no gradient, and its layers are never small.
DENSE = {"small": "dense", "fused": "dense"}
PATHS = DENSE | {name: name for name in FORMATS if name != "dense"}


def draw(dtype=torch.float64, grad=(), shapes=SHAPES):
    return {
        name: torch.randn(shape, dtype=dtype).requires_grad_(name in grad)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def run(t, dropout_p=0.0, seed=1, format="dense"):
    torch.manual_seed(seed)
    return lora_linear(
        t["x"], FORMATS[format](t["weight"]), t["lora_A"], t["lora_B"], 0.5, t["bias"],
        dropout_p=dropout_p,
    )  # fmt: skip


def trainable(path, names=NAMES):
    return tuple(name for name in names if name != "weight" or path in DENSE)


def gradients(y, t):
    wanted = [name for name in NAMES if t[name].requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    found = torch.autograd.grad(y, [t[name] for name in wanted], dy)
    return dict(zip(wanted, found, strict=True))


@pytest.fixture(params=PATHS)
def path(request, never_small):
    if request.param != "small":
        never_small()
    return request.param


@pytest.fixture
def format(path):
    return PATHS[path]


@pytest.fixture
def fused(never_small):
    never_small()


def is_slow(path, grad):
    if len(grad) == 3:
        return grad not in WITHOUT_X
    return path not in DENSE and (len(grad) == 2 or path not in ("nf4", "scaled"))


def over_paths(subsets):
    """``path`` and ``grad``, what requires a gradient. Quick tests have one, two, all but one
    and all, and those that differ in what is kept; of weights in two other formats without pairs."""
    cases = [(p, grad) for p in PATHS for grad in subsets if trainable(p, grad) == grad]
    ids = [f"{path}-{'+'.join(grad)}" for path, grad in cases]
    cases = [
        pytest.param(path, grad, marks=[pytest.mark.slow] * is_slow(path, grad))
        for path, grad in cases
    ]
    return pytest.mark.parametrize(("path", "grad"), cases, ids=ids, indirect=["path"])


@over_paths(SUBSETS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(path, format, grad, dropout_p):
    t = draw(grad=grad, shapes=SMALL)

    def function(*leaves):
        return run(t | dict(zip(grad, leaves, strict=True)), dropout_p, format=format)

    some = grad != trainable(path)
    assert torch.autograd.gradcheck(function, [t[name] for name in grad], fast_mode=some, **CLOSE)


@over_paths([s for s in SUBSETS if s not in WITHOUT_X])
def test_gradgradcheck(path, format, grad):
    t = draw(grad=grad, shapes=SMALL)

    def function(*leaves):
        return run(t | dict(zip(grad, leaves, strict=True)), 0.3, format=format)

    some = grad != trainable(path)
    assert torch.autograd.gradgradcheck(
        function, [t[name] for name in grad], fast_mode=some, **CLOSE
    )


@pytest.mark.parametrize("grad", WITHOUT_X, ids="+".join)
def test_second_derivative_without_x_is_refused(fused, grad):
    t = draw(grad=grad)
    with pytest.raises(RuntimeError, match="needs x, which is not kept"):
        torch.autograd.grad(run(t).sum(), t["lora_B"], create_graph=True)


@given(p=problems())
@pytest.mark.parametrize("backend", ["aten", "cpu", "triton"])
def test_output_and_gradients_against_float64(device, poisoned, backend, p):
    skip_unless_usable(backend)
    drawn = several(p, device, most=4 if backend == "triton" else 32)

    def outputs(t, layer, cast):
        leaves = (
            p.lay_out(cast(t.x)).detach().requires_grad_(),
            cast(t.lora_A, p.adapter_dtype).detach().requires_grad_(),
            cast(t.lora_B, p.adapter_dtype).detach().requires_grad_(),
        )
        x, lora_A, lora_B = leaves
        more = {"dropout_p": p.dropout_p, "seed": t.seed}
        y = layer(x, cast(t.weight), lora_A, lora_B, 0.5, cast(t.bias), **more)
        return y.detach(), *torch.autograd.grad(y, leaves, cast(t.dy))

    def call(run, cast):
        layer = reference.lora_linear if run is reference else lorafast.ops.lora_linear
        return stacked(outputs(t, layer, cast) for t in drawn)

    with lorafast.use_backend(backend):
        assert_contract(call, None, p.dtype, rounded_to=p.dtype)


@given(p=problems())
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "dense"])
def test_another_format_against_float64(device, poisoned, fused, format, p):
    """What W is in; all else is to the bits as with the dense weight."""
    t = p.tensors(device)
    stored = FORMATS[format](t.weight.to(p.dtype))
    dense = operands.as_dense(stored)

    def outputs(layer, weight, cast):
        leaves = {
            "x": p.lay_out(cast(t.x)).detach().requires_grad_(),
            "lora_A": cast(t.lora_A, p.adapter_dtype).detach().requires_grad_(),
            "lora_B": cast(t.lora_B, p.adapter_dtype).detach().requires_grad_(),
        }
        more = {"dropout_p": p.dropout_p, "seed": t.seed}
        y = layer(
            leaves["x"], weight, leaves["lora_A"], leaves["lora_B"], 0.5, cast(t.bias), **more
        )
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), cast(t.dy))

    def y_and_dx(run, cast):
        if run is reference:
            return outputs(reference.lora_linear, cast(dense), cast)[:2]
        return outputs(lorafast.ops.lora_linear, stored, cast)[:2]

    def cast(tensor, dtype=p.dtype):
        return tensor.to(dtype)

    with lorafast.use_backend("aten"):
        assert_contract(y_and_dx, None, p.dtype)
        found = outputs(lorafast.ops.lora_linear, stored, cast)[2:]
        expected = outputs(lorafast.ops.lora_linear, dense, cast)[2:]
    for name, one, two in zip(("dA", "dB"), found, expected, strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mask_is_that_of_the_reference_forward_and_backward(fused, device, backend, dtype):
    """With W = 0 and A, B of ones, an element of dx is not zero where x was kept, and only there."""
    skip_unless_usable(backend)
    M, K, p = 37, 150, 0.4
    seed = torch.tensor([987654321], device=device)
    keep = reference.keep_mask(M, K, p, seed)
    x = torch.eye(M, K, device=device, dtype=dtype).requires_grad_()
    weight = torch.zeros((1, K), device=device, dtype=dtype)
    lora_A = torch.ones((1, K), device=device, dtype=dtype, requires_grad=True)
    lora_B = torch.ones((1, 1), device=device, dtype=dtype)
    with lorafast.use_backend(backend):
        y = lorafast.ops.lora_linear(x, weight, lora_A, lora_B, 1.0, None, p, seed)
        dx, dA = torch.autograd.grad(y.sum(), (x, lora_A))
    assert torch.equal(y[:, 0] != 0, keep.diagonal())
    assert torch.equal(dx != 0, keep)
    assert torch.equal(dA[0, :M] != 0, keep.diagonal())


@pytest.mark.parametrize(
    ("backend", "format"),
    [
        (backend, format)
        for backend in lorafast.backends()
        for format in FORMATS
        if backend != "triton" or format == "dense"
    ],
)
def test_the_bits_are_the_same_whatever_changes(fused, backend, format):
    skip_unless_usable(backend)
    shapes = ((40, 70), (45, 70), (5, 70), (45, 5), (45,))
    t = {n: torch.randn(s).requires_grad_() for n, s in zip(NAMES, shapes, strict=True)}
    t["weight"].requires_grad_(format == "dense")

    def forward_and_backward():
        y = run(t, 0.3, format=format)
        return {"y": y} | gradients(y, t)

    changes = together(MEMORY, ORDER or WORK) if backend == "triton" else MEMORY | WORK
    with lorafast.use_backend(backend):
        assert_same_bits(forward_and_backward, changes)


def test_a_second_backward_over_a_retained_graph_gives_the_same_gradients(path, format):
    names = trainable(path)
    t = draw(torch.float32, grad=names)
    y = run(t, 0.3, format=format)
    dy = torch.randn_like(y)
    kept = dy.clone()
    leaves = [t[name] for name in names]
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    for name, one, two in zip(names, first, second, strict=True):
        assert torch.equal(one, two), name
    assert torch.equal(dy, kept)


@pytest.mark.parametrize(
    ("dtype", "sizes", "with_bias"),
    covering(
        (torch.float32, torch.float16, torch.bfloat16),
        ((1, 1, 1), (1, 64, 64), (3, 7, 5), (100, 384, 1536), (512, 64, 384)),
        (True, False),
    ),
    ids=str,
)
def test_a_fresh_adapter_changes_no_bit(format, dtype, sizes, with_bias):
    M, K, N = sizes
    x, weight, lora_A = (torch.randn(s).to(dtype) for s in ((M, K), (N, K), (4, K)))
    bias = torch.randn(N).to(dtype) if with_bias else None
    W, lora_B = FORMATS[format](weight), torch.zeros((N, 4), dtype=dtype)
    y = lora_linear(x, W, lora_A, lora_B, 2.0, bias)
    frozen = F.linear(x, W, bias) if format == "dense" else quantized_linear(x, W, bias)
    assert torch.equal(y, frozen)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("K", [1, 7])
@pytest.mark.parametrize("r", [1, 9], ids=["r=1", "r>K,N"])
def test_shapes(format, leading, K, r):
    x = torch.randn((*leading, K), dtype=torch.float64, requires_grad=True)
    weight, lora_A, lora_B = (torch.randn(s, dtype=torch.float64) for s in ((5, K), (r, K), (5, r)))
    lora_A.requires_grad_()
    y = lora_linear(x, FORMATS[format](weight), lora_A, lora_B, 0.5)
    dx, dA = torch.autograd.grad(y.sum(), (x, lora_A))
    expected = reference.lora_linear(x, held(format, weight), lora_A, lora_B, 0.5)
    dx_expected, dA_expected = torch.autograd.grad(expected.sum(), (x, lora_A))
    for name, one, two in (
        ("y", y, expected),
        ("dx", dx, dx_expected),
        ("dA", dA, dA_expected),
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=["2-D", "3-D"])
def test_the_output_can_be_changed_in_place(format, dropout_p, leading):
    t = draw(grad=("x", "lora_A", "lora_B"))
    t["x"] = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)
    expected = gradients(2 * run(t, dropout_p, format=format), t)
    found = gradients(run(t, dropout_p, format=format).mul_(2), t)
    for name in ("x", "lora_A", "lora_B"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@pytest.mark.parametrize(("K", "N"), [(0, 3), (3, 0)], ids=["K=0", "N=0"])
def test_layers_without_inputs_or_outputs(path, format, backend, K, N):
    skip_unless_usable(backend)
    if backend == "triton" and format != "dense":
        backend = "auto"
    x = torch.randn(2, 5, K, requires_grad=True)
    weight, lora_A, lora_B = (torch.randn(s) for s in ((N, K), (2, K), (N, 2)))
    lora_A.requires_grad_()
    lora_B.requires_grad_()
    with lorafast.use_backend(backend):
        y = lora_linear(x, FORMATS[format](weight), lora_A, lora_B, 0.5)
        gradients_found = torch.autograd.grad(y.sum(), (x, lora_A, lora_B))
    assert torch.equal(y, torch.zeros(2, 5, N))
    assert not any(gradient.any() for gradient in gradients_found)


def test_non_contiguous_x_of_many_dimensions(format):
    t = draw()
    x = torch.randn(6, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    found = run(t | {"x": x}, format=format)
    expected = run(t | {"x": x.contiguous()}, format=format)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def saved_for_backward(function):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


def pointers(tensors):
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_saved_are_x_and_s_and_the_parameters(monkeypatch, fused, format, dropout_p):
    t = draw(torch.float32, grad=("x", "lora_A", "lora_B"))
    weight = FORMATS[format](t["weight"])
    monkeypatch.setitem(FORMATS, format, lambda _: weight)
    saved = saved_for_backward(lambda: run(t, dropout_p, format=format))
    own = pointers([*t.values(), *operands.stored(weight)])
    others = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert t["x"].data_ptr() in pointers(saved)
    assert sorted(tensor.numel() for tensor in others) == sorted([3 * 2] + [1] * bool(dropout_p))


def test_x_and_W_are_not_saved_for_a_frozen_A(path, format):
    t = draw(torch.float32, grad=("lora_B",))
    saved = saved_for_backward(lambda: run(t, format=format))
    if path == "small":
        assert not {t["x"].data_ptr(), t["weight"].data_ptr()} & pointers(saved)
    else:
        assert [tensor.shape for tensor in saved] == [(3, 2)]


def test_bf16_layer_with_fp32_adapter_makes_no_fp32_copy_of_x(format):
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((64, 48), (40, 48), (40,)))
    x.requires_grad_()
    lora_A, lora_B = torch.randn(4, 48, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    y = []
    weight = FORMATS[format](weight)
    saved = saved_for_backward(lambda: y.append(lora_linear(x, weight, lora_A, lora_B, 0.5, bias)))
    assert y[0].dtype == torch.bfloat16
    assert x.data_ptr() in pointers(saved)
    assert not any(s.dtype == torch.float32 and s.numel() >= x.numel() for s in saved)
    dx, dA, dB = torch.autograd.grad(y[0].sum(), (x, lora_A, lora_B))
    assert (dx.dtype, dA.dtype, dB.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_autocast_casts_as_linear_does(path, format):
    t = draw(torch.float32, grad=trainable(path))
    low = {name: t[name].bfloat16() for name in ("x", "bias")}
    low["weight"] = FORMATS[format](t["weight"]).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(t, 0.3, format=format)
        assert y.dtype == F.linear(t["x"], t["weight"], t["bias"]).dtype
    cast = run(t | low, 0.3)
    assert torch.equal(y, cast)
    expected = gradients(cast, t)
    for name, gradient in gradients(y, t).items():
        assert gradient.dtype == torch.float32, name
        assert torch.equal(gradient, expected[name]), name


def test_autocast_leaves_float64_alone(format):
    t = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(t, format=format).dtype == torch.float64


@pytest.mark.parametrize("path", [p for p in PATHS if p != "small"], indirect=True)
def test_backward_inside_autocast_stays_in_the_dtype_of_the_forward(path, format):
    t = draw(torch.float32, grad=trainable(path))
    expected = gradients(run(t, format=format), t)
    y = run(t, format=format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(y, t)
    for name in trainable(path):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing_draws_the_same_mask_again(path, format, use_reentrant):
    names = trainable(path)
    t = draw(grad=names)
    expected = gradients(run(t, 0.5, seed=3, format=format), t)
    weight = FORMATS[format](t["weight"])
    torch.manual_seed(3)
    y = checkpoint(
        lambda *tensors: lora_linear(*tensors[:4], 0.5, tensors[4], dropout_p=0.5),
        *(weight if name == "weight" else t[name] for name in NAMES),
        use_reentrant=use_reentrant,
    )
    if use_reentrant:
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        y.backward(dy)
        found = {name: t[name].grad for name in names}
    else:
        found = gradients(y, t)
    for name in names:
        assert torch.equal(found[name], expected[name]), name


def test_manual_seed_fixes_the_mask_and_calls_differ(format):
    t = draw()
    first, again, other = (run(t, 0.5, seed=seed, format=format) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_same_tensor_as_two_arguments(format):
    square = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    weight = FORMATS[format](torch.randn(4, 4, dtype=torch.float64))

    def function(square):
        return lora_linear(square, weight, square, square, 0.5)

    assert torch.autograd.gradcheck(function, square)


TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(lambda A: f(A).sum())(t["lora_A"]),
    "jacrev": lambda f, t: torch.func.jacrev(f)(t["lora_A"]),
    "jacfwd": lambda f, t: torch.func.jacfwd(f)(t["lora_A"]),
    "vmap": lambda f, t: torch.func.vmap(f)(torch.stack([t["lora_A"], 2 * t["lora_A"]])),
    "jvp": lambda f, t: torch.func.jvp(f, (t["lora_A"],), (t["lora_A"],))[1],
    "hessian": lambda f, t: torch.func.hessian(lambda A: f(A).square().sum())(t["lora_A"]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(format, transform):
    t = draw()
    weight = FORMATS[format](t["weight"])

    def layer(lora_A):
        return lora_linear(t["x"], weight, lora_A, t["lora_B"], 0.5, t["bias"])

    def formula(lora_A):
        W = operands.as_dense(weight) + 0.5 * t["lora_B"] @ lora_A
        return F.linear(t["x"], W, t["bias"])

    torch.testing.assert_close(transform(layer, t), transform(formula, t), rtol=1e-10, atol=1e-10)


def test_torch_func_on_a_forced_backend_is_refused():
    t = draw()
    with (
        lorafast.use_backend("aten"),
        pytest.raises(lorafast.BackendError, match=r"torch\.func transforms need operations"),
    ):
        torch.func.grad(lambda A: run(t | {"lora_A": A}).sum())(t["lora_A"])


def bad(**changes):
    return draw(torch.float32) | changes


REFUSALS = {
    "x-width": (bad(x=torch.randn(3, 7)), "x has shape [3, 7], expected [..., 6]"),
    "x-scalar": (bad(x=torch.tensor(1.0)), "x has shape [], expected [..., 6]"),
    "x-integer": (bad(x=torch.ones(3, 6, dtype=torch.int64)), "x is torch.int64, expected float16"),
    "x-dtype": (bad(x=torch.randn(3, 6).half()), "weight is torch.float32, expected torch.float16"),
    "weight-integer": (bad(weight=torch.ones(5, 6, dtype=torch.int8)), "weight is torch.int8"),
    "weight-1d": (
        bad(weight=torch.randn(6)),
        "weight has shape [6], expected [out_features, in_features]",
    ),
    "A-width": (bad(lora_A=torch.randn(2, 5)), "lora_A has shape [2, 5], expected [r, 6]"),
    "x-list": (bad(x=[[1.0] * 6]), "x is a list, expected a tensor"),
    "A-list": (bad(lora_A=[[1.0]]), "lora_A is a list, expected a tensor"),
    "r=0": (
        bad(lora_A=torch.randn(0, 6), lora_B=torch.randn(5, 0)),
        "the rank r is 0, expected at least 1",
    ),
    "B-rank": (bad(lora_B=torch.randn(5, 3)), "lora_B has shape [5, 3], expected [5, 2]"),
    "B-dtype": (bad(lora_B=torch.randn(5, 2).half()), "lora_B is torch.float16, expected"),
    "bias-length": (bad(bias=torch.randn(1)), "bias has shape [1], expected [5]"),
    "bias-dtype": (bad(bias=torch.randn(5).half()), "bias is torch.float16, expected"),
    "device": (bad(weight=torch.randn(5, 6, device="meta")), "weight is on meta, expected cpu"),
    "device-B": (bad(lora_B=torch.randn(5, 2, device="meta")), "lora_B is on meta, expected cpu"),
}


@pytest.mark.parametrize(("tensors", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(tensors, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        run(tensors)


def test_refusal_under_autocast():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="weight is a list, expected a tensor"),
    ):
        run(bad(weight=[1.0]))


@pytest.mark.parametrize("dropout_p", [-0.1, 1.5, float("nan")])
def test_dropout_that_is_no_probability_is_refused(dropout_p):
    with pytest.raises(ValueError, match="dropout_p is"):
        run(bad(), dropout_p)


def test_dropout_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="dropout_p is a NoneType, expected a number"):
        run(bad(), None)


def test_scaling_that_is_no_number_is_refused():
    t = bad()
    with pytest.raises(TypeError, match="scaling is a Tensor, expected a number"):
        lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], torch.tensor(1.0))


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(fused, format):
    t = draw(grad=("x", "lora_A", "lora_B"))
    weight = FORMATS[format](t["weight"])
    for dropout_p, seed in ((0.0, None), (0.25, torch.tensor([3]))):
        torch.library.opcheck(
            torch.ops.lorafast.lora_linear.default,
            (
                t["x"],
                operands.stored(weight),
                operands.describe(weight),
                t["lora_A"],
                t["lora_B"],
                0.5,
                t["bias"],
                dropout_p,
                seed,
            ),
        )
