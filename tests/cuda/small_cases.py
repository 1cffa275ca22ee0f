"""Calls of ``lorafast.backends.cuda.small`` on the machine, as the contract takes operations."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from layouts import lay_out
from on_machine import launched

from lorafast import reference
from lorafast.backends.cost import Device
from lorafast.backends.cuda import small
from lorafast.backends.cuda.launch import Launch
from lorafast.core.problem import Problem
from lorafast.reference.expand_backward import expand_dB, expand_ds

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KINDS = {
    "bf16": (BF16, BF16),
    "bf16+fp32": (BF16, F32),
    "fp16": (F16, F16),
    "fp16+fp32": (F16, F32),
    "fp32": (F32, F32),
}
SEED = torch.tensor([-(1 << 62) - 12345])


def device(arch: int = 90, sms: int = 3) -> Device:
    """With few SMs, so that a CTA goes through several row blocks."""
    return Device.known_by("", arch, sms)


@dataclass(frozen=True)
class Case:
    """One call, on sizes of its own."""

    kind: str
    M: int
    K: int
    N: int
    r: int
    dropout_p: float = 0.0
    bias: bool = False
    layout: str = "contiguous"
    arch: int = 90
    columns: int = 64
    stages: int = 3

    def __str__(self) -> str:
        sizes = "x".join(str(n) for n in (self.M, self.K, self.N) if n)
        said = [self.kind, sizes, f"r{self.r}", f"sm_{self.arch}", self.layout.replace(" ", "-")]
        said += [f"p{self.dropout_p}"] * bool(self.dropout_p) + ["bias"] * self.bias
        return "-".join(said)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return KINDS[self.kind][0]

    def problem(self, operation: str, **more: Any) -> Problem:
        """As a plan gets it."""
        dtype, adapters = KINDS[self.kind]
        return Problem(
            operation, self.M, self.K, self.N, self.r, dtype, adapters, torch.device("cuda"),
            dropout=self.dropout_p > 0, bias=self.bias, **more,
        )  # fmt: skip

    def tensors(self) -> SimpleNamespace:
        """In float64, laid out; ``cast`` keeps the layout."""
        generator = torch.Generator().manual_seed(self.M + 7 * self.N + 31 * self.r)

        def draw(*size: int) -> torch.Tensor:
            drawn = torch.randn(size, generator=generator, dtype=torch.float64)
            return lay_out(drawn, self.layout) if len(size) == 2 else drawn

        M, K, N, r = self.M, self.K, self.N, self.r
        return SimpleNamespace(
            x=draw(M, K), weight=draw(N, K), lora_A=draw(r, K), lora_B=draw(N, r), s=draw(M, r),
            bias=draw(N) if self.bias else None, dy=draw(M, N),
        )  # fmt: skip


@dataclass
class OnMachine:
    """Operations that are planned for a case and run there. The last run is kept."""

    case: Case
    options: dict[str, Any] = field(default_factory=dict)
    run: Any = None
    sms: int = 3

    def expand(self, s, lora_B, scaling, dropout_p=0.0, seed=None, *, dtype, bias=None):
        """By the plan's own tile."""
        launch = small.plan_expand(self.case.problem("expand"), device(self.case.arch, self.sms))
        assert isinstance(launch, Launch), launch
        s, lora_B = (self._laid_out(t) for t in (s, lora_B))
        return self._launched(lambda: launch.run(s, lora_B, scaling, dropout_p, seed, bias))

    def lora_linear(self, x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
        """By the case's tile."""
        problem = self.case.problem("lora_linear", wants=("y", "s"))
        assert (why := small.why_not_in_one(problem, device(self.case.arch))) is None, why
        run = small._run_lora_linear(problem, self.case.columns, self.case.stages)
        given = [self._laid_out(t) for t in (x, weight, lora_A, lora_B)]
        return self._launched(lambda: run(*given, scaling, bias, dropout_p, seed))

    def lora_linear_backward(self, *given, wants, dropout_p, seed):
        """By the case's tile: what is wanted, in the order of ``WANTS``."""
        problem = self.case.problem("lora_linear_backward", wants=wants)
        assert (why := small.why_no_backward_in_one(problem, device(self.case.arch))) is None, why
        run = small._run_lora_linear_backward(problem, self.case.columns, self.case.stages)
        laid_out = [self._laid_out(t) if isinstance(t, torch.Tensor) else t for t in given]
        found = self._launched(lambda: run(*laid_out, dropout_p, seed))
        return tuple(gradient for gradient in found if gradient is not None)

    def _laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        return lay_out(tensor, self.case.layout)  # of what is expanded already the same

    def _launched(self, call: Any) -> Any:
        with launched(self.case.arch, **self.options) as run:
            found = call()
        self.run = run
        return found


class Reference:
    """A whole layer with its ``s``, and its gradients, as plans return them."""

    @staticmethod
    def lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
        s = reference.shrink(x, lora_A, dropout_p, seed)
        return reference.linear_expand(x, weight, s, lora_B, scaling, bias), s

    @staticmethod
    def lora_linear_backward(dy, x, weight, lora_A, lora_B, s, scaling, *, wants, dropout_p, seed):
        ds = expand_ds(dy, lora_B, scaling)
        found = {
            "dx": lambda: reference.linear_expand(
                dy, weight, ds, lora_A.t(), 1.0, None, dropout_p, seed, transposed=True
            ),
            "dA": lambda: reference.shrink_backward(ds, x, dropout_p, seed, lora_A.dtype),
            "dB": lambda: expand_dB(dy, s, scaling, lora_B.dtype),
            "dbias": lambda: dy.sum(0),
        }
        return tuple(found[name]() for name in found if name in wants)
