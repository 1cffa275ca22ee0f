"""The kernels of a frozen layer with a vector against the contract; the backend around them."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from circumstances import MEMORY, ORDER, WORK, assert_same_bits, together
from helpers import skip_unless_usable
from layouts import LAYOUTS, lay_out
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.start import Start
from lorafast.kernels.scaled_linear import (
    scaled_dx,
    scaled_linear,
    scaled_linear_backward,
    scaled_pass,
)
from scaled_layers import assert_right, drawn, results
from small_tiles import SMALL_TILES

import lorafast
from lorafast import ops
from lorafast.backends import Refusal, registry
from lorafast.backends.cost import Device, pretending
from lorafast.ops.problems import scaled_linear_backward_problem, scaled_linear_problem

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
H200 = Device.known_by("NVIDIA H200", 90, 132, memory_clock=3.2e9, bus_bits=6144)
SMALL = LaunchConfig(16, 16, 16, 16, num_warps=1, num_stages=1)
WANTS = ("dx", "dscale")
sides = pytest.mark.parametrize("scales_input", [False, True], ids=["y", "x"])


def on_kernels(given, scales_input, config=None):
    forward = functools.partial(scaled_linear, keeps=not scales_input, config=config)
    backward = functools.partial(scaled_linear_backward, config=config)
    return results(given, scales_input, forward, backward)


@sides
@pytest.mark.parametrize("tiles", list(SMALL_TILES))
@pytest.mark.parametrize(
    ("size", "dtype", "scale_dtype"),
    [
        ((37, 45, 70), F32, F32),
        ((40, 64, 80), BF16, F32),  # rows that TMA reads
        ((19, 70, 33), F16, F16),
        ((1, 1, 1), F32, F32),
        ((5, 300, 20), BF16, BF16),  # K in shares
    ],
    ids=str,
)
def test_kernels_against_reference(poisoned, device, size, dtype, scale_dtype, tiles, scales_input):
    given = drawn(*size, dtype, scale_dtype, device, scales_input=scales_input)
    assert_right(on_kernels(given, scales_input, SMALL_TILES[tiles]), given, scales_input)


@sides
@pytest.mark.parametrize("size", [(0, 20, 16), (40, 0, 30), (40, 16, 0)], ids=str)
def test_nothing_to_compute(poisoned, device, size, scales_input):
    given = drawn(*size, BF16, F32, device, scales_input=scales_input, bias=False)
    assert_right(on_kernels(given, scales_input), given, scales_input)


@sides
@pytest.mark.parametrize(
    "layout",
    [name if name == "offset" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_layouts(poisoned, device, layout, scales_input):
    given = drawn(35, 40, 24, F32, F32, device, scales_input=scales_input, seed=1)
    own = [name for name, t in given.items() if t.dim() == 2]
    if layout == "one row expanded":
        own.remove("dy")  # equal rows round alike, and their sums lose more than others
    given |= {name: lay_out(given[name], layout) for name in own}
    for name in ("scale", "bias"):
        given[name] = given[name].repeat_interleave(2)[::2]
    assert_right(on_kernels(given, scales_input, SMALL), given, scales_input)


@pytest.mark.parametrize(("M", "N"), [(700, 300), (33, 16), (1, 1), (5000, 7)], ids=str)
def test_the_pass(poisoned, device, M, N):
    """Several row groups and column blocks, of which the last are not whole."""
    g, t, scale = (torch.randn(size, device=device) for size in ((M, N), (M, N), (N,)))
    out, sums = scaled_pass(g.to(BF16), scale, t.to(BF16), F32)
    wide_g, wide_t = g.to(BF16).double(), t.to(BF16).double()
    assert torch.equal(out, (wide_g * scale.double()).float().to(BF16))
    expected, sizes = (wide_g * wide_t).sum(0), (wide_g * wide_t).abs().sum(0)
    assert ((sums - expected).abs() <= M * 2**-24 * sizes).all()


@sides
def test_a_vector_of_zeros_gives_its_gradient(device, scales_input):
    """z is kept, not y, of which nothing would be left."""
    given = drawn(20, 24, 32, F32, F32, device, scales_input=scales_input)
    given["scale"].zero_()
    found = on_kernels(given, scales_input)
    assert found["dscale"].all()
    assert not found["dx"].any()
    assert_right(found, given, scales_input)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_where_it_is(device):
    """Beyond M zeros would be NaN beside an infinite W, and in sums over rows they would count."""
    given = drawn(20, 24, 32, F32, F32, device, scales_input=True)
    given["weight"][3, 5] = float("inf")
    dscale = on_kernels(given, True, SMALL)["dscale"]
    assert dscale.isfinite().sum() == 23
    given = drawn(20, 24, 32, F32, F32, device, scales_input=False)
    given["x"][2, 5] = float("nan")
    found = on_kernels(given, False, SMALL)
    others = torch.arange(20, device=device) != 2
    assert found["y"][others].isfinite().all()
    assert found["y"][2].isnan().all()
    assert found["dx"].isfinite().all()


@functools.cache
def _with_all_gradients(device, scales_input):
    given = drawn(37, 45, 70, BF16, F32, device, scales_input=scales_input)
    return given, on_kernels(given, scales_input)


@sides
@pytest.mark.parametrize("wants", [("dx",), ("dscale",)], ids=str)
def test_what_is_not_asked_for_is_not_needed(poisoned, device, wants, scales_input):
    skip_unless_usable("triton")
    t, _ = _with_all_gradients(device, scales_input)
    z = t["x"] if scales_input else torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    kept = z if "dscale" in wants else None
    weight = t["weight"] if "dx" in wants or scales_input else None
    for asked in (wants, WANTS):
        needs = (kept, weight) if asked == wants else (z, t["weight"])
        problem = scaled_linear_backward_problem(t["dy"], *needs, t["scale"], scales_input, asked)
        plan = registry.plan_of("triton", problem)
        found = dict(zip(WANTS, plan.run(t["dy"], *needs, t["scale"]), strict=True))
        assert {name for name, tensor in found.items() if tensor is not None} == {*asked}
        given = t | {"bias": t["bias"]}
        assert_right({"y": None, "z": None} | found, given, scales_input)


@sides
def test_the_bits_are_the_same_whatever_changes(device, scales_input):
    """Several row and column blocks, none of them whole."""
    given = drawn(40, 70, 45, F32, F32, device, scales_input=scales_input)

    def run():
        return list(on_kernels(given, scales_input, SMALL).values())

    assert_same_bits(run, together(MEMORY, ORDER or WORK))


def test_dx_with_the_vector_at_the_load_of_dy(poisoned, device):
    """As the pass and PyTorch's GEMM have it, to the rounding of ``l ⊙ dy`` that both have."""
    given = drawn(40, 64, 80, BF16, F32, device, scales_input=False)
    found = scaled_dx(given["dy"], given["weight"], given["scale"])
    scaled, _ = scaled_pass(given["dy"], given["scale"], None, F32)
    exact = scaled.double() @ given["weight"].double()
    assert (found - exact).norm() <= 2**-8 * exact.norm()


class TestBackend:
    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "PyTorch's GEMM"])
    @pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
    @sides
    def test_what_is_launched(self, poisoned, device, monkeypatch, scales_input, gradients, fused):
        skip_unless_usable("triton")
        from lorafast.backends.triton import cost, planning

        plan = planning.plan_scaled_linear if fused else planning.plan_scaled_pass
        for name in ("scaled_linear", "scaled_linear_backward"):
            monkeypatch.setitem(cost.PLANNED, name, lambda p, device, _: plan(p, device))
        registry.forget_plans()
        started = []
        own = Start.__call__

        def starting(self, *arguments):
            started.append(self._kernel.__name__.removesuffix("_kernel"))
            own(self, *arguments)

        monkeypatch.setattr(Start, "__call__", starting)
        given = drawn(20, 24, 32, BF16, F32, device, scales_input=scales_input)
        dy = given.pop("dy")
        for name in ("x", "scale"):
            given[name].requires_grad_(gradients)
        with lorafast.use_backend("triton"):
            y = ops.scaled_linear(**given, scales_input=scales_input)
        assert started == ["scaled_linear" if fused else "scaled_pass"]
        found = dict.fromkeys(("y", "z", "dx", "dscale")) | {"y": y.detach()}
        if gradients:
            y.backward(dy)
            found |= {f"d{name}": given[name].grad for name in ("x", "scale")}
            if not fused:
                assert started[1:] == ["scaled_pass", "sum_partials"]
            elif scales_input:
                assert started[1:] == ["scaled_linear", "sum_partials"]
            else:
                assert started[1:] == ["scaled_pass", "sum_partials", "scaled_linear"]
        plain = {name: t.detach() for name, t in given.items()} | {"dy": dy}
        assert_right(found, plain, scales_input)
        registry.forget_plans()

    def test_what_it_refuses(self, device):
        skip_unless_usable("triton")
        given = drawn(2, 8, 8, torch.float64, F32, device, scales_input=False)
        del given["dy"]
        match = "can't serve scaled_linear: the dtype is torch.float64"
        with lorafast.use_backend("triton"), pytest.raises(lorafast.BackendError, match=match):
            ops.scaled_linear(**given)

    @pytest.mark.parametrize("size", [(8192, 4096, 4096), (8192, 4096, 1024), (512, 4096, 4096)])
    @sides
    def test_by_the_model_it_is_faster_than_pytorchs_calls(self, device, size, scales_input):
        """Of a backward PyTorch writes and reads a float32 product for the sum."""
        skip_unless_usable("triton")
        M, K, N = size

        def empty(*size, dtype=BF16):
            return torch.empty(size, dtype=dtype, device=device)

        x, weight, dy = empty(M, K), empty(N, K), empty(M, N)
        scale = empty(K if scales_input else N, dtype=F32)
        wants = ("y",) if scales_input else ("y", "z")
        kept = x if scales_input else dy
        with pretending(H200):
            for problem in (
                scaled_linear_problem(x, weight, scale, None, scales_input, wants),
                scaled_linear_backward_problem(dy, kept, weight, scale, scales_input, WANTS),
            ):
                answers = {name: registry.plan_of(name, problem) for name in ("aten", "triton")}
                assert not any(isinstance(answer, Refusal) for answer in answers.values())
                assert 0 < answers["triton"].seconds < answers["aten"].seconds
