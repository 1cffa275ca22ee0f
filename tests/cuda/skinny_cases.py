"""Calls of the skinny operations: planned, executed on the machine, held to the contract."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import layouts
import pytest
import torch
from on_machine import Run, launched
from torch import Tensor

from lorafast import reference
from lorafast.backends.cost import Device
from lorafast.backends.cuda import skinny
from lorafast.backends.cuda.launch import Launch
from lorafast.core.dtypes import wide
from lorafast.core.problem import Problem
from lorafast.reference import contract
from lorafast.reference.dropout import survivor_scale

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([0x1234_5678_9ABC_DEF])
SCALING = 0.75
PLANS = {
    "shrink": skinny.plan_shrink,
    "expand_backward": skinny.plan_expand_backward,
    "shrink_backward": skinny.plan_shrink_backward,
}
KINDS = (
    (80, BF16), (80, F16), (80, F32), (75, F16), pytest.param(75, F32, marks=pytest.mark.slow),
)  # fmt: skip
"""Architectures and dtypes that differ in how they multiply: sm_75 has neither bfloat16 nor TF32."""
SCHEDULES = ((0, 1), (1, 2), (2, 4), (3, 3), (4, 64))
"""Seeds, and CTAs that are resident at once."""


def dtype_on(arch: int) -> torch.dtype:
    """That of most calls on an architecture."""
    return F16 if arch < 80 else BF16


def _pitched(matrix: Tensor) -> Tensor:
    """Rows with a gap behind them, aligned to 16 bytes."""
    whole = matrix.new_full((matrix.shape[0], -(-matrix.shape[1] // 8) * 8 + 16), torch.nan)
    whole[:, : matrix.shape[1]] = matrix
    return whole[:, : matrix.shape[1]]


def _far(matrix: Tensor) -> Tensor:
    """Elements beyond 2**31 of them: rows lie far apart in memory that is hardly used."""
    rows, columns = matrix.shape
    step = (2**31 // max(rows - 1, 1) + columns + 8) // 8 * 8
    whole = torch.empty((rows - 1) * step + columns, dtype=matrix.dtype)
    return whole.as_strided((rows, columns), (step, 1)).copy_(matrix)


LAYOUTS = {name: functools.partial(layouts.lay_out, layout=name) for name in layouts.LAYOUTS}
LAYOUTS |= {"rows with a gap": _pitched, "far apart": _far}


def specials(matrix: Tensor) -> Tensor:
    """The same with an infinity and a NaN, each in a row and a column of its own."""
    matrix = matrix.clone()
    if matrix.dim() == 2 and min(matrix.shape) > 8:
        matrix[3, 5], matrix[7, 2] = torch.inf, torch.nan
    return matrix


@dataclass(frozen=True)
class Case:
    """One call. ``columns`` is K, or N of ``expand_backward``; ``sms`` decides how sums are shared out.
    ``lay_out`` changes how a matrix lies in memory."""

    operation: str
    rows: int
    columns: int
    r: int
    dtype: torch.dtype = BF16
    adapter: torch.dtype | None = None
    dropout_p: float = 0.0
    wants: tuple[str, ...] = ("ds", "dB", "dbias")
    arch: int = 80
    sms: int = 8
    lay_out: Callable[[Tensor], Tensor] = lambda matrix: matrix

    @property
    def adapter_dtype(self) -> torch.dtype:
        return self.adapter or self.dtype

    def launch(self) -> Launch:
        """What the family plans."""
        back = self.operation == "expand_backward"
        problem = Problem(
            self.operation, self.rows, 0 if back else self.columns, self.columns if back else 0,
            self.r, self.dtype, self.adapter_dtype, torch.device("cpu"),
            wants=self.wants if back else (), dropout=self.dropout_p > 0,
        )  # fmt: skip
        found = PLANS[self.operation](problem, Device.known_by("a device", self.arch, self.sms))
        assert isinstance(found, Launch), found
        return found

    def tensors(self) -> dict[str, Tensor]:
        """In their dtypes: the large matrix, the factor beside its columns, that beside its rows."""
        generator = torch.Generator().manual_seed(self.rows + 7 * self.columns + self.r)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        large, beside = draw(self.rows, self.columns), draw(self.rows, self.r)
        factor = draw(self.r, self.columns)
        if self.operation == "expand_backward":
            factor = factor.t().contiguous()
        return {
            "large": self.lay_out(large.to(self.dtype)),
            "beside": self.lay_out(beside.to(wide(self.dtype))),
            "factor": self.lay_out(factor.to(self.adapter_dtype)),
        }

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Calls the launch, within ``launched``."""
        run, seed = self.launch().run, SEED if self.dropout_p else None
        large, beside, factor = given["large"], given["beside"], given["factor"]
        if self.operation == "shrink":
            return {"s": run(large, factor, self.dropout_p, seed)}
        if self.operation == "shrink_backward":
            return {"dA": run(beside, large, self.dropout_p, seed)}
        found = run(
            large,
            beside if "dB" in self.wants else None,
            factor if "ds" in self.wants else None,
            SCALING,
        )
        names = ("ds", "dB", "dbias")
        return {name: t for name, t in zip(names, found, strict=True) if t is not None}

    def reference(self, given: dict[str, Tensor], scaling: float = SCALING) -> dict[str, Tensor]:
        """What the definition gives, in the dtype of ``given``."""
        seed = SEED if self.dropout_p else None
        large, beside, factor = given["large"], given["beside"], given["factor"]
        if self.operation == "shrink":
            return {"s": reference.shrink(large, factor, self.dropout_p, seed)}
        if self.operation == "shrink_backward":
            dtype = self.adapter_dtype if large.dtype == self.dtype else large.dtype
            dA = reference.shrink_backward(beside, large, self.dropout_p, seed, dtype)
            return {"dA": dA}
        ds, dB = reference.expand_backward(large, beside, factor, scaling)
        dbias = large.sum(0)
        return {
            name: t for name, t in (("ds", ds), ("dB", dB), ("dbias", dbias)) if name in self.wants
        }

    def bounds(self, given: dict[str, Tensor]) -> dict[str, contract.Bound]:
        """The contract's, for each output."""
        exact = {name: tensor.double() for name, tensor in given.items()}
        squares = {name: tensor.square() for name, tensor in exact.items()}
        eager, ref64 = self.reference(given), self.reference(exact)
        size64 = self.reference(squares, SCALING**2)
        if self.dropout_p:  # survivors are scaled by its square
            keep = survivor_scale(self.dropout_p)
            size64 = {name: t * keep for name, t in size64.items()}
        found = {}
        for name, one in ref64.items():
            rounded = self.dtype if name in ("dA", "dB") and self.dtype == BF16 else None
            found[name] = contract.bound(eager[name], one, size64[name].abs().sqrt(), rounded)
        return found


def executed(
    case: Case, seed: int = 0, resident: int = 4, times: int = 1, **options: Any
) -> tuple[dict[str, Tensor], Run]:
    """What a case gives, and what was launched; ``times`` calls in a row, all of which must agree."""
    given = case.tensors()
    with launched(case.arch, seed, resident, sms=case.sms, **options) as run:
        found = [case.run(given) for _ in range(times)]
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert bits(tensor).equal(bits(other[name])), f"{name} of a second call"
    return found[0], run


def check(case: Case, seed: int = 0, resident: int = 4, **options: Any) -> dict[str, Tensor]:
    """Executes a case and holds it to the contract."""
    found, _ = executed(case, seed, resident, **options)
    why = contract.why_any_broken(found, case.bounds(case.tensors()))
    assert why is None, why
    return found


def bits(tensor: Tensor) -> Tensor:
    """As integers: NaN is equal to itself, and 0 is not −0."""
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)
