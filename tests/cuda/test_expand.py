"""csrc/cuda/expand.cu, executed: ``y = drop(scaling · s·Bᵀ) + bias``, by its plan."""

from dataclasses import replace

import pytest
import torch
from layouts import LAYOUTS
from on_machine import Fault, launched, needs_nvcc, planted
from ptx.plant import EVERY, change, drop
from small_cases import BF16, F16, F32, KINDS, SEED, Case, OnMachine, device

from lorafast import reference
from lorafast.backends.cuda import small
from lorafast.backends.cuda.launch import Launch
from lorafast.reference import contract, keep_mask, wide

pytestmark = needs_nvcc


class WithGaps(OnMachine):
    """Rows at multiples of 16 bytes, NaN between them: what is copied 16 bytes at a time."""

    def _laid_out(self, tensor):
        rows, r = tensor.shape
        whole = tensor.new_full((rows, -(-r // 8) * 8 + 8), torch.nan)
        whole[:, :r] = tensor
        return whole[:, :r]


def hold(case, scaling=1.5, on=OnMachine, **options):
    """The contract, of a case on the machine."""
    t, machine = case.tensors(), on(case, options)

    def call(operations, cast):
        dtype = cast(torch.empty(0)).dtype
        s, lora_B = cast(t.s, wide(case.dtype)), cast(t.lora_B, KINDS[case.kind][1])
        return operations.expand(s, lora_B, scaling, case.dropout_p, SEED, dtype=dtype)

    verdict = contract.compare(call, machine, case.dtype)
    assert verdict.why_broken is None, verdict.why_broken
    return machine.run


def of(kind, M, N, r, **more):
    return Case(kind, M, 0, N, r, **more)


QUICK = [
    of("bf16", 70, 200, 16),
    of("bf16", 300, 257, 17, dropout_p=0.5),
    of("bf16+fp32", 1, 33, 1, dropout_p=0.1),
    of("bf16", 33, 40, 256, arch=80),
    of("fp16", 130, 72, 3, dropout_p=0.1, arch=80),
    of("fp16+fp32", 40, 136, 64),
    of("fp32", 130, 100, 16, dropout_p=0.1),
    of("fp16", 300, 257, 17, dropout_p=0.5, arch=75),
    of("fp16+fp32", 70, 200, 40, arch=75),
    of("fp32", 130, 100, 3, dropout_p=0.1, arch=75),
]
MORE = [
    of(kind, M, N, r, dropout_p=p, arch=arch)
    for kind in KINDS
    for arch in (75, 80, 90)
    if arch > 75 or "bf16" not in kind
    for M, N, r, p in (
        (300, 200, 16, 0.0), (257, 129, 1, 0.1), (64, 64, 3, 0.5), (31, 264, 17, 0.0),
        (129, 96, 64, 0.1), (40, 200, 256, 0.1), (600, 24, 33, 0.0),
    )
]  # fmt: skip
OTHERS = [
    of("fp32", 65, 31, 17, arch=86),
    of("fp32", 9, 24, 256, arch=120),
    of("bf16", 40, 72, 16, dropout_p=1.0, arch=100),
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
    hold(of("bf16", 41, 72, 24, dropout_p=0.1, layout=layout))
    hold(of("fp32", 41, 40, 6, layout=layout))
    hold(of("fp16+fp32", 41, 72, 6, layout=layout, arch=75))


@pytest.mark.parametrize("r", [3, 20, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_gaps(kind, r):
    for arch in (75, 90)["bf16" in kind :]:
        hold(of(kind, 150, 72, r, dropout_p=0.1, arch=arch), on=WithGaps)


@pytest.mark.parametrize("kind", KINDS)
def test_bias_is_added_before_y_is_rounded(kind):
    case = of(kind, 37, 44, 5, dropout_p=0.5, bias=True)
    dtype, adapters = KINDS[kind]
    t, machine = case.tensors(), OnMachine(case)
    s, B, bias = t.s.to(wide(dtype)), t.lora_B.to(adapters), t.bias.to(dtype)
    found = machine.expand(s, B, 2.0, 0.5, SEED, dtype=dtype, bias=bias)
    B64 = B.to(wide(dtype)).double()
    exact = reference.expand(s.double(), B64, 2.0, 0.5, SEED, dtype=torch.float64) + bias.double()
    unit = torch.finfo(dtype).eps * exact.abs() + 1e-5
    assert ((found.double() - exact).abs() <= unit).all()


@pytest.mark.parametrize(("dtype", "N"), [(BF16, 77), (F32, 100), (F16, 64)])
def test_the_mask_is_everyones(dtype, N):
    kind = {BF16: "bf16", F16: "fp16", F32: "fp32"}[dtype]
    case = of(kind, 70, N, 2, dropout_p=0.3)
    s, B = torch.ones(70, 2, dtype=wide(dtype)), torch.ones(N, 2, dtype=dtype)
    y = OnMachine(case).expand(s, B, 1.0, 0.3, SEED, dtype=dtype)
    assert (y != 0).equal(keep_mask(70, N, 0.3, SEED))


@pytest.mark.parametrize(
    ("kind", "arch"), [("bf16", 90), ("fp16+fp32", 90), ("fp32", 90), ("fp16+fp32", 75)]
)
def test_schedules_change_no_bit(kind, arch):
    case = of(kind, 300, 104, 20, dropout_p=0.2, arch=arch)
    t, found = case.tensors(), []
    dtype, adapters = KINDS[kind]
    for seed in range(5):
        machine = OnMachine(case, {"seed": seed, "resident": (1, 2, 4)[seed % 3]})
        s, B = t.s.to(wide(dtype)), t.lora_B.to(adapters)
        found.append(machine.expand(s, B, 0.5, 0.2, SEED, dtype=dtype))
    assert all(y.equal(found[0]) for y in found)
    assert machine.run.launches[0].grid[1] > 1


@pytest.mark.parametrize(("M", "N"), [(0, 8), (8, 0), (1, 1)])
def test_empty_and_least(M, N):
    run = hold(of("bf16", M, N, 4))
    assert len(run.launches) == (M * N > 0)


def test_nan_and_infinity():
    case = of("fp32", 3, 16, 4, dropout_p=0.5)
    s, B = torch.ones(3, 4), torch.ones(16, 4)
    s[0, 0], s[1, 1] = float("nan"), float("inf")
    y = OnMachine(case).expand(s, B, 1.0, 0.5, SEED, dtype=F32)
    keep = keep_mask(3, 16, 0.5, SEED)
    assert y[0].isnan().equal(keep[0])
    assert y[1].isinf().equal(keep[1])
    assert (y[~keep] == 0).all()
    assert (y[2][keep[2]] == 8).all()


def test_strides_beyond_2_to_the_31():
    case = of("bf16", 3, 40, 16)
    whole = torch.empty(2**31 + 64, dtype=BF16)
    far = whole.as_strided((3, 16), (2**30 + 8, 1))
    factors = torch.empty(2**31 + 64, dtype=BF16).as_strided((40, 16), (1, 2**27))
    s, B = torch.randn(3, 16).to(BF16), torch.randn(40, 16).to(BF16)
    far.copy_(s), factors.copy_(B)
    found = small.plan_expand(case.problem("expand"), device()).run
    with launched(90):
        y = found(far, factors, 1.0)
    with launched(90):
        assert y.equal(found(s, B, 1.0))


@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize(
    ("sizes", "dropout_p"),
    [((70, 200, 16), 0.0), ((300, 257, 5), 0.5), ((33, 36, 20), 0.0), ((1, 1, 1), 0.0)],
)
def test_onto_what_y_has(sizes, dropout_p, arch):
    """In place, both terms added in float32 before they are rounded."""
    M, N, _ = sizes
    case = of("fp16+fp32", *sizes, dropout_p=dropout_p, arch=arch)
    t = case.tensors()
    s, B = t.s.float(), t.lora_B.float()
    y = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).half()
    before = y.clone()
    launch = small.plan_expand(case.problem("expand"), device(arch, 3))
    with launched(arch):
        assert launch.run(s, B, 1.5, dropout_p, SEED, None, y) is y
    low = reference.expand(s.double(), B.double(), 1.5, dropout_p, SEED, dtype=torch.float64)
    exact = before.double() + low
    unit = torch.finfo(F16).eps / 2 * exact.abs() + 1e-6 * low.abs() + 2.0**-24
    assert ((y.double() - exact).abs() <= unit).all()


def test_onto_other_dtypes_nothing_is_added():
    s, B, y = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, 5)
    said = "y has dtype Float, onto float16 alone can be added"
    with launched(80) as run, pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.expand(s, B, 1.0, None, None, 0, 1.0, y, 1, 1, True)
    assert not run.launches


COUNTED = [
    ("bf16", 16, 0.0, 8),
    ("bf16", 64, 0.1, 26),
    ("fp16", 16, 0.1, 50),
    ("fp32", 16, 0.1, 58),
]


@pytest.mark.parametrize(("kind", "r", "dropout_p", "most"), COUNTED)
def test_what_it_takes(kind, r, dropout_p, most):
    """y leaves in whole sectors, 16 bytes a thread; s comes once; no banks collide; few instructions an
    element of a lane, beside those that a CTA begins with."""
    dtype, adapters = KINDS[kind]
    steps = {}
    for blocks in (2, 4):
        M = 64 * blocks
        s, B = torch.ones(M, r, dtype=wide(dtype)), torch.ones(128, r, dtype=adapters)
        threshold = round(dropout_p * 65536)
        with launched(90) as run:
            y = torch.empty(M, 128, dtype=dtype)
            torch.ops.lorafast_cuda.expand(
                s, B, 1.0, None, SEED, threshold, 1.1, y, 4, blocks, False
            )
        (ran,) = run.ran()
        steps[blocks] = ran.steps
        stores = [c for c in ran.counts if c.opcode.startswith("st.global") and c.issued]
        assert {c.opcode for c in stores} == {"st.global.v4.u32"}
        size = y.numel() * y.element_size()
        assert sum(c.bytes for c in stores) == size == 32 * sum(c.sectors for c in stores)
        copied = sum(c.sectors for c in ran.counts if c.opcode.startswith("cp.async"))
        assert 32 * copied == s.numel() * s.element_size()
        reads = ("ld.shared", "ldmatrix")
        loads = [c for c in ran.counts if c.opcode.startswith(reads) and c.issued]
        assert sum(c.wavefronts for c in loads) * 128 == sum(c.bytes for c in loads)
    assert (steps[4] - steps[2]) * 32 / (128 * 128) < most


ARGUMENTS = {"scaling": 1.0, "bias": None, "seed": None, "threshold": 0, "survivor_scale": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"s": torch.ones(4, 2)}, "s has dtype Float, expected bfloat16"),
        ({"lora_B": torch.ones(8, 3)}, "lora_B is 8 x 3, expected 8 x 2"),
        ({"bias": torch.ones(7)}, "bias has 1 dimensions and 7 elements, expected a vector of 8"),
        ({"s": torch.ones(4, 0, dtype=BF16), "lora_B": torch.ones(8, 0)}, "r is 0"),
        ({"column_warps": 3}, "column_warps is 3, expected 1, 2 or 4"),
        ({"row_blocks": 0}, "row_blocks is 0, expected 1 to 16777215"),
        ({"row_blocks": 1 << 40}, "row_blocks is 1099511627776, expected 1 to 16777215"),
        ({"threshold": -1}, "threshold is -1"),
        ({"s": torch.ones(4, 600, dtype=BF16), "lora_B": torch.ones(8, 600)}, "of shared memory"),
    ],
)
def test_errors(given, said):
    taken = {"s": torch.ones(4, 2, dtype=BF16), "lora_B": torch.ones(8, 2), **ARGUMENTS}
    taken |= {"y": torch.ones(4, 8, dtype=BF16), "column_warps": 4, "row_blocks": 1, "onto": False}
    with launched(90), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.expand(**(taken | given))


FAULTS = {
    "no barrier before B and s are read": ("bf16", drop(r"bar(rier)?\.sync")),
    "s is read before it is there": ("bf16", drop(r"cp\.async\.wait_group")),
    "all bytes of a tail of s are read": (
        "bf16", change(r"(cp\.async\.cg.*), 16, %r\d+;", r"\1, 16, 16;", EVERY),
    ),
    "a row beyond the last": ("bf16", change(r"setp\.(lt|ge)\.s64", "setp.ne.s64", EVERY)),
    "a rank beyond the last": ("bf16", change(r"setp\.(lt|ge)\.s32", "setp.ne.s32", EVERY)),
    "neighbours exchange nothing": ("fp32", change(r"shfl\.sync\.bfly", "shfl.sync.up", EVERY)),
    "two tiles are one": ("bf16", change(r"(ld\.shared\.v4\.u32 .*)\+512\]", r"\1]", 0)),
    "the small product is left out": ("fp32", drop(r"sub\.f32", EVERY)),
}  # fmt: skip


FAULTS_OF_SM75 = {
    "no barrier before B and s are read": drop(r"bar(rier)?\.sync"),
    "a chunk of s stays where it is": drop(r"st\.shared\.v4", 0),
    "a product is left out": drop(r"fma\.rn\.f32", 5),
    "s of another row": change(r"(ld\.shared\.v4\.f32\s.*)\+16\]", r"\1]", 0),
}


def hold_planted(kind, edit=None, arch=90):
    for seed in range(5):
        hold(of(kind, 150, 200, 20, arch=arch), on=WithGaps, seed=seed, edit=edit)


@pytest.mark.parametrize("name", FAULTS)
def test_planted(name):
    kind, edit = FAULTS[name]
    with pytest.raises((Fault, AssertionError)):
        hold_planted(kind, planted("expand_kernel", edit))


@pytest.mark.parametrize("name", FAULTS_OF_SM75)
def test_planted_on_sm_75(name):
    with pytest.raises((Fault, AssertionError)):
        hold_planted("fp16+fp32", planted("expand_kernel", FAULTS_OF_SM75[name]), 75)


@pytest.mark.parametrize(("kind", "arch"), [("bf16", 90), ("fp32", 90), ("fp16+fp32", 75)])
def test_without_a_fault_it_passes(kind, arch):
    hold_planted(kind, arch=arch)


class TestPlan:
    @pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
    @pytest.mark.parametrize(("M", "N"), [(8192, 4096), (1, 4096), (512, 20), (70_000_000, 8)])
    @pytest.mark.parametrize("r", [1, 16, 64, 256, 512])
    @pytest.mark.parametrize("kind", ["bf16", "fp32"])
    def test_every_architecture_has_a_tile(self, arch, M, N, r, kind):
        launch = small.plan_expand(of(kind, M, N, r).problem("expand"), device(arch, 100))
        assert isinstance(launch, Launch)
        assert launch.launches == 1
        across, down = (int(n) for n in launch.line.split(": ")[1].split(" CTAs")[0].split(" x "))
        assert down <= 65535
        rows, columns = (int(n) for n in launch.line.split(", ")[1].split(" x "))
        assert across * columns >= N
        assert rows * columns == 8 * 32 * 32

    def test_what_it_reckons_with(self):
        launch = small.plan_expand(of("bf16", 8192, 4096, 16).problem("expand"), device(90, 132))
        assert launch.flops == 2 * 8192 * 4096 * 16
        assert launch.moved == 2 * (8192 * 4096 + 8192 * 16 + 4096 * 16)

    @pytest.mark.parametrize(
        ("case", "arch", "said"),
        [
            (of("bf16", 4, 8, 0), 90, "r is 0"),
            (of("bf16", 4, 8, 2000), 90, "r is 2000, expand keeps up to 1024"),
            (of("fp32", 4, 8, 513), 90, "r is 513, expand keeps up to 512"),
            (of("bf16", 4, 8, 4), 75, "needs compute capability 8.0 in bfloat16, this is 7.5"),
            (of("fp16", 4, 8, 4), 70, "needs compute capability 7.5, this is 7.0"),
            (of("fp16", 4, 8, 313), 75, "r is 313, expand keeps up to 312 ranks"),
        ],
    )
    def test_refusals(self, case, arch, said):
        reason = small.plan_expand(case.problem("expand"), replace(device(80), capability=arch))
        assert isinstance(reason, str)
        assert said in reason
