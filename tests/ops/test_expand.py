"""``expand`` on every backend: layouts, dtypes, masks, no rows; ``linear_expand`` adds the same."""

import pytest
import torch
from helpers import DTYPES, Problem, assert_contract, problems, several, skip_unless_usable
from hypothesis import given
from layouts import LAYOUTS
from torch.utils.flop_counter import FlopCounterMode

import lorafast
from lorafast import ops, reference
from lorafast.backends import registry
from lorafast.ops.problems import expand_problem, on_backend
from lorafast.reference import wide

BACKENDS = [name for name in registry.names() if "expand" in registry.get(name).operations]
SEED = torch.tensor([-3])


def expand_of(p, t, factor="lora_B"):
    def call(run, cast):
        s, lora_B = cast(t.s, wide(p.dtype)), cast(getattr(t, factor), p.adapter_dtype)
        lora_B = lora_B.t() if factor == "lora_A" else lora_B
        like = cast(t.dy)
        return run.expand(
            p.lay_out(s), p.lay_out(lora_B), 0.7, p.dropout_p, t.seed, dtype=like.dtype
        )

    return call


@given(p=problems())
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", ["lora_B", "lora_A"])
def test_it_keeps_the_contract(poisoned, device, backend, factor, p):
    skip_unless_usable(backend)
    drawn = several(p, device, most=4 if backend == "triton" else 32)
    calls = [expand_of(p, t, factor) for t in drawn]
    assert_contract(
        lambda run, cast: torch.stack([call(run, cast) for call in calls]),
        on_backend(backend),
        p.dtype,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(poisoned, device, backend, layout, dtype):
    skip_unless_usable(backend)
    for adapter_dtype in DTYPES:
        p = Problem(33, 20, 70, 5, dtype, adapter_dtype, 0.25, layout, 7)
        assert_contract(expand_of(p, p.tensors(device)), on_backend(backend), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_nothing_to_compute(poisoned, device, backend, sizes, dropout_p):
    skip_unless_usable(backend)
    M, N, r = sizes
    s, lora_B = torch.ones(M, r, device=device), torch.ones(N, r, device=device)
    for dtype in DTYPES:
        low = s.to(wide(dtype))
        with lorafast.use_backend(backend):
            y = ops.expand(low, lora_B, 0.7, dropout_p, SEED.to(device), dtype=dtype)
        assert torch.equal(y, torch.zeros(M, N, dtype=dtype, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_that_of_the_output(device, backend):
    """The one that dx's low-rank term has: a function of the seed, and of a row and column of y."""
    skip_unless_usable(backend)
    M, N, p = 9, 37, 0.4
    s, lora_B = torch.ones(M, 1, device=device), torch.ones(N, 1, device=device)
    with lorafast.use_backend(backend):
        y = ops.expand(s, lora_B, 2.0, p, SEED.to(device), dtype=torch.float32)
        dx = ops.linear_expand(
            torch.zeros(M, 3, device=device), torch.ones(3, N, device=device), s, lora_B, 2.0,
            None, p, SEED.to(device), transposed=True,
        )  # fmt: skip
    keep = reference.keep_mask(M, N, p, SEED.to(device))
    scale = reference.dropout(torch.ones(M, N, device=device), p, SEED.to(device)).max()
    torch.testing.assert_close(y, keep * 2.0 * scale)
    torch.testing.assert_close(dx, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_expand_adds_it(device, backend, dtype):
    """To a base product of zeros it adds the very bits."""
    skip_unless_usable(backend)
    p = Problem(17, 24, 40, 4, dtype, dtype, 0.3, "contiguous", 5)
    t = p.tensors(device)
    x, s, lora_B = torch.zeros_like(t.x, dtype=dtype), t.s.to(wide(dtype)), t.lora_B.to(dtype)
    with lorafast.use_backend(backend):
        y = ops.linear_expand(x, t.weight.to(dtype), s, lora_B, 0.7, None, 0.3, t.seed)
        alone = ops.expand(s, lora_B, 0.7, 0.3, t.seed, dtype=dtype)
    assert torch.equal(y, alone)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradients_of_s_and_lora_B(dtype, dropout_p):
    p = Problem(13, 8, 21, 3, dtype, torch.float32, dropout_p, "contiguous", 3)
    t = p.tensors(torch.device("cpu"))

    def call(run, cast):
        s = cast(t.s, wide(dtype)).detach().requires_grad_()
        lora_B = cast(t.lora_B, torch.float32).detach().requires_grad_()
        dy = cast(t.dy)
        y = run.expand(s, lora_B, 0.7, dropout_p, t.seed, dtype=dy.dtype)
        ds, dB = torch.autograd.grad(y, (s, lora_B), dy)
        return y.detach(), ds, dB

    assert_contract(call, ops, dtype, rounded_to=dtype)


def test_a_problem_says_all_of_it():
    s, lora_B = torch.randn(5, 2), torch.randn(2, 7).t()
    p = expand_problem(s, lora_B, 0.5, SEED, torch.float16)
    assert (p.operation, p.M, p.K, p.N, p.r) == ("expand", 5, 0, 7, 2)
    assert (p.dtype, p.adapter_dtype, p.dropout) == (torch.float16, torch.float32, True)
    assert p.layouts.lora_B.columns > 0 == p.layouts.lora_B.rows
    assert p.layouts.s.rows > 0
    assert not expand_problem(s, lora_B, 0.0, None, torch.float32).dropout


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiled_it_is_what_runs_eagerly(dropout_p):
    s, lora_B = torch.randn(6, 3), torch.randn(10, 3, requires_grad=True)

    def function(s, lora_B):
        return ops.expand(s, lora_B, 0.5, dropout_p, SEED, dtype=torch.float16)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for run in (function, compiled):
        y = run(s, lora_B)
        (dB,) = torch.autograd.grad(y.sum(), lora_B)
        if run is function:
            expected = y, dB
    torch.testing.assert_close((y, dB), expected, rtol=0, atol=0)


def test_func_transforms():
    s, lora_B = torch.randn(4, 6, 3).double(), torch.randn(10, 3).double()

    def function(s, lora_B):
        return ops.expand(s, lora_B, 0.5, dtype=torch.float64)

    batched = torch.func.vmap(function, (0, None))(s, lora_B)
    torch.testing.assert_close(batched, 0.5 * s @ lora_B.t())
    tangent = torch.randn_like(lora_B)
    _, found = torch.func.jvp(lambda B: function(s[0], B), (lora_B,), (tangent,))
    torch.testing.assert_close(found, 0.5 * s[0] @ tangent.t())


def test_its_flops_are_counted():
    s, lora_B = torch.randn(6, 3), torch.randn(10, 3)
    with FlopCounterMode(display=False) as counter:
        ops.expand(s, lora_B, 0.5, dtype=torch.float32)
    assert counter.get_total_flops() == 2 * 6 * 3 * 10


def test_a_backend_without_it_says_so(monkeypatch):
    aten = registry.get("aten")
    monkeypatch.setattr(type(aten), "operations", aten.operations - {"expand"})
    registry.forget_plans()
    try:
        with (
            lorafast.use_backend("aten"),
            pytest.raises(lorafast.BackendError, match="can't serve expand: it has no expand"),
        ):
            ops.expand(torch.ones(2, 1), torch.ones(3, 1), 1.0, dtype=torch.float32)
    finally:
        registry.forget_plans()
