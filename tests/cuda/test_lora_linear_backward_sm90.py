"""csrc/cuda/lora_linear_backward_sm90.cu, executed: a layer's backward in one launch."""

from dataclasses import replace

import pytest
import torch
from on_machine import launched, needs_nvcc
from side_by_side import SideBySide
from sm90_backward_cases import Case, bits_of, hold
from sm90_cases import ARCH, BF16, F16

from lorafast.backends.cost import Device
from lorafast.backends.cuda import cost, wgmma_backward
from lorafast.backends.cuda.launch import NONE, Launch
from lorafast.core.problem import Layout, Layouts

pytestmark = needs_nvcc
H100 = Device.known_by("", ARCH, 132, 1.7e9, 2.6e9, 5120)

QUICK = [
    Case("bf16", 300, 264, 136, 16, rows_behind=2, sms=3, helpers=2),
    Case("bf16+fp32", 200, 72, 1032, 8, layout="pitched"),
    Case("bf16", 1, 8, 8, 1, sms=1),
    Case("bf16", 300, 136, 136, 8, 1, 2, helpers=2, sms=4, cluster=2),
]
MORE = [
    Case("bf16", 257, 136, 2104, 3, 2, 1, sms=4, helpers=3),
    Case("bf16", 130, 2184, 136, 16, 1, 2, sms=3, helpers=2),
    Case("bf16", 260, 72, 1032, 17, 1, 3, sms=4, helpers=2),
    Case("bf16", 390, 520, 1160, 64, 2, 2, sms=5, helpers=4),
    Case("bf16+fp32", 140, 264, 72, 64, layout="pitched", sms=3, helpers=2),
    Case("bf16+fp32", 140, 264, 264, 33, layout="across", sms=3, helpers=2),
    Case("bf16+fp16", 64, 80, 72, 24, layout="pitched"),
    Case("bf16", 128, 256, 128, 5, layout="across", sms=1),
    Case("bf16", 300, 136, 136, 16, rows_behind=0, sms=3, helpers=2),
    Case("bf16+fp32", 300, 136, 136, 20, 4, 0, sms=3, helpers=2),
    Case("bf16", 1, 256, 128, 16),
    Case("bf16", 640, 264, 1160, 64, 2, 1, helpers=4, sms=6, cluster=2),
    Case("bf16+fp32", 130, 264, 72, 17, 1, 0, helpers=2, sms=3, cluster=2),
    Case("bf16", 1, 40, 264, 64, helpers=2, sms=2, cluster=2),
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contract(case):
    hold(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_contract_at_length(case):
    hold(case, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("wants", [("dx",), ("dx", "dA"), ("dx", "dB")], ids="-".join)
def test_any_gradients_beside_dx_are_the_same(wants):
    """And ask for nothing that they aren't made of."""
    case = Case("bf16", 260, 136, 1096, 33, rows_behind=2, sms=3, helpers=2)
    run = hold(replace(case, wants=wants))
    assert len(run.launches) == 1


SCHEDULED = Case("bf16", 260, 72, 520, 33, 1, 2, helpers=2, sms=6)
SCHEDULES = [(1, "late"), (2, "soon"), (4, "random"), (5, None), (3, "late")]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [1, 2])
def test_schedules_change_no_bit(cluster):
    """Also with one CTA at a time, or cluster: whoever waits for ds runs after those who make it have
    started."""
    case = replace(SCHEDULED, cluster=cluster)
    first, *others = (
        bits_of(case, seed=seed, resident=cluster * resident, late=late)
        for seed, (resident, late) in enumerate(SCHEDULES)
    )
    assert all(first.equal(other) for other in others)


def test_two_launches_in_a_row_on_the_same_counters(monkeypatch):
    case = Case("bf16", 140, 72, 72, 16, helpers=2)
    counters = torch.zeros(wgmma_backward.counters_of(case.problem()), dtype=torch.int32)
    monkeypatch.setattr(wgmma_backward, "counters", lambda like, count: counters[:count])
    given = [t.to(BF16) for t in case.tensors()]
    with launched(ARCH, resident=2) as run:
        first, second = (case.launch().run(*given, 1.0, 0.0, None) for _ in range(2))
    assert len(run.launches) == 2
    assert not counters.any()
    for i in (0, 2, 3):
        assert first[i].equal(second[i])


@pytest.mark.slow
def test_two_launches_at_once():
    """On counters of their own."""
    case = Case("bf16", 260, 72, 72, 16, helpers=2)
    dy, *rest = (t.to(BF16) for t in case.tensors())
    both, run = (
        [(dy, *rest, 1.0, 0.0, None), (dy.flip(0), *rest, 1.0, 0.0, None)],
        case.launch().run,
    )
    alone = []
    for given in both:
        with launched(ARCH):
            alone.append(run(*given))
    for seed in range(5):
        with SideBySide(ARCH, seed, 1 + seed):
            found = [run(*given) for given in both]
        for ours, expected in zip(found, alone, strict=True):
            assert all(ours[i].equal(expected[i]) for i in (0, 2, 3))


def test_nan_and_infinity():
    """A rank that there isn't makes no NaN of them, nor a row."""
    case = Case("bf16", 3, 40, 16, 3)
    dy, x, W, A, B, s = (torch.ones(t.shape, dtype=BF16) for t in case.tensors())
    dy[0, 1], dy[1, 2], x[2, 5] = float("nan"), float("inf"), float("inf")
    with launched(ARCH):
        dx, _, dA, dB, _ = case.launch().run(dy, x, W, A, B, s, 1.0, 0.0, None)
    assert dx[0].isnan().all()
    assert (dx[1] == float("inf")).all()
    assert dx[2].isfinite().all()
    assert dB[1].isnan().all()
    assert (dB[2] == float("inf")).all()
    assert dB[3:].isfinite().all()
    assert dA.isnan().all()  # every column has a row of ds that is NaN
    dy[:2] = 1.0
    with launched(ARCH):
        _, _, dA, _, _ = case.launch().run(dy, x, W, A, B, s, 1.0, 0.0, None)
    assert (dA == float("inf")).equal((torch.arange(40) == 5).expand(3, 40))


def arguments(changed):
    sizes = {
        "dy": (4, 16), "x": (4, 8), "weight": (16, 8), "lora_A": (2, 8), "lora_B": (16, 2),
        "s": (4, 2), "dx": (4, 8), "ds": (4, 16), "dA": (2, 8), "dB": (16, 2),
    }  # fmt: skip
    taken = {name: torch.ones(size, dtype=BF16) for name, size in sizes.items()}
    return {
        **taken, "scaling": 1.0, "partials": torch.empty(2 * 128 * 16),
        "counters": torch.zeros(16, dtype=torch.int32), "group": 1, "ctas": 1, "helpers": 1,
        "rows_ahead": 1, "rows_behind": 1, "cluster": 1, **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dy": torch.ones(4, 16)}, "dy has dtype Float, expected bfloat16"),
        ({"dy": torch.ones(16, 4, dtype=BF16).t()}, "dy has neighbours of a row 4 elements apart"),
        ({"dy": torch.ones(4, 20, dtype=BF16)[:, :16]}, "dy has rows that don't begin"),
        ({"dy": torch.ones(1, 16, dtype=BF16).expand(4, 16)}, "dy has rows 0 elements apart"),
        (
            {"x": torch.ones(64, dtype=BF16).as_strided((4, 8), (0, 1))},
            "x has rows 0 elements apart",
        ),
        (
            {"weight": torch.ones(16, 8, dtype=F16)},
            "weight has dtype Half, expected BFloat16 beside dy",
        ),
        ({"x": None}, "x is missing, which dA is made of"),
        ({"x": torch.ones(4, 8, dtype=F16)}, "x has dtype Half, expected bfloat16"),
        ({"x": torch.ones(4, 7, dtype=BF16)}, "x is 4 x 7, expected 4 x 8"),
        ({"s": None}, "s is missing, which dB is made of"),
        ({"s": torch.ones(4, 2)}, "s has dtype Float, expected bfloat16"),
        ({"weight": torch.ones(8, 16, dtype=BF16).t()}, "expected contiguous rows"),
        ({"lora_A": torch.ones(3, 8)}, "lora_A is 3 x 8, expected 2 x 8"),
        ({"lora_B": torch.ones(16, 65)}, "r is 65, expected 1 to 64"),
        ({"ds": torch.ones(4, 2, dtype=BF16)}, "ds is 4 x 2, expected 4 x 16"),
        ({"ds": torch.ones(4, 16)}, "ds has dtype Float, expected bfloat16"),
        ({"dA": torch.ones(2, 9)}, "dA is 2 x 9, expected 2 x 8"),
        ({"helpers": 2}, "helpers is 2, expected 1 to 1"),
        ({"rows_behind": 0}, "rows_ahead is 1 and rows_behind 0, expected 1"),
        ({"cluster": 3}, "cluster is 3, expected 1 or 2"),
        ({"partials": torch.empty(8)}, "partials has 8 elements of dtype Float, expected 4096"),
        ({"partials": None}, "partials is None, expected 4096 elements"),
        (
            {"counters": torch.zeros(15, dtype=torch.int32)},
            "counters has 15 elements of dtype Int, expected 16",
        ),
        ({"dy": torch.ones(0, 16, dtype=BF16)}, "dy is 0 x 16 and dx 0 x 8, expected no zeros"),
    ],
)
def test_errors(changed, said):
    with launched(ARCH), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.lora_linear_backward_sm90(**arguments(changed))


def test_one_column_of_dy():
    """The weight is a row, whose stride to the next may be any."""
    given = {
        "dy": torch.ones(4, 16, dtype=BF16)[:, :1], "weight": torch.ones(1, 8, dtype=BF16),
        "lora_B": torch.ones(1, 2), "dB": torch.zeros(1, 2),
    }  # fmt: skip
    taken = arguments(given)
    with launched(ARCH):
        torch.ops.lorafast_cuda.lora_linear_backward_sm90(**taken)
    assert (taken["dx"] == 3).all()
    assert (taken["dA"] == 4).all()
    assert (taken["dB"] == 4).all()


def planned(*sizes, device=H100, changed=NONE):
    problem = Case("bf16", *sizes).problem()._replace(**changed)
    return problem, wgmma_backward.plan_lora_linear_backward(problem, device)


class TestPlan:
    @pytest.mark.parametrize(
        ("M", "K", "N", "r"),
        [
            (8192, 4096, 4096, 16), (8192, 4096, 4096, 64), (8192, 4096, 1024, 16),
            (8192, 4096, 14336, 16), (8192, 14336, 4096, 16), (16384, 4096, 1024, 32),
        ],
    )  # fmt: skip
    def test_large_layers_end_before_their_operations_one_by_one(self, M, K, N, r):
        problem, launch = planned(M, K, N, r)
        assert isinstance(launch, Launch)
        assert launch.seconds < cost.one_by_one(problem, H100).device
        assert launch.flops == 2 * M * (N * K + 2 * r * (N + K))
        assert launch.moved > 2 * (2 * M * N + 2 * M * K + N * K)

    def test_small_ones_do_not(self):
        problem, launch = planned(512, 4096, 4096, 16)
        assert isinstance(launch, Launch)
        assert launch.seconds > cost.one_by_one(problem, H100).device

    def test_it_says_what_it_launches(self):
        _, launch = planned(8192, 4096, 4096, 16)
        assert launch.launches == 1
        chosen = dict(launch.choices)
        assert launch.line == (
            "lora_linear_backward: 132 CTAs in clusters of 2 for 1024 tiles of 128 x 256, wgmma, "
            f"{chosen['helpers']} of them make ds and dB first, then dA"
        )
        assert chosen["rows_behind"] > 0

    def test_dA_may_be_a_launch_of_its_own(self):
        case = Case("bf16", 256, 128, 128, 16, rows_behind=0)
        launch = case.launch()
        assert launch.launches == 2
        assert "; shrink_backward: " in launch.line
        alone = replace(case, wants=("dx", "dB")).launch()
        assert launch.moved > alone.moved
        assert launch.seconds > alone.seconds
        assert "rows_behind" not in alone.choices

    def test_B_that_has_to_be_gathered_takes_longer(self):
        _, vectors = planned(8192, 4096, 4096, 64)
        across = {"layouts": Layouts(lora_B=Layout(0, 16))}
        _, elements = planned(8192, 4096, 4096, 64, changed=across)
        assert vectors.seconds < elements.seconds

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"wants": ("dA", "dB")}, "dx isn't wanted, without it there is no GEMM"),
            ({"wants": ("dx", "dbias")}, "dbias is wanted, a backward by wgmma has dx, dA and dB"),
            ({"wants": ("dx", "dweight")}, "dweight is wanted"),
            ({"dropout": True}, "there is dropout, and beside helpers neither dx's term nor the x"),
            ({"dtype": F16}, "dy is torch.float16, helpers make ds and dB of bfloat16"),
            ({"r": 65}, "the rank is 65, helpers make ds and dB of 1 to 64"),
            ({"M": 0}, "dy is 0 x 64, there is nothing to compute"),
            ({"layouts": Layouts(dy=Layout(8))}, "the rows of dy aren't aligned to 16 bytes"),
            ({"layouts": Layouts(x=Layout(8))}, "the rows of x aren't aligned to 16 bytes"),
            ({"layouts": Layouts(weight=Layout(0, 16))}, "the weight's rows aren't contiguous"),
            ({"format": "nf4"}, "the weight is stored as nf4"),
            ({"K": 0}, "dx is 64 x 0"),
        ],
    )
    def test_refusals(self, changed, said):
        _, answer = planned(64, 64, 64, 4, changed=changed)
        assert isinstance(answer, str)
        assert said in answer

    def test_x_is_read_for_dA_alone(self):
        changed = {"layouts": Layouts(x=Layout(2)), "wants": ("dx", "dB")}
        _, answer = planned(64, 64, 64, 4, changed=changed)
        assert isinstance(answer, Launch)

    def test_other_architectures_have_no_wgmma(self):
        _, answer = planned(64, 64, 64, 4, device=Device.known_by("", 100, 148))
        assert answer == "compute capability is 10.0, the kernels of wgmma are for 9.0"
