"""Layers of at most 16 rows, drawn, run on the machine and held to the contract."""

from dataclasses import dataclass, field

import torch
from on_machine import Run, launched
from ptx.plant import EVERY, change
from torch import Tensor

from lorafast import reference
from lorafast.core.dtypes import wide
from lorafast.reference import contract

KERNEL = "decode_kernel"
LAST_FIRST = change(
    r"mov\.u32 \s*(%r\d+), %ctaid\.x;",
    r"{ .reg .u32 own; mov.u32 own, %ctaid.x; not.b32 own, own; mov.u32 \1, %nctaid.x; "
    r"add.u32 \1, \1, own; }",
    EVERY,
)
"""The grid the other way round: a device may start CTAs in any order, and helpers last of all."""

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Layer:
    """The arguments of a call; ``adapter_of`` is None where there is one adapter."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor = 0.5
    bias: Tensor | None = None
    adapter_of: Tensor | None = None
    wanted: dict[str, contract.Bound] = field(default_factory=dict)

    @property
    def r(self) -> int:
        return self.lora_A.shape[-2]

    def scratch(self, helpers: int) -> tuple[int, int]:
        """Elements of ``partials`` and of ``counters``."""
        tokens = 8 if self.x.shape[0] <= 8 else 16
        rows = 2 * tokens
        pitch = -(-self.r // rows) * rows
        return tokens * (pitch + helpers * rows), 3 + helpers

    def bounds(self) -> dict[str, contract.Bound]:
        """What the contract allows, found once."""
        if not self.wanted:
            eager, exact, squares = (
                self._reference(cast)
                for cast in (lambda t: t, lambda t: t.double(), lambda t: t.double().square())
            )
            roots = {name: t.abs().sqrt() for name, t in squares.items()}
            self.wanted = contract.bounds(eager, exact, roots)
        return self.wanted

    def _reference(self, cast) -> dict[str, Tensor]:
        x, w, A, B = (cast(t) for t in (self.x, self.weight, self.lora_A, self.lora_B))
        bias = None if self.bias is None else cast(self.bias)
        if self.adapter_of is None:
            scaling = cast(torch.tensor(self.scaling, dtype=torch.float64)).item()
            y, s = reference.lora_linear(x, w, A, B, scaling, bias), reference.shrink(x, A)
        else:
            scaling = cast(self.scaling)
            y = reference.grouped_lora_linear(
                reference.as_elements(x, self.adapter_of), w, A, B, scaling, self.adapter_of, bias
            ).reshape(x.shape[0], -1)
            s = reference.grouped_shrink(x, A, self.adapter_of)
        return {"y": y, "s": s}


def drawn(
    M,
    K,
    N,
    r,
    dtype=BF16,
    adapters=None,
    *,
    bias=True,
    adapter_of=None,
    n=4,
    seed=0,
) -> Layer:
    """Standard normal numbers; ``adapters``: the dtype of A and B, by default ``dtype``."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape, of=dtype):
        return torch.randn(shape, generator=rng).to(of)

    of = adapters or dtype
    stack = () if adapter_of is None else (n,)
    layer = Layer(
        normal(M, K), normal(N, K), normal(*stack, r, K, of=of), normal(*stack, N, r, of=of)
    )
    if bias:
        layer.bias = normal(N)
    if adapter_of is not None:
        layer.adapter_of = torch.tensor(adapter_of, dtype=torch.int64)
        layer.scaling = torch.rand(n, generator=rng) + 0.25
    return layer


def call(layer: Layer, helpers: int, counters: Tensor | None = None, want_s: bool = True):
    """The operation, within a block of ``launched``: y and s."""
    x, N = layer.x, layer.weight.shape[0]
    partials, flags = layer.scratch(helpers)
    y = torch.empty(x.shape[0], N, dtype=x.dtype)
    s = torch.empty(x.shape[0], layer.r, dtype=wide(x.dtype)) if want_s else None
    scratch = torch.empty(partials) if helpers else None
    if counters is None and helpers:
        counters = torch.zeros(flags, dtype=torch.int32)
    matrices = (x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    rest = (layer.bias, helpers, scratch, counters, y, s)
    if layer.adapter_of is None:
        torch.ops.lorafast_cuda.lora_linear_decode(*matrices, *rest)
    else:
        torch.ops.lorafast_cuda.grouped_lora_linear_decode(*matrices, layer.adapter_of, *rest)
    return y, s


def run(layer: Layer, helpers: int, arch=80, want_s=True, **options) -> tuple[Run, Tensor, Tensor]:
    """Executes the operation."""
    with launched(arch, **options) as ran:
        y, s = call(layer, helpers, want_s=want_s)
    return ran, y, s


def check(layer: Layer, helpers: int, arch=80, **options) -> tuple[Tensor, Tensor]:
    """Executes it and holds its results to the contract."""
    ran, y, s = run(layer, helpers, arch, **options)
    assert len(ran.launches) == 1
    reason = contract.why_any_broken({"y": y, "s": s}, layer.bounds())
    assert reason is None, reason
    return y, s
