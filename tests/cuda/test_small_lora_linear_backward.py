"""csrc/cuda/lora_linear_backward.cu, executed: a layer's backward in one launch."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import covering
from layouts import LAYOUTS
from on_machine import Fault, launched, needs_nvcc, planted
from ptx.plant import EVERY, after, before, change, drop
from side_by_side import SideBySide
from small_cases import BF16, F16, F32, KINDS, SEED, Case, OnMachine, Reference

import lorafast
from lorafast.backends.cost import Device, pretending
from lorafast.backends.cuda import native, small
from lorafast.backends.cuda.launch import Launch
from lorafast.backends.cuda.tables import SMALL
from lorafast.core.problem import Layout, Layouts
from lorafast.reference import contract, keep_mask, wide

pytestmark = needs_nvcc

ALL = ("dx", "dA", "dB", "dbias")
SLOW = pytest.mark.slow


def hold(case, scaling=1.5, wants=ALL, **options):
    """The contract for each gradient of a case on the machine."""
    t, machine, found = case.tensors(), OnMachine(case, options), {}
    dtype, adapters = KINDS[case.kind]

    def call(operations, cast, name):
        def gradients(of):
            A, B = cast(t.lora_A, adapters), cast(t.lora_B, adapters)
            return of.lora_linear_backward(
                cast(t.dy), cast(t.x), cast(t.weight), A, B, cast(t.s, wide(dtype)), scaling,
                wants=wants, dropout_p=case.dropout_p, seed=SEED,
            )  # fmt: skip

        if operations is not machine:
            return gradients(Reference)[wants.index(name)]
        if not found:
            found.update(zip(wants, gradients(machine), strict=True))
        return found[name]

    for name in wants:
        verdict = contract.compare(
            lambda o, cast, name=name: call(o, cast, name), machine, case.dtype
        )
        assert verdict.why_broken is None, f"{name}: {verdict.why_broken}"
    return machine.run


QUICK = [
    Case("bf16", 70, 200, 136, 16),
    Case("bf16", 40, 257, 130, 17, 0.5, stages=4),
    Case("bf16+fp32", 130, 72, 70, 3, 0.1, columns=32, stages=2, arch=80),
    Case("bf16", 1, 40, 40, 64, columns=32),
    Case("bf16+fp32", 65, 65, 264, 64, 0.1),
    Case("fp16", 70, 136, 72, 16, 0.1, arch=80),
    Case("fp16", 17, 65, 33, 1, columns=32),
    Case("fp16+fp32", 33, 96, 200, 17, 0.5, stages=2),
    Case("fp32", 70, 72, 104, 16, 0.1),
    Case("fp32", 20, 37, 130, 3, arch=80),
    Case("bf16+fp32", 1, 1, 1, 1),
]
MORE = [
    Case(kind, M, K, N, r, p, arch=arch, columns=columns, stages=stages)
    for kind, arch, (M, K, N, r, p, columns, stages) in covering(
        list(KINDS),
        (80, 90),
        (
            (130, 264, 200, 16, 0.0, 64, 3), (64, 64, 64, 64, 0.1, 64, 2),
            (1, 24, 1, 1, 0.0, 32, 4), (63, 129, 31, 17, 0.5, 32, 3),
            (100, 96, 384, 32, 0.0, 32, 3), (267, 24, 67, 8, 0.1, 64, 4),
        ),
    )
]  # fmt: skip
OTHERS = [
    Case("fp16+fp32", 9, 48, 40, 64, arch=86, columns=32, stages=2),
    Case("fp32", 65, 64, 33, 64, 1.0, columns=32, arch=100),
    Case("bf16", 66, 130, 40, 24, 0.1, arch=120),
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contract(case):
    hold(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE + OTHERS, ids=str)
def test_contract_at_length(case):
    hold(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """``weight`` as W and as Wᵀ among them."""
    hold(Case("bf16", 41, 72, 40, 5, 0.1, layout=layout))
    hold(Case("fp16+fp32", 19, 40, 24, 3, layout=layout, columns=32))
    hold(Case("fp32", 19, 40, 24, 3, 0.1, layout=layout))


def run_of(case, wants=ALL):
    problem = case.problem("lora_linear_backward", wants=wants)
    return small._run_lora_linear_backward(problem, case.columns, case.stages)


def given(case):
    """``dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed``."""
    dtype, adapters = KINDS[case.kind]
    t = case.tensors()
    dy, x, W, s = t.dy.to(dtype), t.x.to(dtype), t.weight.to(dtype), t.s.to(wide(dtype))
    return dy, x, W, t.lora_A.to(adapters), t.lora_B.to(adapters), s, 0.5, case.dropout_p, SEED


def results(case, wants=ALL, arguments=None, **options):
    """By name what is wanted, of the case or of other arguments."""
    with launched(case.arch, **options):
        dx, dweight, *rest = run_of(case, wants)(*(arguments or given(case)))
    assert dweight is None
    found = dict(zip(ALL, (dx, *rest), strict=True))
    assert all((found[name] is not None) == (name in wants) for name in ALL)
    return {name: found[name] for name in wants}


def assert_same(found, expected):
    for name, gradient in found.items():
        assert gradient.equal(expected[name]), name


@pytest.mark.parametrize(
    "kind",
    ["bf16+fp32", "fp16", "fp32", *(pytest.param(k, marks=SLOW) for k in ("bf16", "fp16+fp32"))],
)
def test_schedules_change_no_bit(kind):
    case = Case(kind, 70, 100, 136, 12, 0.2, columns=32)
    expected = results(case)
    for seed in range(1, 6):
        assert_same(results(case, seed=seed, resident=(1, 2, 4)[seed % 3]), expected)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_a_tile_changes_no_bit(kind):
    case = Case(kind, 70, 100, 136, 12, 0.2)
    expected = results(case)
    for columns, stages in ((32, 2), (32, 4)):
        assert_same(results(replace(case, columns=columns, stages=stages)), expected)


def test_any_gradients_alone_are_the_same():
    """And ask for nothing that they aren't made of."""
    case = Case("bf16+fp32", 70, 72, 80, 5, 0.2)
    expected = results(case)
    dy, x, W, A, B, s, *rest = given(case)
    for count in range(1, 5):
        for wants in itertools.combinations(ALL, count):
            want_dx, want_dA, want_dB = (name in wants for name in ("dx", "dA", "dB"))
            needed = (
                dy, x if want_dA else None, W if want_dx else None, A if want_dx else None,
                B if want_dx or want_dA else None, s if want_dB else None, *rest,
            )  # fmt: skip
            assert_same(results(case, wants, needed), expected)


@pytest.mark.parametrize(("dtype", "K"), [(BF16, 77), (F32, 36), (F16, 64)])
def test_the_mask_is_everyones(dtype, K):
    """With x of ones and ds that picks rows, dA is the mask of these; with ds of ones, dx is where W is
    zero."""
    kind = {BF16: "bf16", F16: "fp16", F32: "fp32"}[dtype]
    case, keep = Case(kind, 70, K, 16, 16, 0.3), keep_mask(70, K, 0.3, SEED)
    W, A, B = torch.zeros(16, K, dtype=dtype), torch.ones(16, K), torch.eye(16)
    s = torch.ones(70, 16, dtype=wide(dtype))
    for first in (0, 54):
        dy = torch.zeros(70, 16, dtype=dtype)
        dy[first : first + 16] = torch.eye(16)
        arguments = (
            dy, torch.ones(70, K, dtype=dtype), W, A.to(dtype), B.to(dtype), s, 1.0, 0.3, SEED
        )  # fmt: skip
        found = results(case, ALL, arguments)
        assert (found["dA"] != 0).equal(keep[first : first + 16])
        assert (found["dx"] != 0)[first : first + 16].equal(keep[first : first + 16])
        assert not found["dx"][:first].any()


def test_no_rows():
    """Sums over rows are zeros."""
    case = Case("bf16", 0, 72, 80, 4)
    found = results(case)
    assert found["dx"].shape == (0, 72)
    assert not any(found[name].any() for name in ("dA", "dB", "dbias"))
    with launched(90) as run:
        run_of(case, ("dx",))(*given(case))
    assert not run.launches


def test_it_is_one_launch():
    case = Case("bf16", 70, 72, 80, 4)
    with launched(90) as run:
        run_of(case)(*given(case))
    (launch,) = run.launches
    assert launch.kernel == "lora_linear_backward_kernel"
    p = case.problem("lora_linear_backward", wants=ALL)
    assert launch.grid == (sum(small.backward_ctas(p, case.columns)), 1, 1)


@pytest.mark.parametrize("kind", ["bf16", "fp16+fp32", "fp32"])
def test_nan_and_infinity(kind):
    case = Case(kind, 3, 40, 8, 2, 0.5)
    dtype, adapters = KINDS[kind]
    dy, x = torch.ones(3, 8, dtype=dtype), torch.ones(3, 40, dtype=dtype)
    W = torch.full((8, 40), 1.0 - 2.0**-8, dtype=dtype)
    A, B = torch.ones(2, 40, dtype=adapters), torch.ones(8, 2, dtype=adapters)
    s = torch.ones(3, 2, dtype=wide(dtype))
    dy[0, 1], dy[1, 2], x[2, 5] = float("nan"), float("inf"), float("inf")
    found = results(case, ALL, (dy, x, W, A, B, s, 1.0, 0.5, SEED))
    keep = keep_mask(3, 40, 0.5, SEED)
    assert found["dx"][0].isnan().all()
    assert (found["dx"][1] == float("inf")).all()
    assert found["dx"][2].isfinite().all()
    assert (found["dB"][1].isnan()).all()
    assert (found["dB"][2] == float("inf")).all()
    assert found["dB"][3:].isfinite().all()
    assert found["dbias"][1].isnan()
    assert found["dbias"][2] == float("inf")
    assert found["dbias"][3:].isfinite().all()
    # NaN times a dropped element's zero is NaN too.
    assert found["dA"].isnan().all()
    finite = dy.clone()
    finite[:2] = 1.0
    found = results(case, ALL, (finite, x, W, A, B, s, 1.0, 0.5, SEED))
    assert ((found["dA"] == float("inf")) == (torch.arange(40) == 5) * keep[2, 5]).all()


def test_strides_beyond_2_to_the_31():
    case = Case("bf16", 3, 40, 5, 4)
    dy, x, W, *rest = given(case)
    far = torch.empty(2**31 + 64, dtype=BF16).as_strided((3, 40), (2**30 + 8, 1))
    further = torch.empty(2**31 + 64, dtype=BF16).as_strided((3, 5), (1, 5 * 2**26))
    heavy = torch.empty(2**31 + 64, dtype=BF16).as_strided((5, 40), (2**29, 1))
    far.copy_(x), further.copy_(dy), heavy.copy_(W)
    expected = results(case)
    assert_same(results(case, arguments=(further, far, W, *rest)), expected)
    assert_same(results(case, arguments=(dy, x, heavy, *rest)), expected)


def common_counters(monkeypatch):
    counters = torch.zeros(3, dtype=torch.int32)
    monkeypatch.setattr(small, "counters", lambda like, count: counters[:count])
    return counters


def test_two_launches_in_a_row(monkeypatch):
    case = Case("bf16", 130, 72, 40, 4, 0.1)
    counters = common_counters(monkeypatch)
    with launched(90, resident=2):
        run = run_of(case)
        first, second = run(*given(case)), run(*given(case))
    assert not counters.any()
    for name, one, other in zip(ALL, (first[0], *first[2:]), (second[0], *second[2:]), strict=True):
        assert one.equal(other), name


def two_of(case):
    dy, x, *rest = given(case)
    return (dy, x, *rest), (dy.flip(0), x.flip(1), *rest)


def test_two_launches_at_once():
    case = Case("bf16", 130, 72, 40, 4, 0.1)
    both = two_of(case)
    alone = [results(case, arguments=arguments) for arguments in both]
    for seed in range(5):
        with SideBySide(90, seed, 1 + seed):
            found = [run_of(case)(*arguments) for arguments in both]
        for (dx, _, *rest), expected in zip(found, alone, strict=True):
            assert_same(dict(zip(ALL, (dx, *rest), strict=True)), expected)


def test_two_launches_at_once_on_the_same_counters(monkeypatch):
    case = Case("bf16", 130, 72, 40, 4, 0.1)
    common_counters(monkeypatch)
    one, other = two_of(case)
    with pytest.raises(Fault), SideBySide(90, 3, 4):
        run_of(case)(*one), run_of(case)(*other)


COUNTED = [
    # kind, r, columns; products and instructions of a block for dx, then for dB
    ("bf16", 16, 64, 40, 245, 8, 120),
    ("bf16+fp32", 16, 64, 40, 350, 8, 120),
    pytest.param("bf16", 64, 32, 48, 335, 32, 200, marks=SLOW),
    pytest.param("fp16", 16, 64, 40, 250, 48, 1010, marks=SLOW),
    ("fp16+fp32", 16, 64, 80, 1150, 48, 1010),
    ("fp32", 16, 64, 200, 2000, 40, 680),
]


def counted(case, wants, blocks):
    with launched(90) as run:
        run_of(case, wants)(*given(case))
    (ran,) = run.ran()
    for name in ("ld.shared", "ldmatrix"):
        found = [c for c in ran.counts if c.opcode.startswith(name)]
        assert sum(c.wavefronts for c in found) * 128 == sum(c.bytes for c in found)
    copies = [c for c in ran.counts if c.opcode.startswith("cp.async.cg")]
    assert sum(c.sectors * 32 for c in copies) == sum(c.bytes for c in copies)
    return ran


@pytest.mark.parametrize(("kind", "r", "columns", "dx", "most", "dB", "most_dB"), COUNTED)
def test_what_a_block_takes(kind, r, columns, dx, most, dB, most_dB):
    """Of a warp in a block: so many products, no banks that collide, few other instructions; matrices
    come in whole sectors, and so is dx stored."""
    dtype, adapters = KINDS[kind]
    elements, ran = 128 // dtype.itemsize, {}
    for blocks in (4, 6):
        along = Case(kind, 64, columns, blocks * elements, r, columns=columns)
        down = Case(kind, blocks * elements, 8, 64, r, columns=columns)
        ran[blocks] = counted(along, ("dx",), blocks), counted(down, ("dB",), blocks)
        of_dx, of_dB = ran[blocks]
        copies = [c for c in of_dx.counts if c.opcode.startswith("cp.async.cg")]
        row = 64 * dtype.itemsize + columns * dtype.itemsize + r * adapters.itemsize
        assert sum(c.bytes for c in copies) == blocks * elements * row
        copies = [c for c in of_dB.counts if c.opcode.startswith("cp.async.cg")]
        row = 64 * dtype.itemsize + r * wide(dtype).itemsize
        assert sum(c.bytes for c in copies) == blocks * elements * row
        stores = [c for c in of_dx.counts if c.opcode.startswith("st.global") and c.issued]
        assert sum(c.bytes for c in stores) == 64 * columns * dtype.itemsize
        assert sum(c.sectors * 32 for c in stores) == sum(c.bytes for c in stores)
    two_of_four_warps = 8
    for which, products, instructions in ((0, dx, most), (1, dB, most_dB)):
        few, many = ran[4][which], ran[6][which]
        assert (many.issued("mma") - few.issued("mma")) / two_of_four_warps == products
        assert (many.steps - few.steps) / two_of_four_warps < instructions


COUNTED_BY = r"atom\.add\.acq_rel"
FAULTS = {
    "no barriers": drop(r"bar(rier)?\.sync", EVERY),
    "copies that nobody waits for": drop(r"cp\.async\.wait_group", EVERY),
    "a wait for a group fewer": change(r"wait_group 1", "wait_group 2", EVERY),
    "no group of the first stages": drop(r"cp\.async\.commit_group", 0),
    "no group in the loop": drop(r"cp\.async\.commit_group", -1),
    "rows beyond the matrix": change(r"setp\.(lt|ge|gt|le)\.s32", "setp.ne.s32", EVERY),
    "a row of dx beyond the last": change(r"setp\.(lt|ge|gt|le)\.s64", "setp.ne.s64", EVERY),
    "a product is left out": drop(r"mma\.sync", 7),
    "lanes exchange with others": change(r"shfl\.sync\.bfly", "shfl.sync.down", EVERY),
    "ds isn't released": change(COUNTED_BY, "atom.add.relaxed", EVERY),
    "ds isn't counted": drop(COUNTED_BY, 0),
    "no barrier before ds is counted": before(COUNTED_BY, drop(r"bar(rier)?\.sync", -1)),
    "ds isn't acquired": change(r"ld\.acquire\.gpu", "ld.relaxed.gpu", EVERY),
    "no barrier after the wait": after(r"ld\.acquire", drop(r"bar(rier)?\.sync", 0), -1),
    "a row block is not waited for": change(r"setp\.(lt|ge)\.u32", r"setp.eq.u32", EVERY),
    "counters stay": drop(r"st\.global\.u32\s+\[%rd\d+\],", -1),
}


def hold_planted(edit=None):
    case = Case("bf16", 130, 136, 328, 20)
    for seed in range(5):
        hold(case, seed=seed, edit=edit)


@pytest.mark.parametrize("name", FAULTS)
def test_planted(name):
    with pytest.raises((Fault, AssertionError)):
        hold_planted(planted("lora_linear_backward_kernel", FAULTS[name]))


def test_without_a_fault_it_passes():
    hold_planted()


ARGUMENTS = {"scaling": 1.0, "seed": None, "threshold": 0, "survivor_scale": 1.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight": None}, "weight is missing, which dx is made of"),
        ({"lora_A": None}, "lora_A is missing, which dx is made of"),
        ({"lora_B": None}, "lora_B is missing, which dx is made of"),
        ({"lora_B": None, "dx": None}, "lora_B is missing, which dA is made of"),
        ({"x": None}, "x is missing, which dA is made of"),
        ({"s": None}, "s is missing, which dB is made of"),
        ({"scratch": None}, "scratch is missing, which dA is made of"),
        ({"counters": None}, "counters is missing, which dA is made of"),
        ({"weight": torch.ones(7, 4, dtype=BF16)}, "weight is 7 x 4, expected 8 x 4"),
        ({"weight": torch.ones(8, 4, dtype=F16)}, "weight or dx has another dtype than dy"),
        ({"lora_A": torch.ones(3, 4)}, "lora_A is 3 x 4, expected 2 x 4"),
        ({"lora_B": torch.ones(8, 2, dtype=F16)}, "lora_B has dtype Half, expected float32 or"),
        ({"x": torch.ones(3, 5, dtype=BF16)}, "x has 5 columns, expected 4"),
        ({"x": torch.ones(3, 4)}, "x has dtype Float, expected that of dy"),
        ({"s": torch.ones(3, 2)}, "s has dtype Float, expected bfloat16 beside that"),
        ({"lora_B": torch.ones(8, 65)}, "r is 65, expected 1 to 64"),
        ({"dx": torch.ones(3, 5, dtype=BF16)}, "dx is 3 x 5, expected 3 x 4"),
        ({"dbias": torch.ones(8)}, "dbias has dtype Float and stride 1, expected neighbours of BF"),
        ({"scratch": torch.ones(3, 2, dtype=BF16)}, "scratch is 3 x 2, expected 3 x 16"),
        ({"counters": torch.zeros(2, dtype=torch.int32)}, "counters has 2 elements of dtype Int"),
        ({"columns": 48}, "a tile has 48 columns, expected 32 or 64"),
        ({"stages": 5}, "stages is 5, expected 2 to 4"),
        ({"threshold": 70000}, "threshold is 70000"),
    ],
)
def test_errors(changed, said):
    bf16 = {"dtype": BF16}
    taken = {
        "dy": torch.ones(3, 8, **bf16), "x": torch.ones(3, 4, **bf16),
        "weight": torch.ones(8, 4, **bf16), "lora_A": torch.ones(2, 4), "lora_B": torch.ones(8, 2),
        "s": torch.ones(3, 2, **bf16), **ARGUMENTS, "dx": torch.ones(3, 4, **bf16),
        "dA": torch.ones(2, 4), "dB": torch.ones(8, 2), "dbias": torch.ones(8, **bf16),
        "scratch": torch.ones(3, 16, **bf16), "counters": torch.zeros(3, dtype=torch.int32),
        "columns": 64, "stages": 3,
    }  # fmt: skip
    with launched(90), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.lora_linear_backward(**(taken | changed))


def h100():
    return Device.known_by("NVIDIA H100 80GB HBM3", 90, 132, 1.98e9, 2.619e9, 5120)


def problem(kind="bf16+fp32", M=512, K=384, N=384, r=16, dropout_p=0.0, wants=ALL):
    return Case(kind, M, K, N, r, dropout_p).problem("lora_linear_backward", wants=wants)


class TestPlan:
    @pytest.mark.parametrize("arch", [arch for arch in SMALL if arch >= 80])  # 75 has expand alone
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("r", [1, 17, 64])
    def test_every_architecture_has_stages(self, arch, kind, r):
        p = problem(kind, 64, 64, 64, r)
        for columns in (32, 64):
            stages = small._stages(p, SMALL[arch], columns, small.backward_shared_bytes)
            # what the kernel declares itself counts too
            assert small.backward_shared_bytes(p, columns, stages) + 16 <= SMALL[arch].shared

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("columns", [32, 64])
    @pytest.mark.parametrize("wants", [ALL, ("dB",)], ids=",".join)
    def test_it_knows_the_shared_memory_of_a_cta(self, kind, columns, wants):
        case = Case(kind, 4, 16, 8, 20, columns=columns)
        with launched(90) as run:
            run_of(case, wants)(*given(case))
        p = case.problem("lora_linear_backward", wants=wants)
        assert run.launches[0].shared == small.backward_shared_bytes(p, columns, case.stages)

    @pytest.mark.parametrize(
        ("M", "K", "N"),
        [(64, 64, 64), (32, 384, 1536), (512, 384, 384), (512, 384, 1536), (512, 1536, 384)],
    )
    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    def test_tiny_models_take_it(self, M, K, N, dropout_p):
        """The layers of ``tiny-llama`` and ``minilm``."""
        launch = small.plan_lora_linear_backward(
            problem(M=M, K=K, N=N, dropout_p=dropout_p, wants=("dx", "dA", "dB")), h100()
        )
        assert isinstance(launch, Launch), launch
        assert launch.launches == 1

    @pytest.mark.parametrize(("M", "K", "N"), [(8192, 4096, 4096), (8192, 4096, 1024)])
    def test_large_layers_do_not(self, M, K, N):
        reason = small.plan_lora_linear_backward(problem(M=M, K=K, N=N), h100())
        assert "a backward in one launch takes longer, modelled" in reason

    def test_rows_that_are_not_aligned_cost_more(self):
        p = problem()
        narrow = p._replace(layouts=Layouts(dy=Layout(2), x=Layout(2), weight=Layout(2)))
        seconds = small.backward_seconds_in_one
        assert seconds(narrow, h100(), 64) > seconds(p, h100(), 64)

    def test_its_line(self):
        launch = small.plan_lora_linear_backward(problem("bf16"), h100())
        assert launch.line == (
            "lora_linear_backward: 60 CTAs, 48 for ds and dx, 64 x 64, 6 for dB and dbias, 6 for dA, "
            "3 stages"
        )
        launch = small.plan_lora_linear_backward(problem("bf16", wants=("dA", "dB")), h100())
        assert (
            launch.line == "lora_linear_backward: 20 CTAs, 8 for ds, 6 for dB, 6 for dA, 3 stages"
        )

    @pytest.mark.parametrize(
        ("changed", "arch", "said"),
        [
            ({"r": 65}, 90, "r is 65, a layer in one launch takes 1 to 64"),
            ({"K": 0}, 90, "K is 0"),
            ({"N": 0}, 90, "N is 0, a backward in one launch takes 1 to"),
            ({"adapter_dtype": F16}, 90, "adapters have dtype torch.float16"),
            ({"dtype": torch.float64}, 90, "x has dtype torch.float64"),
            ({"format": "nf4"}, 90, "the weight is stored as nf4"),
            ({"M": 1 << 23}, 90, "M is 8388608"),
            ({"wants": ("dx", "dweight")}, 90, "dweight is wanted"),
            ({"wants": ()}, 90, "nothing is wanted of the backward"),
            ({}, 75, "needs compute capability 8.0, this is 7.5"),
        ],
    )
    def test_refusals(self, changed, arch, said):
        p = problem("bf16", 4, 16, 8, 4)._replace(**changed)
        reason = small.plan_lora_linear_backward(p, replace(h100(), capability=arch))
        assert isinstance(reason, str)
        assert said in reason


class TestLayer:
    """``nn.LoRALinear`` on a CPU, planned as on an H100; its launches run on the machine."""

    @pytest.fixture
    def layer(self, monkeypatch):
        monkeypatch.setattr(native, "why_unusable", lambda: None)
        for name in ("_run_lora_linear", "_run_lora_linear_backward"):
            monkeypatch.setattr(small, name, self.executed(getattr(small, name)))
        self.launches = []
        torch.manual_seed(0)
        layer = lorafast.nn.LoRALinear(72, 40, bias=True, r=6, dropout=0.25, dtype=BF16)
        torch.nn.init.normal_(layer.lora_B)
        layer.bias.requires_grad_()
        with pretending(h100()):
            yield layer

    def executed(self, make):
        def run_of(*sizes):
            run = make(*sizes)

            def call(*arguments):
                with launched(90) as of:
                    found = run(*arguments)
                self.launches += [launch.kernel for launch in of.launches]
                return found

            return call

        return run_of

    def gradients(self, layer, backend):
        torch.manual_seed(1)
        x = torch.randn(3, 12, 72).to(BF16).requires_grad_()
        with lorafast.use_backend(backend):
            y = layer(x)
            y.backward(torch.randn(3, 12, 40).to(BF16))
        trained = [x, layer.lora_A, layer.lora_B, layer.bias]
        found = [t.grad.clone() for t in trained]
        layer.zero_grad()
        return found

    @pytest.mark.parametrize("autocast", [False, True])
    def test_its_backward_is_one_launch(self, layer, autocast):
        with torch.autocast("cpu", BF16, enabled=autocast):
            found = self.gradients(layer, "cuda")
        assert self.launches == ["lora_linear_kernel", "lora_linear_backward_kernel"]
        exact = layer.double()
        assert [gradient.dtype for gradient in found] == [BF16, F32, F32, BF16]
        for one, other in zip(found, self.gradients_in_float64(exact), strict=True):
            assert (one.double() - other).norm() < 6e-3 * other.norm()

    def gradients_in_float64(self, layer):
        torch.manual_seed(1)
        x = torch.randn(3, 12, 72).to(BF16).double().requires_grad_()
        with lorafast.use_backend("reference"):
            layer(x).backward(torch.randn(3, 12, 40).to(BF16).double())
        return [x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.bias.grad]

    def test_explain_says_so(self, layer):
        with lorafast.use_backend("cuda"):
            said = str(lorafast.explain(layer, torch.empty(36, 72, dtype=BF16)))
        assert (
            "lora_linear_backward: 6 CTAs, 3 for ds and dx, 64 x 32, 1 for dB, 2 for dA, " in said
        )
