"""What surrounds a call: modes that keep what operations return, forward mode, transforms, FLOP counts.

Each at sizes on both sides of where the fused formula begins, for there the paths differ, and with
weights that are not stored dense, which have one path at all sizes.
"""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from toy_formats import FORMATS, held

import lorafast
from lorafast import operands, ops, reference
from lorafast.core.context import watched
from lorafast.functional import lora_linear
from lorafast.nn import LoRALinear
from lorafast.reference import contract

pytestmark = pytest.mark.usefixtures("toy_formats")

ROWS = pytest.mark.parametrize("rows", [4, 300])
CASES = pytest.mark.parametrize(
    ("rows", "format"),
    [(4, "dense"), (300, "dense"), *((4, name) for name in FORMATS if name != "dense")],
)
SCALING = 0.5


def draw(rows, dtype=torch.float32, format="dense"):
    """x, W as the format holds it, A, B, bias; all but W and bias require gradients."""
    sizes = ((rows, 256), (240, 256), (8, 256), (240, 8), (240,))
    x, W, A, B, bias = (torch.randn(size).to(dtype) for size in sizes)
    W = held(format, W)
    return x.requires_grad_(), W, A.requires_grad_(), B.requires_grad_(), bias


def layer(x, W, A, B, bias=None, format="dense", **more):
    return lora_linear(x, FORMATS[format](W), A, B, SCALING, bias, **more)


def plain(x, W, A, B, bias=None):
    """The same by PyTorch's own calls."""
    return F.linear(x, W, bias) + SCALING * F.linear(F.linear(x, A), B)


def gradients(y, *leaves):
    return torch.autograd.grad(y.float().square().sum(), leaves)


POLICIES = {
    "mm": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    "mm, linear": [torch.ops.aten.mm.default, torch.ops.aten.linear.default],
    "the layer": [torch.ops.lorafast.lora_linear.default],
}


@pytest.mark.parametrize("kept", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "rows", "format"),
    [
        (torch.float32, 4, "dense"),
        (torch.float32, 300, "dense"),
        (torch.bfloat16, 300, "dense"),
        (torch.float32, 4, "negative"),
        (torch.bfloat16, 300, "scaled"),
    ],
    ids=["fp32-4", "fp32-300", "bf16-300", "negative", "scaled"],
)
def test_selective_checkpointing_changes_no_gradient(dtype, rows, format, dropout, kept):
    linear = nn.Linear(256, 240, dtype=dtype)
    if format == "dense":
        adapted = LoRALinear.from_linear(linear, 8, dropout=dropout)
    else:
        weight = FORMATS[format](linear.weight.detach())
        adapted = LoRALinear.from_operand(weight, 8, bias=linear.bias, dropout=dropout)
    nn.init.normal_(adapted.lora_B, std=0.1)
    context = functools.partial(create_selective_checkpoint_contexts, kept)
    results = []
    for selective in (False, True):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, rows * 256).sin().view(rows, 256).to(dtype).requires_grad_()
        run = functools.partial(checkpoint, adapted, use_reentrant=False, context_fn=context)
        y = run(x) if selective else adapted(x)
        before = y.detach().clone()
        found = gradients(y, x, adapted.lora_A, adapted.lora_B)
        assert torch.equal(y.detach(), before)
        results.append(found)
    for name, expected, found in zip(("x", "lora_A", "lora_B"), *results, strict=True):
        # Small layers: another order of the same sums.
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < torch.finfo(dtype).eps, name


class _KeepsAll(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kept += [(t, t.clone()) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


class _KeepsAllCalls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        with torch.no_grad():
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.kept += [(t, t.detach().clone()) for t in tensors]
        return out


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [_KeepsAll, _KeepsAllCalls])
@pytest.mark.parametrize("where", ["inference", "forward", "backward", "both"])
def test_what_a_mode_has_kept_stays_what_it_was(mode, dtype, rows, format, where):
    x, W, A, B, bias = draw(rows, dtype, format)
    inside = mode()
    with torch.set_grad_enabled(where != "inference"):
        with contextlib.nullcontext() if where == "backward" else inside:
            y = layer(x, W, A, B, bias, format)
        if where in ("backward", "both"):
            with inside:
                gradients(y, x, A, B)
    assert inside.kept
    for tensor, copy in inside.kept:
        assert torch.equal(tensor, copy)


def test_a_default_device_is_no_mode_that_keeps_anything():
    with torch.device("cpu"):
        assert not watched()
        with _KeepsAllCalls():
            assert watched()


@CASES
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_mode_in_the_backward_gets_the_gradients_of_the_forwards_backend(rows, format, dropout_p):
    x, W, A, B, bias = draw(rows, format=format)
    found = []
    for mode in (_KeepsAll(), None):
        torch.manual_seed(2)
        with lorafast.use_backend("reference"):
            y = layer(x, W, A, B, bias, format, dropout_p=dropout_p)
        if mode is None:
            found.append(gradients(y, x, A, B))
        else:
            with mode:
                found.append(gradients(y, x, A, B))
    for name, one, two in zip(("x", "lora_A", "lora_B"), *found, strict=True):
        assert torch.equal(one, two), name


# ----- forward mode


def tangent_of(function, values, tangents):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


@CASES
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("wanted", ["x", "A", "B", "xAB"])
def test_forward_mode(rows, format, grad, wanted):
    x, W, A, B, bias = draw(rows, torch.float64, format)
    tangents = [
        torch.randn_like(t) if name in wanted else torch.zeros_like(t)
        for name, t in zip("xAB", (x, A, B), strict=True)
    ]
    with torch.set_grad_enabled(grad):
        found, expected = (
            tangent_of(lambda x, A, B, f=f: f(x, W, A, B, bias), (x, A, B), tangents)
            for f in (functools.partial(layer, format=format), plain)
        )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@CASES
def test_forward_mode_with_dropout_has_the_mask_of_the_forward(rows, format):
    x, W, A, B, _ = draw(rows, torch.float64, format)
    t = torch.randn_like(x)

    def dropped(x):
        torch.manual_seed(3)
        return layer(x, W, A, B, format=format, dropout_p=0.4)

    # Linear in x, so the tangent is the layer on the tangent.
    with torch.no_grad():
        torch.testing.assert_close(tangent_of(dropped, (x,), (t,)), dropped(t))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_through_each_operation(format, grad):
    x, W, A, B, bias = draw(5, torch.float64, format)
    s, dy = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 240, dtype=torch.float64)
    calls = {
        "shrink": ((x, A), lambda run, x, A: run.shrink(x, A)),
        "linear_expand": (
            (s, B),
            lambda run, s, B: run.linear_expand(
                x, W if run is reference else FORMATS[format](W), s, B, SCALING, bias
            ),
        ),
        "expand_backward": (
            (dy, s),
            lambda run, dy, s: torch.cat([t.flatten() for t in run.expand_backward(dy, s, B, 2.0)]),
        ),
        "shrink_backward": ((s, x), lambda run, ds, x: run.shrink_backward(ds, x)),
    }
    with torch.set_grad_enabled(grad):
        for name, (values, call) in calls.items():
            tangents = [torch.randn_like(v) for v in values]
            found, expected = (
                tangent_of(functools.partial(call, run), values, tangents)
                for run in (ops, reference)
            )
            torch.testing.assert_close(found, expected, msg=name)


def test_the_bare_operation_loses_no_tangent_without_a_word():
    x, W, A, B, _ = draw(300)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        tangent_of(
            lambda x: torch.ops.lorafast.lora_linear(x, [W], "dense", A, B, SCALING)[0],
            (x,),
            (x.clone(),),
        )


@CASES
@pytest.mark.parametrize("how", ["dual level", "torch.func"])
def test_forward_mode_that_begins_after_the_forward(rows, format, how):
    """The tangent of a gradient: a Hessian-vector product."""
    x, W, A, B, bias = draw(rows, torch.float64, format)
    v, t = torch.randn(2, rows, 240, dtype=torch.float64)
    found = []
    for run in (functools.partial(layer, format=format), plain):
        y = run(x, W, A, B, bias)

        def pull(v, y=y):
            return torch.autograd.grad(y, (x, A, B), v, retain_graph=True)

        if how == "torch.func":
            found.append(torch.func.jvp(pull, (v,), (t,))[1])
        else:
            with forward_ad.dual_level():
                duals = pull(forward_ad.make_dual(v, t))
                found.append(tuple(forward_ad.unpack_dual(dual).tangent for dual in duals))
    for name, one, two in zip(("dx", "dA", "dB"), *found, strict=True):
        torch.testing.assert_close(one, two, msg=name)


@CASES
def test_a_batch_of_gradients_by_vmap(rows, format):
    leaves, several = draw(rows, format=format), torch.randn(3, rows, 240)
    found = []
    ours = functools.partial(layer, format=format)
    for run, dtype in ((ours, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        x, W, A, B, bias = (t.to(dtype) for t in leaves)
        y = run(x, W, A, B, bias)
        pull = functools.partial(torch.autograd.grad, y, (x, A, B), retain_graph=True)
        found.append(torch.vmap(pull)(several.to(dtype)))
    for name, actual, eager, ref64 in zip(("dx", "dA", "dB"), *found, strict=True):
        reason = contract.why_broken(actual, eager, ref64)
        assert reason is None, f"{name} is {reason}"


def test_forward_mode_after_the_forward_of_a_forced_backend_is_refused():
    x, W, A, B, _ = draw(300)
    with lorafast.use_backend("aten"):
        y = layer(x, W, A, B)
    with (
        forward_ad.dual_level(),
        pytest.raises(lorafast.BackendError, match="forward-mode derivatives need"),
    ):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_transforms_ask_again_which_backend_is_forced():
    torch._dynamo.reset()
    x, W, A, B, _ = (t.detach() for t in draw(4))
    derivative = torch.compile(
        lambda A: torch.func.grad(lambda A: layer(x, W, A, B).sum())(A), backend="aot_eager"
    )
    derivative(A)
    with (
        lorafast.use_backend("aten"),
        pytest.raises(Exception, match=r"torch\.func transforms need"),
    ):
        derivative(A)


@ROWS
def test_forward_mode_on_a_forced_backend_is_refused(rows):
    x, W, A, B, _ = draw(rows)
    with (
        lorafast.use_backend("aten"),
        pytest.raises(lorafast.BackendError, match="forward-mode derivatives need"),
    ):
        tangent_of(lambda x: layer(x, W, A, B), (x,), (torch.ones_like(x),))


# ----- transforms under torch.compile

TRANSFORMS = {
    "jvp": lambda f, x, A: torch.func.jvp(f, (x, A), (x.cos(), A.cos()))[1],
    "linearize": lambda f, x, A: torch.func.linearize(f, x, A)[1](x.cos(), A.cos()),
    "jacfwd": lambda f, x, A: torch.func.jacfwd(f)(x[:2], A),
    "grad": lambda f, x, A: torch.func.grad(lambda A: f(x, A).square().sum())(A),
    "vjp": lambda f, x, A: torch.func.vjp(lambda A: f(x, A), A)[1](f(x, A).sin())[0],
    "hessian": lambda f, x, A: torch.func.hessian(lambda A: f(x[:1], A).square().sum())(A[:, :9]),
    "per sample": lambda f, x, A: torch.func.vmap(
        torch.func.grad(lambda A, row: f(row, A).square().sum()), (None, 0)
    )(A, x[:6]),
    "forward-mode jacobian": lambda f, x, A: torch.autograd.functional.jacobian(
        lambda A: f(x[:2], A), A, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize(
    ("compiled", "rows", "format"),
    [
        *((compiled, 4, "dense") for compiled in (False, True)),
        (False, 300, "dense"),
        pytest.param(True, 300, "dense", marks=pytest.mark.slow),
        *((False, 4, name) for name in FORMATS if name != "dense"),
        pytest.param(True, 4, "scaled", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform, compiled, rows, format):
    torch._dynamo.reset()
    sizes = ((rows, 9), (240, 9), (3, 9), (240, 3))
    x, W, A, B = (torch.randn(size, dtype=torch.float64) for size in sizes)
    W = held(format, W)

    def go(x, A):
        return transform(lambda x, A: layer(x, W, A, B, format=format), x, A)

    found = (torch.compile(go, backend="aot_eager") if compiled else go)(x, A)
    torch.testing.assert_close(found, transform(lambda x, A: plain(x, W, A, B), x, A))


# ----- second derivatives and what may change before a backward


@pytest.mark.parametrize("format", FORMATS)
def test_second_derivative_of_the_registered_operation_without_a_bias(format):
    x, W, A, B = (t[:6].detach() for t in draw(6, torch.float64)[:4])
    A, B = A[:, :5].contiguous().requires_grad_(), B[:, :6].contiguous().requires_grad_()
    x, W = x[:, :5].contiguous().requires_grad_(), W[:, :5].contiguous()

    weight = FORMATS[format](W)
    stored, description = operands.stored(weight), operands.describe(weight)

    def registered(x, A, B):
        return torch.ops.lorafast.lora_linear(x, stored, description, A, B, SCALING)[0]

    assert torch.autograd.gradgradcheck(registered, (x, A, B))


NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
NEEDED = {"x": {"lora_A", "weight"}, "weight": {"x"}, "lora_A": {"x"}, "lora_B": {"x", "lora_A"}}


@ROWS
@pytest.mark.parametrize("changed", NAMES)
def test_what_no_needed_gradient_takes_may_change_before_the_backward(rows, changed):
    for wanted in itertools.chain.from_iterable(
        itertools.combinations(NAMES, n) for n in (1, 2, 3)
    ):
        t = dict(zip(NAMES, (v.detach().double() for v in draw(rows)), strict=True))
        for name in wanted:
            t[name].requires_grad_()
        expected = torch.autograd.grad(
            plain(*t.values()).sum(), [t[n] for n in wanted], retain_graph=False
        )
        y = layer(*t.values())
        with torch.no_grad():
            t[changed].mul_(2)
        if NEEDED.get(changed, set()) & set(wanted):
            with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
                torch.autograd.grad(y.sum(), [t[n] for n in wanted])
            continue
        found = torch.autograd.grad(y.sum(), [t[n] for n in wanted])
        for name, one, two in zip(wanted, found, expected, strict=True):
            torch.testing.assert_close(one, two, msg=f"{name} of {wanted}")


def test_an_input_changed_in_place_is_named_with_what_to_write_instead():
    x, W, A, B, _ = draw(300)
    x = x * 1
    y = layer(x, W, A, B, dropout_p=0.1)
    x += 1
    with pytest.raises(RuntimeError, match=r"write x = x \+ layer\(x\)"):
        y.sum().backward()


# ----- FLOPs


@CASES
@pytest.mark.parametrize("wanted", ["xAB", "AB", "xB", "x", "B"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_flops_are_those_of_plain_pytorch(rows, format, wanted, dropout_p):
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    for run in (plain, functools.partial(layer, format=format, dropout_p=dropout_p)):
        x, W, A, B, bias = draw(rows, format=format)
        for name, tensor in zip("xAB", (x, A, B), strict=True):
            tensor.requires_grad_(name in wanted)
        with FlopCounterMode(display=False) as counter:
            run(x, W, A, B, bias).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("format", FORMATS)
def test_flops_of_each_operation(format):
    from torch.utils.flop_counter import FlopCounterMode

    x, W, A, B, _ = (t.detach() for t in draw(7, format=format))
    s, dy = x.new_ones(7, 8), x.new_ones(7, 240)
    calls = [
        lambda run: run.shrink(x, A),
        lambda run: run.linear_expand(
            x, W if run is reference else FORMATS[format](W), s, B, SCALING
        ),
        lambda run: run.expand_backward(dy, s, B, SCALING),
        lambda run: run.shrink_backward(s, x),
    ]
    for call in calls:
        counted = []
        for run in (reference, ops):
            with FlopCounterMode(display=False) as counter:
                call(run)
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0
