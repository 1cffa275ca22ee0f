"""A bottleneck adapter's kernels against the contract; the backend around them."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from bottlenecks import GRADIENTS, assert_right, drawn, results
from circumstances import MEMORY, ORDER, WORK, assert_same_bits, together
from helpers import skip_unless_usable
from layouts import LAYOUTS, lay_out
from lorafast.kernels.bottleneck import backward as kernels_of_backward
from lorafast.kernels.bottleneck import bottleneck, bottleneck_backward
from lorafast.kernels.common.bottleneck_plan import bottleneck_backward_launch
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.start import Start

import lorafast
from lorafast import functional
from lorafast.backends import Refusal, registry
from lorafast.backends.cost import Device, pretending
from lorafast.core.problem import ACTIVATIONS
from lorafast.ops.problems import bottleneck_backward_problem, bottleneck_problem
from lorafast.reference import contract
from lorafast.reference.bottleneck import activate, activate_backward

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
H200 = Device.known_by("NVIDIA H200", 90, 132, memory_clock=3.2e9, bus_bits=6144)
SMALL = LaunchConfig(16, 16, 16, 32, num_warps=1, num_stages=1)
TINY = LaunchConfig(16, 16, 16, 16, num_warps=1, num_stages=1, ctas_per_sm=8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("size", "dtype", "adapter_dtype", "residual"),
    [
        ((37, 45, 45, 5), F32, F32, False),
        ((19, 70, 70, 17), BF16, F32, False),
        ((21, 40, 50, 33), F16, F16, True),
    ],
    ids=str,
)
def test_kernels_against_reference(
    poisoned, device, size, dtype, adapter_dtype, residual, activation
):
    given = drawn(*size, dtype, adapter_dtype, device, residual=residual)
    found = results(given, 0.7, activation, bottleneck, bottleneck_backward)
    assert_right(found, given, 0.7, activation)


@pytest.mark.parametrize(
    ("size", "dtype", "adapter_dtype"),
    [
        ((1, 1, 1, 1), F32, F32),
        ((90, 33, 90, 32), BF16, BF16),
        ((5, 300, 20, 66), BF16, BF16),
        ((3, 20, 35, 129), BF16, F32),
        ((9, 20, 35, 128), F16, F32),
        ((40, 16, 0, 4), F32, F32),
        ((40, 0, 30, 7), F32, F32),
        ((0, 20, 16, 4), BF16, F32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "biases",
    [pytest.param(True, id="biases"), pytest.param(False, id="none", marks=pytest.mark.slow)],
)
def test_sizes(poisoned, device, size, dtype, adapter_dtype, biases):
    given = drawn(*size, dtype, adapter_dtype, device, biases=biases, residual=True)
    found = results(given, -2.0, "silu", bottleneck, bottleneck_backward)
    assert_right(found, given, -2.0, "silu")


@pytest.mark.parametrize(
    "layout",
    [name if name == "offset" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_layouts(poisoned, device, layout):
    given = drawn(35, 40, 24, 7, F32, F32, device, residual=True, seed=1)
    own = {name for name, t in given.items() if t.dim() == 2}
    if layout == "one row expanded":
        own.remove("dy")  # equal rows round alike, and their sums lose more than others
    given |= {name: lay_out(given[name], layout) for name in own}
    for name in ("down_bias", "up_bias"):
        given[name] = given[name].repeat_interleave(2)[::2]
    found = results(given, 0.5, "relu", bottleneck, bottleneck_backward)
    assert_right(found, given, 0.5, "relu")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("unit", [1.0, 1e-3, 20.0])
def test_an_activation_and_its_derivative(device, activation, unit):
    """Of a bottleneck that is one number: y is f(h), dh is f'(h)."""
    h = torch.cat([torch.linspace(-6, 6, 95), torch.tensor([0.0])])[:, None].to(device) * unit
    one, nothing = torch.ones(1, 1, device=device), torch.zeros_like(h)
    y, a = bottleneck(h, one, one, activation=activation, residual=nothing)
    dh, *_ = bottleneck_backward(
        torch.ones_like(h), h, a, one, one, 1.0, activation, True, wants=("dh",)
    )
    ones, exact = torch.ones_like(h), h.double()
    eager = {"y": activate(h, activation), "dh": activate_backward(ones, h, activation)}
    ref64 = {
        "y": activate(exact, activation),
        "dh": activate_backward(ones.double(), exact, activation),
    }
    reason = contract.why_any_broken({"y": y, "dh": dh}, contract.bounds(eager, ref64))
    assert reason is None, reason


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_in_its_row(device, activation):
    given = drawn(20, 24, 24, 3, F32, F32, device)
    given["h"][2, 5], given["dy"][7, 1] = float("nan"), float("inf")
    given["up"][3, 1] = float("inf")
    found = results(given, 1.0, activation, bottleneck, bottleneck_backward)
    y = found["y"].isfinite()
    assert not y[2].any()
    others = torch.arange(20, device=device) != 2
    columns = torch.arange(24, device=device) != 3
    assert y[others][:, columns].all()
    assert found["du"].isfinite().sum() == 23


@functools.cache
def _with_all_gradients(device):
    given = drawn(37, 45, 45, 5, BF16, F32, device)
    return given, results(given, 0.7, "gelu", bottleneck, bottleneck_backward)


@pytest.mark.parametrize("wants", [(name,) for name in GRADIENTS] + [("dd", "dU"), ("dh", "du")])
def test_what_is_not_asked_for_is_not_needed(poisoned, device, wants):
    given, whole = _with_all_gradients(device)
    needs = {"h": {"dD"}, "down": {"dh"}, "up": {"dh", "dD", "dd"}, "a": {*GRADIENTS} - {"du"}}
    t = {**given, "a": whole["a"]}
    own = {name: t[name] if {*wants} & of else None for name, of in needs.items()}
    problem = bottleneck_backward_problem(
        t["dy"], own["h"], own["a"], own["down"], own["up"], "gelu", False, wants, F32
    )
    skip_unless_usable("triton")
    plan = registry.plan_of("triton", problem)
    found = plan.run(t["dy"], own["h"], own["a"], own["down"], own["up"], 0.7)
    for name, tensor in zip(GRADIENTS, found, strict=True):
        assert (tensor is not None) is (name in wants)
        if tensor is not None:
            assert torch.equal(tensor, whole[name])


@pytest.mark.parametrize(
    ("size", "wants", "rows", "columns"),
    [
        ((140, 20, 20, 7), GRADIENTS, (9, 1), (4, 2, 1)),
        ((140, 20, 37, 7), GRADIENTS, (9, 2), (5, 2, 1)),
        ((140, 20, 20, 20), GRADIENTS, (9, 2), (4, 2, 2)),
        ((20, 20, 140, 20), GRADIENTS, (2, 2), (11, 1, 2)),
        ((20, 20, 140, 7), ("dD", "dd"), (2, 2), (2, 1, 1)),
        ((140, 20, 20, 7), ("dD", "dU", "du"), (9, 1), (4, 2, 1)),
        ((140, 20, 20, 7), ("dh", "dD", "dd"), (9, 2), (2, 2, 1)),
        ((140, 20, 37, 7), ("dh", "dU"), (9, 2), (3, 2, 1)),
        ((140, 20, 20, 7), ("dh", "dd"), (9, 2), None),
        ((140, 20, 20, 7), ("dh", "du"), (9, 1), (2, 2, 1)),
        ((20, 140, 140, 7), ("dU",), (2, 1), (9, 1, 1)),
        ((140, 20, 20, 20), ("du",), None, (2, 2, 1)),
    ],
    ids=str,
)
def test_who_makes_which_gradients(poisoned, device, monkeypatch, size, wants, rows, columns):
    """dh beside the sums over dy, which is in it, where all ranks are there at once; row groups, and
    shares of the columns of few rows, none of which is whole."""
    (_, K, N, _), small = size, {"rows": SMALL, "columns": TINY}
    given = drawn(*size, F32, F32, device, residual=K != N)
    launch = bottleneck_backward_launch(
        small, *size, sms=20, dtype=F32, tf32=False, activation="tanh", wants=wants, residual=K != N,
    )  # fmt: skip
    assert (launch.rows and launch.rows.grid, launch.columns and launch.columns.grid) == (
        rows,
        columns,
    )

    monkeypatch.setattr(kernels_of_backward, "sms", lambda _: 20)

    def backward(*arguments):
        return bottleneck_backward(*arguments, wants=wants, config=SMALL, over_columns=TINY)

    found = results(given, 0.7, "tanh", bottleneck, backward)
    assert {name for name in GRADIENTS if found[name] is not None} == {*wants}
    assert_right(found, given, 0.7, "tanh")


@pytest.mark.parametrize(
    ("M", "K", "N", "b"), [(150, 70, 45, 20), (150, 40, 40, 12), (20, 40, 150, 7)], ids=str
)
def test_the_bits_are_the_same_whatever_changes(device, monkeypatch, M, K, N, b):
    """Several row blocks, row groups and column groups, none of them whole, rank blocks, and shares of
    the columns of few rows."""
    given = drawn(M, K, N, b, F32, F32, device, residual=K != N)
    dy, t = given.pop("dy"), given
    monkeypatch.setattr(kernels_of_backward, "sms", lambda _: 20)

    def run():
        y, a = bottleneck(**t, config=SMALL)
        rest = (t["h"], a, t["down"], t["up"], 1.0, "gelu", K != N)
        gradients = bottleneck_backward(dy, *rest, config=SMALL, over_columns=TINY)
        return [y, a, *gradients]

    assert_same_bits(run, together(MEMORY, ORDER or WORK))


class TestBackend:
    @pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
    def test_what_is_launched(self, device, monkeypatch, gradients):
        skip_unless_usable("triton")
        started = []
        own = Start.__call__

        def starting(self, *arguments):
            started.append(self._kernel.__name__.removesuffix("_kernel"))
            own(self, *arguments)

        monkeypatch.setattr(Start, "__call__", starting)
        given = drawn(20, 24, 24, 3, BF16, F32, device)
        dy = given.pop("dy")
        for tensor in given.values():
            if tensor is not None:
                tensor.requires_grad_(gradients)
        with lorafast.use_backend("triton"):
            y = functional.bottleneck(**given, scaling=0.5, activation="tanh")
            assert started == ["bottleneck"]
            if gradients:
                y.backward(dy)
                assert started[1:] == ["bottleneck_backward", "bottleneck_columns"]
        found = {"y": y.detach(), "a": None} | dict.fromkeys(GRADIENTS)
        if gradients:
            names = ("h", "down", "down_bias", "up", "up_bias")
            found |= {d: given[n].grad for d, n in zip(GRADIENTS, names, strict=True)}
        plain = {name: None if t is None else t.detach() for name, t in given.items()}
        assert_right(found, plain | {"dy": dy}, 0.5, "tanh")

    @pytest.mark.parametrize(
        ("b", "dtype", "says"),
        [
            (257, BF16, "the bottleneck is 257 wide, the kernels take up to 256 in torch.bfloat16"),
            (129, F16, "the bottleneck is 129 wide, the kernels take up to 128 in torch.float16"),
            (3, torch.float64, "the dtype is torch.float64"),
        ],
        ids=str,
    )
    def test_what_it_refuses(self, device, b, dtype, says):
        skip_unless_usable("triton")
        given = drawn(2, 8, 8, b, dtype, dtype, device)
        del given["dy"]
        with lorafast.use_backend("triton"), pytest.raises(lorafast.BackendError, match=says):
            functional.bottleneck(**given)

    @pytest.mark.parametrize(
        ("M", "K", "b"), [(512, 768, 48), (8192, 768, 48), (8192, 4096, 64)], ids=str
    )
    def test_by_the_model_it_is_faster_than_pytorchs_calls(self, device, M, K, b):
        """Of bfloat16; where it isn't, of wider ones' backward, PyTorch is asked."""
        skip_unless_usable("triton")

        def empty(*size):
            return torch.empty(1, dtype=BF16, device=device).expand(size)

        h, down, up = torch.empty(M, K, dtype=BF16, device=device), empty(b, K), empty(K, b)
        a = torch.empty(M, b, dtype=BF16, device=device)
        with pretending(H200):
            for problem in (
                bottleneck_problem(h, down, up, None, None, "gelu", None, ("y", "a")),
                bottleneck_backward_problem(h, h, a, down, up, "gelu", False, GRADIENTS, BF16),
            ):
                answers = {name: registry.plan_of(name, problem) for name in ("aten", "triton")}
                assert not any(isinstance(answer, Refusal) for answer in answers.values())
                assert 0 < answers["triton"].seconds < answers["aten"].seconds
