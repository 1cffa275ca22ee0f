"""``Bottleneck``: a bottleneck adapter, and how it stands at the output of another module."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lorafast import functional
from lorafast.nn.checks import check_alpha, check_rank
from lorafast.nn.switch import Switch
from lorafast.ops.bottleneck_checks import check_activation

INITS = ("zero", "bert")
"""``zero``: U is 0 and D as ``nn.Linear`` has it (He et al., 2022); ``bert``: both normal, std 0.02."""
_STD = 0.02


class Bottleneck(Switch, nn.Module):
    """``y = h + scaling · (f(norm(h)·Dᵀ + d)·Uᵀ + u)`` (Houlsby et al., 2019), or with ``residual``
    given ``y = residual + scaling · …`` (He et al., 2022).

    Shapes: ``h [..., in_features]`` → ``y [..., out_features]``. Parameters: ``down [b, in_features]``,
    ``down_bias [b]``, ``up [out_features, b]``, ``up_bias [out_features]``, and those of ``norm``, a
    LayerNorm, if there is one. A new one changes nothing (``init="zero"``) or little (``"bert"``).

    Args:
        in_features: the width of ``h``.
        bottleneck: b, at least 1.
        out_features: the width of ``y``; by default that of ``h``. Another one needs ``residual``.
        activation: f, a name of ``functional.bottleneck``.
        scaling: a number, which scales u too, as in AdapterHub's ``adapters``.
        layer_norm: whether there is a LayerNorm before D. It is PyTorch's own.
        init: ``"zero"`` or ``"bert"``.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an argument doesn't fit.
    """

    def __init__(
        self,
        in_features: int,
        bottleneck: int,
        out_features: int | None = None,
        *,
        activation: str = "gelu",
        scaling: float = 1.0,
        layer_norm: bool = False,
        init: str = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        sizes = {"in_features": in_features, "bottleneck": bottleneck, "out_features": out_features}
        for name, size in sizes.items():
            check_rank(name, size)
        check_activation(activation)
        if init not in INITS:
            raise ValueError(f"init is {init!r}, expected one of {', '.join(INITS)}")
        self.in_features, self.bottleneck, self.out_features = in_features, bottleneck, out_features
        self.activation, self.scaling = activation, check_alpha("scaling", scaling)
        self.parallel = False
        """At another module: whether it reads that module's input."""

        def made(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.down, self.down_bias = made(bottleneck, in_features), made(bottleneck)
        self.up, self.up_bias = made(out_features, bottleneck), made(out_features)
        self.norm = nn.LayerNorm(in_features, device=device, dtype=dtype) if layer_norm else None
        self.reset_parameters(init)

    def reset_parameters(self, init: str = "zero") -> None:
        """Draws new values."""
        with torch.no_grad():
            if init == "bert":
                self.down.normal_(std=_STD)
                self.up.normal_(std=_STD)
            else:
                nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
                self.up.zero_()
            self.down_bias.zero_()
            self.up_bias.zero_()
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """``y [..., out_features]`` in the dtype of ``h``."""
        if self._off:
            return h if residual is None else residual
        normed = h
        if self.norm is not None:
            normed = self.norm(h)
            residual = h if residual is None else residual
        return functional.bottleneck(
            normed,
            self.down,
            self.up,
            self.down_bias,
            self.up_bias,
            self.scaling,
            self.activation,
            residual,
        )

    def at_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """A forward hook: the module's output with the bottleneck after it, or beside the module. Of
        several outputs it is the first one that changes."""
        if self._off:
            return output
        y = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(y, Tensor):
            raise TypeError(
                f"a {type(module).__name__} with a bottleneck returned a {type(output).__name__}, "
                "expected a tensor or a tuple that begins with one"
            )
        if self.parallel:
            h = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if h is None:
                raise TypeError(
                    f"a {type(module).__name__} with a parallel bottleneck was given no tensor"
                )
            y = self(h, y)
        else:
            y = self(y)
        if isinstance(output, tuple | list):
            return type(output)((y, *output[1:]))
        return y

    def extra_repr(self) -> str:
        """The sizes and the function."""
        beside = ", parallel" if self.parallel else ""
        return (
            f"{self.in_features} → {self.bottleneck} → {self.out_features}, {self.activation}, "
            f"scaling={self.scaling:g}{beside}"
        )
