"""Calls of the GEMMs of csrc/cuda/sm90.cuh on the machine, as the contract takes operations."""

from dataclasses import dataclass, field
from typing import Any

import torch
from on_machine import Run, launched
from torch import Tensor

from lorafast.backends.cost import Device
from lorafast.backends.cuda import wgmma
from lorafast.backends.cuda.launch import Launch
from lorafast.core.problem import Layout, Layouts, Problem
from lorafast.reference import contract, wide

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KINDS = {
    "bf16": (BF16, BF16),
    "bf16+fp32": (BF16, F32),
    "fp16": (F16, F16),
    "fp16+fp32": (F16, F32),
}
SEED = torch.tensor([-(1 << 62) - 12345])
ARCH = 90


def device(sms: int = 3) -> Device:
    """With few SMs, so that a CTA takes several tiles."""
    return Device.known_by("", ARCH, sms)


@dataclass(frozen=True)
class Sizes:
    """What all calls have: ``kind`` says dtypes, ``columns`` are a tile's."""

    kind: str
    M: int
    K: int
    N: int
    r: int
    columns: int = 256
    dropout_p: float = 0.0
    bias: bool = False

    def said(self, *flags: str) -> str:
        """A test's name, with those of the flags that are set."""
        said = [self.kind, f"{self.M}x{self.K}x{self.N}", f"r{self.r}", f"n{self.columns}"]
        said += [f"p{self.dropout_p}"] * bool(self.dropout_p)
        return "-".join(said + [name for name in ("bias", *flags) if getattr(self, name)])

    def draw(self, *size: int, salt: int = 0) -> Tensor:
        """In float64."""
        generator = torch.Generator().manual_seed(self.M + 7 * self.N + 31 * self.r + salt)
        return torch.randn(size, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case(Sizes):
    """One ``linear_expand``. ``transposed``: as dx, whose W lies across; ``pitched``: x, s and B have
    gaps behind their rows."""

    transposed: bool = False
    pitched: bool = False
    sms: int = 2
    cluster: int = 1

    def __str__(self) -> str:
        return self.said("transposed", "pitched") + "-c2" * (self.cluster > 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return KINDS[self.kind][0]

    def problem(self, operation: str = "linear_expand") -> Problem:
        """As a plan gets it: sizes are the layer's."""
        dtype, adapters = KINDS[self.kind]
        N, K = (self.K, self.N) if self.transposed else (self.N, self.K)
        layouts = Layouts(
            weight=Layout.fresh(N, K, dtype),
            x=Layout.fresh(self.M, self.K, dtype),
            lora_A=Layout.fresh(self.r, K, adapters),
        )
        return Problem(
            operation, self.M, K, N, self.r, dtype, adapters, torch.device("cuda"),
            dropout=self.dropout_p > 0, bias=self.bias, transposed=self.transposed,
            layouts=layouts._replace(dy=layouts.x),
        )  # fmt: skip


def pitched(matrix: Tensor) -> Tensor:
    """With 16 bytes of NaN and more behind each row."""
    rows, columns = matrix.shape
    whole = matrix.new_full((rows, columns + 8 + -columns % 8), torch.nan)
    whole[:, :columns] = matrix
    return whole[:, :columns]


@dataclass
class Machine:
    """Calls a case in one launch; the last run is kept."""

    case: Any
    options: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None


def held(call: Any, machine: Machine, dtype: torch.dtype, what: str = "", **given: Any) -> Run:
    """The contract, of what ``contract.compare`` takes; ``what`` it is a call of."""
    verdict = contract.compare(call, machine, dtype, **given)
    assert verdict.why_broken is None, f"{what}: {verdict.why_broken}"
    assert machine.run is not None
    return machine.run


def as_bits(*found: Tensor) -> Tensor:
    """All bytes."""
    return torch.cat([tensor.view(torch.uint8).flatten() for tensor in found])


class OnMachine(Machine):
    """``linear_expand`` by the plan of a case."""

    def linear_expand(
        self,
        x,
        weight,
        s,
        lora_B,
        scaling,
        bias=None,
        dropout_p=0.0,
        seed=None,
        *,
        transposed=False,
    ):
        """Of tiles that are as wide as the case says."""
        case = self.case
        fixed = {"columns": case.columns, "group": 2, "cluster": case.cluster}
        launch = wgmma.plan_linear_expand(case.problem(), device(case.sms), fixed)
        assert isinstance(launch, Launch), launch
        if case.pitched:
            x, s, lora_B = (pitched(t) for t in (x, s, lora_B))
        with launched(ARCH, **self.options) as run:
            y = launch.run(x, weight, s, lora_B, scaling, bias, dropout_p, seed)
        self.run = run
        return y


def call_of(case: Case, scaling: float = 0.75):
    """As ``contract.compare`` takes it."""
    M, K, N, r = case.M, case.K, case.N, case.r

    def call(operations: Any, cast: Any) -> Tensor:
        s, B = case.draw(M, r, salt=1), case.draw(N, r, salt=2)
        weight = case.draw(K, N, salt=3) if case.transposed else case.draw(N, K, salt=3)
        bias = cast(case.draw(N, salt=4)) if case.bias else None
        return operations.linear_expand(
            cast(case.draw(M, K)), cast(weight), cast(s, wide(case.dtype)),
            cast(B, KINDS[case.kind][1]), scaling, bias, case.dropout_p, SEED,
            transposed=case.transposed,
        )  # fmt: skip

    return call


def hold(case: Case, **options: Any) -> Run:
    """The contract."""
    return held(call_of(case), OnMachine(case, options), case.dtype, "y")


def bits_of(case: Case, **options: Any) -> Tensor:
    """y of a schedule, as bytes."""

    def cast(tensor: Tensor, other: torch.dtype = case.dtype) -> Tensor:
        return tensor.to(other)

    return as_bits(call_of(case)(OnMachine(case, options), cast))
