"""Layers of few rows in one launch, with what they are compared by."""

from dataclasses import dataclass

import torch
from codes_products import weight_of
from lorafast.kernels.common.configs import INTERPRETER_SMS
from lorafast.kernels.common.decode_plan import DecodeLaunch, decode_launch
from lorafast.kernels.common.plan import precision_of, skinny_precision_of
from lorafast.kernels.lora_linear import decode

from lorafast import reference
from lorafast.reference import contract

DENSE = "dense"


@dataclass(frozen=True)
class Decoding:
    """One call; ``kind``: how W is stored, of ``codes_products.READ`` or dense."""

    kind: str
    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype = torch.float32
    bias: bool = True
    sms: int = INTERPRETER_SMS
    stored: torch.dtype = torch.bfloat16

    def weight(self, device: torch.device):
        """Of random numbers or codes."""
        if self.kind == DENSE:
            return torch.randn(self.N, self.K, device=device).to(self.dtype)
        return weight_of(self.kind, self.N, self.K, self.stored, device).to(self.dtype)

    @property
    def launch(self) -> DecodeLaunch:
        bits = 8 * self.dtype.itemsize
        if self.kind != DENSE:
            bits = 4 if "4" in self.kind.split()[0] else 8
        return decode_launch(
            self.M, self.K, self.N, self.r, sms=self.sms, dtype=self.dtype, bits=bits,
            precision=precision_of(self.dtype, False), skinny=skinny_precision_of(self.dtype, False),
            bias=self.bias,
        )  # fmt: skip

    def check(self, device: torch.device, run=lambda call: call()) -> tuple[torch.Tensor, ...]:
        """Holds ``y`` and ``s`` to the contract, and returns them. ``run`` calls the launcher."""
        torch.manual_seed(5)
        weight = self.weight(device)
        x = torch.randn(self.M, self.K, device=device).to(self.dtype)
        A = torch.randn(self.r, self.K, device=device).to(self.adapter_dtype)
        B = torch.randn(self.N, self.r, device=device).to(self.adapter_dtype)
        bias = torch.randn(self.N, device=device).to(self.dtype) if self.bias else None
        launch = self.launch
        found = run(lambda: decode.launcher(launch)(x, weight, A, B, 0.7, bias))

        def of(change):
            W = weight if self.kind == DENSE else weight.dense()
            s = reference.shrink(change(x), change(A), 0.0, None)
            added = None if bias is None else change(bias)
            return reference.linear_expand(
                change(x), change(W), s, change(B), 0.7, added, 0.0, None
            ), s

        ref64 = of(lambda t: t.double())
        size = [t.abs().sqrt() for t in of(lambda t: t.double().square())]
        names = ("y", "s")
        bounds = contract.bounds(
            dict(zip(names, of(lambda t: t), strict=True)),
            dict(zip(names, ref64, strict=True)),
            dict(zip(names, size, strict=True)),
        )
        reason = contract.why_any_broken(dict(zip(names, found, strict=True)), bounds)
        assert reason is None, reason
        return found
