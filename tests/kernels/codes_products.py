"""Products that read a quantized weight as codes, with what they are compared by."""

from dataclasses import dataclass

import torch
from lorafast.kernels.common.codes_plan import GROUP, CodesLaunch, codes_launch
from lorafast.kernels.common.configs import INTERPRETER_SMS
from lorafast.kernels.common.plan import precision_of
from lorafast.kernels.linear_expand import codes
from quantized_weights import KINDS, draw

from lorafast import reference
from lorafast.reference import contract, wide

READ = [kind for kind in KINDS if "blocks of 7" not in kind and "blocks of 100" not in kind]
"""Those whose scales groups of neighbours may share."""
for _kind in ("fp8 in blocks", "mxfp4"):
    READ.remove(_kind)
BLOCKED = "fp8 in wide blocks"
READ.append(BLOCKED)


def weight_of(kind, N, K, stored, device):
    """As ``draw``, of ``BLOCKED`` too."""
    from lorafast.operands import FP8

    if kind != BLOCKED:
        return draw(kind, N, K, stored, device)
    codes_ = draw("fp8", N, K, stored, device).tensors()["weight"]
    scale = torch.rand(-(-N // 16), -(-K // (2 * GROUP)), device=device)
    return FP8({"weight": codes_, "scale": scale}, stored, (16, 2 * GROUP))


@dataclass(frozen=True)
class Product:
    """One call; ``x [M, K]`` or transposed ``[M, N]``, with a bias if it is not transposed."""

    kind: str
    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    transposed: bool = False
    sms: int = INTERPRETER_SMS
    stored: torch.dtype = torch.bfloat16
    """What W is rounded to first."""

    @property
    def launch(self) -> CodesLaunch:
        read, written = (self.N, self.K) if self.transposed else (self.K, self.N)
        return codes_launch(
            self.M, read, written, self.r, sms=self.sms, dtype=self.dtype,
            precision=precision_of(self.dtype, False), transposed=self.transposed,
            bias=not self.transposed,
        )  # fmt: skip

    def check(
        self, device: torch.device, run=lambda call: call(), edit=lambda weight: weight
    ) -> torch.Tensor:
        """Holds the result to the contract, and returns it. ``run`` calls the launcher, ``edit`` makes
        another weight of the one that is drawn."""
        torch.manual_seed(5)
        weight = edit(weight_of(self.kind, self.N, self.K, self.stored, device)).to(self.dtype)
        launch = self.launch
        x = torch.randn(self.M, launch.K, device=device).to(self.dtype)
        s = torch.randn(self.M, self.r, device=device).to(wide(self.dtype))
        B = torch.randn(launch.N, self.r, device=device)
        bias = None if self.transposed else torch.randn(launch.N, device=device).to(self.dtype)
        y = run(lambda: codes.launcher(launch)(x, weight, s, B, 0.7, bias))

        def of(change):
            W = weight.dense()
            terms = (x, W.t() if self.transposed else W, s, B)
            given = [change(t) for t in terms]
            return reference.linear_expand(
                *given, 0.7, None if bias is None else change(bias), 0.0, None
            )

        ref64 = of(lambda t: t.double())
        size = of(lambda t: t.double().square()).abs().sqrt()
        bound = contract.bound(of(lambda t: t), ref64, size)
        reason = bound.verdict(y).why_broken
        assert reason is None, reason
        return y
