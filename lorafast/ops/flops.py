"""FLOPs of the registered operations, for PyTorch's ``FlopCounterMode``.

A formula is one PyTorch's own operations would be counted by: two for each multiply-add of a product,
none for what is element by element.
"""

import sys
from math import prod
from typing import Any

import torch
from torch.utils import _python_dispatch

_Shape = tuple[int, ...]


def _shrink(x: _Shape, lora_A: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * lora_A[0]


def _expand(s: _Shape, lora_B: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(s) * lora_B[0]


def _linear_expand(
    x: _Shape, weight: Any, format: str, s: _Shape, lora_B: _Shape, *_: Any, **__: Any
) -> int:
    return 2 * x[0] * lora_B[0] * (x[1] + s[1])


def _expand_backward(
    dy: _Shape,
    s: _Shape | None,
    lora_B: _Shape | None,
    scaling: float,
    wants: str = "ds,dB",
    *_: Any,
    **__: Any,
) -> int:
    like = lora_B if s is None else s
    products = sum(name in wants.split(",") for name in ("ds", "dB"))
    return 0 if like is None else 2 * products * prod(dy) * like[1]


def _shrink_backward(ds: _Shape, x: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * ds[1]


def _lora_linear(
    x: _Shape, weight: Any, format: str, lora_A: _Shape, lora_B: _Shape, *_: Any, **__: Any
) -> int:
    N, (r, K) = lora_B[0], lora_A
    return 2 * prod(x[:-1]) * (N * K + r * (N + K))


def _lora_linear_backward(
    dy: _Shape, x: _Shape, weight: Any, format: str, lora_A: _Shape, *_: Any, **__: Any
) -> int:
    N, (r, K) = dy[-1], lora_A
    return 2 * prod(dy[:-1]) * (N * K + 2 * r * (N + K))


def _grouped_lora_linear(
    x: _Shape, weight: Any, format: str, lora_A: _Shape, lora_B: _Shape, *_: Any, **__: Any
) -> int:
    """As if every element had an adapter, which no shape tells."""
    N, r, K = lora_B[1], lora_A[1], lora_A[2]
    return 2 * prod(x[:-1]) * (N * K + r * (N + K))


def _grouped_lora_linear_backward(
    dy: _Shape,
    x: _Shape | None,
    weight: Any,
    format: str,
    lora_A: _Shape | None,
    lora_B: _Shape | None,
    s: _Shape | None,
    scaling: _Shape,
    adapter_of: _Shape,
    wants: str,
    *_: Any,
    **__: Any,
) -> int:
    (M, N), asked = dy, wants.split(",")
    r = lora_B[2] if lora_B is not None else s[1] if s is not None else 0
    K = x[1] if x is not None else lora_A[2] if lora_A is not None else 0
    products = {
        "ds": N * r if "dx" in asked or "dA" in asked else 0,
        "dx": K * (N + r),
        "dweight": N * K,
        "dA": r * K,
        "dB": N * r,
        "dscaling": N * r,
    }
    return 2 * M * sum(size for name, size in products.items() if name in (*asked, "ds"))


def _lora_conv(
    x: _Shape, weight: _Shape, lora_A: _Shape, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    y, s = out_shape
    groups = lora_A[1] // weight[1]
    # For each element of y a filter of W and of B, for each of s one of A.
    return 2 * (prod(y) * (prod(weight[1:]) + s[1] // groups) + prod(s) * prod(lora_A[1:]))


def _lora_conv_backward(
    dy: _Shape,
    x: _Shape,
    weight: _Shape,
    lora_A: _Shape,
    lora_B: _Shape,
    s: _Shape,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    dx, dweight, dA, dB, _ = (prod(shape) > 0 for shape in out_shape)
    of_W, of_A, of_B = prod(dy) * prod(weight[1:]), prod(s) * prod(lora_A[1:]), prod(dy) * lora_B[1]
    ds = dx or dA
    return 2 * (of_W * (dx + dweight) + of_A * (dx + dA) + of_B * (ds + dB))


def _quantized_linear(
    x: _Shape,
    weight: Any,
    format: str,
    bias: Any = None,
    transposed: bool = False,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    return 2 * prod(x) * out_shape[-1]


def _weight_norm(lora_A: _Shape, lora_B: _Shape, *_: Any, **__: Any) -> int:
    """W·Aᵀ, A·Aᵀ, and B times that."""
    N, (r, K) = lora_B[0], lora_A
    return 2 * r * (N * K + r * K + N * r)


def _bottleneck(h: _Shape, down: _Shape, up: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(h[:-1]) * (prod(down) + prod(up))


def _bottleneck_backward(
    dy: _Shape,
    h: _Shape | None,
    a: _Shape | None,
    down: _Shape | None,
    up: _Shape | None,
    scaling: float,
    activation: str,
    residual: bool,
    wants: str,
    *_: Any,
    **__: Any,
) -> int:
    (M, N), asked = dy, set(wants.split(","))
    b = 0 if a is None else a[1]
    K = h[1] if h is not None else down[1] if down is not None else 0
    of_U = bool(asked & {"dh", "dD", "dd"}) + ("dU" in asked)
    return 2 * M * b * (N * of_U + K * (("dh" in asked) + ("dD" in asked)))


def _scaled_linear(x: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * prod(weight)


def _scaled_linear_backward(
    dy: _Shape, kept: _Shape | None, weight: _Shape | None, *_: Any, **__: Any
) -> int:
    return 0 if weight is None else 2 * prod(dy[:-1]) * prod(weight)


FORMULAS = {
    "bottleneck": _bottleneck,
    "bottleneck_backward": _bottleneck_backward,
    "shrink": _shrink,
    "expand": _expand,
    "linear_expand": _linear_expand,
    "expand_backward": _expand_backward,
    "shrink_backward": _shrink_backward,
    "lora_linear": _lora_linear,
    "lora_linear_backward": _lora_linear_backward,
    "grouped_lora_linear": _grouped_lora_linear,
    "grouped_lora_linear_backward": _grouped_lora_linear_backward,
    "lora_conv": _lora_conv,
    "lora_conv_backward": _lora_conv_backward,
    "quantized_linear": _quantized_linear,
    "scaled_linear": _scaled_linear,
    "scaled_linear_backward": _scaled_linear_backward,
    "weight_norm": _weight_norm,
}


def tell_counters() -> None:
    """Gives PyTorch's counter the formulas, if it is there, and those of its modes that are open.

    Called where a mode is open, not when this package is imported: the counter imports Triton. A mode
    has the formulas that were known when it was made.
    """
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    known = counter.flop_registry
    for name, formula in FORMULAS.items():
        operation = getattr(torch.ops.lorafast, name)
        if operation not in known:
            counter.register_flop_formula(operation)(formula)
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        of_mode = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(of_mode, dict):
            for name in FORMULAS:
                operation = getattr(torch.ops.lorafast, name)
                of_mode.setdefault(operation, known[operation])
