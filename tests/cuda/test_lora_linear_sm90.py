"""csrc/cuda/lora_linear_sm90.cu, executed: a layer's forward in one launch, whose helpers make ``s``."""

import pytest
import torch
from on_machine import launched, needs_nvcc
from sm90_cases import ARCH, BF16, F16, Case, hold_layer, layer_bits_of

pytestmark = needs_nvcc

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


SCHEDULED = Case("bf16", 520, 72, 264, 16, 128, bias=True, sms=6, helpers=2)


def test_schedules_change_no_bit():
    """Also with one CTA at a time: whoever waits for s runs after those who make it have started."""
    first, *others = (
        layer_bits_of(SCHEDULED, seed=seed, resident=resident, late=late)
        for seed, (resident, late) in enumerate(
            [(1, "late"), (2, "soon"), (4, "random"), (6, None), (3, "late"), (6, "soon")]
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
                x, weight, A, B, 1.0, None, y, s, counters, 128, 2, 2, 1
            )
            found.append(y)
    assert len(run.launches) == 2
    assert found[0].equal(found[1])
    assert not counters.any()


GIVEN = {"scaling": 1.0, "bias": None, "columns": 256, "group": 1, "ctas": 1, "helpers": 1}


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
