"""float16's range: what a float32 adapter makes of it is neither infinite nor lost, on any path.

The yardstick is what PEFT does, which casts x to float32 for its adapter: within the package's contract,
every output by name.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import covering, skip_unless_usable
from torch import nn
from toy_formats import FORMATS, held

import lorafast
from lorafast import ops, reference
from lorafast.reference import contract

pytestmark = pytest.mark.usefixtures("toy_formats")

BACKENDS = ("reference", "aten", "cpu", "triton")
SERVED = [
    (backend, format)
    for backend in BACKENDS
    for format in FORMATS
    if backend != "triton" or format == "dense"  # its kernels read dense weights
]
K, N, r = 48, 40, 4
SCALING = 2.0
SEED = torch.tensor([20_261_126])

# Sizes of x, A, B, dy, and rows. The first makes s of 2e5; the others a ds that float16 hasn't.
SITUATIONS = {
    "s overflows": (3e3, 10.0, 1e-5, 1e-3, 33),
    "small dy": (1.0, 0.1, 1e-3, 1e-5, 33),
    "smaller dy": (1.0, 0.1, 1e-3, 1e-6, 33),
    "smallest dy": (1.0, 0.1, 1e-3, 1e-7, 33),
    "young B": (1.0, 0.1, 1e-6, 1e-5, 33),
    "tiny A": (1.0, 1e-7, 0.1, 1e-2, 33),
    "512 rows": (1.0, 0.1, 1e-4, 1 / (512 * N), 512),
    "4096 rows": (1.0, 0.1, 1e-4, 1 / (4096 * N), 4096),
}


def draw(situation, adapter_dtype):
    of_x, of_A, of_B, of_dy, M = SITUATIONS[situation]
    return {
        "x": (of_x * torch.randn(M, K)).half(),
        "weight": (torch.randn(N, K) / K**0.5).half(),
        "lora_A": (of_A * torch.randn(r, K)).to(adapter_dtype),
        "lora_B": (of_B * torch.randn(N, r)).to(adapter_dtype),
        "dy": (of_dy * torch.randn(M, N)).half(),
    }


def peft(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
    """As stock PEFT composes it; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dropped = reference.dropout(x.to(wide), dropout_p, seed)
    low = F.linear(F.linear(dropped, lora_A.to(wide)), lora_B.to(wide))
    return (F.linear(x, weight, bias) + low * scaling).to(x.dtype)


def outputs(layer, t, dropout_p, scaling=SCALING):
    leaves = {name: t[name].detach().requires_grad_() for name in ("x", "lora_A", "lora_B")}
    y = layer(
        leaves["x"], t["weight"], leaves["lora_A"], leaves["lora_B"], scaling, None,
        dropout_p, SEED if dropout_p else None,
    )  # fmt: skip
    found = torch.autograd.grad(y, list(leaves.values()), t["dy"])
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), found, strict=True))}


def assert_as_exact_as_peft(found, t, dropout_p):
    truth = outputs(peft, {name: value.double() for name, value in t.items()}, dropout_p)
    squares = {name: value.double().square() for name, value in t.items()}
    sizes = outputs(peft, squares, dropout_p, SCALING**2)
    sizes = {name: value.abs().sqrt() for name, value in sizes.items()}
    eager = outputs(peft, t, dropout_p)
    # The yardstick itself overflows nowhere.
    assert all(value.isfinite().all() for value in (*eager.values(), *truth.values()))
    reason = contract.why_any_broken(found, contract.bounds(eager, truth, sizes))
    assert reason is None, reason


@pytest.mark.parametrize(
    ("served", "situation", "dropout_p"), covering(SERVED, list(SITUATIONS), (0.0, 0.3)), ids=str
)
def test_float32_adapters(served, situation, dropout_p):
    backend, format = served
    skip_unless_usable(backend)
    t = draw(situation, torch.float32)
    if backend == "triton" and t["x"].shape[0] > 1000:
        pytest.skip("too many rows for the interpreter")
    stored = t | {"weight": FORMATS[format](t["weight"])}
    with lorafast.use_backend(backend):
        found = outputs(ops.lora_linear, stored, dropout_p)
    assert_as_exact_as_peft(found, t | {"weight": held(format, t["weight"])}, dropout_p)


@pytest.mark.parametrize("size", ["small", "fused"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("situation", ["s overflows", "smaller dy", "512 rows"])
def test_float16_adapters(backend, situation, size, never_small):
    skip_unless_usable(backend)
    if size == "fused":
        never_small()
    t = draw(situation, torch.float16)
    with lorafast.use_backend(backend):
        assert_as_exact_as_peft(outputs(ops.lora_linear, t, 0.0), t, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["x", "lora_A", "lora_B"])
def test_a_gradient_alone(backend, needs, never_small):
    """``ds`` alone is a shrink, ``dB`` alone a shrink_backward: scaled before they are rounded."""
    skip_unless_usable(backend)
    never_small()
    t = draw("smaller dy", torch.float16)
    t["dy"] = t["dy"].sign() * 6e-8  # the smallest: dB without its scaling has few bits
    scaling = 512.0

    def alone(layer, t, scaling):
        leaf = t[needs].detach().requires_grad_()
        given = t | {needs: leaf}
        y = layer(
            given["x"], given["weight"], given["lora_A"], given["lora_B"], scaling, None, 0.0, None
        )
        return torch.autograd.grad(y, leaf, t["dy"])[0]

    with lorafast.use_backend(backend):
        found = alone(ops.lora_linear, t, scaling)
    truth = alone(peft, {name: value.double() for name, value in t.items()}, scaling)
    squares = {name: value.double().square() for name, value in t.items()}
    size = alone(peft, squares, scaling**2).abs().sqrt()
    eager = alone(peft, t, scaling)
    assert eager.isfinite().all()
    assert contract.why_broken(found, eager, truth, size) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_between_the_operations_is_float32(backend):
    skip_unless_usable(backend)
    t = draw("s overflows", torch.float32)
    with lorafast.use_backend(backend):
        s = ops.shrink(t["x"], t["lora_A"])
        ds, dB = ops.expand_backward(t["dy"], s, t["lora_B"], SCALING)
        y = ops.linear_expand(t["x"], t["weight"], s, t["lora_B"], SCALING)
        dA = ops.shrink_backward(ds, t["x"])
    assert s.abs().max() > 65_504
    assert (s.dtype, ds.dtype, dB.dtype) == (torch.float32,) * 3
    assert (y.dtype, dA.dtype) == (torch.float16,) * 2
    assert y.isfinite().all()


@pytest.mark.parametrize(("backend", "format"), SERVED)
def test_a_low_rank_term_beyond_float16_is_added_before_it_is_rounded(backend, format):
    skip_unless_usable(backend)
    x, weight = torch.full((3, 1), 100.0).half(), torch.full((2, 1), -600.0).half()
    weight = FORMATS[format](weight)
    with lorafast.use_backend(backend):
        y = ops.lora_linear(x, weight, torch.ones(1, 1), torch.ones(2, 1), 700.0, None, 0.0, None)
    assert torch.equal(y, torch.full((3, 2), 10_000.0).half())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [512, 4096])
def test_an_adapted_layer_without_a_gradient_scaler(rows, dropout):
    """The mean over all of y is the loss: dy is about 1e-6, which float16 rounds as PEFT has it too."""
    layer = lorafast.adapt(nn.Linear(K, N).half(), r, dropout=dropout)
    nn.init.normal_(layer.lora_B, std=1e-4)
    x, target = torch.randn(rows, K).half(), torch.randn(rows, N).half()

    def of_peft(layer):
        def forward(x):
            seed = torch.randint(2**63 - 1, (1,))  # as the layer draws it
            factors = layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias
            return peft(x, *factors, layer.dropout, seed)

        return forward

    def gradients(layer, forward, x, target):
        torch.manual_seed(3)
        loss = (forward(x) * target).double().mean()
        found = torch.autograd.grad(loss, (layer.lora_A, layer.lora_B))
        return dict(zip(("dA", "dB"), found, strict=True))

    exact = copy.deepcopy(layer).double()
    truth = gradients(exact, of_peft(exact), x.double(), target.double())
    eager = gradients(layer, of_peft(layer), x, target)
    found = gradients(layer, layer, x, target)
    assert all(gradient.dtype is torch.float32 for gradient in eager.values())
    reason = contract.why_any_broken(found, contract.bounds(eager, truth, dtype=x.dtype))
    assert reason is None, reason


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32], ids=str)
def test_opcheck(adapter_dtype):
    """What is traced has the dtypes of what runs."""
    t = draw("small dy", adapter_dtype)
    x, weight, lora_A, lora_B, dy = (t[name] for name in ("x", "weight", "lora_A", "lora_B", "dy"))
    s = ops.shrink(x, lora_A)
    tests = ("test_schema", "test_faketensor")
    library = torch.ops.lorafast
    for op, arguments in (
        (library.shrink, (x, lora_A, 0.25, SEED)),
        (library.expand, (s, lora_B, SCALING, 0.25, SEED, x.dtype)),
        (library.linear_expand, (x, [weight], "dense", s, lora_B, SCALING)),
        (library.expand_backward, (dy, s, lora_B, SCALING)),
        (library.shrink_backward, (s, x, 0.25, SEED)),
        (library.lora_linear, (x, [weight], "dense", lora_A, lora_B, SCALING, None, 0.25, SEED)),
        (library.lora_linear_backward, (dy, x, [weight], "dense", lora_A, lora_B, s, SCALING)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_compiled_it_is_what_runs_eagerly():
    t = draw("s overflows", torch.float32)
    compiled = torch.compile(ops.lora_linear, backend="aot_eager", fullgraph=True)
    assert_as_exact_as_peft(outputs(compiled, t, 0.3), t, 0.3)


@pytest.mark.parametrize("scaling", [0.1, 0.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiled_scaling_rounds_no_half_adapter(dtype, scaling):
    """scaling · B of a young adapter would lose its digits in the adapter's dtype."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, W, A = (torch.randn(s).to(dtype) for s in ((40, 64), (48, 64), (4, 64)))
    B = (1e-6 * torch.randn(48, 4)).to(dtype)
    dy = torch.randn(40, 48).to(dtype)
    compiled = torch.compile(ops.lora_linear, backend="aot_eager", fullgraph=True)
    found = {}
    for name, run, cast in (
        ("ref64", reference.lora_linear, lambda t: t.double()),
        ("eager", ops.lora_linear, lambda t: t),
        ("compiled", compiled, lambda t: t),
    ):
        leaves = [cast(t).requires_grad_() for t in (A, B)]
        more = {} if run is reference.lora_linear else {"dropout_p": 0.0, "seed": None}
        y = run(cast(x), cast(W), *leaves, scaling, bias=None, **more)
        found[name] = torch.autograd.grad(y, leaves, cast(dy))
    for i, name in enumerate(("dA", "dB")):
        compiled, eager, ref64 = (found[of][i] for of in ("compiled", "eager", "ref64"))
        reason = contract.why_broken(compiled, eager, ref64)
        assert reason is None, f"{name} is {reason}"


REFUSALS = {
    "linear_expand": lambda half: ops.linear_expand(half, half, half, half, 1.0),
    "expand": lambda half: ops.expand(half, half, 1.0, dtype=torch.float16),
    "expand_backward": lambda half: ops.expand_backward(half, half, half, 1.0),
}


@pytest.mark.parametrize("call", REFUSALS.values(), ids=REFUSALS)
def test_s_in_float16_is_refused(call):
    with pytest.raises(TypeError, match=r"s is torch\.float16, expected torch\.float32: d?[xy] is"):
        call(torch.ones(4, 4).half())
