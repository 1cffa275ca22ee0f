"""Calls of csrc/cuda/lora_linear_backward_sm90.cu on the machine, as the contract takes operations."""

from dataclasses import dataclass
from typing import Any

import torch
from on_machine import Run, launched
from sm90_cases import ARCH, BF16, F16, F32, Machine, as_bits, device, held, pitched
from small_cases import Reference
from torch import Tensor

from lorafast import reference
from lorafast.backends.cuda import wgmma_backward
from lorafast.backends.cuda.launch import Launch
from lorafast.core.problem import Layout, Layouts, Problem

ALL = ("dx", "dA", "dB")
ADAPTERS = {"bf16": BF16, "bf16+fp32": F32, "bf16+fp16": F16}


@dataclass(frozen=True)
class Case:
    """One backward. ``layout``: ``across``, A, B and s lie across memory, or ``pitched``, all have gaps
    behind their rows. ``rows_behind`` is 0 where dA is a launch of its own."""

    kind: str
    M: int
    K: int
    N: int
    r: int
    rows_ahead: int = 1
    rows_behind: int = 1
    helpers: int = 1
    sms: int = 2
    layout: str = ""
    wants: tuple[str, ...] = ALL
    cluster: int = 1

    def __str__(self) -> str:
        said = [self.kind, f"{self.M}x{self.K}x{self.N}", f"r{self.r}"]
        said += [f"rows{self.rows_ahead}-{self.rows_behind}", f"h{self.helpers}"]
        said += ["pairs"] * (self.cluster == 2)
        return "-".join(said + [self.layout] * bool(self.layout) + list(self.wants[:-1]))

    def problem(self) -> Problem:
        """As a plan gets it."""
        layouts = Layouts(
            x=Layout.fresh(self.M, self.K, BF16),
            dy=Layout.fresh(self.M, self.N, BF16),
            weight=Layout.fresh(self.N, self.K, BF16),
        )
        return Problem(
            "lora_linear_backward", self.M, self.K, self.N, self.r, BF16, ADAPTERS[self.kind],
            torch.device("cuda"), wants=self.wants, layouts=layouts,
        )  # fmt: skip

    def launch(self) -> Launch:
        """As it is planned with the case's choices."""
        fixed = {
            "helpers": self.helpers, "rows_ahead": self.rows_ahead, "group": 2,
            "cluster": self.cluster,
        }  # fmt: skip
        if "dA" in self.wants:
            fixed["rows_behind"] = self.rows_behind
        answer = wgmma_backward.plan_lora_linear_backward(self.problem(), device(self.sms), fixed)
        assert isinstance(answer, Launch), answer
        assert answer.choices == fixed
        return answer

    def tensors(self) -> tuple[Tensor, ...]:
        """``dy, x, weight, lora_A, lora_B, s`` in float64."""
        generator = torch.Generator().manual_seed(self.M + 7 * self.N + 31 * self.r)
        M, K, N, r = self.M, self.K, self.N, self.r
        sizes = (M, N), (M, K), (N, K), (r, K), (N, r), (M, r)
        return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)

    def laid_out(self, given: tuple[Any, ...]) -> list[Any]:
        """``dy, x, weight, lora_A, lora_B, s`` as the case has them."""
        if self.layout == "pitched":
            return [pitched(t) for t in given]
        if self.layout == "across":
            return [t if i < 3 else t.t().contiguous().t() for i, t in enumerate(given)]
        return list(given)


class OnMachine(Machine):
    """``lora_linear_backward`` by the plan of a case."""

    def lora_linear_backward(self, *given: Any, **_: Any) -> tuple[Tensor, ...]:
        """What is wanted, in the order of ``WANTS``."""
        launch, tensors = self.case.launch(), self.case.laid_out(given[:6])
        dy, x, weight, A, B, s = tensors
        x = x if "dA" in self.case.wants else None
        s = s if "dB" in self.case.wants else None
        with launched(ARCH, **self.options) as run:
            found = launch.run(dy, x, weight, A, B, s, given[6], 0.0, None)
        self.run = run
        dx, dweight, dA, dB, dbias = found
        assert dweight is dbias is None
        for name, gradient in zip(ALL, (dx, dA, dB), strict=True):
            assert (gradient is not None) == (name in self.case.wants), name
        return tuple(gradient for gradient in (dx, dA, dB) if gradient is not None)


def call_of(case: Case, scaling: float = 0.75):
    """All that is wanted, by name, as ``contract.compare`` takes a call."""

    def call(operations: Any, cast: Any) -> dict[str, Tensor]:
        dy, x, weight, A, B, s = case.tensors()
        adapters = ADAPTERS[case.kind]
        given = (cast(dy), cast(x), cast(weight), cast(A, adapters), cast(B, adapters), cast(s))
        if operations is reference:
            operations = Reference
        found = operations.lora_linear_backward(
            *given, scaling, wants=case.wants, dropout_p=0.0, seed=None
        )
        return dict(zip(case.wants, found, strict=True))

    return call


def hold(case: Case, **options: Any) -> Run:
    """The contract, of each gradient by its name."""
    machine, call, found = OnMachine(case, options), call_of(case), {}
    for name in case.wants:

        def of_one(operations: Any, cast: Any, name: str = name) -> Tensor:
            if operations is not machine:
                return call(operations, cast)[name]
            if not found:
                found.update(call(machine, cast))
            return found[name]

        held(of_one, machine, BF16, name, rounded_to=BF16)
    assert machine.run is not None
    return machine.run


def bits_of(case: Case, **options: Any) -> Tensor:
    """Every gradient of a schedule, as bytes."""
    found = call_of(case)(OnMachine(case, options), lambda t, dtype=BF16: t.to(dtype))
    return as_bits(*found.values())
