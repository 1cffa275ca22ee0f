"""A NaN or an infinity in an input makes exactly those elements NaN or infinite that it makes so in the
reference: which ones, of every operation, on every backend, in every tile.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import DTYPES, Problem, assert_contract, covering, skip_unless_usable
from toy_formats import FORMATS

import lorafast
from lorafast import ops, reference
from lorafast.backends import forced, registry
from lorafast.reference import contract, wide

M, K, N, r = 20, 40, 25, 5
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
ROW, COLUMN = 4, 7


def calls(t, dtype, p=0.0):
    """Each operation; ``p``: of those that have a mask."""
    seed, low = t.seed if p else None, wide(dtype)
    return {
        "shrink": lambda run, cast: run.shrink(cast(t.x), cast(t.lora_A), p, seed),
        "expand": lambda run, cast: run.expand(
            cast(t.s, low), cast(t.lora_B), 0.7, p, seed, dtype=cast(t.dy).dtype
        ),
        "linear_expand": lambda run, cast: run.linear_expand(
            cast(t.x), cast(t.weight), cast(t.s, low), cast(t.lora_B), 0.7, cast(t.bias)
        ),
        "dx": lambda run, cast: run.linear_expand(
            cast(t.dy), cast(t.weight).t(), cast(t.ds, low), cast(t.lora_A).t(), 1.0, None, p, seed
        ),
        "expand_backward": lambda run, cast: run.expand_backward(
            cast(t.dy), cast(t.s, low), cast(t.lora_B), 0.7
        )[:2],
        "shrink_backward": lambda run, cast: run.shrink_backward(
            cast(t.ds, low), cast(t.x), p, seed
        ),
    }


pytestmark = [
    pytest.mark.usefixtures("toy_formats"),
    # Of the interpreter's own NumPy.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

row, column = (ROW, slice(None)), (slice(None), COLUMN)
# Where the value is put, and which elements of each output it reaches.
REACHED = {
    ("shrink", "x", (ROW, 9)): [row],
    ("shrink", "lora_A", (3, 9)): [(slice(None), 3)],
    ("expand", "s", (ROW, 4)): [row],
    ("expand", "lora_B", (COLUMN, 2)): [column],
    ("linear_expand", "x", (ROW, 39)): [row],
    ("linear_expand", "weight", (COLUMN, 0)): [column],
    ("linear_expand", "s", (ROW, 4)): [row],
    ("linear_expand", "lora_B", (COLUMN, 2)): [column],
    ("linear_expand", "bias", (COLUMN,)): [column],
    ("dx", "dy", (ROW, 24)): [row],
    ("dx", "weight", (11, COLUMN)): [column],
    ("dx", "ds", (ROW, 0)): [row],
    ("dx", "lora_A", (4, COLUMN)): [column],
    ("expand_backward", "dy", (ROW, 24)): [row, (24, slice(None))],
    ("expand_backward", "s", (19, 3)): [None, (slice(None), 3)],
    ("expand_backward", "lora_B", (17, 3)): [(slice(None), 3), None],
    ("shrink_backward", "ds", (19, ROW)): [row],
    ("shrink_backward", "x", (17, COLUMN)): [column],
}
CASES = {f"{op} of {name}{list(place)}": (op, name, place) for op, name, place in REACHED}

# What a format makes of a NaN in the weight is its own affair.
BESIDE_A_WEIGHT = [
    case
    for case, (op, name, _) in CASES.items()
    if op in ("linear_expand", "dx") and name != "weight"
]


def exact(tensor, dtype=None):
    return tensor.double()


def outputs(result):
    return (result,) if isinstance(result, torch.Tensor) else result


def tensors(device, *, dropout_p=0.0):
    return Problem(M, K, N, r, torch.float32, torch.float32, dropout_p, "contiguous", 3).tensors(
        device
    )


def assert_reached(call, places):
    """The float64 reference, by which the contract goes, has the value in these places and no others."""
    for output, place in zip(outputs(call(reference, exact)), places, strict=True):
        expected = torch.zeros_like(output, dtype=torch.bool)
        if place is not None:
            expected[place] = True
        assert torch.equal(~output.isfinite(), expected)


@pytest.fixture(params=lorafast.backends())
def on_backend(request):
    skip_unless_usable(request.param)
    with lorafast.use_backend(request.param):
        yield ops


def skip_unless_planned(operation):
    """Of the backend that is forced."""
    operation = "linear_expand" if operation == "dx" else operation
    if operation not in registry.get(forced.forced()).operations:
        pytest.skip(f"it has no {operation}")


@pytest.mark.parametrize(
    ("on_backend", "case", "value"),
    covering(list(lorafast.backends()), list(CASES), list(VALUES)),
    indirect=["on_backend"],
)
def test_which_elements_a_value_reaches(on_backend, poisoned, device, case, value):
    op, name, place = CASES[case]
    skip_unless_planned(op)
    t = tensors(device)
    getattr(t, name)[place] = VALUES[value]
    for dtype in DTYPES:
        call = calls(t, dtype)[op]
        assert_reached(call, REACHED[CASES[case]])
        assert_contract(call, on_backend, dtype)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "dense"])
@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
@pytest.mark.parametrize("case", BESIDE_A_WEIGHT)
def test_which_elements_a_value_reaches_in_another_format(backend, format, poisoned, device, case):
    skip_unless_usable(backend)
    op, name, place = CASES[case]
    t = tensors(device)
    getattr(t, name)[place] = math.nan
    for dtype in DTYPES:
        low = wide(dtype)
        weight = FORMATS[format](t.weight.to(dtype))
        drawn = {
            n: value.to(low if n in ("s", "ds") else dtype)
            for n, value in vars(t).items()
            if value is not None
        }
        if op == "dx":
            arguments = (
                drawn["dy"],
                weight,
                drawn["ds"],
                drawn["lora_A"].t(),
                1.0,
                None,
                0.0,
                None,
            )
        else:
            arguments = (drawn["x"], weight, drawn["s"], drawn["lora_B"], 0.7, drawn["bias"])
        with lorafast.use_backend(backend):
            found = ops.linear_expand(*arguments, transposed=op == "dx")
        expected = torch.zeros_like(found, dtype=torch.bool)
        expected[REACHED[op, name, place][0]] = True
        assert torch.equal(~found.isfinite(), expected)


@pytest.mark.parametrize("value", VALUES)
def test_a_small_layer_has_no_finite_element_where_the_reference_has_none(value):
    t = tensors("cpu")
    t.x[ROW, 9] = VALUES[value]
    lora_A = t.lora_A.float().requires_grad_()
    arguments = (t.x.float(), t.weight.float(), lora_A, t.lora_B.float(), 0.7, t.bias.float())
    y, right = lorafast.functional.lora_linear(*arguments), reference.lora_linear(*arguments)
    assert torch.equal(y.isfinite(), right.isfinite())


@pytest.mark.parametrize("case", CASES)
def test_in_small_tiles(poisoned, device, case):
    """Beside the last whole tile, where a mask that multiplies would spread it."""
    pytest.importorskip("triton")
    from small_tiles import SMALL_TILES, on_kernels

    op, name, place = CASES[case]
    t = tensors(device)
    getattr(t, name)[place] = math.nan
    operation = "linear_expand" if op == "dx" else op
    if operation not in registry.get("triton").operations:
        pytest.skip(f"it has no {operation}")
    for config in SMALL_TILES.values():
        assert_contract(
            calls(t, torch.bfloat16)[op], on_kernels(**{operation: config}), torch.bfloat16
        )


@pytest.mark.parametrize("value", VALUES)
def test_what_is_dropped_reaches_nothing(on_backend, poisoned, device, value):
    p = 0.5
    t = tensors(device, dropout_p=p)
    keep = reference.keep_mask(M, K, p, t.seed)
    kept, dropped = (int(mask[ROW].nonzero()[3]) for mask in (keep, ~keep))
    clean = t.x.clone()
    for place, reached in ((kept, True), (dropped, False)):
        t.x = clean.clone()
        t.x[ROW, place] = VALUES[value]
        for dtype in DTYPES:
            of_s, of_dA = (calls(t, dtype, p)[op] for op in ("shrink", "shrink_backward"))
            assert_reached(of_s, [row if reached else None])
            assert_reached(of_dA, [(slice(None), place) if reached else None])
            assert_contract(of_s, on_backend, dtype)
            assert_contract(of_dA, on_backend, dtype)
    t.ds[ROW, 2] = VALUES[value]
    for dtype in DTYPES:
        of_dx = calls(t, dtype, p)["dx"]
        assert_reached(of_dx, [(ROW, keep[ROW])])
        assert_contract(of_dx, on_backend, dtype)
    skip_unless_planned("expand")
    t.s[ROW, 2] = VALUES[value]
    keep = reference.keep_mask(M, N, p, t.seed)
    for dtype in DTYPES:
        of_y = calls(t, dtype, p)["expand"]
        assert_reached(of_y, [(ROW, keep[ROW])])
        assert_contract(of_y, on_backend, dtype)


def test_a_mask_that_multiplies_is_caught(device):
    """Zero times NaN is NaN."""
    t = tensors(device, dropout_p=0.5)
    keep = reference.keep_mask(M, K, 0.5, t.seed)
    t.x[ROW, int((~keep[ROW]).nonzero()[0])] = math.nan
    multiplied = SimpleNamespace(shrink=lambda x, lora_A, *_: (x * keep * 2) @ lora_A.t())
    verdict = contract.compare(calls(t, torch.float32, 0.5)["shrink"], multiplied, torch.float32)
    assert verdict.why_broken.startswith(f"nan at [{ROW}, 0], expected ")


@pytest.mark.parametrize("value", VALUES)
def test_through_a_whole_layer(on_backend, poisoned, device, value):
    """Which sum comes first, and so whether two infinities meet and are NaN, is the backend's choice."""
    t = tensors(device)
    t.x[ROW, 3] = VALUES[value]

    def call(run, cast):
        leaves = [cast(v).detach().requires_grad_() for v in (t.x, t.lora_A, t.lora_B)]
        x, lora_A, lora_B = leaves
        if run is reference:
            y = reference.lora_linear(x, cast(t.weight), lora_A, lora_B, 0.7, cast(t.bias))
        else:
            y = run.lora_linear(x, cast(t.weight), lora_A, lora_B, 0.7, cast(t.bias), 0.0, None)
        found = y.detach(), *torch.autograd.grad(y, leaves, cast(t.dy))
        return tuple(torch.where(output.isfinite(), output, math.nan) for output in found)

    # s's row is lost, so all of dB is; of dA, the column.
    assert_reached(call, [row, None, (slice(None), 3), (slice(None), slice(None))])
    for dtype in DTYPES:
        assert_contract(call, on_backend, dtype)
