"""The contract itself: what it lets pass, and what it must not."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lorafast import reference
from lorafast.reference import contract

REF64 = torch.tensor([[3.0, 4.0], [0.0, 12.0]], dtype=torch.float64)  # its norm is 13
EAGER = (REF64 + torch.tensor([[0.5, 0.0], [0.0, 0.0]])).bfloat16()
ALLOWED = 1.25 * 0.5 + 2**-7 * 13
NAN, INF = math.nan, math.inf


def why(actual, eager=EAGER, ref64=REF64, **options):
    return contract.why_broken(actual, eager, ref64, **options)


def with_value(tensor: Tensor, value: float, place=(1, 0)) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def test_the_right_side():
    assert contract.bound(EAGER, REF64).allowed == pytest.approx(ALLOWED, rel=1e-12)
    assert contract.bound(EAGER, REF64, 2 * REF64).allowed == pytest.approx(
        1.25 * 0.5 + 2**-7 * 26, rel=1e-12
    )
    wider = contract.bound(EAGER.float(), REF64, dtype=torch.bfloat16)
    assert wider.allowed == pytest.approx(ALLOWED, rel=1e-12)
    assert wider.dtype is torch.float32


@pytest.mark.parametrize(("share", "passes"), [(0.99, True), (1.01, False)])
def test_the_error_is_measured_against_it(share, passes):
    eager = EAGER.float()
    allowed = contract.bound(eager, REF64).allowed
    actual = with_value(REF64, 12 + share * allowed, (1, 1)).float()
    reason = why(actual, eager)
    assert (reason is None) is passes
    if not passes:
        assert reason == f"off by {1.01 * allowed:.1e}, allowed {allowed:.1e}"


def test_shapes_and_dtypes():
    assert why(EAGER) is None
    assert why(EAGER[:1]) == "of shape [1, 2], expected [2, 2]"
    assert why(EAGER.float()) == "torch.float32, expected torch.bfloat16"
    with pytest.raises(ValueError, match=r"eager has shape \[1, 2\], expected \[2, 2\]"):
        why(EAGER, EAGER[:1])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_where_it_should_be_fails(value):
    assert why(with_value(EAGER, value)) == f"{value} at [1, 0], expected 0"
    everywhere = torch.full_like(EAGER, value)
    assert why(everywhere) == f"{value} at [0, 0], expected 3, and so in 3 other places"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_not_even_where_eager_is_not_finite_either(value):
    """An error that is itself infinite would allow anything."""
    eager = with_value(EAGER, value)
    assert why(with_value(EAGER, value), eager) == f"{value} at [1, 0], expected 0"
    assert why(EAGER, eager) is None
    assert "off by" in why(with_value(EAGER, 5.0), eager)
    assert contract.bound(eager, REF64).allowed == pytest.approx(ALLOWED, rel=1e-12)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_where_the_reference_is_not_finite_it_must_be_the_same(value):
    eager, ref64 = with_value(EAGER, value), with_value(REF64, value)
    assert why(eager, eager, ref64) is None
    for other in (0.0, 1e30, NAN, INF, -INF):
        same = other == value or (math.isnan(other) and math.isnan(value))
        reason = why(with_value(EAGER, other), eager, ref64)
        assert (reason is None) is same
        assert same or reason.endswith(f"at [1, 0], expected {value}")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_other_elements_are_held_to_the_contract(value):
    eager, ref64 = with_value(EAGER, value), with_value(REF64, value)
    off = with_value(eager, 5.0, (0, 0))
    assert why(off, eager, ref64) == f"off by 2.0e+00, allowed {ALLOWED:.1e}"


def test_beyond_the_range_of_the_dtype():
    ref64 = with_value(REF64, 1e5)
    eager = ref64.half()
    assert eager.isinf().sum() == 1
    assert why(eager, eager, ref64) is None
    assert why(with_value(eager, -INF), eager, ref64) == "-inf at [1, 0], expected 1e+05"
    assert why(with_value(eager, NAN), eager, ref64) == "nan at [1, 0], expected 1e+05"
    assert "off by" in why(with_value(eager, 65504.0), eager, ref64)


def test_an_output_without_elements():
    nothing = torch.empty(0, 3)
    assert why(nothing, nothing, nothing.double()) is None


NAMED = {"y": EAGER, "dx": EAGER.float()}
BOUNDS = contract.bounds(NAMED, dict.fromkeys(NAMED, REF64))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"dx": -EAGER.float()}, "dx is off by "),
        ({"y": with_value(EAGER, NAN)}, "y is nan at [1, 0], expected 0"),
        ({"y": None}, "y is missing"),
        ({"dA": EAGER}, "dA is there and should not be"),
    ],
)
def test_several_outputs_by_name(changes, sentence):
    found = {name: value for name, value in (NAMED | changes).items() if value is not None}
    reason = contract.why_any_broken(found, BOUNDS)
    assert reason is None if sentence is None else reason.startswith(sentence)


def test_bounds_of_other_names_are_refused():
    with pytest.raises(ValueError, match=r"eager has \['y'\], expected \['dx', 'y'\]"):
        contract.bounds({"y": EAGER}, dict.fromkeys(NAMED, REF64))


X, A = torch.randn(6, 40, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)


def call(run, cast):
    return run.shrink(cast(X), cast(A))


def also_its_double(run, cast):
    s = call(run, cast)
    return s, 2 * s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_of_operations(dtype):
    good = contract.compare(call, reference, dtype)
    assert good.why_broken is None
    assert 0 < good.error <= good.allowed
    assert good.severity == good.error / good.allowed
    bad = contract.compare(call, SimpleNamespace(shrink=lambda x, A: -(x @ A.t())), dtype)
    assert bad.why_broken.startswith("off by")
    assert bad.error > bad.allowed
    assert bad.severity == INF


@pytest.mark.parametrize("broken", [0, 1])
def test_of_several_outputs_the_one_that_fails_is_told(broken):
    class Half:
        """One of the two outputs has a NaN."""

        def spoil(self, run, cast):
            outputs = list(also_its_double(reference, cast))
            outputs[broken] = with_value(outputs[broken], NAN, (2, 1))
            return tuple(outputs)

    def either(run, cast):
        return run.spoil(run, cast) if isinstance(run, Half) else also_its_double(run, cast)

    verdict = contract.compare(either, Half(), torch.float32)
    assert verdict.why_broken.startswith("nan at [2, 1], expected ")


def test_another_number_of_outputs_is_an_error():
    def fewer(run, cast):
        return also_its_double(run, cast) if run is reference else call(reference, cast)

    with pytest.raises(ValueError, match="zip"):
        contract.compare(fewer, None, torch.float32)
