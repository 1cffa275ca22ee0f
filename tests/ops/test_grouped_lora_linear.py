"""The layer of a batch whose elements have adapters of their own: its contract, every gradient by name,
on every path that a call can take, whether the host knows the assignment or the device alone."""

import itertools
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from circumstances import MEMORY, WORK, assert_same_bits
from helpers import DTYPES, assert_contract, covering, skip_unless_usable, stacked
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from toy_formats import FORMATS, held

import lorafast
from lorafast import operands, reference
from lorafast.backends.grouping import Grouping
from lorafast.core import assignment
from lorafast.functional import grouped_lora_linear, lora_linear

pytestmark = pytest.mark.usefixtures("toy_formats")

NAMES = ("x", "weight", "lora_A", "lora_B", "scaling", "bias")
E, T, K, N, r, n = 7, 2, 6, 5, 2, 4
SHAPES = ((E, T, K), (N, K), (n, r, K), (n, N, r), (n,), (N,))
ADAPTER_OF = [0, 3, -1, 0, 0, 1, 3]  # nobody has 2
# x is kept for the backward only if A or W has a gradient; without it dB has no second derivative.
WITHOUT_X = [
    ("x", *some, *bias)
    for some in (("lora_B",), ("scaling",), ("lora_B", "scaling"))
    for bias in ((), ("bias",))
]
SUBSETS = [s for n in range(1, 7) for s in itertools.combinations(NAMES, n)]
PATHS = ("host", "device")


def over_paths(subsets):
    """``path`` and ``grad``. Quick tests have one, two, all but one and all, and those that differ in
    what is kept, and the paths take turns."""
    cases = []
    for i, grad in enumerate(subsets):
        slow = len(grad) in (3, 4) and grad not in WITHOUT_X
        for path in PATHS:
            marks = [pytest.mark.slow] * (slow or path != PATHS[i % 2])
            cases.append(pytest.param(path, grad, marks=marks, id=f"{path}-{'+'.join(grad)}"))
    return pytest.mark.parametrize(("path", "grad"), cases, indirect=["path"])


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Who knows the assignment: a tensor on the CPU stands in for one on a GPU."""
    if request.param == "device":
        monkeypatch.setattr(assignment, "_NEVER_READ", ("cpu", "cuda", "meta"))
    return request.param


def given_as(path, adapter_of):
    return torch.tensor(adapter_of) if path == "device" else adapter_of


def draw(dtype=torch.float64, grad=(), **shapes):
    return {
        name: torch.randn(shapes.get(name, shape), dtype=dtype).requires_grad_(name in grad)
        for name, shape in zip(NAMES, SHAPES, strict=True)
    }


def run(t, adapter_of=ADAPTER_OF, format="dense", function=grouped_lora_linear):
    weight = FORMATS[format](t["weight"])
    return function(
        t["x"], weight, t["lora_A"], t["lora_B"], t["scaling"], adapter_of, t["bias"]
    )  # fmt: skip


def defined(t, adapter_of=ADAPTER_OF):
    return run(t, adapter_of, function=reference.grouped_lora_linear)


def gradients(y, t):
    wanted = [name for name in NAMES if isinstance(t[name], Tensor) and t[name].requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    found = torch.autograd.grad(y, [t[name] for name in wanted], dy)
    return dict(zip(wanted, found, strict=True))


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


@over_paths(SUBSETS)
def test_gradcheck(path, grad):
    small = {"x": (5, 2, 3), "weight": (4, 3), "lora_A": (3, 1, 3), "lora_B": (3, 4, 1)}
    t = draw(grad=grad, **small, scaling=(3,), bias=(4,))
    adapter_of = given_as(path, [0, 2, -1, 0, 0])  # nobody has 1

    def function(*leaves):
        return run(t | dict(zip(grad, leaves, strict=True)), adapter_of)

    leaves = [t[name] for name in grad]
    # For a subset a random combination of the elements will do, of which one is a small part. Of
    # polynomials central differences are close.
    how = {"fast_mode": grad != NAMES, "rtol": 1e-6, "atol": 1e-8}
    assert torch.autograd.gradcheck(function, leaves, **how)
    if grad not in WITHOUT_X:
        assert torch.autograd.gradgradcheck(function, leaves, **how)


@pytest.mark.parametrize("grad", WITHOUT_X, ids="+".join)
def test_second_derivative_without_x_is_refused(grad):
    t = draw(grad=grad)
    with pytest.raises(RuntimeError, match="needs x, which is not kept"):
        torch.autograd.grad(run(t).sum(), t[grad[1]], create_graph=True)


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_a_forced_backend_serves_it(path, backend):
    t, adapter_of = draw(grad=NAMES), given_as(path, ADAPTER_OF)
    expected = gradients(defined(t), t)
    with lorafast.use_backend(backend):
        y = run(t, adapter_of)
    assert_near({"y": y} | gradients(y, t), {"y": defined(t)} | expected)


def test_a_backend_without_the_dtype_refuses():
    skip_unless_usable("cpu")
    sentence = (
        "backend 'cpu' can't serve grouped_lora_linear: the dtype is torch.float64, the kernels"
    )
    with lorafast.use_backend("cpu"), pytest.raises(lorafast.BackendError, match=sentence):
        run(draw())


@dataclass(frozen=True)
class Problem:
    """A batch's tensors, drawn in float64."""

    adapter_of: tuple[int, ...]
    T: int
    K: int
    N: int
    r: int
    n: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    transposed: bool
    draw_seed: int

    def tensors(self, device):
        generator = torch.Generator().manual_seed(self.draw_seed)
        rows, K, N, r, n = (len(self.adapter_of), self.T), self.K, self.N, self.r, self.n
        shapes = ((*rows, K), (N, K), (n, r, K), (n, N, r), (n,), (N,), (*rows, N))
        drawn = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return {name: t.to(device) for name, t in zip((*NAMES, "dy"), drawn, strict=True)}


_sizes = st.integers(1, 40)


@st.composite
def problems(draw):
    n = draw(st.integers(1, 5))
    some = draw(st.lists(st.integers(-1, n - 1), min_size=1, max_size=4))
    return Problem(
        adapter_of=tuple(draw(st.lists(st.sampled_from(some), max_size=12))),
        T=draw(st.integers(0, 6)),
        K=draw(_sizes),
        N=draw(_sizes),
        r=draw(st.sampled_from((1, 2, 5, 16))),
        n=n,
        dtype=draw(st.sampled_from(DTYPES)),
        adapter_dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        transposed=draw(st.booleans()),
        draw_seed=draw(st.integers(0, 2**32)),
    )


@given(p=problems())
def test_output_and_gradients_against_float64(device, poisoned, path, p):
    # Of few elements the error is luck: several layers together.
    drawn = [replace(p, draw_seed=p.draw_seed + i).tensors(device) for i in range(12)]
    adapter_of = given_as(path, list(p.adapter_of))
    if path == "device" and not p.adapter_of:
        adapter_of = torch.zeros(0, dtype=torch.int64)

    def outputs(t, layer, cast):
        low = {"lora_A": p.adapter_dtype, "lora_B": p.adapter_dtype, "scaling": torch.float32}
        leaves = {
            name: cast(t[name], low.get(name, p.dtype)).detach().requires_grad_() for name in NAMES
        }
        x = leaves["x"]
        if p.transposed:
            x = x.mT.contiguous().mT
        y = run(leaves | {"x": x}, adapter_of, function=layer)
        found = torch.autograd.grad(y, list(leaves.values()), cast(t["dy"], p.dtype))
        return y.detach(), *found

    def call(operations, cast):
        layer = reference.grouped_lora_linear if operations is reference else grouped_lora_linear
        return stacked(outputs(t, layer, cast) for t in drawn)

    assert_contract(call, None, p.dtype, rounded_to=p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_none_and_a_fresh_adapter_change_no_bit(path, dtype, with_bias):
    t = draw(
        dtype, x=(E, 64, 96), weight=(80, 96), lora_A=(n, 4, 96), lora_B=(n, 80, 4), bias=(80,)
    )
    t["bias"] = t["bias"] if with_bias else None
    t["lora_B"][0] = 0
    base = F.linear(t["x"], t["weight"], t["bias"])
    y = run(t, given_as(path, ADAPTER_OF))
    for i, g in enumerate(ADAPTER_OF):
        assert torch.equal(y[i], base[i]) == (g in (-1, 0)), i


def test_none_is_not_the_last_adapter(path):
    t = draw()
    t["lora_A"][-1] = t["lora_B"][-1] = math.nan
    adapter_of = [-1, 0, -1, 1, -1, -1, 2]
    y = run(t, given_as(path, adapter_of))
    assert y.isfinite().all()
    none = torch.tensor(adapter_of) == -1
    assert torch.equal(y[none], F.linear(t["x"], t["weight"], t["bias"])[none])


@pytest.mark.parametrize("nobodys", range(4))
def test_an_adapter_that_nobody_has_reaches_nothing(path, nobodys):
    t = draw(torch.float32, grad=NAMES)
    with torch.no_grad():
        for name in ("lora_A", "lora_B", "scaling"):
            t[name][nobodys] = math.nan
    others = [g for g in (-1, 0, 1, 2, 3) if g != nobodys]
    y = run(t, given_as(path, [others[i % 3] for i in range(E)]))
    found = gradients(y, t)
    assert all(tensor.isfinite().all() for tensor in (y, *found.values()))
    for name in ("lora_A", "lora_B", "scaling"):
        assert not found[name][nobodys].any(), name


VALUES = {"nan": math.nan, "inf": math.inf}
HOLDERS = {
    "an element": ("x", (4, 1, 3)),
    "one that fills up": ("x", (7, 1, 3)),
    "the first by adapter": ("x", (5, 1, 3)),  # which fills up where the device groups
    "its gradient": ("dy", (7, 1, 3)),
    "A": ("lora_A", (1, 1, 1)),
    "B": ("lora_B", (1, 1, 1)),
    "scaling": ("scaling", (1,)),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("backend", ["reference", "aten"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_one_adapter_holds_reaches_no_other(path, dtype, backend, holder, value):
    """Neither outputs nor gradients; and of its own it reaches those that it does by definition. All is
    positive: an infinity stays one, whatever sum comes first, unless a zero comes near it."""
    adapter_of = [1, 3, -1, 1, 1, 0, 3, 1, 1, 0]  # adapter 1 is filled up in both groupings
    leaves = ("x", "lora_A", "lora_B", "scaling")
    t = draw(x=(10, T, K)) | {"dy": torch.randn(10, T, N).double()}
    t = {name: tensor.abs() for name, tensor in t.items()}
    name, place = HOLDERS[holder]
    t[name][place] = VALUES[value]

    def call(operations, cast):
        of = {name: cast(tensor) for name, tensor in t.items()}
        of |= {name: of[name].detach().requires_grad_() for name in leaves}
        y = operations.grouped_lora_linear(
            *(of[name] for name in NAMES[:5]), given_as(path, adapter_of), of["bias"]
        )
        return y.detach(), *torch.autograd.grad(y, [of[name] for name in leaves], of["dy"])

    with lorafast.use_backend(backend):
        found = call(lorafast.functional, lambda tensor: tensor.to(dtype))
    for output, expected in zip(found, call(reference, lambda tensor: tensor), strict=True):
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output.isinf(), expected.isinf())
    y, dx, *of_adapters = found
    g = adapter_of[place[0]] if name in ("x", "dy") else place[0]
    others = torch.tensor(adapter_of) != g
    assert y[others].isfinite().all()
    assert dx[others].isfinite().all()
    for gradient in of_adapters:
        assert gradient[[i for i in range(n) if i != g]].isfinite().all()
    assert not all(output.isfinite().all() for output in (y, dx, *of_adapters))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4), (0,), (2, 0, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("of", ["first", "all"])
@pytest.mark.parametrize(("n", "r"), [(1, 1), (3, 9)], ids=["n=1, r=1", "r>K,N"])
@pytest.mark.parametrize("scaling", ["number", "0-dim", "each"])
def test_shapes(path, leading, of, n, r, scaling):
    scale = {"number": 0.5, "0-dim": torch.tensor(0.5).double(), "each": torch.rand(n).double()}
    t = draw(x=(*leading, K), lora_A=(n, r, K), lora_B=(n, N, r), grad=("x", "lora_A", "lora_B"))
    t |= {"scaling": scale[scaling], "bias": None}
    shape = leading if of == "all" else leading[:1]
    adapter_of = torch.randint(-1, n, shape)
    expected, found = defined(t, adapter_of), run(t, adapter_of)
    assert_near({"y": found} | gradients(found, t), {"y": expected} | gradients(expected, t))
    if len(shape) <= 1 and path == "host":
        listed = adapter_of.tolist()
        assert torch.equal(run(t, listed), found)
        assert torch.equal(run(t, tuple(listed) if shape else (listed,)), found)


@pytest.mark.parametrize("backend", ["reference", "aten"])
@pytest.mark.parametrize(("K", "N"), [(0, 3), (3, 0)], ids=["K=0", "N=0"])
def test_layers_without_inputs_or_outputs(path, backend, K, N):
    leaves = ("x", "lora_A", "lora_B")
    sizes = {"x": (E, T, K), "weight": (N, K), "lora_A": (n, r, K), "lora_B": (n, N, r)}
    t = draw(torch.float32, grad=leaves, **sizes) | {"bias": None}
    with lorafast.use_backend(backend):
        y = run(t, given_as(path, ADAPTER_OF))
        found = gradients(y, t)
    assert torch.equal(y, torch.zeros(E, T, N))
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("adapter_of", [[-1] * E, [2] * E, [0, 1, 2, 3, -1, -1, -1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_none_all_and_each_once(path, adapter_of, dtype):
    t = draw(grad=NAMES)
    y, expected = run(t, torch.tensor(adapter_of, dtype=dtype)), defined(t, adapter_of)
    assert_near({"y": y} | gradients(y, t), {"y": expected} | gradients(expected, t))


def test_lower_ranks_are_filled_up_with_zeros(path):
    t = draw()
    ranks = (1, 2, 1, 2)
    for g, rank in enumerate(ranks):
        t["lora_A"][g, rank:], t["lora_B"][g, :, rank:] = 0, 0
    y = run(t, given_as(path, ADAPTER_OF))
    for i, g in enumerate(ADAPTER_OF):
        if g >= 0:
            A, B = t["lora_A"][g, : ranks[g]], t["lora_B"][g, :, : ranks[g]]
            alone = lora_linear(t["x"][i], t["weight"], A, B, t["scaling"][g].item(), t["bias"])
            torch.testing.assert_close(y[i], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "dense"])
def test_another_format(path, format):
    t = draw(grad=("x", "lora_A", "lora_B", "scaling", "bias"))
    y = run(t, given_as(path, ADAPTER_OF), format)
    expected = defined(t | {"weight": held(format, t["weight"])})
    assert_near({"y": y} | gradients(y, t), {"y": expected} | gradients(expected, t))


def test_non_contiguous_tensors(path):
    t = draw()
    for name in ("x", "lora_A", "lora_B"):
        t[name] = t[name].transpose(0, 1).contiguous().transpose(0, 1)
    t["weight"], t["bias"] = t["weight"].t().contiguous().t(), t["bias"][:1].expand(N)
    torch.testing.assert_close(run(t, given_as(path, ADAPTER_OF)), defined(t))


def test_the_bits_are_the_same_whatever_changes(path):
    t = draw(torch.float32, grad=NAMES, x=(40, 9, K))
    adapter_of = given_as(path, [g % 5 - 1 if g > 20 else 1 for g in range(40)])

    def forward_and_backward():
        y = run(t, adapter_of)
        return {"y": y} | gradients(y, t)

    assert_same_bits(forward_and_backward, MEMORY | WORK)


def test_a_second_backward_over_a_retained_graph_gives_the_same_gradients(path):
    t = draw(torch.float32, grad=NAMES)
    y = run(t, given_as(path, ADAPTER_OF))
    dy = torch.randn_like(y)
    kept, leaves = dy.clone(), [t[name] for name in NAMES]
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    for name, one, two in zip(NAMES, first, second, strict=True):
        assert torch.equal(one, two), name
    assert torch.equal(dy, kept)


def test_the_inputs_stay_as_they_were(path):
    for of in (ADAPTER_OF, [0] * E):  # gathered, and not
        t = draw(torch.float32, grad=NAMES)
        before = {name: tensor.detach().clone() for name, tensor in t.items()}
        gradients(run(t, given_as(path, of)), t)
        assert all(torch.equal(t[name], before[name]) for name in NAMES)


def test_the_output_can_be_changed_in_place(path):
    t, adapter_of = draw(grad=NAMES), given_as(path, ADAPTER_OF)
    assert_near(gradients(run(t, adapter_of).mul_(2), t), gradients(2 * run(t, adapter_of), t))


def test_what_was_kept_must_not_change(path):
    t = draw(grad=("x", "lora_A"))
    y = run(t, given_as(path, ADAPTER_OF))
    with torch.no_grad():
        t["x"].add_(1)
    with pytest.raises(RuntimeError, match="was changed in place after a LoRA layer had kept it"):
        y.sum().backward()


def test_a_tensor_of_indices_must_not_change_before_the_backward(monkeypatch):
    monkeypatch.setattr(assignment, "_NEVER_READ", ("cpu",))
    t, adapter_of = draw(grad=("lora_A",)), torch.tensor(ADAPTER_OF)
    y = run(t, adapter_of)
    adapter_of.zero_()
    with pytest.raises(RuntimeError, match="adapter_of was changed in place"):
        y.sum().backward()


def saved_for_backward(function):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


def test_saved_are_x_and_s_and_the_parameters(path):
    t = draw(torch.float32, grad=("x", "lora_A", "lora_B"))
    adapter_of = given_as(path, ADAPTER_OF)
    saved = saved_for_backward(lambda: run(t, adapter_of))
    own = {tensor.data_ptr() for tensor in t.values()}
    if path == "device":
        own |= {adapter_of.data_ptr()}
    others = [tensor.shape for tensor in saved if tensor.data_ptr() not in own]
    assert others == [(E * T, r)]


def test_x_and_W_are_not_saved_for_a_frozen_A():
    t = draw(torch.float32, grad=("lora_B",))
    saved = saved_for_backward(lambda: run(t))
    assert {tensor.shape for tensor in saved} == {(E * T, r), (n,)}


def test_bf16_layer_with_fp32_adapters_makes_no_fp32_copy_of_x(path):
    t = draw(torch.float32, grad=("lora_A", "lora_B", "scaling"), x=(E, 64, K))
    for name in ("x", "weight", "bias"):
        t[name] = t[name].bfloat16()
    y = []
    saved = saved_for_backward(lambda: y.append(run(t, given_as(path, ADAPTER_OF))))
    assert y[0].dtype == torch.bfloat16
    assert not any(s.dtype == torch.float32 and s.numel() >= t["x"].numel() for s in saved)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(y[0], t).values())


def test_a_low_rank_term_beyond_float16_is_added_before_it_is_rounded(path):
    x, weight = torch.full((2, 3, 1), 100.0).half(), torch.full((2, 1), -600.0).half()
    ones = torch.ones(1, 1, 1), torch.ones(1, 2, 1)
    y = grouped_lora_linear(x, weight, *ones, 700.0, given_as(path, [0, -1]))
    assert torch.equal(y[0], torch.full((3, 2), 10_000.0).half())
    assert torch.equal(y[1], torch.full((3, 2), -60_000.0).half())


def test_autocast_casts_as_linear_does(path):
    t, adapter_of = draw(torch.float32, grad=NAMES), given_as(path, ADAPTER_OF)
    low = {name: t[name].bfloat16() for name in ("x", "weight", "bias")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(t, adapter_of)
        assert y.dtype == F.linear(t["x"], t["weight"], t["bias"]).dtype
    cast = run(t | low, adapter_of)
    assert torch.equal(y, cast)
    expected = gradients(cast, t)
    for name, gradient in gradients(y, t).items():
        assert gradient.dtype == torch.float32, name
        assert torch.equal(gradient, expected[name]), name


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(draw()).dtype == torch.float64


def test_backward_inside_autocast_stays_in_the_dtype_of_the_forward(path):
    t, adapter_of = draw(torch.float32, grad=NAMES), given_as(path, ADAPTER_OF)
    expected = gradients(run(t, adapter_of), t)
    y = run(t, adapter_of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(y, t)
    for name in NAMES:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing(path, use_reentrant):
    t, adapter_of = draw(grad=NAMES), given_as(path, ADAPTER_OF)
    expected = gradients(run(t, adapter_of), t)
    y = checkpoint(
        lambda *tensors: run(dict(zip(NAMES, tensors, strict=True)), adapter_of),
        *(t[name] for name in NAMES),
        use_reentrant=use_reentrant,
    )
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    for name in NAMES:
        assert torch.equal(t[name].grad, expected[name]), name


def test_the_same_tensor_as_two_arguments():
    square = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64)

    def function(square):
        return grouped_lora_linear(square, weight, square, square, 0.5, [0, -1, 2])

    assert torch.autograd.gradcheck(function, square)


def test_many_gradients_at_once(path):
    t = draw(grad=NAMES)
    y = run(t, given_as(path, ADAPTER_OF))
    several, leaves = torch.randn(3, *y.shape, dtype=y.dtype), [t[name] for name in NAMES]
    found = torch.autograd.grad(y, leaves, several, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(several):
        expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for name, one, two in zip(NAMES, found, expected, strict=True):
            torch.testing.assert_close(one[i], two, msg=name)


TRANSFORMS = {
    "grad": lambda f, A: torch.func.grad(lambda A: f(A).sum())(A),
    "jacrev": lambda f, A: torch.func.jacrev(f)(A),
    "jacfwd": lambda f, A: torch.func.jacfwd(f)(A),
    "vmap": lambda f, A: torch.func.vmap(f)(torch.stack([A, 2 * A])),
    "jvp": lambda f, A: torch.func.jvp(f, (A,), (A,))[1],
    "hessian": lambda f, A: torch.func.hessian(lambda A: f(A).square().sum())(A),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(path, transform):
    t = draw()
    has = torch.tensor(ADAPTER_OF) >= 0
    each = torch.tensor(ADAPTER_OF).clamp(min=0)

    def formula(lora_A):
        update = t["scaling"][each, None, None] * t["lora_B"][each] @ lora_A[each]
        W = t["weight"] + torch.where(has[:, None, None], update, 0.0)
        return t["x"] @ W.mT + t["bias"]

    def layer(lora_A):
        return run(t | {"lora_A": lora_A}, given_as(path, ADAPTER_OF))

    found, expected = transform(layer, t["lora_A"]), transform(formula, t["lora_A"])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_torch_func_on_a_forced_backend_is_refused():
    t = draw()
    with (
        lorafast.use_backend("aten"),
        pytest.raises(lorafast.BackendError, match=r"torch\.func transforms need operations"),
    ):
        torch.func.grad(lambda A: run(t | {"lora_A": A}).sum())(t["lora_A"])


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **({"backend": "aot_eager"} | options))


@pytest.mark.parametrize("scaling", ["number", "tensor"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_compiled_it_is_one_graph_with_the_gradients_of_eager(path, scaling, with_bias):
    t, adapter_of = draw(grad=NAMES), given_as(path, ADAPTER_OF)
    if scaling == "number":
        t["scaling"] = 0.3
    if not with_bias:
        t["bias"] = None
    y, expected = compiled(run)(t, adapter_of), run(t, adapter_of)
    assert_near({"y": y} | gradients(y, t), {"y": expected} | gradients(expected, t))


def test_compiled_with_an_adapter_a_row():
    t, adapter_of = draw(grad=NAMES), torch.randint(-1, n, (E, T))
    y, expected = compiled(run)(t, adapter_of), run(t, adapter_of)
    assert_near({"y": y} | gradients(y, t), {"y": expected} | gradients(expected, t))


@pytest.mark.parametrize("rows", [False, True], ids=["elements", "rows"])
def test_an_assignment_serves_several_calls(path, rows, monkeypatch):
    """As the same indices do, grouped once, whatever serves the call."""
    t, adapter_of = draw(grad=NAMES), torch.randint(-1, n, (E, T)) if rows else ADAPTER_OF
    given = assignment.Assignment(adapter_of)
    expected = run(t, adapter_of)
    expected = {"y": expected} | gradients(expected, t)
    for _ in range(2):
        y = run(t, given)
        assert_near({"y": y} | gradients(y, t), expected)
    assert sum(isinstance(made, Grouping) for made in given._made.values()) == 1
    with lorafast.use_backend("reference"):
        torch.testing.assert_close(run(t, given), expected["y"])
    with torch.no_grad():
        batched = torch.func.vmap(lambda x: run(t | {"x": x}, given))(t["x"].unsqueeze(0))
    torch.testing.assert_close(batched[0], expected["y"])


@pytest.mark.slow
def test_inductor(path):
    t, adapter_of = draw(grad=NAMES), given_as(path, ADAPTER_OF)
    y, expected = compiled(run, backend="inductor")(t, adapter_of), run(t, adapter_of)
    assert_near({"y": y} | gradients(y, t), {"y": expected} | gradients(expected, t))


def test_no_new_graph_for_another_assignment_scaling_or_batch():
    counter = CompileCounter()
    layer = compiled(run, backend=counter, dynamic=True)
    for E, number in ((7, 0.5), (8, 0.7), (9, -1.5), (12, 3.0)):
        t = draw(x=(E, T, K)) | {"scaling": number}
        adapter_of = torch.randint(-1, n, (E,))
        torch.testing.assert_close(layer(t, adapter_of), run(t, adapter_of))
        before = counter.frame_count if number == 0.7 else None
    assert counter.frame_count <= 2, before


def test_compiled_code_refuses_an_index_out_of_range():
    layer = compiled(run)
    with pytest.raises(ValueError, match="adapter_of holds 4 at 1, expected -1"):
        layer(draw(), torch.tensor([0, 4, 0, 0, 0, 0, 0]))


def test_exported_it_runs_on_pytorch_alone():
    t = draw()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return run(t | {"x": x}, ADAPTER_OF)

    program = torch.export.export(Layer(), (t["x"],))
    assert not any("lorafast" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(t["x"]), run(t))


@pytest.mark.parametrize(
    ("path", "served", "grad"),
    covering(
        PATHS,
        [("reference", "dense"), *(("aten", format) for format in FORMATS)],
        [(), ("x", "lora_A", "scaling")],
    ),
    indirect=["path"],
    ids=str,
)
def test_opcheck(path, served, grad):
    backend, format = served
    t = draw(grad=grad)
    weight = FORMATS[format](t["weight"])
    stored = operands.stored(weight), operands.describe(weight)
    factors = t["lora_A"], t["lora_B"], t["scaling"]
    adapter_of = torch.tensor(ADAPTER_OF)
    operation = torch.ops.lorafast.grouped_lora_linear.default
    with lorafast.use_backend(backend):
        for bias in (t["bias"], None):
            arguments = (t["x"], *stored, *factors, adapter_of)
            torch.library.opcheck(operation, arguments if bias is None else (*arguments, bias))


WANTED = ["dx", "dA", "dB", "dscaling", "dbias", "dweight", "dx,dweight,dA,dB,dscaling,dbias"]


@pytest.mark.parametrize("wants", WANTED)
@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_opcheck_of_the_backward(path, wants, dtype):
    t = {name: tensor.to(dtype) for name, tensor in draw().items()}
    s = torch.randn(E * T, r, dtype=reference.wide(dtype))
    arguments = (
        torch.randn(E * T, N).to(dtype), t["x"].flatten(0, 1), [t["weight"]], "dense",
        t["lora_A"].float(), t["lora_B"].float(), s, t["scaling"], torch.tensor(ADAPTER_OF), wants,
        torch.float32,
    )  # fmt: skip
    operation = torch.ops.lorafast.grouped_lora_linear_backward.default
    torch.library.opcheck(operation, arguments)
    found = operation(*arguments)
    shapes = dict(zip(WANTED[-1].split(","), found, strict=True))
    assert {name for name, tensor in shapes.items() if tensor.numel()} == set(wants.split(","))


def test_the_device_alone_is_never_asked_for_a_value(monkeypatch):
    """Of fake tensors there is none to be had: whoever asks raises."""
    monkeypatch.setattr(assignment, "_NEVER_READ", ("cpu",))
    t = draw(torch.float32)
    from lorafast.backends import registry
    from lorafast.core.problem import WANTS, Problem

    problem = Problem(
        "grouped_lora_linear", E * T, K, N, r, torch.float32, torch.float32, torch.device("cpu"),
        wants=("y", "s"), bias=True, adapters=n,
    )  # fmt: skip
    wants = WANTS["grouped_lora_linear_backward"]
    backward = problem._replace(operation="grouped_lora_linear_backward", wants=wants)
    with FakeTensorMode() as mode:
        f = {name: mode.from_tensor(tensor) for name, tensor in t.items()}
        x, factors = f["x"].flatten(0, 1), (f["lora_A"], f["lora_B"])
        assigned = assignment.Assignment(mode.from_tensor(torch.tensor(ADAPTER_OF)))
        forward = registry.choose(problem).run
        y, s = forward(x, f["weight"], *factors, f["scaling"], assigned, f["bias"])
        run_backward = registry.choose(backward).run
        found = run_backward(y, x, f["weight"], *factors, s, f["scaling"], assigned)
    shapes = [tuple(tensor.shape) for tensor in (y, s, *found)]
    assert shapes == [(E * T, N), (E * T, r), (E * T, K), *SHAPES[1:]]


def test_on_the_meta_device():
    t = {name: tensor.to("meta").requires_grad_() for name, tensor in draw().items()}
    for adapter_of in (ADAPTER_OF, torch.tensor(ADAPTER_OF, device="meta")):
        y = run(t, adapter_of)
        assert y.is_meta
        assert [tuple(g.shape) for g in gradients(y, t).values()] == list(SHAPES)


def test_operations_are_counted_as_of_one_adapter():
    t = draw(grad=("x", "lora_A", "lora_B"), lora_A=(1, r, K), lora_B=(1, N, r))
    t |= {"scaling": 0.5}
    alone = t | {"lora_A": t["lora_A"][0], "lora_B": t["lora_B"][0]}
    counts = []
    for function in (
        lambda: run(t, [0] * E),
        lambda: lora_linear(*(alone[name] for name in NAMES)),
    ):
        with FlopCounterMode(display=False) as counter:
            function().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def bad(**changes):
    return draw(torch.float32) | changes


REFUSALS = {
    "x-width": (bad(x=torch.randn(7, 5)), "x has shape [7, 5], expected [..., 6]"),
    "x-scalar": (bad(x=torch.tensor(1.0)), "x has shape [], expected [..., 6]"),
    "x-integer": (bad(x=torch.ones(7, 6).long()), "x is torch.int64, expected float16"),
    "x-dtype": (bad(x=torch.randn(7, 6).half()), "weight is torch.float32, expected torch.float16"),
    "x-list": (bad(x=[[1.0] * 6]), "x is a list, expected a tensor"),
    "x-sparse": (bad(x=torch.randn(7, 6).to_sparse()), "x is torch.sparse_coo, expected a strided"),
    "weight-1d": (bad(weight=torch.randn(6)), "weight has shape [6], expected [out_features"),
    "A-2d": (bad(lora_A=torch.randn(2, 6)), "lora_A has shape [2, 6], expected [n, r, 6]"),
    "A-width": (bad(lora_A=torch.randn(4, 2, 5)), "lora_A has shape [4, 2, 5], expected [n, r, 6]"),
    "n=0": (
        bad(lora_A=torch.randn(0, 2, 6)),
        "lora_A has shape [0, 2, 6]: there is no adapter, expected at least 1",
    ),
    "r=0": (bad(lora_A=torch.randn(4, 0, 6)), "the rank r is 0, expected at least 1"),
    "B-n": (bad(lora_B=torch.randn(3, 5, 2)), "lora_B has shape [3, 5, 2], expected [4, 5, 2]"),
    "B-dtype": (bad(lora_B=torch.randn(4, 5, 2).half()), "lora_B is torch.float16, expected"),
    "scaling-n": (bad(scaling=torch.ones(3)), "scaling has shape [3], expected [4] or a number"),
    "scaling-text": (bad(scaling="1"), "scaling is a str, expected a number or a tensor [n]"),
    "scaling-integer": (bad(scaling=torch.ones(4).long()), "scaling is torch.int64, expected"),
    "bias-length": (bad(bias=torch.randn(1)), "bias has shape [1], expected [5]"),
    "bias-dtype": (bad(bias=torch.randn(5).half()), "bias is torch.float16, expected"),
    "device": (
        bad(lora_B=torch.randn(4, 5, 2, device="meta")),
        "lora_B is on meta, expected cpu, where x is",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(tensors, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        run(tensors)


def test_refusal_under_autocast():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="weight is a list, expected a tensor"),
    ):
        grouped_lora_linear(torch.randn(7, 6), [1.0], *(torch.randn(1, 1, 1),) * 2, 1.0, [0] * 7)


INDICES = {
    "too large": ([0, 4, 0, 0, 0, 0, 0], "adapter_of holds 4 at 1, expected -1 (none) to 3: lora_A"),
    "too small": ([0, 0, 0, 0, 0, 0, -2], "adapter_of holds -2 at 6, expected -1 (none) to 3"),
    "too many": ([0] * 8, "adapter_of has 8 indices, expected 7: x has shape [7, 2, 6]"),
    "a number": (0, "adapter_of is a int, expected a sequence of integers or a tensor"),
    "None": (None, "adapter_of is a NoneType, expected a sequence of integers or a tensor"),
    "text": ("0000000", "adapter_of is a str, expected a sequence"),
    "floats": ([0.0] * 7, "adapter_of holds 0.0 at 0, expected integers"),
    "truths": ([True] * 7, "adapter_of holds True at 0, expected integers"),
    "nested": ([[0, 0]] * 7, "adapter_of holds [0, 0] at 0, expected integers"),
    "float tensor": (torch.zeros(7), "adapter_of is torch.float32, expected integers"),
    "mask": (torch.zeros(7).bool(), "adapter_of is torch.bool, expected integers"),
    "sparse": (torch.zeros(7).int().to_sparse(), "adapter_of is torch.sparse_coo, expected a strided"),
    "shape": (torch.zeros(2).int(), "adapter_of has shape [2], expected [7, 2] or [7]: x has shape"),
    "index of a row": (
        torch.tensor([[0, 9]] * 7),
        "adapter_of holds 9 at 1, expected -1 (none) to 3",
    ),
    "assignment": (assignment.Assignment([0] * 6), "adapter_of is of 6 elements, and x has shape [7"),
    "assignment, too large": (assignment.Assignment([4] * 7), "adapter_of holds 4 at 0, expected -1"),
    "device": (torch.zeros(7, device="meta").int(), "adapter_of is on meta, expected cpu, where x is"),
}  # fmt: skip


@pytest.mark.parametrize(("adapter_of", "sentence"), INDICES.values(), ids=INDICES)
def test_refused_indices(adapter_of, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        run(draw(torch.float32), adapter_of)


def test_an_assignment_that_is_too_large_is_refused_under_vmap():
    t, given = draw(torch.float32), assignment.Assignment([0, 7, -1, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="adapter_of holds 7 at 1, expected -1"):
        torch.func.vmap(lambda x: run(t | {"x": x}, given))(t["x"].unsqueeze(0))


def test_an_operand_that_requires_a_gradient_is_refused():
    t = draw(grad=("weight",))
    with pytest.raises(
        ValueError, match="weight requires a gradient, and none flows into a weight"
    ):
        run(t, format="negative")
