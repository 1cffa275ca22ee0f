"""csrc/cuda/linear_expand.cu, executed: ``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``."""

import pytest
import torch
from cards import A100, H200, L4, T4, problem
from helpers import covering
from layouts import LAYOUTS, lay_out
from linear_expand_cases import TILES, Case, OnMachine, bits, hold, padded
from linear_expand_counts import plain
from on_machine import Fault, launched, needs_nvcc
from ptx import cuda_counts
from ptx.counts import RATES
from ptx.cuda_counts import Subject
from side_by_side import SideBySide
from small_cases import BF16, F16, F32, KINDS, SEED

from lorafast import reference
from lorafast.backends.cost import Device
from lorafast.backends.cuda import linear_expand
from lorafast.backends.cuda.launch import Launch
from lorafast.core.problem import Layout, Layouts
from lorafast.reference import contract, keep_mask, wide

pytestmark = needs_nvcc
HALVES = [kind for kind in KINDS if kind != "fp32"]

QUICK = [
    Case("bf16", 130, 200, 264, 16),
    Case("bf16", 70, 131, 150, 17, bias=True, columns=256),
    Case("bf16", 130, 72, 140, 16, transposed=True, dropout_p=0.3),
    Case("bf16", 130, 72, 300, 3, transposed=True, dropout_p=0.1),
    Case("bf16+fp32", 1, 40, 24, 1),
    Case("fp16", 100, 100, 77, 64, bias=True),
    Case("fp16+fp32", 40, 88, 136, 8, transposed=True, dropout_p=0.5),
    Case("bf16", 40, 700, 130, 16, bias=True, splits=3),
    Case("fp16", 40, 520, 64, 20, transposed=True, dropout_p=0.2, columns=256, splits=2),
]
MORE = [
    Case(kind, M, K, N, r, transposed, p, bias, columns, splits, arch)
    for kind, arch, (M, K, N, r, transposed, p, bias, columns, splits) in covering(
        list(HALVES),
        (80, 90),
        (
            (257, 129, 129, 1, False, 0.0, True, 128, 1),
            (129, 264, 513, 3, True, 0.5, False, 256, 1),
            (64, 64, 64, 17, True, 0.1, True, 128, 2),
            (31, 33, 31, 256, False, 0.0, False, 256, 1),
            (200, 1000, 96, 64, False, 0.1, False, 128, 4),
            (140, 640, 270, 130, True, 0.0, False, 256, 3),
            (3, 8, 8, 16, True, 1.0, False, 128, 1),
        ),
    )
]  # fmt: skip
OTHERS = [
    Case("bf16", 140, 520, 200, 64, True, 0.1, arch=arch, columns=columns, splits=splits)
    for arch, columns, splits in ((86, 128, 1), (120, 128, 2))
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contract(case):
    hold(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE + OTHERS, ids=str)
def test_contract_at_length(case):
    hold(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_may_lie_in_any_way(layout):
    def laid_out(matrix):
        return lay_out(matrix, layout)

    for kind in ("bf16", "fp16+fp32"):
        case, seen = Case(kind, 41, 40, 72, 24, dropout_p=0.1), []
        t = {name: matrix.to(BF16).to(F16) for name, matrix in case.tensors().items()}
        x, weight = (t[name].to(case.dtype) for name in ("x", "weight"))
        s, B = laid_out(t["s"].to(wide(case.dtype))), laid_out(t["lora_B"].to(KINDS[kind][1]))
        for factors in ((s, B), (s.contiguous(), B.contiguous())):
            seen.append(OnMachine(case).linear_expand(x, weight, *factors, 1.5, None, 0.1, SEED))
        assert bits(seen[0]).equal(bits(seen[1]))


@pytest.mark.parametrize("transposed", [False, True])
def test_x_and_the_weight_may_have_gaps_or_one_row(transposed):
    """The weight's rows or columns are read, as they lie; the numbers decide, not the name."""
    case = Case("bf16", 20, 136, 48, 4, transposed)
    t = {name: matrix.to(BF16) for name, matrix in case.tensors().items()}
    s, B, y = t["s"], t["lora_B"], []
    W = t["weight"].t() if transposed else t["weight"]
    for weight in (padded(W), padded(W.t()).t(), W.contiguous(), W.t().contiguous().t()):
        for x in (t["x"], padded(t["x"]), t["x"][:1].expand(20, 136)):
            with launched(80):
                y.append(torch.empty(20, 48, dtype=BF16))
                torch.ops.lorafast_cuda.linear_expand(
                    x, weight, s, B, 1.0, None, None, 0, 1.0, y[-1], None, None, 128, 1
                )
    assert all(bits(y[i]).equal(bits(y[i % 3])) for i in range(len(y)))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("columns", "N"), [(128, 77), (256, 264)])
def test_the_mask_is_everyones(dtype, columns, N):
    kind = "bf16" if dtype is BF16 else "fp16"
    case = Case(kind, 140, 8, N, 2, True, 0.3, columns=columns)
    x, W = torch.zeros(140, 8, dtype=dtype), torch.zeros(8, N, dtype=dtype)
    s, B = torch.ones(140, 2, dtype=wide(dtype)), torch.ones(N, 2, dtype=dtype)
    y = OnMachine(case).linear_expand(x, W, s, B, 1.0, None, 0.3, SEED, transposed=True)
    assert (y != 0).equal(keep_mask(140, N, 0.3, SEED))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in HALVES[1:3])) for kind in HALVES],
)
def test_schedules_change_no_bit(kind):
    """Two launches in a row, on the same counters; fewer CTAs at once than there are."""
    case = Case(kind, 150, 600, 140, 20, True, 0.2, splits=3)
    found = []
    for seed in range(5):
        machine = OnMachine(case, {"seed": seed, "resident": (1, 2, 4, 3, 12)[seed]}, times=2)
        t = case.tensors()
        dtype, adapters = KINDS[kind]
        factors = t["s"].to(wide(dtype)), t["lora_B"].to(adapters)
        x, W = t["x"].to(dtype), t["weight"].to(dtype)
        found.append(machine.linear_expand(x, W, *factors, 0.5, None, 0.2, SEED, transposed=True))
    assert all(bits(y).equal(bits(found[0])) for y in found)
    assert machine.run.launches[0].grid == (12, 1, 1)


def tf32(x):
    """To nearest, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(F32)


@pytest.mark.parametrize(
    "case",
    [
        Case("fp32", 130, 70, 137, 20, bias=True),
        Case("fp32", 40, 70, 200, 5, True, 0.3),
        pytest.param(Case("fp32", 140, 130, 72, 33, splits=2, arch=86), marks=pytest.mark.slow),
        pytest.param(
            Case("fp32", 20, 400, 260, 16, True, splits=3, arch=120), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_float32_is_rounded_to_tf32_and_no_further(case):
    t = {name: matrix.to(F32) for name, matrix in case.tensors().items()}
    seed, bias = SEED if case.dropout_p else None, t.pop("bias", None)
    more = {"transposed": case.transposed}
    mask = case.dropout_p, seed
    y = OnMachine(case).linear_expand(*t.values(), 0.75, bias, *mask, **more)
    rounded = [tf32(matrix).double() for matrix in t.values()]
    b64 = None if bias is None else bias.double()
    exact = reference.linear_expand(*rounded, 0.75, b64, *mask, **more)
    assert y.dtype is F32
    assert (y.double() - exact).norm() <= 4 * torch.finfo(F32).eps * exact.norm()


def two_of(case):
    """What two launches of a case's sizes are called with."""
    t = {name: matrix.to(BF16) for name, matrix in case.tensors().items()}
    x, weight, s, B = t["x"], t["weight"].t(), t["s"], t["lora_B"]
    return (x, weight, s, B), (x.flip(0), weight, s, B.flip(0))


def call_cut(given, counters):
    tiles = counters.numel()
    y, partials = torch.empty(140, 136, dtype=BF16), torch.empty(tiles * 2 * 128 * 128)
    torch.ops.lorafast_cuda.linear_expand(
        *given, 1.0, None, SEED, 9000, 1.1, y, partials, counters, 128, 2
    )
    return y


CUT = Case("bf16", 140, 336, 136, 16, True)


def test_two_launches_whose_ctas_take_turns():
    both, alone = two_of(CUT), []
    for given in both:
        with launched(80):
            alone.append(call_cut(given, torch.zeros(4, dtype=torch.int32)))
    for seed in range(5):
        counters = [torch.zeros(4, dtype=torch.int32) for _ in both]
        with SideBySide(80, seed, 1 + seed):
            found = [call_cut(given, own) for given, own in zip(both, counters, strict=True)]
        assert all(bits(y).equal(bits(right)) for y, right in zip(found, alone, strict=True))
        assert not any(own.any() for own in counters)


def test_two_launches_on_the_same_counters_are_found_out():
    one, other = two_of(CUT)
    common = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(Fault), SideBySide(80, 3, 4):
        call_cut(one, common), call_cut(other, common)


@pytest.mark.parametrize(
    ("M", "K", "N"), [(0, 8, 8), (8, 8, 0), (1, 1, 1), (5, 0, 9), (0, 0, 0)], ids=str
)
def test_empty_and_least(M, K, N):
    machine = hold(Case("bf16", M, K, N, 4, bias=True))
    assert len(machine.run.launches) == (M * N > 0)


def test_nan_and_infinity():
    """In a row of x, in one of s, in a column of W: nowhere else, and not where the mask drops it."""
    case = Case("bf16", 40, 72, 48, 4, True, 0.5)
    t = {name: matrix.to(BF16) for name, matrix in case.tensors().items()}
    t["x"][3, 70], t["x"][4, 1] = torch.nan, torch.inf
    t["s"][7, 3], t["weight"][5, 11] = torch.nan, torch.inf
    y = OnMachine(case).linear_expand(
        t["x"], t["weight"], t["s"], t["lora_B"], 1.0, None, 0.5, SEED, transposed=True
    )
    exact = reference.linear_expand(
        t["x"].double(), t["weight"].double(), t["s"].double(), t["lora_B"].double(), 1.0, None, 0.5,
        SEED, transposed=True,
    )  # fmt: skip
    assert y.isnan().equal(exact.isnan())
    assert y.isinf().equal(exact.isinf())
    assert exact.isinf().any()


def test_a_zero_low_rank_term_changes_no_bit():
    """With B = 0 the result is the base layer's, with r = 0 too."""
    case = Case("bf16", 70, 200, 96, 16)
    t = {name: matrix.to(BF16) for name, matrix in case.tensors().items()}
    zero, none = torch.zeros(96, 16, dtype=BF16), torch.zeros(96, 0, dtype=BF16)
    found = []
    for s, B in ((t["s"], zero), (t["s"][:, :0], none)):
        with launched(80):
            found.append(torch.empty(70, 96, dtype=BF16))
            torch.ops.lorafast_cuda.linear_expand(
                t["x"], t["weight"], s, B, 1.0, None, None, 0, 1.0, found[-1], None, None, 128, 1
            )
    assert bits(found[0]).equal(bits(found[1]))


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_beyond_2_to_the_31(transposed):
    case = Case("bf16", 3, 16, 40, 16, transposed)
    t = {name: matrix.to(BF16) for name, matrix in case.tensors().items()}
    W = t["weight"].t() if transposed else t["weight"]

    def far(matrix):
        rows, columns = matrix.shape
        step = (2**31 // (rows - 1) + columns + 8) // 8 * 8
        whole = torch.empty((rows - 1) * step + columns, dtype=BF16)
        return whole.as_strided((rows, columns), (step, 1)).copy_(matrix)

    found = []
    for lay in (lambda matrix: matrix, far):
        weight = lay(W.t()).t() if transposed else lay(W)
        with launched(80):
            found.append(torch.empty(3, 40, dtype=BF16))
            torch.ops.lorafast_cuda.linear_expand(
                lay(t["x"]), weight, lay(t["s"]), lay(t["lora_B"]), 1.0, None, None, 0, 1.0,
                found[-1], None, None, 128, 1,
            )  # fmt: skip
    assert bits(found[0]).equal(bits(found[1]))


@pytest.mark.parametrize(
    ("columns", "variant"),
    [
        (128, "dx"), (256, "forward"),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((128, "forward"), (256, "dx"))),
    ],
)  # fmt: skip
def test_what_a_tile_takes(columns, variant, monkeypatch):
    """Tensor cores bound it; no banks collide; x and W come once a tile; beside a plain GEMM's the
    low-rank term is little. A mask is instructions, beside which the SM's other CTA multiplies."""
    monkeypatch.setitem(linear_expand.LINEAR_EXPAND, 80, (TILES[columns],))
    subject = Subject("linear_expand", "linear_expand", (8192, 4096, 4096, 16), variant=variant)
    row, bare = cuda_counts.count(subject, 80), plain(subject, 80)
    assert row.tiles == 8192 * 4096 // (128 * columns)
    assert row.bound == "tensor"
    assert row.step.conflicts == 0
    assert row.steps * row.step.sectors * 32 == 2 * 4096 * (128 + columns)
    assert row.in_flight >= 64 << 10
    assert sum(row.step.issued.values()) < 2.7 * row.step.issued["tensor"]
    assert 0.97 * row.cycles["tensor"] > max(v for u, v in row.cycles.items() if u != "tensor")
    beside = row.tile.minus(bare.tile).cycles(RATES[80], from_l2=True)
    assert max(beside.values()) < 0.01 * row.cycles["tensor"]
    assert row.exposed < 0.03 * row.cycles["tensor"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_y_is_stored_in_whole_sectors(dtype):
    """And nothing in shared memory collides."""
    wide = 256 if dtype == "bf16" else 128
    case = Case(dtype, 256, 64, 256, 16, columns=wide)
    t = {name: matrix.to(case.dtype) for name, matrix in case.tensors().items()}
    machine = OnMachine(case)
    y = machine.linear_expand(t["x"], t["weight"], t["s"], t["lora_B"], 1.0)
    (ran,) = machine.run.ran()
    stores = [c for c in ran.counts if c.opcode.startswith("st.global") and c.issued]
    assert {c.opcode for c in stores} == {"st.global.v4.u32"}
    assert sum(c.bytes for c in stores) == y.nbytes == 32 * sum(c.sectors for c in stores)
    for name in ("ldmatrix", "ld.shared", "st.shared", "cp.async"):
        at = [c for c in ran.counts if c.opcode.startswith(name) and c.issued]
        assert at
        assert sum(c.wavefronts for c in at) * 128 == sum(c.bytes for c in at), name


ARGUMENTS = {
    "scaling": 1.0, "bias": None, "seed": None, "threshold": 0, "survivor_scale": 1.0,
    "partials": None, "counters": None, "columns": 128, "splits": 1,
}  # fmt: skip
SCRATCH = {"partials": torch.ones(3 * 128 * 128), "counters": torch.zeros(1, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": torch.ones(4, 96)}, "weight has dtype BFloat16, expected Float beside x"),
        ({"weight": torch.ones(8, 96)}, "weight has dtype Float, expected BFloat16 beside x"),
        ({"weight": torch.ones(8, 88, dtype=BF16)}, "weight is 8 x 88, expected 8 x 96"),
        ({"s": torch.ones(4, 2)}, "s has dtype Float, expected bfloat16 beside x"),
        ({"lora_B": torch.ones(8, 3)}, "lora_B is 8 x 3, expected 8 x 2"),
        ({"bias": torch.ones(7)}, "bias has 1 dimensions and 7 elements, expected a vector of 8"),
        (
            {"x": torch.ones(4, 97, dtype=BF16)[:, 1:]},
            "the rows of x aren't contiguous and aligned",
        ),
        ({"weight": torch.ones(8, 97, dtype=BF16)[:, 1:]}, "neither the rows nor the columns of w"),
        ({"columns": 64}, "columns is 64, expected 128 or 256"),
        ({"splits": 0}, "splits is 0, expected 1 to 3"),
        ({"splits": 4}, "splits is 4, expected 1 to 3"),
        ({"splits": 2}, "partials is None, expected 32768 elements"),
        ({"splits": 3} | SCRATCH | {"counters": None}, "counters is None, expected 1 elements"),
        (
            {"splits": 2} | SCRATCH | {"partials": torch.ones(9)},
            "partials has 9 elements of dtype F",
        ),
        ({"threshold": -1}, "threshold is -1"),
    ],
)
def test_errors(given, said):
    taken = {"x": torch.ones(4, 96, dtype=BF16), "weight": torch.ones(8, 96, dtype=BF16)}
    taken |= {"s": torch.ones(4, 2, dtype=BF16), "lora_B": torch.ones(8, 2), **ARGUMENTS}
    taken |= {"y": torch.ones(4, 8, dtype=BF16)}
    with launched(80), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.linear_expand(**(taken | given))


class TestPlan:
    @pytest.mark.parametrize("arch", [80, 86, 89, 120])
    @pytest.mark.parametrize(
        ("M", "K", "N"), [(8192, 4096, 4096), (8192, 4096, 1024), (512, 4096, 4096), (1, 8, 8)]
    )
    @pytest.mark.parametrize("transposed", [False, True])
    def test_every_architecture_has_a_tile(self, arch, M, K, N, transposed):
        p = problem("linear_expand", M, K, N, transposed=transposed)
        assert isinstance(linear_expand.plan_linear_expand(p, device(arch)), Launch)
        shares = linear_expand.shares_of(p, device(arch))
        assert shares.tile.columns == 128 or arch == 80
        assert shares.splits == 1 or shares.tiles < 2 * 108

    def test_few_tiles_are_cut(self):
        few = linear_expand.shares_of(problem("linear_expand", 512, N=1024), A100)
        assert few.splits > 1
        assert few.partials == few.tiles * few.splits * 128 * few.tile.columns
        assert linear_expand.shares_of(problem("linear_expand"), A100).splits == 1

    def test_a_plan_runs(self):
        """By its own tile and shares, in a row: the mask and the counters of both."""
        p = problem("linear_expand", 40, 2048, 72, 8, bias=True, layouts=Layouts())
        launch = linear_expand.plan_linear_expand(p, Device.known_by("a card", 80, 8))
        assert "K in" in launch.line
        x, W, s, B, bias = (torch.randn(n).to(BF16) for n in
                            ((40, 2048), (72, 2048), (40, 8), (72, 8), (72,)))  # fmt: skip
        with launched(80) as run:
            y = [launch.run(x, W, s, B, 2.0, bias) for _ in range(2)]
        assert [one.op for one in run.launches] == ["linear_expand"] * 2
        given = (x, W, s, B)
        exact = reference.linear_expand(*(t.double() for t in given), 2.0, bias.double())
        eager = reference.linear_expand(*given, 2.0, bias)
        for found in y:
            assert contract.why_broken(found, eager, exact) is None

    def test_float32_where_it_may_be_rounded(self):
        p = problem("linear_expand", dtype=F32, tf32=True)
        assert "128 x 128" in linear_expand.plan_linear_expand(p, A100).line

    def test_what_it_reckons_with(self):
        launch = linear_expand.plan_linear_expand(problem("linear_expand"), A100)
        assert launch.flops == 2 * 8192 * 4096 * (4096 + 16)
        assert launch.moved == 2 * (2 * 8192 * 4096 + 4096**2 + 8192 * 16 + 4096 * 16)
        assert launch.launches == 1

    @pytest.mark.parametrize(
        ("change", "on", "said"),
        [
            ({}, T4, "needs compute capability 8.0, this is 7.5"),
            ({}, H200, "multiplies by mma.sync, too slow for compute capability 9.0"),
            (
                {"dtype": torch.float64},
                A100,
                "x has dtype torch.float64, the fused linear_expand takes",
            ),
            ({"dtype": F32}, A100, "x is in float32, which the fused linear_expand rounds to TF32"),
            ({"format": "nf4"}, A100, "the weight is stored as nf4"),
            ({"r": 0}, A100, "r is 0, the fused linear_expand takes 1 to"),
            ({"K": 2**28}, L4, "the sums have 268435456 terms"),
            ({"M": 2**36, "N": 2**20}, L4, "more than 1073741824 tiles"),
            ({"layouts": Layouts(x=Layout(8))}, L4, "the rows of x aren't aligned to 16 bytes"),
            ({"layouts": Layouts(dy=Layout(8)), "transposed": True}, L4, "the rows of dy aren't"),
            (
                {"layouts": Layouts(weight=Layout(4, 8))},
                L4,
                "neither rows nor columns of the weight",
            ),
        ],
    )
    def test_refusals(self, change, on, said):
        reason = linear_expand.plan_linear_expand(problem("linear_expand", **change), on)
        assert isinstance(reason, str)
        assert said in reason
        assert reason.count(". ") == 0


def device(arch: int) -> Device:
    return Device.known_by("a card", arch, 108)
