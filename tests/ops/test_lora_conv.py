"""The LoRA convolution: the contract, every gradient by name, and what surrounds a call."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_contract, covering
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lorafast
from lorafast import ops
from lorafast.core.convolution import Geometry
from lorafast.functional import lora_conv
from lorafast.ops import lora_conv_products
from lorafast.reference import contract

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAST = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}
# batch, C, size, N, r, kernel, stride, padding, dilation, groups
CASES = {
    "1d": (3, 5, (11,), 7, 3, (3,), (2,), (1,), (1,), 1),
    "2d": (2, 6, (9, 7), 4, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d of 32 channels": (2, 32, (9, 7), 24, 3, (3, 3), (2, 1), (1, 2), (1, 2), 1),
    "2d strided": (3, 4, (8, 9), 6, 1, (3, 2), (2, 3), (1, 0), (1, 1), 1),
    "2d dilated": (2, 3, (9, 9), 5, 2, (3, 3), (1, 1), (2, 1), (2, 1), 1),
    "2d in groups": (2, 6, (5, 6), 4, 4, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "2d pointwise": (4, 8, (5, 3), 6, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "2d pointwise strided": (3, 8, (5, 6), 6, 3, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3d": (2, 3, (4, 5, 6), 5, 2, (3, 1, 2), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1),
}
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(NAMES[:4], n)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def merge(monkeypatch):
    """Says whether B·A is added to y and dx, or to W where that is exact."""

    def decide(merged):
        for name in ("_pays_forward", "_pays_backward"):
            monkeypatch.setattr(lora_conv_products, name, lambda *_: merged)

    return decide


def draw(case, dtype=torch.float64, last=False, grad=NAMES):
    batch, C, size, N, r, kernel, *_, groups = CASES[case]
    ones = [1] * len(kernel)
    shapes = {
        "x": (batch, C, *size),
        "weight": (N, C // groups, *kernel),
        "lora_A": (r, C, *kernel),
        "lora_B": (N, r // groups, *ones),
        "bias": (N,),
    }
    drawn = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    if last:
        for name in ("x", "weight"):
            drawn[name] = drawn[name].contiguous(memory_format=LAST[len(size)])
    return {name: t.requires_grad_(name in grad) for name, t in drawn.items()}


def options(case):
    names = ("stride", "padding", "dilation", "groups")
    return dict(zip(names, CASES[case][6:], strict=True))


def formula(case, x, weight, lora_A, lora_B, bias, scaling=0.5):
    """By PyTorch's layers, as PEFT makes them."""
    conv, given = CONVOLUTIONS[len(CASES[case][2])], options(case)
    low_rank = conv(conv(x, lora_A, **given | {"groups": 1}), lora_B, groups=given["groups"])
    return conv(x, weight, bias, **given) + scaling * low_rank


def gradients(y, t):
    wanted = [name for name, tensor in t.items() if tensor.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    found = torch.autograd.grad(y, [t[name] for name in wanted], dy)
    return dict(zip(wanted, found, strict=True))


def assert_close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("case", "dtype", "last", "merged", "dropout_p"),
    covering(list(CASES), DTYPES, (False, True), (False, True), (0.0, 0.5)),
    ids=str,
)
def test_output_and_gradients_against_float64(
    merge, poisoned, case, dtype, last, merged, dropout_p
):
    merge(merged)
    t = draw(case, last=last)
    geometry = Geometry(*CASES[case][6:])
    seed = torch.tensor([11]) if dropout_p else None
    dy = torch.randn_like(formula(case, **t)).detach()

    def call(operations, cast):
        leaves = {
            n: cast(v.detach(), torch.float32) if "lora" in n else cast(v.detach())
            for n, v in t.items()
        }
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        x, weight, lora_A, lora_B, bias = leaves.values()
        y = operations.lora_conv(
            x, weight, lora_A, lora_B, 0.5, bias, geometry=geometry, dropout_p=dropout_p, seed=seed
        )
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), cast(dy))

    assert_contract(call, ops, dtype, rounded_to=dtype)


def last(*sizes):
    return torch.randn(sizes).to(memory_format=torch.channels_last)


LAID_OUT = {
    "a part of a batch": lambda: (last(6, 32, 9, 8)[2:4], torch.randn(32, 32, 3, 3)),
    "the end of a batch": lambda: (last(6, 32, 9, 8).chunk(3)[2], last(32, 32, 3, 3)),
    "an image as it is read": lambda: (
        torch.randn(9, 8, 32).permute(2, 0, 1)[None],
        torch.randn(32, 32, 3, 3),
    ),
    "one column": lambda: (
        torch.randn(4, 9, 1, 32).permute(0, 3, 1, 2),
        torch.randn(32, 32, 3, 3),
    ),
    "a part of a weight": lambda: (last(2, 32, 9, 8), torch.randn(32, 64, 3, 3)[:, :32]),
    "a part of a weight, many positions": lambda: (
        last(16, 32, 9, 8),
        torch.randn(32, 64, 3, 3)[:, :32],
    ),
    "a turned weight": lambda: (last(16, 32, 9, 8), torch.randn(3, 3, 32, 32).permute(3, 2, 0, 1)),
    "many positions": lambda: (last(16, 32, 9, 8), torch.randn(32, 32, 3, 3)),
}


@pytest.mark.parametrize("kept", [True, False], ids=["trained", "without gradients"])
@pytest.mark.parametrize("mkldnn", [True, False], ids=["", "without oneDNN"])
@pytest.mark.parametrize("layout", LAID_OUT)
def test_whatever_lies_where_in_memory(layout, mkldnn, kept):
    """Of sizes that native kernels take: y, and every gradient of a dy that is a part of another."""
    x, weight = LAID_OUT[layout]()
    lora_A, lora_B, dy = torch.randn(8, 32, 3, 3), torch.randn(32, 8, 1, 1), last(20, *x.shape[1:])
    dy = dy[3 : 3 + len(x)]
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)

    def call(operations, cast):
        given = [cast(t).requires_grad_(kept) for t in (x, weight, lora_A, lora_B)]
        given[1].requires_grad_(False)
        y = operations.lora_conv(*given, 0.5, None, geometry=geometry)
        if not kept:
            return (y,)
        return y.detach(), *torch.autograd.grad(y, [given[i] for i in (0, 2, 3)], cast(dy))

    with torch.backends.mkldnn.flags(enabled=mkldnn):
        assert_contract(call, ops, torch.float32)


@pytest.mark.parametrize(
    ("case", "last", "merged"), covering(list(CASES), (False, True), (False, True)), ids=str
)
def test_it_is_what_PyTorchs_layers_compute(merge, case, last, merged):
    merge(merged)
    t = draw(case, last=last)
    y = lora_conv(t["x"], t["weight"], t["lora_A"], t["lora_B"], 0.5, t["bias"], **options(case))
    expected = formula(case, **t)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    plain = CONVOLUTIONS[len(CASES[case][2])](t["x"], t["weight"], t["bias"], **options(case))
    assert y.stride() == plain.stride()
    assert_close(gradients(y, t), gradients(expected, t))
    with torch.no_grad():
        without = lora_conv(*[t[n] for n in NAMES[:4]], 0.5, t["bias"], **options(case))
    torch.testing.assert_close(without, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size", [(3,), (1,), (3, 2), (1, 3), (1, 1), (2, 3, 2), (1, 1, 1)], ids=str
)
@pytest.mark.parametrize("channels", [1, 5])
def test_a_pointwise_convolution_keeps_the_memory_format_of_the_plain_one(channels, size, dtype):
    ones = [1] * len(size)
    W, A = torch.randn(4, channels, *ones, dtype=dtype), torch.randn(2, channels, *ones)
    last = torch.randn(2, *size, channels, dtype=dtype).movedim(-1, 1)
    for x in (last, last.clone(memory_format=torch.contiguous_format)):
        y = lora_conv(x, W, A, torch.randn(4, 2, *ones), 0.5)
        assert y.stride() == CONVOLUTIONS[len(size)](x, W).stride()


@pytest.mark.parametrize(
    ("case", "grad"), [*(("2d", s) for s in SUBSETS), ("2d in groups", NAMES)], ids=str
)
def test_first_and_second_derivatives(case, grad):
    t = draw(case, grad=grad)

    def function(*leaves):
        x, weight, lora_A, lora_B, bias = (t | dict(zip(grad, leaves, strict=True))).values()
        return lora_conv(x, weight, lora_A, lora_B, 0.5, bias, **options(case))

    leaves = [t[name] for name in grad]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if {"x", "lora_B"} <= set(grad) and not {"lora_A", "weight"} & set(grad):
        with pytest.raises(RuntimeError, match="let lora_A require one"):
            torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    else:
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    expected = gradients(formula(case, **t), t)
    assert_close(gradients(function(*leaves), t), expected)


def test_what_it_keeps_for_the_backward():
    t = draw("2d", grad=("lora_A", "lora_B"))
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_conv(*[t[n] for n in NAMES[:4]], 0.5, t["bias"], **options("2d"))
    batch, _, size, _, r, *_ = CASES["2d"]
    own = [tuple(t[name].shape) for name in ("x", "lora_A", "lora_B")]
    assert sorted(kept) == sorted([*own, (batch, r, *size)])


class Made(TorchDispatchMode):
    """The operations whose output has a shape, and that output's memory."""

    def __init__(self, shape):
        super().__init__()
        self.numel, self.found = shape.numel(), []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **kwargs or {})
        if isinstance(made, torch.Tensor) and made.numel() == self.numel:
            self.found.append((operation.overloadpacket, made.untyped_storage().data_ptr()))
        return made


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["2d", "2d in groups"])
def test_the_low_rank_term_is_added_without_a_second_y(merge, case, dtype, last):
    merge(False)
    x, W, A, B, b = draw(case, dtype, last=last, grad=()).values()
    geometry = Geometry(*CASES[case][6:])
    A, B = A[:2], B[:, : 2 // geometry.groups]  # so that s is smaller than y
    adapter = lora_conv_products.Adapter(A, B, 0.5, geometry, 0.0, None)
    with Made(F.conv2d(x, W, b, **options(case)).shape) as made:
        y, _ = lora_conv_products.forward(x, W, b, adapter, keep_s=False)
    assert {memory for _, memory in made.found} == {y.untyped_storage().data_ptr()}


def test_dx_alone_of_float16_copies_no_x():
    x, W, A, B, _ = draw("2d", torch.float16, grad=()).values()
    adapter = lora_conv_products.Adapter(A, B, 0.5, Geometry(*CASES["2d"][6:]), 0.0, None)
    dy = torch.randn_like(F.conv2d(x, W, **options("2d")))
    with Made(x.shape) as made:
        lora_conv_products.backward(dy, x, W, None, adapter, ("dx",))
    assert torch.ops.aten._to_copy not in [operation for operation, _ in made.found]


@pytest.mark.parametrize("merged", [False, True])
def test_a_fresh_adapter_changes_no_bit(merge, merged):
    merge(merged)
    t = draw("2d", torch.float32)
    zero = torch.zeros_like(t["lora_B"])
    y = lora_conv(t["x"], t["weight"], t["lora_A"], zero, 2.0, t["bias"], **options("2d"))
    assert torch.equal(y, F.conv2d(t["x"], t["weight"], t["bias"], **options("2d")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_adapters_of_another_dtype_than_float32_images(merge, dtype):
    merge(False)
    t = draw("2d of 32 channels", torch.float32, last=True, grad=NAMES[:4])
    for name in ("lora_A", "lora_B"):
        t[name] = t[name].detach().to(dtype).requires_grad_()
    y = lora_conv(*[t[n] for n in NAMES[:4]], 0.5, t["bias"], **options("2d of 32 channels"))

    def plain(dtype):
        leaves = {n: leaf.detach().to(dtype).requires_grad_(n != "bias") for n, leaf in t.items()}
        y = formula("2d of 32 channels", **leaves)
        return {"y": y.detach(), **gradients(y, leaves)}

    found = {"y": y.detach(), **gradients(y, t)}
    eager, exact = plain(torch.float32), plain(torch.float64)
    for name, tensor in found.items():
        like = eager[name].to(t[name].dtype if name in t else torch.float32)
        eps_of = torch.bfloat16 if like.dtype is torch.bfloat16 else torch.float32
        bound = contract.bound(like, exact[name], dtype=eps_of)
        assert bound.verdict(tensor).why_broken is None, name


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", ["2d", "2d of 32 channels"])
def test_a_tiny_update_of_a_large_weight_is_within_the_contract(merge, case, merged):
    merge(merged)
    t = draw(case, torch.float32, last=True, grad=NAMES[:4])
    with torch.no_grad():
        t["weight"] *= 1e3
        t["lora_B"] *= 1e-4

    def results(function, cast):
        leaves = {name: cast(leaf.detach()) for name, leaf in t.items()}
        leaves = {name: leaf.requires_grad_(name in NAMES[:4]) for name, leaf in leaves.items()}
        y = function(leaves)
        return {"y": y.detach(), **gradients(y, leaves)}

    def layer(leaves):
        return lora_conv(*[leaves[n] for n in NAMES[:4]], 0.5, leaves["bias"], **options(case))

    def plain(leaves):
        return formula(case, **leaves)

    found = results(layer, torch.Tensor.clone)
    bounds = contract.bounds(
        results(plain, torch.Tensor.clone), results(plain, torch.Tensor.double)
    )
    assert contract.why_any_broken(found, bounds) is None


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("case", ["2d", "2d in groups", "2d pointwise"])
def test_an_empty_batch(case, last):
    t = draw(case, last=last)
    x = t["x"].detach()[:0].requires_grad_()
    y = lora_conv(x, *[t[n] for n in NAMES[1:4]], 0.5, t["bias"], **options(case))
    assert y.shape == formula(case, **t | {"x": x}).shape
    for gradient in torch.autograd.grad(y.sum(), [x, t["lora_A"], t["lora_B"]]):
        assert not gradient.count_nonzero()


@pytest.mark.parametrize("case", ["1d", "2d", "3d"])
def test_without_a_batch(case):
    t = draw(case)
    rest = [t[n] for n in NAMES[1:4]]
    y = lora_conv(t["x"][0], *rest, 0.5, t["bias"], **options(case))
    torch.testing.assert_close(y, formula(case, **t)[0])


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_padding_same(kernel):
    x, W = torch.randn(2, 3, 6, 7), torch.randn(4, 3, *kernel)
    A, B = torch.randn(2, 3, *kernel), torch.randn(4, 2, 1, 1)
    y = lora_conv(x, W, A, B, 0.5, padding="same", dilation=2)
    changed = W + 0.5 * torch.einsum("nrij,rckl->nckl", B, A)
    torch.testing.assert_close(y, F.conv2d(x, changed, padding="same", dilation=2))


def test_dropout_is_of_positions_and_channels_and_drawn_from_the_generator():
    t = draw("2d", torch.float32)
    arguments = [t[n] for n in NAMES[:4]]
    torch.manual_seed(3)
    y = lora_conv(*arguments, 0.5, t["bias"], **options("2d"), dropout_p=0.3)
    torch.manual_seed(3)
    rows = t["x"].movedim(1, -1).reshape(-1, t["x"].shape[1])
    seed = torch.randint(2**63 - 1, (1,))
    left = lorafast.ops.dropout(rows, 0.3, seed).view(t["x"].movedim(1, -1).shape).movedim(-1, 1)
    expected = formula("2d", **t) - formula("2d", **t | {"lora_A": t["lora_A"] * 0})
    low_rank = formula("2d", **t | {"x": left}) - F.conv2d(
        left, t["weight"], t["bias"], **options("2d")
    )
    plain = formula("2d", **t) - expected
    torch.testing.assert_close(y, plain + low_rank, rtol=1e-4, atol=1e-4)
    y = lora_conv(*arguments, 0.5, t["bias"], **options("2d"), dropout_p=0.3, training=False)
    torch.testing.assert_close(y, formula("2d", **t))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_DoRA_is_the_normed_weight(dropout_p):
    t = draw("2d")
    m = torch.rand(4, dtype=torch.float64).requires_grad_()
    x, W, A, B, b = t.values()
    torch.manual_seed(5)
    y = lora_conv(
        x, W, A, B, 0.5, b, **options("2d"), magnitude=m.view(1, 4, 1, 1), dropout_p=dropout_p
    )
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,)) if dropout_p else None
    drop = lorafast.ops.dropout(x.movedim(1, -1), dropout_p, seed).movedim(-1, 1)
    norm = (
        (W + 0.5 * torch.einsum("nr,rckl->nckl", B[:, :, 0, 0], A)).flatten(1).norm(dim=1).detach()
    )
    scale = (m / norm).view(1, 4, 1, 1)
    given = options("2d")
    low_rank = 0.5 * F.conv2d(F.conv2d(drop, A, **given), B)
    expected = (
        F.conv2d(x, W, b, **given) + (scale - 1) * F.conv2d(drop, W, **given) + scale * low_rank
    )
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients(y, t | {"m": m}), gradients(expected, t | {"m": m}))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_autocast_casts_what_a_convolution_casts(last):
    t = draw("2d", torch.float32, last=last)
    arguments = [t[n] for n in NAMES[:4]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_conv(*arguments, 0.5, t["bias"], **options("2d"))
    assert y.dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(y, t)
    low = [a.bfloat16() if i < 2 else a for i, a in enumerate(arguments)]
    expected = lora_conv(*low, 0.5, t["bias"].bfloat16(), **options("2d"))
    assert torch.equal(y, expected)
    assert all(torch.equal(found[n], g) for n, g in gradients(expected, t).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "last", "dropout_p"),
    covering(["1d", "2d", "2d in groups", "2d pointwise"], (False, True), (0.0, 0.5)),
)
def test_compiled_in_one_graph(fresh_dynamo, case, last, dropout_p):
    t = draw(case, torch.float32, last=last)
    counter = CompileCounterWithBackend("aot_eager")

    def function(scaling):
        return lora_conv(
            *[t[n] for n in NAMES[:4]], scaling, t["bias"], **options(case), dropout_p=dropout_p
        )

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for scaling in (0.5, 0.25):
        torch.manual_seed(0)
        y = compiled(scaling)
        torch.manual_seed(0)
        expected = function(scaling)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.stride() == expected.stride()
        assert_close(gradients(y, t), gradients(expected, t), 1e-4)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("case", ["2d", "2d of 32 channels", "2d in groups", "3d"])
def test_the_registered_operation(case, last):
    t = draw(case, torch.float32 if case == "2d of 32 channels" else torch.float64, last=last)
    given = [t[n] for n in NAMES[:4]]
    torch.library.opcheck(
        torch.ops.lorafast.lora_conv.default, (*given, 0.5, t["bias"], *CASES[case][6:])
    )


def test_under_transforms_in_forward_mode_and_under_modes():
    t = draw("2d", grad=())
    x, W, A, B, b = t.values()
    given = options("2d")

    def layer(A, x):
        return lora_conv(x, W, A, B, 0.5, b, **given)

    def plain(A, x):
        return formula("2d", x, W, A, B, b)

    tangents = torch.randn_like(A), torch.randn_like(x)
    for found, expected in zip(
        torch.func.jvp(layer, (A, x), tangents),
        torch.func.jvp(plain, (A, x), tangents),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    found = torch.func.vmap(layer, (None, 0))(A, x.unsqueeze(1))
    torch.testing.assert_close(found, plain(A, x).unsqueeze(1))
    A.requires_grad_()
    counted = []
    for function in (layer, plain):
        with FlopCounterMode(display=False) as counter:
            function(A, x.requires_grad_()).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 5, 9, 7)}, "x has shape [2, 5, 9, 7], expected [batch, 6, height, width]"),
        ({"x": torch.randn(2, 6, 9, 2), "padding": 0}, "too small for a window of 3 in dimension 3"),
        ({"weight": torch.randn(4, 6)}, "weight has shape [4, 6], expected [out_channels, in_channels"),
        ({"lora_A": torch.randn(3, 6, 3, 2)}, "lora_A has shape [3, 6, 3, 2], expected [r, 6, 3, 3]"),
        ({"lora_B": torch.randn(4, 2, 1, 1)}, "lora_B has shape [4, 2, 1, 1], expected [4, 3, 1, 1]"),
        ({"lora_A": torch.randn(0, 6, 3, 3)}, "the rank r of lora_A is 0"),
        ({"bias": torch.randn(5)}, "bias has shape [5], expected [4]"),
        ({"x": torch.ones(2, 6, 9, 7, dtype=torch.int64)}, "x is torch.int64, expected float16"),
        ({"padding": -1}, "padding is -1, expected 2 integers of at least 0"),
        ({"stride": (1, 1, 1)}, "stride is (1, 1, 1), expected 2 integers of at least 1"),
        ({"padding": True}, "padding is True, expected 2 integers of at least 0"),
        ({"stride": (1.0, 1)}, "stride is (1.0, 1), expected 2 integers of at least 1"),
        ({"x": [1]}, "x is a list, expected a tensor"),
        ({"weight": torch.randn(0, 6, 3, 3), "lora_B": torch.randn(0, 3, 1, 1), "bias": None},
         "weight has shape [0, 6, 3, 3], expected at least one output channel"),
        ({"padding": "full"}, "padding is 'full', expected 'same', 'valid' or numbers"),
        ({"groups": 0}, "groups is 0, expected an integer of at least 1"),
        ({"dropout_p": 1.5}, "dropout_p is 1.5, expected a probability"),
        ({"scaling": None}, "scaling is a NoneType, expected a number"),
        ({"magnitude": torch.ones(3)}, "magnitude has shape [3], expected [4]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "of",
)  # fmt: skip
def test_what_does_not_fit_is_said_in_a_sentence(change, message):
    t = draw("2d", torch.float32, grad=())
    lora_conv(**t, scaling=0.5, **options("2d"))  # a call that fitted changes no answer
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        lora_conv(**t | {"scaling": 0.5} | options("2d") | change)


def test_a_rank_that_does_not_fit_groups():
    x, W = torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3)
    A, B = torch.randn(3, 4, 3, 3), torch.randn(4, 1, 1, 1)
    with pytest.raises(
        ValueError, match=r"rank r of lora_A is 3, expected a multiple of groups, 2"
    ):
        lora_conv(x, W, A, B, 1.0, groups=2)
