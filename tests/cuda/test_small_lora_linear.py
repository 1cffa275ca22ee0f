"""csrc/cuda/lora_linear.cu, executed: a layer's forward in one launch, ``y`` and ``s``."""

from dataclasses import replace

import pytest
import torch
from helpers import covering
from layouts import LAYOUTS
from on_machine import Fault, launched, needs_nvcc, planted
from ptx.plant import EVERY, change, drop
from small_cases import BF16, F16, F32, KINDS, SEED, Case, OnMachine, Reference

from lorafast.backends.cost import Device
from lorafast.backends.cuda import small
from lorafast.backends.cuda.launch import Launch
from lorafast.backends.cuda.tables import SMALL
from lorafast.core.problem import Layout, Layouts
from lorafast.reference import contract, keep_mask

pytestmark = needs_nvcc


def hold(case, scaling=1.5, **options):
    """The contract for y and for s, of a case on the machine."""
    t, machine = case.tensors(), OnMachine(case, options)
    adapters = KINDS[case.kind][1]

    def call(operations, cast, which=0):
        given = cast(t.x), cast(t.weight), cast(t.lora_A, adapters), cast(t.lora_B, adapters)
        bias = None if t.bias is None else cast(t.bias)
        of = operations if operations is machine else Reference
        return of.lora_linear(*given, scaling, bias, case.dropout_p, SEED)[which]

    for which in (0, 1):
        verdict = contract.compare(
            lambda o, cast, which=which: call(o, cast, which), machine, case.dtype
        )
        assert verdict.why_broken is None, f"{'ys'[which]}: {verdict.why_broken}"
    return machine.run


QUICK = [
    Case("bf16", 70, 200, 136, 16, 0.0, True),
    Case("bf16", 40, 257, 130, 17, 0.5, True, stages=4),
    Case("bf16+fp32", 130, 72, 70, 3, 0.1, columns=32, stages=2, arch=80),
    Case("bf16", 1, 40, 40, 64, 0.0, columns=32),
    Case("bf16+fp32", 65, 520, 65, 64, 0.1, True),
    Case("fp16", 70, 136, 72, 16, 0.1, True, arch=80),
    Case("fp16", 17, 65, 33, 1, 0.0, columns=32),
    Case("fp16+fp32", 33, 200, 96, 17, 0.5, True),
    Case("fp32", 70, 200, 72, 16, 0.1, True),
    Case("fp32", 20, 37, 130, 3, 0.0, arch=80),
    Case("bf16+fp32", 1, 1, 1, 1),
]
MORE = [
    Case(kind, M, K, N, r, p, bias, arch=arch, columns=columns, stages=stages)
    for kind, arch, (M, K, N, r, p, bias, columns, stages) in covering(
        list(KINDS),
        (80, 90),
        (
            (130, 264, 200, 16, 0.0, True, 64, 3), (64, 64, 64, 64, 0.1, False, 64, 2),
            (1, 24, 1, 1, 0.0, True, 32, 4), (63, 129, 31, 17, 0.5, True, 32, 3),
            (100, 384, 96, 32, 0.0, False, 32, 3), (67, 1000, 24, 8, 0.1, True, 64, 4),
        ),
    )
]  # fmt: skip
OTHERS = [
    Case("fp16+fp32", 9, 48, 40, 64, arch=86, columns=32),
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
    hold(Case("bf16", 41, 72, 40, 5, 0.1, layout=layout))
    # Of equal terms what two TF32 leave out of a float32 adds up, one in four by its last bit: more than
    # the contract allows for the s of 40 such terms, where PyTorch hardly rounds.
    K = 200 if layout == "one column expanded" else 40
    hold(Case("fp16+fp32", 19, K, 24, 3, layout=layout, columns=32))
    hold(Case("fp32", 19, K, 24, 3, 0.1, layout=layout))


def run_of(case, wants=("y", "s")):
    return small._run_lora_linear(
        case.problem("lora_linear", wants=wants), case.columns, case.stages
    )


def given(case):
    dtype, adapters = KINDS[case.kind]
    t = case.tensors()
    bias = None if t.bias is None else t.bias.to(dtype)
    A, B = t.lora_A.to(adapters), t.lora_B.to(adapters)
    return t.x.to(dtype), t.weight.to(dtype), A, B, 0.5, bias, case.dropout_p, SEED


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_change_no_bit(kind):
    case, found = Case(kind, 70, 150, 136, 20, 0.2, True, columns=32), []
    for seed in range(5):
        with launched(90, seed=seed, resident=(1, 2, 4)[seed % 3]):
            found.append(run_of(case)(*given(case)))
    for y, s in found:
        assert y.equal(found[0][0])
        assert s.equal(found[0][1])


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_a_tile_changes_no_bit(kind):
    case, found = Case(kind, 70, 150, 136, 20, 0.2, True), []
    for columns, stages in ((64, 3), (32, 2), (32, 4)):
        with launched(90):
            found.append(run_of(replace(case, columns=columns, stages=stages))(*given(case)))
    assert all(y.equal(found[0][0]) and s.equal(found[0][1]) for y, s in found)


def test_s_is_not_written_unless_it_is_wanted():
    case = Case("bf16", 70, 64, 72, 4)
    with launched(90) as run:
        y, s = run_of(case, ("y",))(*given(case))
    assert s is None
    with launched(90):
        assert y.equal(run_of(case)(*given(case))[0])
    assert run.launches[0].kernel == "lora_linear_kernel"
    assert len(run.launches) == 1


@pytest.mark.parametrize(("dtype", "K"), [(BF16, 77), (F32, 36), (F16, 64)])
def test_the_mask_is_everyones(dtype, K):
    """A picks one column of x: s is where that is kept."""
    kind = {BF16: "bf16", F16: "fp16", F32: "fp32"}[dtype]
    keep = keep_mask(70, K, 0.3, SEED)
    for first in (0, K - 16):
        case = Case(kind, 70, K, 8, 16, 0.3)
        A = torch.zeros(16, K, dtype=dtype)
        A[:, first : first + 16] = torch.eye(16)
        x, W, B = torch.ones(70, K), torch.ones(8, K), torch.ones(8, 16)
        with launched(90):
            _, s = run_of(case)(x.to(dtype), W.to(dtype), A, B.to(dtype), 1.0, None, 0.3, SEED)
        assert (s != 0).equal(keep[:, first : first + 16])


@pytest.mark.parametrize(("M", "N"), [(0, 8), (8, 0)])
def test_empty(M, N):
    case = Case("bf16", M, 16, N, 4)
    with launched(90) as run:
        y, _ = run_of(case, ("y",))(*given(case))
    assert y.shape == (M, N)
    assert not run.launches


def test_nan_and_infinity():
    case = Case("fp32", 3, 8, 8, 2, 0.5)
    x, A = torch.ones(3, 8), torch.full((2, 8), 1.0 - 2.0**-20)
    W, B = torch.full((8, 8), 1.0 - 2.0**-20), torch.ones(8, 2)
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    with launched(90):
        y, s = run_of(case)(x, W, A, B, 1.0, None, 0.5, SEED)
    keep = keep_mask(3, 8, 0.5, SEED)
    assert y[0].isnan().all()
    assert (y[1] == float("inf")).all()
    assert y[2].isfinite().all()
    assert s[0].isnan().all() == keep[0, 1]
    assert (s[1] == float("inf")).all() == keep[1, 2]


def test_the_greatest_of_float32():
    """What would round to infinity in TF32 doesn't."""
    case = Case("fp32", 2, 4, 8, 1)
    most = torch.finfo(torch.float32).max
    x, W = torch.zeros(2, 4), torch.zeros(8, 4)
    x[0, 0], x[1, 1], W[:, :2] = most, -most, 0.25
    with launched(90):
        y, _ = run_of(case)(x, W, torch.ones(1, 4) * 1e-30, torch.zeros(8, 1), 1.0)
    assert torch.allclose(y[0].double(), torch.tensor(most, dtype=torch.float64) / 4, rtol=1e-6)
    assert torch.allclose(y[1].double(), torch.tensor(-most, dtype=torch.float64) / 4, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bf16+fp32", "fp16+fp32"])
def test_infinite_float32_adapters(kind):
    case = Case(kind, 2, 8, 8, 2)
    dtype = case.dtype
    A = torch.ones(2, 8)
    A[0, 3], A[1, 3] = float("inf"), 1e30
    x = torch.ones(2, 8, dtype=dtype)
    with launched(90):
        _, s = run_of(case)(x, torch.ones(8, 8, dtype=dtype), A, torch.zeros(8, 2), 1.0)
    assert (s[:, 0] == float("inf")).all()
    assert torch.allclose(s[:, 1].float(), torch.tensor(1e30), rtol=1e-2)


def test_strides_beyond_2_to_the_31():
    case = Case("bf16", 3, 40, 5, 4)
    x, W, A, B, *rest = given(case)
    far = torch.empty(2**31 + 64, dtype=BF16).as_strided((3, 40), (2**30 + 8, 1))
    further = torch.empty(2**31 + 64, dtype=BF16).as_strided((5, 40), (1, 5 * 2**23))
    far.copy_(x), further.copy_(W)
    with launched(90):
        expected = run_of(case)(x, W, A, B, *rest)
    with launched(90):
        found = run_of(case)(far, W, A, B, *rest)
    with launched(90):
        found_too = run_of(case)(x, further, A, B, *rest)
    assert found[0].equal(expected[0])
    assert found_too[0].equal(expected[0])


def test_two_launches_in_a_row():
    case = Case("bf16", 70, 72, 40, 4, 0.1)
    with launched(90):
        run = run_of(case)
        first, second = run(*given(case)), run(*given(case))
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])


COUNTED = [
    ("bf16", 16, 0.0, 64, 40, 240),
    ("bf16", 16, 0.1, 64, 40, 720),
    ("bf16+fp32", 16, 0.0, 64, 40, 310),
    ("bf16", 64, 0.0, 32, 48, 330),
    ("fp16", 16, 0.0, 64, 40, 265),  # s is summed apart
    ("fp16+fp32", 16, 0.0, 64, 80, 1200),
    ("fp32", 16, 0.1, 64, 200, 2200),
]


@pytest.mark.parametrize(("kind", "r", "dropout_p", "columns", "products", "most"), COUNTED)
def test_what_a_block_takes(kind, r, dropout_p, columns, products, most):
    """Of a warp in a block of K: so many products, no banks that collide, few other instructions; x, W
    and A come in whole sectors."""
    dtype, adapters = KINDS[kind]
    elements, ran = 128 // dtype.itemsize, {}
    for blocks in (4, 6):
        case = Case(kind, 64, blocks * elements, columns, r, dropout_p, columns=columns)
        x, W, A, B, *_ = given(case)
        with launched(90) as run:
            run_of(case, ("y",))(x, W, A, B, 1.0, None, dropout_p, SEED)
        (ran[blocks],) = run.ran()
        for name in ("ld.shared", "cp.async.cg"):
            found = [c for c in ran[blocks].counts if c.opcode.startswith(name)]
            assert sum(c.wavefronts for c in found) * 128 == sum(c.bytes for c in found)
        copied = (64 + columns) * 128 + r * elements * adapters.itemsize
        assert sum(c.bytes for c in found) == blocks * copied == sum(c.sectors * 32 for c in found)
        stores = [c for c in ran[blocks].counts if c.opcode.startswith("st.global") and c.issued]
        assert sum(c.bytes for c in stores) == 64 * columns * dtype.itemsize
        assert sum(c.sectors * 32 for c in stores) == sum(c.bytes for c in stores)
    two_of_four_warps = 8
    assert (ran[6].issued("mma") - ran[4].issued("mma")) / two_of_four_warps == products
    assert (ran[6].steps - ran[4].steps) / two_of_four_warps < most


FAULTS = {
    "no barrier in the loop": drop(r"bar(rier)?\.sync"),
    "copies that nobody waits for": drop(r"cp\.async\.wait_group", EVERY),
    "a wait for a group fewer": change(r"wait_group 1", "wait_group 2"),
    "no group of the first stages": drop(r"cp\.async\.commit_group", 0),
    "no group in the loop": drop(r"cp\.async\.commit_group", -1),
    "rows beyond the matrix": change(r"setp\.(lt|ge|gt|le)\.s32", "setp.ne.s32", EVERY),
    "a row of y beyond the last": change(r"setp\.(lt|ge)\.s64", "setp.ne.s64", EVERY),
    "the next tile of W": change(r"(ld\.shared\.v4\.u32 .*)\+256\]", r"\1]", 0),
    "a product is left out": drop(r"mma\.sync", 7),
}


def hold_planted(edit=None):
    case = Case("bf16", 70, 328, 136, 20, bias=True)
    for seed in range(5):
        hold(case, seed=seed, edit=edit)


@pytest.mark.parametrize("name", FAULTS)
def test_planted(name):
    with pytest.raises((Fault, AssertionError)):
        hold_planted(planted("lora_linear_kernel", FAULTS[name]))


def test_without_a_fault_it_passes():
    hold_planted()


ARGUMENTS = {"scaling": 1.0, "bias": None, "seed": None, "threshold": 0, "survivor_scale": 1.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight": torch.ones(8, 6)}, "weight is 8 x 6, expected 8 x 4"),
        ({"weight": torch.ones(8, 4, dtype=F16)}, "weight or y has another dtype than x"),
        ({"lora_A": torch.ones(2, 4, dtype=F16)}, "lora_A has dtype Half, expected float32 or"),
        ({"lora_B": torch.ones(8, 3)}, "lora_B is 8 x 3, expected 8 x 2"),
        ({"bias": torch.ones(8, 1)}, "bias has 2 dimensions"),
        ({"s": torch.ones(3, 2)}, "s has dtype Float, expected bfloat16 beside that"),
        ({"lora_A": torch.ones(65, 4), "lora_B": torch.ones(8, 65), "s": None}, "r is 65"),
        ({"columns": 48}, "a tile has 48 columns, expected 32 or 64"),
        ({"stages": 5}, "stages is 5, expected 2 to 4"),
        ({"threshold": 70000}, "threshold is 70000"),
    ],
)
def test_errors(changed, said):
    taken = {"x": torch.ones(3, 4, dtype=BF16), "weight": torch.ones(8, 4, dtype=BF16)}
    taken |= {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(8, 2), **ARGUMENTS}
    taken |= {"y": torch.ones(3, 8, dtype=BF16), "s": torch.ones(3, 2, dtype=BF16)}
    taken |= {"columns": 64, "stages": 3}
    with launched(90), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.lora_linear(**(taken | changed))


def h100():
    return Device.known_by("NVIDIA H100 80GB HBM3", 90, 132, 1.98e9, 2.619e9, 5120)


class TestPlan:
    @pytest.mark.parametrize("arch", [arch for arch in SMALL if arch >= 80])  # 75 has expand alone
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("r", [1, 17, 64])
    def test_every_architecture_has_stages(self, arch, kind, r):
        p = Case(kind, 64, 64, 64, r).problem("lora_linear", wants=("y", "s"))
        for columns in (32, 64):
            stages = small._stages(p, SMALL[arch], columns)
            # what the kernel declares itself counts too
            assert small.shared_bytes(p, columns, stages) + 16 <= SMALL[arch].shared

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("columns", [32, 64])
    def test_it_knows_the_shared_memory_of_a_cta(self, kind, columns):
        case = Case(kind, 4, 16, 8, 20, columns=columns)
        with launched(90) as run:
            run_of(case)(*given(case))
        p = case.problem("lora_linear", wants=("y", "s"))
        assert run.launches[0].shared == small.shared_bytes(p, columns, case.stages)

    @pytest.mark.parametrize(
        ("M", "K", "N"), [(64, 64, 64), (512, 384, 384), (512, 384, 1536), (512, 1536, 384)]
    )
    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    def test_tiny_models_take_it(self, M, K, N, dropout_p):
        """The layers of ``tiny-llama`` and ``minilm``."""
        p = Case("bf16+fp32", M, K, N, 16, dropout_p).problem("lora_linear", wants=("y", "s"))
        launch = small.plan_lora_linear(p, h100())
        assert isinstance(launch, Launch), launch
        assert launch.launches == 1

    @pytest.mark.parametrize(("M", "K", "N"), [(8192, 4096, 4096), (8192, 4096, 1024)])
    def test_large_layers_do_not(self, M, K, N):
        p = Case("bf16", M, K, N, 16).problem("lora_linear", wants=("y", "s"))
        assert "one launch that shrinks in every tile takes longer" in small.plan_lora_linear(
            p, h100()
        )

    def test_rows_that_are_not_aligned_cost_more(self):
        p = Case("bf16", 512, 383, 384, 16).problem("lora_linear", wants=("y", "s"))
        narrow = p._replace(layouts=Layouts(x=Layout(2), weight=Layout(2), lora_A=Layout(2)))
        assert small.seconds_in_one(narrow, h100(), 64) > small.seconds_in_one(p, h100(), 64)

    @pytest.mark.parametrize(
        ("changed", "arch", "said"),
        [
            ({"r": 65}, 90, "r is 65, a layer in one launch takes 1 to 64"),
            ({"K": 0}, 90, "K is 0"),
            ({"adapter_dtype": F16}, 90, "adapters have dtype torch.float16"),
            ({"dtype": torch.float64}, 90, "x has dtype torch.float64"),
            ({"format": "nf4"}, 90, "the weight is stored as nf4"),
            ({"M": 1 << 23}, 90, "M is 8388608"),
            ({}, 75, "needs compute capability 8.0, this is 7.5"),
        ],
    )
    def test_refusals(self, changed, arch, said):
        p = Case("bf16", 4, 16, 8, 4).problem("lora_linear", wants=("y", "s"))._replace(**changed)
        reason = small.plan_lora_linear(p, replace(h100(), capability=arch))
        assert isinstance(reason, str)
        assert said in reason
