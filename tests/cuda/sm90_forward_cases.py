"""Calls of csrc/cuda/lora_linear_sm90.cu on the machine: a layer's forward, whose helpers make ``s``."""

from dataclasses import dataclass
from typing import Any

import torch
from on_machine import Run, launched
from sm90_cases import ARCH, BF16, F16, F32, SEED, Machine, Sizes, as_bits, held, pitched
from torch import Tensor

from lorafast import reference
from lorafast.backends.cuda import wgmma
from lorafast.core.problem import Layout, Layouts, Problem
from lorafast.reference.dropout import survivor_scale, threshold

ADAPTERS = {"bf16": BF16, "fp16": F16, "fp32": F32}
LAYOUTS = ("rows", "pitched", "unaligned", "across")


def unaligned(matrix: Tensor) -> Tensor:
    """Rows of neighbours, none of which is known to begin at a multiple of 16 bytes."""
    rows, columns = matrix.shape
    whole = matrix.new_full((rows, columns + 3), torch.nan)
    whole[:, 1 : columns + 1] = matrix
    return whole[:, 1 : columns + 1]


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same matrix, in another layout."""
    if layout == "across":
        return matrix.t().contiguous().t()
    return {"pitched": pitched, "unaligned": unaligned}.get(layout, torch.clone)(matrix)


@dataclass(frozen=True)
class Layer(Sizes):
    """One ``lora_linear`` of a bfloat16 x. ``kind``: the dtype of adapters; ``A``: the layout of lora_A,
    and of lora_B; ``across``: W's columns are contiguous."""

    across: bool = False
    A: str = "rows"
    ctas: int = 3
    helpers: int = 1
    cluster: int = 1

    def __str__(self) -> str:
        layout = f"-{self.A}" * (self.A != "rows")
        pairs = "-c2" * (self.cluster > 1)
        return f"{self.said('across')}{layout}-h{self.helpers}of{self.ctas}{pairs}"

    def problem(self) -> Problem:
        """As a plan gets it."""
        adapters = ADAPTERS[self.kind]
        weight = Layout(0, 16) if self.across else Layout.fresh(self.N, self.K, BF16)
        layouts = Layouts(
            x=Layout.fresh(self.M, self.K, BF16), weight=weight,
            lora_A=Layout.fresh(self.r, self.K, adapters),
        )  # fmt: skip
        return Problem(
            "lora_linear", self.M, self.K, self.N, self.r, BF16, adapters, torch.device("cuda"),
            dropout=self.dropout_p > 0, bias=self.bias, layouts=layouts,
        )  # fmt: skip

    def call(self, operations: Any, cast: Any) -> tuple[Tensor, Tensor]:
        """``lora_linear``, as ``contract.compare`` takes it."""
        adapters = ADAPTERS[self.kind]
        bias = cast(self.draw(self.N, salt=4)) if self.bias else None
        A, B = self.draw(self.r, self.K, salt=1) / self.K**0.5, self.draw(self.N, self.r, salt=2)
        x, weight = cast(self.draw(self.M, self.K)), cast(self.draw(self.N, self.K, salt=3))
        y, s = operations.lora_linear(
            x, weight, cast(A, adapters), cast(B, adapters), 0.75, bias, self.dropout_p, SEED
        )
        return y, s


class OnMachine(Machine):
    """The layer in one launch."""

    def lora_linear(self, x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
        """``y, s``, with the helpers that the case has."""
        case = self.case
        lora_A, lora_B = (laid_out(t, case.A) for t in (lora_A, lora_B))
        weight = laid_out(weight, "across") if case.across else weight
        mask = (
            (seed, threshold(dropout_p), survivor_scale(dropout_p)) if dropout_p else (None, 0, 1.0)
        )
        with launched(ARCH, **self.options) as run:
            y, s = torch.empty(case.M, case.N, dtype=BF16), torch.empty(case.M, case.r, dtype=BF16)
            counters = torch.zeros(wgmma.COUNTERS + -(-case.M // 128), dtype=torch.int32)
            torch.ops.lorafast_cuda.lora_linear_sm90(
                x, weight, lora_A, lora_B, scaling, bias, *mask, y, s, counters, case.columns, 2,
                case.ctas, case.helpers, case.cluster,
            )  # fmt: skip
        self.run = run
        return y, s


class _Reference:
    """``y`` from the ``s`` that is returned, rounded to its dtype."""

    @staticmethod
    def lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
        s = reference.shrink(x, lora_A, dropout_p, seed)
        return reference.linear_expand(x, weight, s, lora_B, scaling, bias), s


def hold(case: Layer, **options: Any) -> Run:
    """The contract, of ``y`` and ``s``."""

    def call(operations: Any, cast: Any) -> tuple[Tensor, Tensor]:
        return case.call(_Reference if operations is reference else operations, cast)

    return held(call, OnMachine(case, options), BF16, "y and s")


def bits_of(case: Layer, **options: Any) -> Tensor:
    """y and s of a schedule, as bytes."""
    return as_bits(*case.call(OnMachine(case, options), lambda t, dtype=BF16: t.to(dtype)))
