"""Calls of the fused ``linear_expand`` on the machine, as the contract takes operations."""

from dataclasses import dataclass, field
from typing import Any

import torch
from on_machine import launched
from small_cases import KINDS, SEED, device
from torch import Tensor

from lorafast.backends.cuda import linear_expand
from lorafast.backends.cuda.linear_expand import Shares
from lorafast.backends.cuda.tables import LINEAR_EXPAND
from lorafast.core.dtypes import wide
from lorafast.core.problem import Layout, Layouts, Problem
from lorafast.reference import contract

SCALING = 0.75
TILES = {tile.columns: tile for tile in LINEAR_EXPAND[80]}


def padded(matrix: Tensor) -> Tensor:
    """Rows with a gap behind them, that begin at multiples of 16 bytes."""
    rows, columns = matrix.shape
    whole = matrix.new_full((rows, -(-columns // 8) * 8 + 8), torch.nan)
    whole[:, :columns] = matrix
    return whole[:, :columns]


@dataclass(frozen=True)
class Case:
    """One call: ``x [M, K]`` and ``weight [N, K]``, transposed ``[K, N]``. ``columns``, ``splits``: the
    tile and the shares, where they aren't the plan's."""

    kind: str
    M: int
    K: int
    N: int
    r: int
    transposed: bool = False
    dropout_p: float = 0.0
    bias: bool = False
    columns: int = 128
    splits: int = 1
    arch: int = 80

    def __str__(self) -> str:
        said = [self.kind, f"{self.M}x{self.K}x{self.N}", f"r{self.r}", f"sm_{self.arch}"]
        said += ["dx"] * self.transposed + [f"p{self.dropout_p}"] * bool(self.dropout_p)
        said += (
            ["bias"] * self.bias + [f"{self.columns}"] + [f"by{self.splits}"] * (self.splits > 1)
        )
        return "-".join(said)

    @property
    def dtype(self) -> torch.dtype:
        return KINDS[self.kind][0]

    @property
    def shares(self) -> Shares:
        """Those that the case asks for."""
        tile = TILES[self.columns]
        return Shares(tile, -(-self.M // 128), -(-self.N // self.columns), self.splits)

    def problem(self, **more: Any) -> Problem:
        """As a plan gets it: of a layer, whose N and K are exchanged in dx."""
        dtype, adapters = KINDS[self.kind]
        N, K = (self.K, self.N) if self.transposed else (self.N, self.K)
        fresh = {
            "x": Layout.fresh(self.M, K, dtype), "dy": Layout.fresh(self.M, N, dtype),
            "weight": Layout.fresh(N, K, dtype),
        }  # fmt: skip
        return Problem(
            "linear_expand", self.M, K, N, self.r, dtype, adapters, torch.device("cuda"),
            transposed=self.transposed, dropout=self.dropout_p > 0, bias=self.bias,
            layouts=Layouts(**fresh), **more,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """In float64; rows of x and the weight begin at multiples of 16 bytes once they are cast."""
        generator = torch.Generator().manual_seed(self.M + 7 * self.N + 31 * self.r)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        M, K, N, r = self.M, self.K, self.N, self.r
        weight = draw(K, N) if self.transposed else draw(N, K)
        found = {"x": draw(M, K), "weight": weight, "s": draw(M, r), "lora_B": draw(N, r)}
        return found | ({"bias": draw(N)} if self.bias else {})


@dataclass
class OnMachine:
    """``linear_expand`` as the contract calls it, run there. The last run is kept."""

    case: Case
    options: dict[str, Any] = field(default_factory=dict)
    times: int = 1
    run: Any = None

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
        case = self.case
        call = linear_expand._run(case.problem(), case.N, case.shares)
        x, weight = padded(x), padded(weight)
        with launched(case.arch, **self.options) as self.run:
            found = [
                call(x, weight, s, lora_B, scaling, bias, dropout_p, seed)
                for _ in range(self.times)
            ]
        assert all(bits(y).equal(bits(found[0])) for y in found)
        return found[0]


def bits(tensor: Tensor) -> Tensor:
    """NaN is equal to itself, and 0 is not −0."""
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def hold(case: Case, times: int = 1, **options: Any) -> OnMachine:
    """The contract, of a case on the machine."""
    t, machine = case.tensors(), OnMachine(case, options, times)
    seed = SEED if case.dropout_p else None
    low, adapters = wide(case.dtype), KINDS[case.kind][1]

    def call(operations, cast):
        return operations.linear_expand(
            cast(t["x"]), cast(t["weight"]), cast(t["s"], low), cast(t["lora_B"], adapters), SCALING,
            cast(t["bias"]) if case.bias else None, case.dropout_p, seed, transposed=case.transposed,
        )  # fmt: skip

    verdict = contract.compare(call, machine, case.dtype)
    assert verdict.why_broken is None, verdict.why_broken
    return machine


__all__ = ["SCALING", "Case", "OnMachine", "bits", "device", "hold", "padded"]
