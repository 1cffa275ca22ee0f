"""csrc/cuda/lora_linear_sm90.cu, executed: a layer's forward in one launch, whose helpers make ``s``."""

import itertools

import pytest
import torch
from on_machine import launched, needs_nvcc
from side_by_side import SideBySide
from sm90_cases import ARCH, BF16, F16, F32, SEED, device
from sm90_forward_cases import LAYOUTS, Layer, OnMachine, bits_of, hold

from lorafast import reference
from lorafast.backends.cost import Device
from lorafast.backends.cuda import wgmma, wgmma_layer
from lorafast.backends.cuda.launch import Launch
from lorafast.core.problem import Layout, Layouts
from lorafast.reference.dropout import survivor_scale

pytestmark = needs_nvcc
H100 = Device.known_by("", ARCH, 132, 1.7e9, 2.6e9, 5120)

QUICK = [
    Layer("bf16", 300, 136, 264, 16, bias=True),
    Layer("fp32", 257, 200, 136, 17, 128, 0.1, ctas=4, helpers=2),
    Layer("fp16", 1, 8, 8, 1, 128, 0.3, ctas=2),
    Layer("fp32", 130, 72, 520, 3, 128, A="unaligned", ctas=2, helpers=2),
    Layer("fp32", 70, 136, 264, 200, across=True),
    Layer("bf16", 390, 136, 136, 16, 128, 0.5, ctas=4, helpers=2, cluster=2),
]
MORE = [
    Layer(adapters, M, K, N, r, columns, p, A=A, across=across, ctas=ctas, helpers=helpers)
    for adapters, M, K, N, r, columns, p, A, across, ctas, helpers in (
        ("bf16", 129, 520, 256, 64, 256, 0.0, "rows", False, 2, 1),
        ("fp32", 640, 64, 128, 33, 128, 0.2, "across", False, 4, 3),
        ("fp32", 65, 2048, 264, 8, 256, 0.05, "rows", True, 1, 1),
        ("fp16", 128, 328, 1032, 63, 128, 0.0, "pitched", False, 5, 5),
        ("fp32", 200, 200, 136, 100, 128, 0.3, "rows", False, 3, 1),
        ("bf16", 140, 136, 264, 256, 256, 0.3, "unaligned", True, 2, 1),
        ("fp32", 140, 72, 264, 256, 256, 0.0, "rows", False, 2, 2),
        ("fp16", 260, 264, 136, 100, 256, 0.6, "across", True, 3, 2),
        ("bf16", 1, 1024, 136, 129, 256, 0.0, "across", False, 2, 1),
        ("bf16", 140, 8, 16, 5, 128, 0.5, "rows", False, 1, 1),
    )
]
MORE += [
    Layer("fp32", 390, 200, 264, r, 256, p, across=across, ctas=6, helpers=3, cluster=2)
    for r, p, across in ((16, 0.0, True), (100, 0.1, False))
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contract(case):
    hold(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_contract_at_length(case):
    hold(case, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adapters", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("K", [72, 136])
def test_layouts_of_the_adapters_change_no_bit(adapters, layout, K):
    """K blocks end within 16 bytes, rows begin anywhere."""

    def layer(A):
        return Layer(adapters, 100, K, 40, 21, 128, 0.25, A=A, ctas=1)

    assert bits_of(layer(layout)).equal(bits_of(layer("rows")))


def test_columns_of_lora_A_that_are_no_whole_16_bytes():
    """x has gaps behind its rows; what lies there isn't multiplied."""
    K, case = 70, Layer("fp32", 40, 70, 16, 5, 128)
    x, A = case.draw(40, 72).to(BF16), case.draw(5, K).float()
    x[:, K:] = torch.nan
    weight = torch.full((16, 72), torch.nan, dtype=BF16)
    weight[:, :K] = 0
    y, s = torch.empty(40, 16, dtype=BF16), torch.empty(40, 5, dtype=BF16)
    counters = torch.zeros(5, dtype=torch.int32)
    with launched(ARCH):
        torch.ops.lorafast_cuda.lora_linear_sm90(
            x[:, :K], weight[:, :K], A, torch.zeros(16, 5), 1.0, None, None, 0, 1.0, y, s, counters,
            128, 1, 1, 1, 1,
        )  # fmt: skip
    exact = x[:, :K].double() @ A.bfloat16().double().t()
    assert (s.double() - exact).norm() < 2**-8 * exact.norm()
    assert not y.any()


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_mask_is_the_references(p):
    """Of an x and an A of ones, a power of two each, s says which columns were kept."""
    M, K, r = 140, 72, 9
    x, A = torch.ones(M, K, dtype=BF16), torch.zeros(r, K)
    A[torch.arange(K) // 8, torch.arange(K)] = 2.0 ** (torch.arange(K) % 8)
    _, s = OnMachine(Layer("fp32", M, K, 8, r, 128, p)).lora_linear(
        x, torch.zeros(8, K, dtype=BF16), A, torch.zeros(8, r), 1.0, None, p, SEED
    )
    kept = reference.keep_mask(M, K, p, SEED).view(M, r, 8)
    scale = torch.tensor(survivor_scale(p)).bfloat16().double()
    sums = (kept * 2.0 ** torch.arange(8)).sum(-1).double() * scale
    assert s.equal(sums.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_two_launches_at_once(seed):
    """On counters of their own."""
    x, W, A = (torch.randn(n, 72).to(BF16) for n in (260, 136, 16))
    B = torch.randn(136, 16)

    def forward(x):
        y, s = torch.empty(260, 136, dtype=BF16), torch.empty(260, 16, dtype=BF16)
        counters = torch.zeros(wgmma.COUNTERS + 3, dtype=torch.int32)
        torch.ops.lorafast_cuda.lora_linear_sm90(
            x, W, A, B, 1.0, None, None, 0, 1.0, y, s, counters, 128, 2, 4, 2, 2
        )
        return y, s, counters

    both, alone = (x, x.flip(0)), []
    for given in both:
        with launched(ARCH):
            alone.append(forward(given))
    with SideBySide(ARCH, seed, 2 * (1 + seed)):
        found = [forward(given) for given in both]
    for ours, expected in zip(found, alone, strict=True):
        assert all(one.equal(two) for one, two in zip(ours, expected, strict=True))
        assert not ours[2].any()


SCHEDULED = Layer("fp32", 260, 72, 136, 16, 128, 0.1, bias=True, ctas=5, helpers=2)
CLUSTERED = Layer("bf16", 390, 72, 136, 16, 128, 0.1, ctas=6, helpers=4, cluster=2)


@pytest.mark.parametrize(
    "case", [SCHEDULED, pytest.param(CLUSTERED, marks=pytest.mark.slow)], ids=str
)
def test_schedules_change_no_bit(case):
    """Also with one CTA, or one cluster, at a time: whoever waits for s runs after those who make it
    have started."""
    first, *others = (
        bits_of(case, seed=seed, resident=case.cluster * resident, late=late)
        for seed, (resident, late) in enumerate(
            [(1, "late"), (2, "soon"), (4, "random"), (5, None), (3, "late")]
        )
    )
    assert all(first.equal(other) for other in others)


def test_two_launches_in_a_row_on_the_same_counters():
    case = Layer("bf16", 260, 72, 128, 16, 128)
    x, weight, A, B = (
        case.draw(*size).to(BF16) for size in ((260, 72), (128, 72), (16, 72), (128, 16))
    )
    counters, found = torch.zeros(7, dtype=torch.int32), []
    with launched(ARCH, resident=2) as run:
        for _ in range(2):
            y, s = torch.empty(260, 128, dtype=BF16), torch.empty(260, 16, dtype=BF16)
            torch.ops.lorafast_cuda.lora_linear_sm90(
                x, weight, A, B, 1.0, None, SEED, 1 << 14, 4 / 3, y, s, counters, 128, 2, 2, 1, 1
            )
            found.append((y, s))
    assert len(run.launches) == 2
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
    assert not counters.any()


def test_without_rows_there_is_no_launch():
    y, s, counters = torch.empty(0, 8), torch.empty(0, 2), torch.zeros(4, dtype=torch.int32)
    with launched(ARCH) as run:
        torch.ops.lorafast_cuda.lora_linear_sm90(
            torch.ones(0, 16, dtype=BF16), torch.ones(8, 16, dtype=BF16), torch.ones(2, 16),
            torch.ones(8, 2), 1.0, None, None, 0, 1.0, y.to(BF16), s.to(BF16), counters,
            128, 1, 1, 1, 1,
        )  # fmt: skip
    assert not run.launches


GIVEN = {
    "scaling": 1.0, "bias": None, "seed": None, "threshold": 0, "survivor_scale": 1.0, "columns": 256,
    "group": 1, "ctas": 1, "helpers": 1, "cluster": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_A": torch.ones(2, 16, dtype=torch.int32)}, "lora_A has dtype Int"),
        ({"lora_A": torch.ones(2, 24, dtype=BF16)}, "lora_A is 2 x 24, expected 2 x 16"),
        ({"helpers": 0}, "helpers is 0, expected 1 to 1"),
        ({"helpers": 2}, "helpers is 2, expected 1 to 1"),
        (
            {"counters": torch.zeros(4, dtype=torch.int32)},
            "counters has 4 elements of dtype Int, expected 5",
        ),
        ({"weight": torch.ones(16, 16, dtype=BF16)[::2, ::2]}, "weight is 8 x 8, expected 8 x 16"),
        ({"s": torch.ones(2, 4, dtype=BF16).t()}, "s is not contiguous"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed has 2 elements"),
        ({"threshold": -1, "seed": SEED}, "threshold is -1"),
    ],
)
def test_errors(given, said):
    taken = {
        "x": torch.ones(4, 16, dtype=BF16), "weight": torch.ones(8, 16, dtype=BF16),
        "lora_A": torch.ones(2, 16, dtype=BF16), "lora_B": torch.ones(8, 2),
        "y": torch.ones(4, 8, dtype=BF16), "s": torch.ones(4, 2, dtype=BF16),
        "counters": torch.zeros(5, dtype=torch.int32), **GIVEN,
    }  # fmt: skip
    with launched(ARCH), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.lora_linear_sm90(**(taken | given))


@pytest.mark.parametrize(
    ("changed", "given", "said"),
    [
        ({"x": (4, 16), "weight": (8, 16), "y": (4, 8)}, {}, "x has dtype Half, expected bfloat16"),
        ({"lora_A": (257, 16), "lora_B": (8, 257), "s": (4, 257)}, {}, "r is 257, expected 1 to 256"),
        (
            {"lora_A": (129, 16), "lora_B": (8, 129), "s": (4, 129)}, {"columns": 128},
            "r is 129, expected 1 to 128, the columns of a tile",
        ),
    ],
)  # fmt: skip
def test_errors_of_several(changed, given, said):
    sizes = {
        "x": (4, 16), "weight": (8, 16), "lora_A": (2, 16), "lora_B": (8, 2), "y": (4, 8), "s": (4, 2),
    }  # fmt: skip
    taken = {name: torch.ones(size, dtype=BF16) for name, size in (sizes | changed).items()}
    if "x" in changed:
        taken |= {name: taken[name].to(F16) for name in ("x", "weight", "y")}
        taken["s"] = taken["s"].float()
    counters = torch.zeros(5, dtype=torch.int32)
    with launched(ARCH), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.lora_linear_sm90(**taken, **(GIVEN | given), counters=counters)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_by_its_plan(p):
    """What ``plan_lora_linear`` launches; two row blocks, with helpers."""
    case = Layer("fp32", 256, 4096, 128, 16, 128, p)
    launch = wgmma_layer.plan_lora_linear(case.problem(), H100, {"helpers": 2, "cluster": 1})
    assert isinstance(launch, Launch)
    x, weight = (case.draw(*size).to(BF16) for size in ((256, 4096), (128, 4096)))
    A, B = (case.draw(*size).float() for size in ((16, 4096), (128, 16)))
    with launched(ARCH) as run:
        y, s = launch.run(x, weight, A, B, 0.5, None, p, SEED)
    assert run.launches[0].grid == (4, 1, 1)
    exact = reference.linear_expand(x.double(), weight.double(), s.double(), B.double(), 0.5)
    assert (y.double() - exact).norm() < 4e-3 * exact.norm()
    exact = reference.shrink(x.double(), A.double(), p, SEED)
    assert (s.double() - exact).norm() < 6e-3 * exact.norm()


def end_of(problem, plan):
    """Clocks of a launch, round by round: clusters of one kind end one together."""
    rows, across = -(-problem.M // (128 * plan.cluster)), -(-problem.N // plan.columns)
    step = wgmma.step_of(plan.columns, plan.cluster, 132, H100)
    tile, help_ = -(-problem.K // 64) * step, plan.helpers // plan.cluster
    late = -(-rows // help_) * wgmma_layer.clocks_of_item(problem, plan.helpers, H100)
    left, ends = rows * across, [(tile, 132 // plan.cluster - help_), (late + tile, help_)]
    while True:
        (end, clusters), other = sorted(ends)
        left -= clusters
        if left <= 0:
            return end
        ends = [(end + tile, clusters), other]


class TestPlan:
    @pytest.mark.parametrize(
        ("adapters", "M", "K", "N", "r", "p", "helpers", "columns"),
        [
            ("bf16", 8192, 4096, 4096, 16, 0.0, 8, 256), ("bf16", 512, 4096, 4096, 16, 0.0, 4, 128),
            ("fp32", 8192, 4096, 4096, 16, 0.0, 32, 256), ("fp32", 8192, 4096, 14336, 16, 0.05, 16, 256),
            ("fp32", 262144, 4096, 4096, 64, 0.05, 50, 256),
        ],
    )  # fmt: skip
    def test_its_helpers(self, adapters, M, K, N, r, p, helpers, columns):
        launch = wgmma_layer.plan_lora_linear(
            Layer(adapters, M, K, N, r, dropout_p=p).problem(), H100
        )
        assert isinstance(launch, Launch)
        assert launch.line.startswith("lora_linear: 132 CTAs in clusters of 2 for ")
        assert launch.line.endswith(f"x {columns}, wgmma, {helpers} of them shrink first")
        assert launch.flops == 2 * M * (N * K + r * (N + K))
        size = 4 if adapters == "fp32" else 2
        assert launch.moved == 2 * (M * K + N * K + M * N + r * M) + size * r * (K + N)
        assert launch.launches == 1

    @pytest.mark.parametrize("p", [0.0, 0.1])
    @pytest.mark.parametrize(
        ("M", "K", "N"),
        [(8192, 4096, 4096), (8192, 4096, 1024), (4096, 1024, 1024), (300, 64, 264)],
    )
    def test_helpers_end_before_a_launch_of_their_own(self, M, K, N, p):
        """Or there are none: no shape takes longer by the model."""
        problem = Layer("fp32", M, K, N, 16, dropout_p=p).problem()
        plan = wgmma_layer.helped(problem, H100)
        answer = wgmma_layer.plan_lora_linear(problem, H100)
        pays = plan.clocks < wgmma_layer.clocks_apart(M, K, N, H100)
        assert isinstance(answer, Launch) is pays

    @pytest.mark.parametrize(
        ("M", "K", "N"), [(8192, 4096, 4096), (4096, 1024, 1024), (700, 64, 264), (33000, 512, 768)]
    )
    def test_the_end_is_that_of_the_rounds(self, M, K, N):
        for case in (Layer("bf16", M, K, N, 16), Layer("fp32", M, K, N, 64, dropout_p=0.1)):
            problem = case.problem()
            for columns, cluster, helpers in itertools.product(
                (256, 128), (1, 2), (1, 2, 3, 17, 33)
            ):
                fixed = {"columns": columns, "cluster": cluster, "helpers": cluster * helpers}
                plan = wgmma_layer.helped(problem, H100, fixed)
                assert (plan.columns, plan.cluster) == (columns, cluster)
                least = end_of(problem, plan)
                # Beside it there is what the first tiles wait for, and helpers that end last.
                item = wgmma_layer.clocks_of_item(problem, plan.helpers, H100)
                assert least * (1 - 1e-9) <= plan.clocks
                assert (
                    plan.clocks < least * (1 + 1e-9) or plan.clocks <= least + -(-M // 128) * item
                )

    def test_a_mask_and_more_ranks_take_longer(self):
        def item(**changes):
            sizes = {"M": 8192, "K": 4096, "N": 4096, "r": 16}
            layer = Layer(**{"kind": "bf16", **sizes, **changes})
            return wgmma_layer.clocks_of_item(layer.problem(), 8, H100)

        assert item() < item(kind="fp32") < item(dropout_p=0.1) == item(dropout_p=0.5)
        assert item(r=16) < item(r=64) < item(r=256)

    @pytest.mark.parametrize(("sms", "most"), [(1, 1), (2, 2), (3, 2)])
    def test_a_small_device(self, sms, most):
        problem = Layer("bf16", 300, 64, 264, 4).problem()
        for cluster in (1, 2):
            plan = wgmma_layer.helped(problem, device(sms), {"cluster": cluster})
            assert plan.helpers <= most
            assert plan.helpers % plan.cluster == 0
            launch = wgmma_layer.plan_lora_linear(problem, device(sms), {"cluster": cluster})
            assert isinstance(launch, Launch)

    def test_tiles_are_as_wide_as_the_rank(self):
        problem = Layer("bf16", 300, 64, 264, 129).problem()
        for columns in (128, 256):
            assert wgmma_layer.helped(problem, H100, {"columns": columns}).columns == 256

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                {"dtype": F16},
                "x is torch.float16, whose s is float32: helpers make one of bfloat16",
            ),
            ({"r": 257}, "the rank is 257, helpers make s of 1 to 256"),
            ({"M": 0}, "y is 0 x 64, there is nothing to compute"),
            ({"layouts": Layouts(weight=Layout(0, 8))}, "neither rows nor columns of the weight"),
            ({"layouts": Layouts(x=Layout(2))}, "the rows of x aren't aligned"),
            (
                {"M": 8192, "K": 4096, "N": 1024, "dropout": True},
                "helpers don't pay: modelled, one",
            ),
        ],
    )
    def test_refusals(self, change, said):
        problem = Layer("fp32", 64, 64, 64, 4).problem()._replace(**change)
        reason = wgmma_layer.plan_lora_linear(problem, H100)
        assert isinstance(reason, str)
        assert said in reason

    @pytest.mark.parametrize(
        "change",
        [
            {"dropout": True}, {"adapter_dtype": F32}, {"adapter_dtype": F16}, {"r": 256},
            {"layouts": Layouts(lora_A=Layout(2))}, {"layouts": Layouts(lora_A=Layout(0, 2, huge=True))},
            {"layouts": Layouts(weight=Layout(0, 16))},
        ],
    )  # fmt: skip
    def test_is_served(self, change):
        problem = Layer("bf16", 64, 64, 64, 4).problem()._replace(**change)
        assert isinstance(wgmma_layer.plan_lora_linear(problem, H100), Launch)
