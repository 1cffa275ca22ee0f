"""csrc/cuda/linear_expand_sm90.cu, executed: ``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``, by wgmma."""

from dataclasses import replace

import pytest
import torch
from launchers import launchers
from on_machine import launched, needs_nvcc
from side_by_side import SideBySide
from sm90_cases import (
    ARCH,
    BF16,
    F16,
    F32,
    KINDS,
    SEED,
    Case,
    OnMachine,
    bits_of,
    device,
    hold,
)

from lorafast.backends.cuda import wgmma
from lorafast.backends.cuda.launch import Launch
from lorafast.core.problem import Layout, Layouts
from lorafast.reference import keep_mask

pytestmark = needs_nvcc

QUICK = [
    Case("bf16", 130, 72, 264, 16, bias=True, cluster=2),
    Case("bf16", 140, 328, 136, 17, 128, transposed=True, bias=True),
    Case("bf16", 70, 136, 520, 3, 256, dropout_p=0.3, transposed=True, cluster=2),
    Case("bf16+fp32", 1, 8, 8, 1, 128, dropout_p=0.1, bias=True),
    Case("bf16", 300, 64, 128, 256, 128, dropout_p=0.1, cluster=2, sms=4),
    Case("bf16", 140, 1032, 136, 16, 128, dropout_p=0.1, sms=1),
    Case("bf16+fp32", 65, 200, 256, 64, pitched=True),
    Case("fp16", 129, 200, 264, 40, bias=True),
    Case("fp16+fp32", 257, 72, 136, 17, 128, dropout_p=0.1, transposed=True, cluster=2),
]
MORE = [
    Case(kind, M, K, N, r, columns, dropout_p=p, bias=bias, transposed=transposed, cluster=1 + i % 2)
    for kind in KINDS
    for i, (M, K, N, r, columns, p, bias, transposed) in enumerate((
        (257, 136, 384, 1, 128, 0.0, False, True), (129, 1000, 256, 16, 256, 0.1, True, True),
        (63, 456, 264, 33, 256, 0.0, True, False), (385, 8, 72, 64, 128, 0.5, False, False),
        (1, 520, 1032, 3, 256, 0.1, True, False), (128, 64, 256, 256, 256, 0.0, False, True),
    ))
] + [
    Case("bf16", 2, 4096, 256, 16, 256, dropout_p=0.1, sms=1),
    Case("bf16", 200, 2048, 264, 300, 128, pitched=True, cluster=2),
    Case("bf16", 641, 136, 520, 16, 256, bias=True, cluster=2, sms=6),
]  # fmt: skip


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contract(case):
    hold(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_contract_at_length(case):
    hold(case, seed=1)


@pytest.mark.parametrize(
    ("columns", "transposed", "cluster"),
    [(128, False, 1), (128, True, 2), (256, False, 2), (256, True, 1)],
)
def test_the_mask_is_everyones(columns, transposed, cluster):
    """Ranks of ones beside an x of zeros: y is not 0 where the mask keeps."""
    M, N = 140, 200
    case = Case("bf16", M, 8, N, 8, columns, dropout_p=0.3, transposed=transposed, cluster=cluster)
    x, s, B = (
        torch.zeros(M, 8, dtype=BF16),
        torch.ones(M, 8, dtype=BF16),
        torch.ones(N, 8, dtype=BF16),
    )
    weight = torch.ones(8, N, dtype=BF16) if transposed else torch.ones(N, 8, dtype=BF16)
    y = OnMachine(case).linear_expand(x, weight, s, B, 1.0, None, 0.3, SEED, transposed=transposed)
    assert (y != 0).equal(keep_mask(M, N, 0.3, SEED))


SCHEDULED = [
    Case("bf16", 300, 200, 384, 100, 128, bias=True, sms=4),
    Case("fp16", 300, 72, 264, 16, 256, dropout_p=0.2, transposed=True, sms=4),
]


@pytest.mark.parametrize("case", SCHEDULED, ids=str)
def test_schedules_and_clusters_change_no_bit(case):
    """Also with one cluster at a time, and where the last one has a row block that isn't there."""
    first, *others = (
        bits_of(replace(case, cluster=cluster), seed=seed, resident=resident, late=late)
        for seed, (cluster, resident, late) in enumerate(
            [
                (1, 1, "late"), (2, 2, "soon"), (2, 4, "random"), (2, 4, "late"), (2, 1, None),
                (1, 4, None), (2, 4, "soon"),
            ]
        )
    )  # fmt: skip
    assert all(first.equal(other) for other in others)


@pytest.mark.parametrize("cluster", [1, 2])
def test_it_takes_few_ctas_for_many_tiles(cluster):
    run = hold(replace(SCHEDULED[0], cluster=cluster))
    (launch,) = run.launches
    assert launch.grid == (4, 1, 1)
    assert launch.cluster == (cluster, 1, 1)
    assert launch.block == (384, 1, 1)
    assert launch.shared <= 232_448


@pytest.mark.parametrize(("M", "N"), [(0, 8), (8, 0), (1, 8)])
def test_empty_and_least(M, N):
    x, weight = torch.ones(M, 8, dtype=BF16), torch.ones(N, 8, dtype=BF16)
    s, B, counters = (
        torch.ones(M, 1, dtype=BF16),
        torch.ones(N, 1),
        torch.zeros(4, dtype=torch.int32),
    )
    with launched(ARCH) as run:
        y = torch.empty(M, N, dtype=BF16)
        torch.ops.lorafast_cuda.linear_expand_sm90(
            x, weight, s, B, 1.0, None, None, 0, 1.0, y, counters, 128, 1, 1, 1
        )
    assert len(run.launches) == (M * N > 0)
    assert (y == 9).all()


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp16+fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_nan_and_infinity(kind, dropout_p):
    """Of s and B they reach their rows and columns, and no other; an infinity stays one."""
    case = Case(kind, 6, 8, 24, 4, 128, dropout_p=dropout_p)
    dtype, adapters = KINDS[kind]
    x, weight = torch.zeros(6, 8, dtype=dtype), torch.zeros(24, 8, dtype=dtype)
    s, B = torch.full((6, 4), 1.5), torch.full((24, 4), 0.1, dtype=adapters)
    s[0, 0], s[1, 1], s[2, 2] = torch.nan, torch.inf, -torch.inf
    B[3, 0], B[4, 1] = torch.inf, torch.nan
    s = s.to(dtype if dtype is BF16 else F32)
    y = OnMachine(case).linear_expand(x, weight, s, B, 0.5, None, dropout_p, SEED).float()
    exact = 0.5 * s.double() @ B.double().t()
    keep = keep_mask(6, 24, dropout_p, SEED)
    expected = torch.where(keep, exact / (1 - dropout_p), 0.0).float()
    assert y.isnan().equal(expected.isnan())
    assert torch.where(y.isinf(), y, 0.0).equal(torch.where(expected.isinf(), expected, 0.0))
    finite = expected.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-2, atol=0.0)


def test_strides_beyond_2_to_the_31():
    M, K, N, r = 3, 72, 40, 16
    draw = Case("bf16", M, K, N, r).draw
    x, weight, s, B = (draw(*size).to(BF16) for size in ((M, K), (N, K), (M, r), (N, r)))
    far = [torch.empty(2**31 + 4096, dtype=BF16) for _ in range(3)]
    wide_x = far[0].as_strided((M, K), (2**30 + 8, 1))
    wide_s = far[1].as_strided((M, r), (2**30 + 8, 1))
    wide_B = far[2].as_strided((N, r), (1, 2**27))
    for to, of in ((wide_x, x), (wide_s, s), (wide_B, B)):
        to.copy_(of)
    counters, found = torch.zeros(4, dtype=torch.int32), []
    for given in ((x, s, B), (wide_x, wide_s, wide_B)):
        with launched(ARCH):
            y = torch.empty(M, N, dtype=BF16)
            torch.ops.lorafast_cuda.linear_expand_sm90(
                given[0], weight, *given[1:], 1.0, None, None, 0, 1.0, y, counters, 128, 1, 1, 1
            )
        found.append(y)
    assert found[0].equal(found[1])


def two_layers():
    """x, W, s and B of two."""
    sizes = (300, 72), (264, 72), (300, 16), (264, 16)
    draw = Case("bf16", *sizes[0], 264, 16).draw
    return [[draw(*size, salt=salt).to(BF16) for size in sizes] for salt in (0, 1)]


def expand(given, counters, cluster):
    """y, of four CTAs."""
    y = torch.empty(300, 264, dtype=BF16)
    torch.ops.lorafast_cuda.linear_expand_sm90(
        *given, 1.0, None, None, 0, 1.0, y, counters, 256, 2, 4, cluster
    )
    return y


@pytest.mark.parametrize("cluster", [1, 2])
def test_two_launches_in_a_row_on_the_same_counters(cluster):
    given, counters = two_layers()[0], torch.zeros(4, dtype=torch.int32)
    with launched(ARCH, resident=2) as run:
        found = [expand(given, counters, cluster) for _ in range(2)]
    assert len(run.launches) == 2
    assert found[0].equal(found[1])
    assert not counters.any()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_launches_at_once(seed):
    """On counters of their own; their clusters take turns."""
    layers, alone = two_layers(), []
    for given in layers:
        with launched(ARCH):
            alone.append(expand(given, torch.zeros(4, dtype=torch.int32), 2))
    own = [torch.zeros(4, dtype=torch.int32) for _ in layers]
    with SideBySide(ARCH, seed, 4 * (1 + seed)):
        found = [expand(given, at, 2) for given, at in zip(layers, own, strict=True)]
    assert all(y.equal(expected) for y, expected in zip(found, alone, strict=True))
    assert not any(at.any() for at in own)


def test_one_column_of_dy():
    """dx of a layer with one output: the weight is a row, whose stride to the next may be any."""
    dy, weight = torch.ones(4, 16, dtype=BF16)[:, :1], torch.ones(1, 8, dtype=BF16)
    s, factor = torch.ones(4, 2, dtype=BF16), torch.ones(8, 2)
    y, counters = torch.empty(4, 8, dtype=BF16), torch.zeros(4, dtype=torch.int32)
    with launched(ARCH):
        torch.ops.lorafast_cuda.linear_expand_sm90(
            dy, weight.t(), s, factor, 1.0, None, None, 0, 1.0, y, counters, 128, 1, 1, 1
        )
    assert (y == 3).all()


GIVEN = {
    "scaling": 1.0, "bias": None, "seed": None, "threshold": 0, "survivor_scale": 1.0,
    "columns": 256, "group": 1, "ctas": 1, "cluster": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": torch.ones(4, 16)}, "x has dtype Float, expected bfloat16 or float16"),
        ({"weight": torch.ones(8, 16, dtype=F16)}, "weight has dtype Half, expected BFloat16 beside x"),
        ({"s": torch.ones(4, 2)}, "s has dtype Float, expected bfloat16"),
        ({"lora_B": torch.ones(8, 3)}, "lora_B is 8 x 3, expected 8 x 2"),
        ({"bias": torch.ones(7)}, "expected a vector of 8"),
        ({"columns": 64}, "columns is 64, expected 128 or 256"),
        ({"group": 0}, "group is 0"),
        ({"ctas": 0}, "ctas is 0"),
        ({"cluster": 3}, "cluster is 3, expected 1 or 2"),
        ({"cluster": 2}, "ctas is 1, expected at least 2"),
        ({"counters": torch.zeros(1, dtype=torch.int32)}, "counters has 1 elements"),
        ({"x": torch.ones(4, 32, dtype=BF16)[:, ::2]}, "x has neighbours of a row 2 elements apart"),
        ({"x": torch.ones(4, 17, dtype=BF16)[:, 1:]}, "x has rows that don't begin at multiples"),
        ({"x": torch.ones(1, 16, dtype=BF16).expand(4, 16)}, "x has rows 0 elements apart"),
        ({"x": torch.ones(64, dtype=BF16).as_strided((4, 16), (8, 1))}, "x has rows 8 .* at least 16"),
        (
            {"weight": torch.ones(128, dtype=BF16).as_strided((8, 16), (8, 1))},
            "weight has rows 8 .* TMA reads none that overlap",
        ),
        ({"weight": torch.ones(8, 20, dtype=BF16)[:, :16]}, "weight has rows that don't begin"),
        ({"weight": torch.ones(16, 32, dtype=BF16)[::2, ::2]}, "weight has strides 64 and 2"),
    ],
)  # fmt: skip
def test_errors(given, said):
    taken = {
        "x": torch.ones(4, 16, dtype=BF16), "weight": torch.ones(8, 16, dtype=BF16),
        "s": torch.ones(4, 2, dtype=BF16), "lora_B": torch.ones(8, 2),
        "y": torch.ones(4, 8, dtype=BF16), "counters": torch.zeros(4, dtype=torch.int32), **GIVEN,
    }  # fmt: skip
    with launched(ARCH), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.linear_expand_sm90(**(taken | given))


def least(arch=ARCH):
    """One tile."""
    ones = torch.ones(8, 8, dtype=BF16)
    with launched(arch):
        y, counters = torch.empty(8, 8, dtype=BF16), torch.zeros(4, dtype=torch.int32)
        torch.ops.lorafast_cuda.linear_expand_sm90(
            ones, ones, ones[:, :1], ones[:, :1], 1.0, None, None, 0, 1.0, y, counters, 128, 1, 1, 1
        )
    return y


def test_a_driver_that_refuses_a_tensor_map():
    launchers().fail("cuTensorMapEncodeTiled", 1)
    with pytest.raises(RuntimeError, match=r"x can't be described to TMA: .* error 1"):
        least()
    assert (least() == 9).all()


@pytest.mark.parametrize(("arch", "has"), [(80, "8.0"), (100, "10.0")])
def test_other_architectures_are_refused(arch, has):
    said = rf"linear_expand_sm90 needs compute capability 9\.0, and .* has {has}"
    with pytest.raises(RuntimeError, match=said):
        least(arch)


ROW = torch.ones(1, 64, dtype=BF16)


class TestPlan:
    @pytest.mark.parametrize(
        ("M", "K", "N", "columns", "cluster", "ctas"),
        [
            (8192, 4096, 4096, 256, 2, 132), (8192, 4096, 14336, 256, 2, 132),
            (8192, 4096, 1024, 256, 2, 132), (512, 4096, 4096, 128, 2, 128),
            (384, 4096, 4096, 128, 1, 96), (1, 4096, 4096, 128, 1, 32),
        ],
    )  # fmt: skip
    def test_its_tiles(self, M, K, N, columns, cluster, ctas):
        launch = wgmma.plan_linear_expand(Case("bf16", M, K, N, 16).problem(), device(132))
        assert isinstance(launch, Launch)
        tiles = -(-M // 128) * (N // columns)
        pairs = " in clusters of 2" if cluster == 2 else ""
        assert launch.line == (
            f"linear_expand: {ctas} CTAs{pairs} for {tiles} tiles of 128 x {columns}, wgmma"
        )
        assert launch.flops == 2 * M * N * (K + 16)
        assert launch.moved == 2 * (M * K + N * K + M * N + (M + N) * 16)

    @pytest.mark.parametrize(("K", "least", "most"), [(256, 1.3, 3.0), (4096, 1.0, 1.02)])
    def test_a_short_tile_waits_for_its_mask(self, K, least, most):
        masked, plain = (
            wgmma.plan_linear_expand(
                Case("bf16", 8192, K, 4096, 16, dropout_p=p).problem(), device(132), {"cluster": 2}
            ).seconds
            for p in (0.1, 0.0)
        )
        assert least * plain < masked < most * plain

    @pytest.mark.parametrize("fixed", [{"cluster": 1}, {"cluster": 2, "columns": 128}])
    def test_its_choices(self, fixed):
        problem = Case("bf16", 8192, 4096, 4096, 16).problem()
        launch = wgmma.plan_linear_expand(problem, device(132), fixed)
        assert isinstance(launch, Launch)
        assert launch.choices == {"fused": 1, "columns": 256, "group": 16, "cluster": 1} | fixed
        best = wgmma.plan_linear_expand(problem, device(132), {"cluster": 3, "columns": 64})
        assert isinstance(best, Launch)
        assert best.choices == {"fused": 1, "columns": 256, "group": 16, "cluster": 2}
        assert best.seconds < launch.seconds

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"dtype": F32}, "x has dtype torch.float32, the GEMM by wgmma takes"),
            ({"r": 0}, "r is 0, the GEMM by wgmma takes 1 to"),
            ({"K": 0}, "the sums have 0 terms"),
            ({"format": "nf4"}, "the weight is stored as nf4"),
            ({"N": 4100}, "a row of y has 8200 bytes, TMA writes multiples of 16"),
            ({"layouts": Layouts(x=Layout(8))}, "the rows of x aren't aligned to 16 bytes"),
            ({"layouts": Layouts(weight=Layout(2, 0))}, "neither rows nor columns of the weight"),
            ({"layouts": Layouts(x=Layout(16, 0, True))}, "or some that overlap"),
            ({"layouts": Layouts(x=Layout.of(ROW.expand(64, 64)))}, "or some that overlap"),
            (
                {"layouts": Layouts(x=Layout.of(ROW.as_strided((4, 16), (8, 1))))},
                "or some that overlap",
            ),
            ({"M": 2**20, "N": 2**28}, "more than 1073741824 tiles"),
        ],
    )
    def test_refusals(self, change, said):
        problem = Case("bf16", 64, 64, 64, 4).problem()._replace(**change)
        reason = wgmma.plan_linear_expand(problem, device())
        assert isinstance(reason, str)
        assert said in reason

    @pytest.mark.parametrize(("arch", "has"), [(80, "8.0"), (100, "10.0"), (120, "12.0")])
    def test_other_architectures(self, arch, has):
        problem = Case("bf16", 64, 64, 64, 4).problem()
        reason = wgmma.plan_linear_expand(problem, replace(device(), capability=arch))
        assert reason == f"compute capability is {has}, the kernels of wgmma are for 9.0"


def counted(K, r, M=128, cluster=1, across=False, adapter=BF16, **more):
    """What tiles of 128 x 256 execute."""
    x, weight, s = (torch.zeros(*size, dtype=BF16) for size in ((M, K), (256, K), (M, r)))
    B = torch.zeros(256, r, dtype=adapter)
    if across:
        weight = torch.zeros(K, 256, dtype=BF16).t()
    with launched(ARCH, late="soon") as run:
        y, counters = torch.empty(M, 256, dtype=BF16), torch.zeros(4, dtype=torch.int32)
        given = {"bias": None, "seed": None, "threshold": 0, "survivor_scale": 1.0} | more
        torch.ops.lorafast_cuda.linear_expand_sm90(
            x, weight, s, B, 1.0, **given, y=y, counters=counters, columns=256, group=16,
            ctas=M // 128, cluster=cluster,
        )  # fmt: skip
    return run.ran()[0]


def total(ran, opcode, what="issued"):
    """Over the instructions that begin so."""
    return sum(getattr(c, what) for c in ran.counts if c.opcode.startswith(opcode))


class TestCounts:
    """Beside the same GEMM without ranks; waits are issued as often as the schedule has it."""

    def test_a_k_block(self):
        short, long = counted(512, 0), counted(1024, 0)
        assert total(long, "wgmma.mma") - total(short, "wgmma.mma") == 8 * 8 * 4
        multiplied = total(long, "wgmma.mma", "multiplies")
        assert multiplied == 128 * 256 * 1024
        # Of 1,024 clocks of the tensor cores, four schedulers issue for an eighth.
        assert (long.steps - short.steps) / 8 / 4 < 128

    @pytest.mark.parametrize("across", [False, True])
    @pytest.mark.parametrize(("cluster", "loaded"), [(1, 48), (2, 32)])
    def test_what_a_cluster_loads(self, across, cluster, loaded):
        """A K block of a tile, in KB, for 1,024 clocks of its SM: of W each CTA loads one half."""
        short, long = (counted(K, 0, 256, cluster, across) for K in (64, 128))
        boxes = "cp.async.bulk.tensor.2d.shared"
        of_tiles = total(long, boxes, "sectors") - total(short, boxes, "sectors")
        assert of_tiles * 32 == 2 * loaded * 1024

    @pytest.mark.parametrize(("r", "most"), [(16, 520), (64, 1400)])
    def test_ranks(self, r, most):
        """A product of 16 ranks more for every 16; the rest is done by warps that don't multiply."""
        plain, ran = counted(512, 0), counted(512, r)
        assert total(ran, "wgmma.mma") - total(plain, "wgmma.mma") == 8 * (r // 16)
        assert (ran.steps - plain.steps) / 4 < most

    @pytest.mark.parametrize(
        ("opcode", "wavefronts"),
        [("st.shared.v4", 4), ("cp.async.cg", 4), ("stmatrix", 4), ("ld.shared.v2.f32", 2)],
    )
    def test_no_bank_collides(self, opcode, wavefronts):
        """A warp writes 512 bytes in four passes; what it reads of the bias are two halves of a warp."""
        adapter = torch.float32 if opcode == "st.shared.v4" else BF16
        ran = counted(512, 64, adapter=adapter, bias=torch.zeros(256))
        issued = total(ran, opcode)
        assert issued > 0
        assert total(ran, opcode, "wavefronts") == wavefronts * issued

    def test_y_leaves_by_tma(self):
        ran = counted(512, 16)
        stored = [c.opcode for c in ran.counts if c.issued and c.opcode.startswith("st.global")]
        assert set(stored) == {"st.global.u32"}  # counters
        assert total(ran, "cp.async.bulk.tensor.2d.global") == 8
