"""Every launch that backend cuda may choose for a layer, planned for a card and executed."""

import pytest
import torch

pytest.importorskip("triton")

from cards import A100, H200
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape
from lorafast.bench.operations.cases import cases
from lorafast.bench.operations.job import why_wrong
from on_machine import launched, needs_nvcc

from lorafast.backends.cost import pretending
from lorafast.backends.cuda import Cuda, planning
from lorafast.backends.cuda.launch import Launch
from lorafast.ops.problems import by_backend

pytestmark = [needs_nvcc, pytest.mark.slow]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("card", [A100, H200], ids=lambda card: card.name)
@pytest.mark.parametrize(("dtype", "dropout_p"), [("bf16", 0.0), ("fp16", 0.3), ("fp32", 0.3)])
def test_whatever_may_be_launched_is_right(card, dtype, dropout_p):
    """Through Python: what ``run`` allocates and hands over; ``lorafast tune`` calls them so."""
    layer = Problem(Shape("", 72, 128, 136), 16, dtype, dtype, dropout_p)
    said = []
    with pretending(card):
        for case in cases(layer, draw(layer, torch.device("cpu"), 1)).values():
            for launch in planning.launches_of(case.asks, card):
                if isinstance(launch, Launch):
                    operations = by_backend(Cuda(launch.choices))
                    with launched(card.capability, resident=200, sms=card.sms):
                        assert why_wrong(case, operations, DTYPES[dtype]) is None, launch.line
                    said.append(launch.line)
    fused = [line for line in said if line.startswith("linear_expand: ")]
    assert len(fused) == (0 if dtype == "fp32" else 2)
    assert all(("wgmma" in line) == (card is H200) for line in fused)
    in_one = 2 * (card is H200 and dtype == "bf16")  # forward and backward by wgmma
    assert len(said) == 8 + len(fused) + in_one
