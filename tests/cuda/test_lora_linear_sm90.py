"""csrc/cuda/lora_linear_sm90.cu, executed: a layer's forward in one launch, whose helpers make ``s``."""

import pytest
import torch
from on_machine import launched, needs_nvcc
from sm90_cases import ARCH, BF16, F16, Case, hold_layer, layer_bits_of

from lorafast import reference
from lorafast.backends.cost import Device
from lorafast.backends.cuda import wgmma
from lorafast.backends.cuda.launch import Launch
from lorafast.core.problem import Layout, Layouts

pytestmark = needs_nvcc
H100 = Device.known_by("", ARCH, 132, 1.7e9, 2.6e9, 5120)

QUICK = [
    Case("bf16", 300, 136, 264, 16, bias=True, sms=3, helpers=1),
    Case("bf16+fp32", 257, 200, 136, 17, 128, sms=4, helpers=2),
    Case("bf16", 1, 8, 8, 1, 128, sms=2, helpers=1),
    Case("bf16", 130, 72, 520, 3, 128, pitched=True, sms=2, helpers=2),
]
MORE = [
    Case("bf16", M, K, N, r, columns, sms=sms, helpers=helpers)
    for M, K, N, r, columns, sms, helpers in (
        (129, 520, 256, 64, 256, 2, 1), (640, 64, 128, 33, 128, 4, 3), (65, 2048, 264, 8, 256, 1, 1),
        (128, 328, 1032, 63, 128, 5, 5),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contract(case):
    hold_layer(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_contract_at_length(case):
    hold_layer(case, seed=1)


SCHEDULED = Case("bf16", 260, 72, 136, 16, 128, bias=True, sms=5, helpers=2)


def test_schedules_change_no_bit():
    """Also with one CTA at a time: whoever waits for s runs after those who make it have started."""
    first, *others = (
        layer_bits_of(SCHEDULED, seed=seed, resident=resident, late=late)
        for seed, (resident, late) in enumerate(
            [(1, "late"), (2, "soon"), (4, "random"), (5, None), (3, "late")]
        )
    )
    assert all(first.equal(other) for other in others)


def test_two_launches_in_a_row_on_the_same_counters():
    case = Case("bf16", 260, 72, 128, 16, 128)
    x, weight, A, B = (
        case.draw(*size).to(BF16) for size in ((260, 72), (128, 72), (16, 72), (128, 16))
    )
    counters, found = torch.zeros(7, dtype=torch.int32), []
    with launched(ARCH, resident=2) as run:
        for _ in range(2):
            y, s = torch.empty(260, 128, dtype=BF16), torch.empty(260, 16, dtype=BF16)
            torch.ops.lorafast_cuda.lora_linear_sm90(
                x, weight, A, B, 1.0, None, y, s, counters, 128, 2, 2, 1, 1
            )
            found.append(y)
    assert len(run.launches) == 2
    assert found[0].equal(found[1])
    assert not counters.any()


GIVEN = {
    "scaling": 1.0,
    "bias": None,
    "columns": 256,
    "group": 1,
    "ctas": 1,
    "helpers": 1,
    "cluster": 1,
}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_A": torch.ones(2, 16)}, "and lora_A Float, expected bfloat16"),
        ({"lora_A": torch.ones(2, 24, dtype=BF16)}, "lora_A is 2 x 24, expected 2 x 16"),
        (
            {"lora_A": torch.ones(16, 2, dtype=BF16).t()},
            "lora_A has neighbours of a row 2 elements",
        ),
        ({"lora_A": torch.ones(2, 20, dtype=BF16)[:, :16]}, "lora_A has rows that don't begin"),
        ({"helpers": 0}, "helpers is 0, expected 1 to 1"),
        ({"helpers": 2}, "helpers is 2, expected 1 to 1"),
        ({"counters": torch.zeros(4, dtype=torch.int32)}, "expected at least 5 int32"),
        ({"weight": torch.ones(16, 8, dtype=BF16).t()}, "expected contiguous rows"),
        ({"s": torch.ones(2, 4, dtype=BF16).t()}, "s is not contiguous"),
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
    ("changed", "said"),
    [
        ({"x": (4, 16), "weight": (8, 16), "y": (4, 8)}, "x has dtype Half"),
        ({"lora_A": (65, 16), "lora_B": (8, 65), "s": (4, 65)}, "r is 65, expected 1 to 64"),
    ],
)
def test_errors_of_several(changed, said):
    sizes = {
        "x": (4, 16),
        "weight": (8, 16),
        "lora_A": (2, 16),
        "lora_B": (8, 2),
        "y": (4, 8),
        "s": (4, 2),
    }
    taken = {name: torch.ones(size, dtype=BF16) for name, size in (sizes | changed).items()}
    if "x" in changed:
        taken |= {name: taken[name].to(F16) for name in ("x", "weight", "y")}
        taken["s"] = taken["s"].float()
    counters = torch.zeros(5, dtype=torch.int32)
    with launched(ARCH), pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.lora_linear_sm90(**taken, **GIVEN, counters=counters)


@pytest.mark.slow
def test_by_its_plan():
    """What ``plan_lora_linear`` launches; two row blocks, with helpers."""
    case = Case("bf16", 256, 4096, 128, 16, 128)
    launch = wgmma.plan_lora_linear(case.problem("lora_linear"), H100)
    assert isinstance(launch, Launch)
    x, weight, A, B = (
        case.draw(*size).to(BF16) for size in ((256, 4096), (128, 4096), (16, 4096), (128, 16))
    )
    with launched(ARCH) as run:
        y, s = launch.run(x, weight, A, B, 0.5, None, 0.0, None)
    assert run.launches[0].grid == (4, 1, 1)
    exact = reference.linear_expand(x.double(), weight.double(), s.double(), B.double(), 0.5)
    assert (y.double() - exact).norm() < 2e-3 * exact.norm()


class TestPlan:
    @pytest.mark.parametrize(
        ("M", "K", "N", "helpers", "columns"),
        [
            (8192, 4096, 4096, 8, 256), (8192, 4096, 14336, 8, 256), (512, 4096, 4096, 4, 128),
            (2048, 4096, 4096, 8, 256),
        ],
    )  # fmt: skip
    def test_its_helpers(self, M, K, N, helpers, columns):
        launch = wgmma.plan_lora_linear(Case("bf16", M, K, N, 16).problem("lora_linear"), H100)
        assert isinstance(launch, Launch)
        assert launch.line.endswith(f"x {columns}, wgmma, {helpers} of them shrink first")
        assert launch.flops == 2 * M * (N * K + 16 * (N + K))
        assert launch.moved == 2 * (M * K + N * K + M * N + 16 * (M + K + N))
        assert launch.launches == 1

    @pytest.mark.parametrize(
        ("M", "K", "N"),
        [(8192, 4096, 4096), (8192, 4096, 1024), (4096, 1024, 1024), (300, 64, 264)],
    )
    def test_helpers_end_before_a_launch_of_their_own(self, M, K, N):
        """Or there are none: no shape takes longer by the model."""
        plan = wgmma.helped(M, K, N, H100)
        answer = wgmma.plan_lora_linear(Case("bf16", M, K, N, 16).problem("lora_linear"), H100)
        assert isinstance(answer, Launch) is (plan.clocks < wgmma.clocks_apart(M, K, N, H100))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"dropout": True}, "there is dropout, helpers make s without"),
            ({"dtype": F16}, "x is torch.float16, helpers make s of bfloat16"),
            ({"adapter_dtype": torch.float32}, "the adapters are torch.float32"),
            ({"r": 65}, "the rank is 65, helpers make s of 1 to 64"),
            ({"M": 0}, "y is 0 x 64, there is nothing to compute"),
            ({"layouts": Layouts(lora_A=Layout(8))}, "the rows of lora_A aren't aligned"),
            ({"layouts": Layouts(weight=Layout(0, 16))}, "the weight's rows aren't contiguous"),
            ({"layouts": Layouts(x=Layout(2))}, "the rows of x aren't aligned"),
        ],
    )
    def test_refusals(self, change, said):
        problem = Case("bf16", 64, 64, 64, 4).problem("lora_linear")._replace(**change)
        reason = wgmma.plan_lora_linear(problem, H100)
        assert isinstance(reason, str)
        assert said in reason
