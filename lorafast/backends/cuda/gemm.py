"""What the fused GEMMs of csrc/cuda have in common: ``linear_expand`` by mma.sync and by wgmma."""

from dataclasses import dataclass

import torch

from lorafast.core.problem import DENSE, Problem

_ADAPTERS = (torch.bfloat16, torch.float16, torch.float32)
_MOST_RANKS = 2**20 - 1
_MOST_TILES = 2**30
ALIGNED = 16
"""Bytes of which the addresses of rows, or of a weight's columns, are multiples."""


@dataclass(frozen=True)
class Gemm:
    """What a family's kernels take.

    - ``name``: as sentences have it;
    - ``dtypes``: of x, the weight and y;
    - ``terms``: of a sum, the fewest and the most;
    - ``rows``, ``columns``: of its smallest tile of y.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    terms: tuple[int, int]
    rows: int
    columns: int


def sizes_of(p: Problem) -> tuple[int, int]:
    """Columns of the result, and terms of its sums."""
    return (p.K, p.N) if p.transposed else (p.N, p.K)


def why_refused(p: Problem, gemm: Gemm) -> str | None:
    """Why no kernel of this kind can serve a ``linear_expand``, a sentence, or None. Each family has
    clauses of its own beside these."""
    N, terms = sizes_of(p)
    x, name = (p.layouts.dy, "dy") if p.transposed else (p.layouts.x, "x")
    least, most = gemm.terms
    if p.format != DENSE:
        return f"the weight is stored as {p.format}, {gemm.name} reads a dense one"
    if p.dtype not in gemm.dtypes:
        return f"{name} has dtype {p.dtype}, {gemm.name} takes {_listed(gemm.dtypes)}"
    if p.adapter_dtype not in _ADAPTERS:
        return f"lora_B has dtype {p.adapter_dtype}, {gemm.name} takes {_listed(_ADAPTERS)}"
    if not 1 <= p.r <= _MOST_RANKS:
        return f"r is {p.r}, {gemm.name} takes 1 to {_MOST_RANKS}"
    if not least <= terms <= most:
        return f"the sums have {terms} terms, {gemm.name} takes {least} to {most}"
    if -(-p.M // gemm.rows) * -(-N // gemm.columns) > _MOST_TILES:
        return f"the result is {p.M} x {N}, more than {_MOST_TILES} tiles"
    if x.rows < ALIGNED:
        return f"the rows of {name} aren't aligned to {ALIGNED} bytes, as {gemm.name} reads them"
    if max(p.layouts.weight.rows, p.layouts.weight.columns) < ALIGNED:
        return (
            f"neither rows nor columns of the weight are aligned to {ALIGNED} bytes, as {gemm.name} "
            "reads them"
        )
    return None


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(names)} and {last}"
