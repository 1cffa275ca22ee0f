"""A frozen layer with a vector, (IA)³: against the contract, as autograd has it, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lorafast import operands, ops, reference
from lorafast.backends import registry
from lorafast.backends.forced import use_backend
from lorafast.core.errors import BackendError
from lorafast.ops.scaled import scaled
from lorafast.reference import contract

BACKENDS = ["reference", "aten", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
sides = pytest.mark.parametrize("scales_input", [False, True], ids=["y", "x"])
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def forced(backend, request):
    """The backend, forced; skipped where this machine can't use it."""
    reason = registry.get(backend).why_unusable()
    if reason is not None:
        pytest.skip(reason)
    with use_backend(backend):
        yield backend


def drawn(M=37, K=40, N=24, *, bias=True, scales_input=False, seed=0):
    """Arguments by name, in float64; the vector has zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": (M, K), "weight": (N, K), "scale": (K if scales_input else N,), "bias": (N,)}
    found = {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in sizes.items()
        if bias or name != "bias"
    }
    found["scale"][::5] = 0.0
    return found


def results(function, tensors, cast, scales_input):
    """``y``, ``dx`` and ``dscale`` by name."""
    given = {name: cast(name, t).detach() for name, t in tensors.items()}
    leaves = {name: given[name].requires_grad_() for name in ("x", "scale")}
    y = function(**given, scales_input=scales_input)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).sin() * 3
    y.backward(cast("dy", dy.to(y.device)))
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def hold_to_contract(tensors, dtype, scale_dtype, scales_input):
    def cast(name, tensor):
        return tensor.to(scale_dtype if name == "scale" else dtype)

    def wide(name, tensor):
        return cast(name, tensor).double()

    found = results(ops.scaled_linear, tensors, cast, scales_input)
    eager = results(reference.scaled_linear, tensors, cast, scales_input)
    if dtype is torch.float64:  # that of the yardstick
        torch.testing.assert_close(found, eager)
        return
    exact = results(reference.scaled_linear, tensors, wide, scales_input)
    reason = contract.why_any_broken(found, contract.bounds(eager, exact, dtype=dtype))
    assert reason is None, reason


@backends
@sides
@pytest.mark.parametrize("scale_dtype", [torch.float32, None], ids=["float32", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_y_and_every_gradient(poisoned, forced, dtype, scale_dtype, scales_input):
    if forced == "triton" and dtype is torch.float64:
        pytest.skip("the kernels have no float64")
    tensors = drawn(scales_input=scales_input)
    hold_to_contract(tensors, dtype, scale_dtype or dtype, scales_input)


@backends
@sides
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 7, 11), (90, 33, 70), (5, 16, 8)], ids=str)
def test_odd_sizes(poisoned, forced, size, bias, scales_input):
    tensors = drawn(*size, bias=bias, scales_input=scales_input)
    hold_to_contract(tensors, torch.float32, torch.float32, scales_input)


@backends
@sides
def test_no_rows(forced, scales_input):
    tensors = drawn(0, scales_input=scales_input)
    found = results(ops.scaled_linear, tensors, lambda _, t: t.float(), scales_input)
    assert found["y"].shape == (0, 24)
    assert found["dx"].shape == (0, 40)
    assert not found["dscale"].any()


@backends
@sides
@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 4, 40)], ids=str)
def test_any_leading_dimensions_and_strides(forced, shape, scales_input):
    tensors = {name: t.float() for name, t in drawn(scales_input=scales_input).items()}
    tensors["scale"].requires_grad_()
    wide = torch.randn(*shape[:-1], 80)[..., ::2].requires_grad_()
    y = ops.scaled_linear(**{**tensors, "x": wide}, scales_input=scales_input)
    assert y.shape == (*shape[:-1], 24)
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, (wide, tensors["scale"]), dy)
    right = reference.scaled_linear(**{**tensors, "x": wide}, scales_input=scales_input)
    torch.testing.assert_close(y, right)
    expected = torch.autograd.grad(right, (wide, tensors["scale"]), dy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@backends
@sides
@pytest.mark.parametrize("name", ["x", "scale"])
def test_each_may_be_the_only_one_with_a_gradient(poisoned, forced, name, scales_input):
    tensors = {key: t.float() for key, t in drawn(scales_input=scales_input).items()}
    tensors[name].requires_grad_()
    found, right = (
        torch.autograd.grad(f(**tensors, scales_input=scales_input).square().sum(), tensors[name])[
            0
        ]
        for f in (ops.scaled_linear, reference.scaled_linear)
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@backends
@sides
@pytest.mark.parametrize("trained", ["x", "scale", "both"])
def test_what_is_kept(forced, trained, scales_input):
    """z for dl where y is scaled, else x; no matrix at all for dx alone."""
    tensors = {key: t.float() for key, t in drawn(scales_input=scales_input).items()}
    for name in ("x", "scale") if trained == "both" else (trained,):
        tensors[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.scaled_linear(**tensors, scales_input=scales_input)
    given = {t.data_ptr() for t in tensors.values()}
    new = [tuple(t.shape) for t in kept if t.data_ptr() not in given]
    assert new == ([] if scales_input or trained == "x" else [(37, 24)])
    of_x = [t for t in kept if t.data_ptr() == tensors["x"].data_ptr()]
    assert bool(of_x) == (scales_input and trained != "x")


@pytest.mark.parametrize("backend", ["reference", "aten"])
@sides
def test_gradcheck(forced, scales_input):
    tensors = drawn(4, 3, 5, scales_input=scales_input)
    inputs = [tensors[name].requires_grad_() for name in ("x", "scale")]

    def call(x, scale):
        return ops.scaled_linear(x, tensors["weight"], scale, tensors["bias"], scales_input)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", ["reference", "aten"])
@sides
@pytest.mark.parametrize("name", ["x", "scale"])
def test_a_second_derivative_of_each_alone(forced, name, scales_input):
    tensors = drawn(4, 3, 5, scales_input=scales_input)
    leaf = tensors[name].requires_grad_()
    dy = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def second(function):
        y = function(**tensors, scales_input=scales_input)
        (first,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
        return torch.autograd.grad(first.square().sum(), dy)

    torch.testing.assert_close(second(ops.scaled_linear), second(reference.scaled_linear))


@sides
def test_transforms_are_pytorchs(scales_input):
    tensors = drawn(scales_input=scales_input)
    names = tuple(tensors)
    given = tuple(tensors.values())
    tangents = tuple(torch.ones_like(t) for t in given)

    def call(function):
        return lambda *t: function(**dict(zip(names, t, strict=True)), scales_input=scales_input)

    found, right = (
        torch.func.jvp(call(f), given, tangents)
        for f in (ops.scaled_linear, reference.scaled_linear)
    )
    torch.testing.assert_close(found, right)
    with use_backend("aten"), pytest.raises(BackendError, match="can't serve scaled_linear"):
        torch.func.jvp(call(ops.scaled_linear), given, tangents)


@pytest.mark.parametrize("backend", ["aten"])
@sides
def test_batched_gradients(forced, scales_input):
    tensors = drawn(scales_input=scales_input)
    leaves = [tensors[name].requires_grad_() for name in ("x", "scale")]
    seeds = torch.randn(3, 37, 24, dtype=torch.float64)
    found, right = (
        torch.autograd.grad(
            f(**tensors, scales_input=scales_input), leaves, seeds, is_grads_batched=True
        )
        for f in (ops.scaled_linear, reference.scaled_linear)
    )
    torch.testing.assert_close(found, right)


@backends
@sides
def test_compiled_and_watched(forced, scales_input):
    """The registered operation, forward and backward; a counter of FLOPs sees both."""
    tensors = {key: t.float() for key, t in drawn(scales_input=scales_input).items()}
    leaves = [tensors[name].requires_grad_() for name in ("x", "scale")]

    def call(x, scale):
        return ops.scaled_linear(x, tensors["weight"], scale, tensors["bias"], scales_input)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, right = (torch.autograd.grad(f(*leaves).sin().sum(), leaves) for f in (compiled, call))
    torch.testing.assert_close(found, right)
    with FlopCounterMode(display=False) as counter:
        call(*leaves).sum().backward()
    assert counter.get_total_flops() == 4 * 37 * 40 * 24


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
@sides
def test_opcheck(scales_input, keep):
    if scales_input and keep:
        pytest.skip("z is kept where y is scaled")
    tensors = {key: t.float() for key, t in drawn(scales_input=scales_input).items()}
    x, scale = tensors["x"].requires_grad_(), tensors["scale"].requires_grad_(keep or scales_input)
    arguments = (x, tensors["weight"], scale, tensors["bias"], scales_input, keep)
    torch.library.opcheck(torch.ops.lorafast.scaled_linear.default, arguments)


@sides
def test_what_is_left_to_pytorchs_calls(scales_input):
    """A trained W or bias, autocast, a quantized W: the same formula, differentiated by PyTorch."""
    tensors = {key: t.float() for key, t in drawn(scales_input=scales_input).items()}
    for t in tensors.values():
        t.requires_grad_()
    found, right = (
        torch.autograd.grad(
            f(**tensors, scales_input=scales_input).sin().sum(), list(tensors.values())
        )
        for f in (ops.scaled_linear, reference.scaled_linear)
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.scaled_linear(**tensors, scales_input=scales_input).dtype is torch.bfloat16
    x, weight, scale, bias = (tensors[n].detach() for n in ("x", "weight", "scale", "bias"))
    int8 = operands.quantize(weight, "int8")
    y = ops.scaled_linear(x, int8, scale, bias, scales_input)
    right = reference.scaled_linear(x, operands.as_dense(int8), scale, bias, scales_input)
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)


def test_a_cpu_has_pytorchs_own_graph():
    """Nothing is fused there, and an autograd.Function takes the host longer."""
    tensors = {key: t.float() for key, t in drawn().items()}
    tensors["scale"].requires_grad_()
    assert type(ops.scaled_linear(**tensors).grad_fn).__name__ == "MulBackward0"
    with use_backend("aten"):
        assert type(ops.scaled_linear(**tensors).grad_fn).__name__ == "_ScaledLinearBackward"
    with use_backend("cpu"):  # which has no such operation
        right = scaled(F.linear(tensors["x"], tensors["weight"], tensors["bias"]), tensors["scale"])
        torch.testing.assert_close(ops.scaled_linear(**tensors), right)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("scale", torch.randn(40), ValueError, r"scale has shape \[40\], expected \[24\]"),
        ("scale", torch.ones(24, dtype=torch.int64), TypeError, "scale is torch.int64"),
        ("scale", 2.0, TypeError, "scale is a float, expected a tensor"),
        (
            "weight",
            torch.randn(24, 39),
            ValueError,
            r"x has shape \[37, 40\], expected \[..., 39\]",
        ),
        ("bias", torch.randn(23), ValueError, r"bias has shape \[23\], expected \[24\]"),
        ("weight", torch.randn(24, 40).double(), TypeError, "weight is torch.float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_bad_input(name, value, error, match):
    tensors = {key: t.float() for key, t in drawn().items()} | {name: value}
    with pytest.raises(error, match=match):
        ops.scaled_linear(**tensors)
