"""A bottleneck adapter in PyTorch's own calls, in their best order.

    a = h·Dᵀ + d
    y = residual + scaling · u, then scaling · f(a)·Uᵀ accumulated onto it

so that y is written once before the product reads it as its accumulator, as ``addmm`` itself would copy
the residual. In float16 the change is float32 and is added to the residual before the one rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.backends.aten.operations import scaled_mm
from lorafast.backends.plan import Run
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS, Problem

_aten = torch.ops.aten
_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "relu": torch.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda dz, a: _aten.gelu_backward(dz, a),
    "gelu_tanh": lambda dz, a: _aten.gelu_backward(dz, a, approximate="tanh"),
    "relu": lambda dz, a: _aten.threshold_backward(dz, a, 0),
    "silu": lambda dz, a: _aten.silu_backward(dz, a),
    "tanh": lambda dz, a: _aten.tanh_backward(dz, torch.tanh(a)),
}


def bottleneck(problem: Problem) -> Run:
    """``y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u)`` and ``a = h·Dᵀ + d``."""
    dtype, low, want_a = problem.dtype, wide(problem.dtype), "a" in problem.wants
    activate = _ACTIVATE[problem.activation]

    def run(
        h: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor | None,
        up_bias: Tensor | None,
        scaling: float,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        a = F.linear(h.to(low), down.to(low), None if down_bias is None else down_bias.to(low))
        z = activate(a)
        beside = (h if residual is None else residual).to(low)
        U_t = up.to(low).t()
        if up_bias is None:
            y = torch.addmm(beside, z, U_t, alpha=scaling)
        else:
            y = torch.add(beside, up_bias.to(low), alpha=scaling).addmm_(z, U_t, alpha=scaling)
        return y.to(dtype), a if want_a else None

    return run


def bottleneck_backward(problem: Problem) -> Run:
    """``dh``, ``dD``, ``dd``, ``dU``, ``du``: a call each, from ``da = scaling · dy·U ⊙ f'(a)``."""
    low, dtype = wide(problem.dtype), problem.adapter_dtype
    want_dh, want_dD, want_dd, want_dU, want_du = (
        name in problem.wants for name in WANTS["bottleneck_backward"]
    )
    activate, backward = _ACTIVATE[problem.activation], _BACKWARD[problem.activation]

    def run(
        dy: Tensor,
        h: Tensor | None,
        a: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor | None, ...]:
        dh = dD = dd = dU = du = None
        wide_dy = dy.to(low)
        if want_dh or want_dD or want_dd:
            assert up is not None
            assert a is not None
            da = backward(scaled_mm(wide_dy, up.to(low), scaling), a)
        if want_dh:
            assert down is not None
            D = down.to(low)
            dh = torch.mm(da, D) if problem.residual else torch.addmm(wide_dy, da, D)
            dh = dh.to(problem.dtype)
        if want_dD:
            assert h is not None
            dD = torch.mm(da.t(), h.to(low)).to(dtype)
        if want_dd:
            dd = da.sum(0).to(dtype)
        if want_dU:
            assert a is not None
            dU = scaled_mm(wide_dy.t(), activate(a), scaling).to(dtype)
        if want_du:
            du = (wide_dy.sum(0) * scaling).to(dtype)
        return dh, dD, dd, dU, du

    return run
