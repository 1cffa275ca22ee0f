"""Bottleneck adapters: against the contract, as autograd has them, and what is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorafast import functional, ops, reference
from lorafast.backends.forced import use_backend
from lorafast.core.errors import BackendError
from lorafast.core.problem import ACTIVATIONS
from lorafast.reference import contract

NAMES = ("h", "down", "up", "down_bias", "up_bias", "residual")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(M=37, K=24, N=24, b=5, *, biases=True, residual=False):
    """Arguments by name, in float64."""
    sizes = {"h": (M, K), "down": (b, K), "up": (N, b)}
    if biases:
        sizes |= {"down_bias": (b,), "up_bias": (N,)}
    if residual:
        sizes["residual"] = (M, N)
    return {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}


def results(function, tensors, cast, **options):
    """``y`` and the gradient of each argument, by name."""
    leaves = {name: cast(name, t).detach().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves, **options)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).sin() * 3
    y.backward(cast("dy", dy))
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def hold_to_contract(function, tensors, dtype, adapter_dtype=None, **options):
    def cast(name, tensor):
        own = name in ("h", "residual", "dy")
        return tensor.to(dtype if own or adapter_dtype is None else adapter_dtype)

    found = results(function, tensors, cast, **options)
    eager = results(reference.bottleneck, tensors, cast, **options)
    exact = results(reference.bottleneck, tensors, lambda n, t: cast(n, t).double(), **options)
    bounds = contract.bounds(eager, exact, dtype=dtype)
    if dtype is torch.float64:  # that of the yardstick
        torch.testing.assert_close(found, eager)
        return
    reason = contract.why_any_broken(found, bounds)
    assert reason is None, reason


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_y_and_every_gradient(dtype, activation):
    hold_to_contract(functional.bottleneck, drawn(), dtype, activation=activation, scaling=0.7)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_of_another_dtype(dtype, adapter_dtype):
    hold_to_contract(functional.bottleneck, drawn(), dtype, adapter_dtype, scaling=2.0)


@pytest.mark.parametrize(
    ("sizes", "residual"),
    [((1, 1, 1, 1), False), ((3, 7, 7, 11), False), ((9, 8, 13, 3), True), ((9, 16, 8, 4), True)],
    ids=str,
)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
def test_odd_sizes_and_another_residual(sizes, residual, biases):
    tensors = drawn(*sizes, biases=biases, residual=residual)
    hold_to_contract(functional.bottleneck, tensors, torch.float32, scaling=-1.5, activation="silu")


def test_no_rows():
    found = results(functional.bottleneck, drawn(0), lambda _, t: t.float())
    assert found["y"].shape == (0, 24)
    for name in NAMES[1:5]:
        assert not found[f"d{name}"].any()


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (0, 4, 24)], ids=str)
def test_any_leading_dimensions_and_strides(shape):
    tensors = {name: t.float() for name, t in drawn().items()}
    wide = torch.randn(*shape[:-1], 48)[..., ::2]
    y = functional.bottleneck(**{**tensors, "h": wide})
    assert y.shape == shape
    rows = functional.bottleneck(**{**tensors, "h": wide.reshape(-1, 24).contiguous()})
    torch.testing.assert_close(y.reshape(-1, 24), rows)


@pytest.mark.parametrize("name", NAMES)
def test_each_argument_may_be_the_only_one_with_a_gradient(name):
    tensors = {key: t.float() for key, t in drawn(residual=True).items()}
    tensors[name].requires_grad_()
    functional.bottleneck(**tensors).square().sum().backward()
    found, tensors[name].grad = tensors[name].grad, None
    reference.bottleneck(**tensors).square().sum().backward()
    torch.testing.assert_close(found, tensors[name].grad, rtol=1e-4, atol=1e-5)


def test_saved_are_h_and_the_bottleneck_alone():
    tensors = {key: t.float().requires_grad_() for key, t in drawn().items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.bottleneck(**tensors)
    new = [t.shape for t in kept if all(t is not given for given in tensors.values())]
    assert new == [(37, 5)]
    kept.clear()
    frozen = {name: t.detach() for name, t in tensors.items()} | {"h": tensors["h"]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.bottleneck(**frozen)
    assert all(t.shape != (37, 24) for t in kept)  # dh needs no h


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = drawn(4, 3, 5, 2, residual=True)
    tensors["h"] += 0.1
    inputs = [tensors[name].requires_grad_() for name in NAMES]

    def call(*given):
        named = dict(zip(NAMES, given, strict=True))
        return functional.bottleneck(**named, scaling=0.6, activation=activation)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_a_second_derivative_needs_h():
    tensors = drawn()
    tensors["h"].requires_grad_()
    y = functional.bottleneck(**tensors).square().sum()
    with pytest.raises(RuntimeError, match="let down require one"):
        torch.autograd.grad(y, tensors["h"], create_graph=True)


@pytest.mark.parametrize("residual", [False, True], ids=["h", "another"])
def test_transforms_and_batched_gradients_are_the_references(residual):
    tensors = drawn(residual=residual)
    given = tuple(tensors.values())

    def call(function):
        return lambda *t: function(**dict(zip(tensors, t, strict=True)), scaling=0.3)

    tangents = tuple(torch.ones_like(t) for t in given)
    found = torch.func.jvp(call(functional.bottleneck), given, tangents)
    torch.testing.assert_close(found, torch.func.jvp(call(reference.bottleneck), given, tangents))
    leaves = [t.requires_grad_() for t in given]
    seeds = torch.randn(3, 37, 24, dtype=torch.float64)
    batched = [
        torch.autograd.grad(call(f)(*leaves), leaves, seeds, is_grads_batched=True)
        for f in (functional.bottleneck, reference.bottleneck)
    ]
    torch.testing.assert_close(*batched)


def test_batched_gradients_of_more_dimensions():
    t = {name: value.requires_grad_() for name, value in drawn().items()}
    y = functional.bottleneck(**t | {"h": t["h"].unflatten(0, (1, 37))}, scaling=0.3)
    seeds = torch.randn(3, *y.shape, dtype=y.dtype)
    leaves = tuple(t.values())
    batched = torch.autograd.grad(y, leaves, seeds, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(seeds):
        single = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        torch.testing.assert_close(tuple(one[i] for one in batched), single)


def test_autocast_gives_what_pytorch_gives():
    tensors = {name: t.float().requires_grad_() for name, t in drawn().items()}
    low = tensors["h"].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = functional.bottleneck(**tensors)
        lowered = functional.bottleneck(**{**tensors, "h": low})
    assert kept.dtype is torch.float32  # that of the residual
    assert lowered.dtype is torch.bfloat16
    kept.sum().backward()
    assert tensors["down"].grad.dtype is torch.float32
    exact = reference.bottleneck(**tensors)
    assert (kept - exact).norm() < 2**-8 * exact.norm()
    assert (lowered - exact).norm() < 2**-7 * exact.norm()


def test_residuals_under_autocast():
    tensors = {name: t.float() for name, t in drawn(residual=True).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with (
            use_backend("cpu"),
            pytest.raises(BackendError, match=r"residuals of another dtype \("),
        ):
            functional.bottleneck(**tensors)
        with use_backend("reference"):
            assert functional.bottleneck(**tensors).dtype is torch.float32
        for dtype in (torch.bfloat16, torch.float64):
            residual = tensors["residual"].to(dtype)
            assert functional.bottleneck(**tensors | {"residual": residual}).dtype is dtype
        with pytest.raises(TypeError, match="residual is"):
            functional.bottleneck(**tensors | {"residual": 3})
        with pytest.raises(ValueError, match=r"residual has shape \[3, 24\]"):
            functional.bottleneck(**tensors | {"residual": tensors["residual"][:3]})


@pytest.mark.slow
@pytest.mark.parametrize("another", [False, True], ids=["h", "another"])
def test_opcheck(another):
    tensors = drawn(residual=another)
    given = [tensors[n].float().requires_grad_() if n in tensors else None for n in NAMES]
    arguments = (*given[:5], 0.7, "silu", given[5])
    torch.library.opcheck(torch.ops.lorafast.bottleneck.default, arguments)


def test_compiled_it_is_one_call_forward_and_one_backward():
    torch._dynamo.reset()
    graphs = []

    def kept(graph, inputs):
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        functional.bottleneck, fullgraph=True, backend=aot_autograd(fw_compiler=kept)
    )
    tensors = drawn()
    for dtype in (torch.float32, torch.bfloat16):
        hold_to_contract(compiled, tensors, dtype, scaling=0.5)
    library = torch.ops.lorafast
    names = (library.bottleneck.default, library.bottleneck_backward.default)
    assert [[graph.count(name) for name in names] for graph in graphs] == [[1, 0], [0, 1]] * 2


def test_a_mode_sees_registered_operations_whose_flops_are_counted():
    tensors = {name: t.float().requires_grad_() for name, t in drawn().items()}
    with FlopCounterMode(display=False) as counter:
        functional.bottleneck(**tensors).sum().backward()
    assert counter.get_total_flops() == 2 * 37 * 5 * 24 * (2 + 4)


def test_the_reference_backend_is_the_reference():
    tensors = {name: t.float() for name, t in drawn().items()}
    with use_backend("reference"):
        y = ops.bottleneck(**tensors)
    assert torch.equal(y, reference.bottleneck(**tensors))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"h": torch.randn(3, 5)}, ValueError, r"h has shape \[3, 5\], expected \[\.\.\., 24\]"),
        ({"h": torch.tensor(1.0)}, ValueError, r"h has shape \[\], expected"),
        ({"h": torch.ones(3, 24, dtype=torch.int64)}, TypeError, "h is torch.int64, expected"),
        ({"h": None}, TypeError, "h is a NoneType, expected a tensor"),
        ({"h": torch.randn(3, 24).to_sparse()}, ValueError, "h is torch.sparse_coo, expected"),
        ({"down": torch.randn(0, 24)}, ValueError, "the bottleneck b is 0, expected at least 1"),
        ({"up": torch.randn(24, 6)}, ValueError, r"up has shape \[24, 6\], expected \[N, 5\]"),
        ({"up": torch.randn(8, 5)}, ValueError, "up has 8 output features and h has 24"),
        ({"up": torch.randn(24, 5).double()}, TypeError, "up is torch.float64, expected"),
        ({"up_bias": None}, ValueError, "up_bias is None and down_bias is not"),
        ({"down_bias": torch.randn(4)}, ValueError, r"down_bias has shape \[4\], expected \[5\]"),
        ({"residual": torch.randn(3, 24)}, ValueError, r"residual has shape \[3, 24\], expected"),
        ({"residual": torch.randn(37, 24).half()}, TypeError, "residual is torch.float16"),
        ({"residual": torch.randn(37, 24, device="meta")}, ValueError, "residual is on meta"),
        ({"scaling": "1"}, TypeError, "scaling is a str, expected a number"),
        ({"activation": "swish"}, ValueError, "activation is 'swish', expected one of gelu, "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(change, error, says):
    tensors = {name: t.float() for name, t in drawn().items()}
    with pytest.raises(error, match=says):
        functional.bottleneck(**tensors | change)
