"""``Bottleneck``: a bottleneck adapter, and how it stands at the output of another module."""

import inspect
import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from lorafast import functional
from lorafast.core.problem import Problem
from lorafast.nn import offload
from lorafast.nn.adapter_module import AdapterModule
from lorafast.nn.checks import check_alpha, check_bool, check_rank
from lorafast.nn.problems import bottleneck_problems
from lorafast.nn.sharded import draw_
from lorafast.ops.bottleneck_checks import check_activation

INITS = ("zero", "bert")
"""``zero``: U is 0 and D as ``nn.Linear`` has it (He et al., 2022); ``bert``: both normal, std 0.02."""
_STD = 0.02


class Bottleneck(AdapterModule):
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
        layer_norm: whether there is a LayerNorm before D. It is PyTorch's own, computes in the dtype of
            the parameters, and is cast back.
        init: ``"zero"`` or ``"bert"``.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an argument doesn't fit.
    """

    operation = "bottleneck"
    watched_parameter = "up"
    _may_miss: str | None = None
    """The prefix of its tensors if what is loaded is a checkpoint of the plain model."""
    stands = "output"
    """Where it stands at another module, one of ``STANDS``."""
    placed = False
    """Whether it stands at another module: a checkpoint of the plain model leaves it as it is then."""

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
        check_bool("layer_norm", layer_norm)
        if init not in INITS:
            raise ValueError(f"init is {init!r}, expected one of {', '.join(INITS)}")
        self.in_features, self.bottleneck, self.out_features = in_features, bottleneck, out_features
        self.activation, self.scaling = activation, check_alpha("scaling", scaling)
        self.init = init
        self.parallel = False
        """At another module: whether it reads that module's input."""
        self._input_name: str | None = None
        """Of the module that it stands at: the parameter of its forward that is read, if that has a
        name."""

        def made(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.down, self.down_bias = made(bottleneck, in_features), made(bottleneck)
        self.up, self.up_bias = made(out_features, bottleneck), made(out_features)
        self.norm = nn.LayerNorm(in_features, device=device, dtype=dtype) if layer_norm else None
        self.reset_parameters(init)
        self.register_load_state_dict_post_hook(_forget_missing)

    def reset_parameters(self, init: str = "zero") -> None:
        """Draws new values."""
        with torch.no_grad():
            if init == "bert":
                draw_(nn.init.normal_, self.down, std=_STD)
                draw_(nn.init.normal_, self.up, std=_STD)
            else:
                draw_(nn.init.kaiming_uniform_, self.down, a=math.sqrt(5))
                self.up.zero_()
            self.down_bias.zero_()
            self.up_bias.zero_()
        if self.norm is not None:
            self.norm.reset_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> "Bottleneck":
        was_meta = self.down.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.down.is_meta:
            # to_empty(): a checkpoint of the plain model, loaded next, has no values for it.
            self.reset_parameters(self.init)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **more: Any
    ) -> None:
        found = any(key.startswith(prefix) for key in state_dict)
        self._may_miss = prefix if self.placed and not self.down.is_meta and not found else None
        super()._load_from_state_dict(state_dict, prefix, *others, **more)

    @property
    def own_child(self) -> str:  # type: ignore[override]
        """Its name at another module, if it stands there."""
        return CHILD if self.placed else ""

    @property
    def r(self) -> int:
        """The width of the bottleneck."""
        return self.bottleneck

    @property
    def has_residual(self) -> bool:
        """At another module: whether it reads another tensor than it adds to."""
        return self.parallel or self.stands == "norm"

    def adapter_parameters(self) -> dict[str, Tensor]:
        """All its parameters by name."""
        return dict(self.named_parameters())

    def example_input(self, rows: int) -> Tensor:
        """``h [rows, in_features]``."""
        device = offload.device_of(self, self.down)
        return torch.zeros((rows, self.in_features), dtype=self.down.dtype, device=device)

    def example_arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        """``h``, and the residual if that is another tensor."""
        return (x, x.new_zeros((*x.shape[:-1], self.out_features))) if self.has_residual else (x,)

    def problems(self, x: Tensor | None) -> tuple[Problem, ...]:
        """The forward and the backward, on rows like those of ``x``, else on many."""
        return bottleneck_problems(x, self)

    def summary_remark(self) -> str:
        """What kind it is."""
        return f"{'parallel ' if self.parallel else ''}bottleneck, {self.activation}"

    def forward(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """``y [..., out_features]`` in the dtype of ``h``."""
        if self._off:
            return self.base_forward(h, residual)
        if self._rows is not None:
            return self._rows.by_parts((h, residual), self.forward_active, self.base_forward, 2)
        return self.forward_active(h, residual)

    def base_forward(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """What there is without it."""
        return h if residual is None else residual

    def forward_active(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """What it gives, for all rows."""
        normed = h
        if self.norm is not None:
            normed = self.norm(h.to(self.norm.weight.dtype)).to(h.dtype)
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

    def extra_repr(self) -> str:
        """The sizes and the function."""
        beside = ", parallel" if self.parallel else ""
        beside += "" if self.stands == "output" else f", at its {self.stands}"
        return (
            f"{self.in_features} → {self.bottleneck} → {self.out_features}, {self.activation}, "
            f"scaling={self.scaling:g}{beside}"
        )


def _forget_missing(bottleneck: Any, incompatible: Any) -> None:
    """What a checkpoint of the plain model can't have is not missing there; of the LayerNorm neither."""
    start = bottleneck._may_miss
    if start is not None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.startswith(start)]


STANDS = ("output", "norm", "residual")
"""With B(h, onto) = onto + scaling · (…), of a module m: ``output``: ``B(m(x), m(x))``, or parallel
``B(x, m(x))``. ``norm``, of a LayerNorm: ``m(B(m(x), x))``. ``residual``: ``m(x, B(t, t))`` where t is
its second argument, that which it adds to what it makes of x."""
CHILD = "bottleneck"
"""Its name where it stands at another module, as that one's child."""
_HOOK = "lorafast.bottleneck"
"""What its hooks are filed under. A number as PyTorch's own could be given to another hook in a process
that unpickles the module."""


class _Before(threading.local):
    """By modules' ids, the inputs of calls that have begun in this thread: their ids and versions."""

    def __init__(self) -> None:
        self.inputs: dict[int, tuple[int, int] | None] = {}


_before = _Before()


def put_at(module: nn.Module, bottleneck: Bottleneck) -> None:
    """Makes it the module's child, and has it called where it stands."""
    bottleneck._input_name = _name_of_parameter(module, bottleneck.stands == "residual")
    bottleneck.placed = True
    module.add_module(CHILD, bottleneck)
    if bottleneck.stands == "residual":
        module._forward_pre_hooks[_HOOK] = _at_residual  # type: ignore[index]
        module._forward_pre_hooks_with_kwargs[_HOOK] = True  # type: ignore[index]
        return
    if bottleneck.parallel:
        module._forward_pre_hooks[_HOOK] = _before_module  # type: ignore[index]
        module._forward_pre_hooks_with_kwargs[_HOOK] = True  # type: ignore[index]
    module._forward_hooks[_HOOK] = _at_output  # type: ignore[index]
    module._forward_hooks_with_kwargs[_HOOK] = True  # type: ignore[index]


def bottleneck_at(module: nn.Module) -> Bottleneck | None:
    """The one that stands at a module, or None."""
    child = module._modules.get(CHILD)
    hooks: dict[Any, Any] = {**module._forward_hooks, **module._forward_pre_hooks}
    return child if isinstance(child, Bottleneck) and _HOOK in hooks else None


def take_away(module: nn.Module) -> None:
    """Undoes ``put_at``, if it was done."""
    if bottleneck_at(module) is None:
        return
    hooks: tuple[Any, ...] = (
        module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs,
        module._forward_hooks, module._forward_hooks_with_kwargs,
    )  # fmt: skip
    for each in hooks:
        each.pop(_HOOK, None)
    del module._modules[CHILD]


def _name_of_parameter(module: nn.Module, index: int) -> str | None:
    """That of the first or second parameter of its forward, if it may be given by name."""
    parameters = list(inspect.signature(module.forward).parameters.values())[: index + 1]
    if len(parameters) == index + 1 and parameters[-1].kind is parameters[-1].POSITIONAL_OR_KEYWORD:
        return parameters[-1].name
    return None


def _at_residual(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A forward pre-hook: the module's arguments with the bottleneck after the second."""
    one: Any = module._modules[CHILD]
    if one._off:
        return None
    given = args[1] if len(args) > 1 else kwargs.get(one._input_name)
    if not isinstance(given, Tensor):
        raise TypeError(
            f"a {type(module).__name__} with a bottleneck at its residual was given a "
            f"{type(given).__name__} for its second argument, expected a tensor"
        )
    if len(args) > 1:
        return (args[0], one(given), *args[2:]), kwargs
    return args, {**kwargs, one._input_name: one(given)}


def _before_module(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A forward pre-hook: keeps the version of what a parallel bottleneck will read."""
    one: Any = module._modules[CHILD]
    if one._off or torch.compiler.is_compiling():
        return
    h = _read(one, module, args, kwargs)
    # An inference tensor has no version.
    _before.inputs[id(module)] = None if h.is_inference() else (id(h), h._version)


def _at_output(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A forward hook: the module's output with the bottleneck after it, or beside the module. Of several
    outputs it is the first one that changes."""
    one: Any = module._modules[CHILD]
    if one._off:
        return output
    y = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(y, Tensor):
        raise TypeError(
            f"a {type(module).__name__} with a bottleneck returned a {type(output).__name__}, "
            "expected a tensor or a tuple that begins with one"
        )
    if one.parallel:
        h = _read(one, module, args, kwargs)
        if not torch.compiler.is_compiling():
            _check_unchanged(module, h)
        y = one(h, y)
    elif one.stands == "norm":
        return module.forward(one(y, _read(one, module, args, kwargs)))
    else:
        y = one(y)
    if isinstance(output, tuple | list):
        several = (y, *output[1:])
        return output._make(several) if hasattr(output, "_make") else type(output)(several)
    return y


def _read(one: Bottleneck, module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """The module's first argument, which a parallel bottleneck reads, and one at a norm adds to."""
    h = args[0] if args else kwargs.get(one._input_name)
    if not args and one._input_name is None and len(kwargs) == 1:
        (h,) = kwargs.values()
    if not isinstance(h, Tensor):
        expected = f", {one._input_name}," if one._input_name else ""
        raise TypeError(
            f"a {type(module).__name__} with a bottleneck that reads its input was given a "
            f"{type(h).__name__} for its first argument{expected} expected a tensor"
        )
    return h


def _check_unchanged(module: nn.Module, h: Tensor) -> None:
    before = _before.inputs.pop(id(module), None)
    if before is not None and before[0] == id(h) and before[1] != h._version:
        raise RuntimeError(
            f"a {type(module).__name__} with a parallel bottleneck changed its input in place, which "
            "the bottleneck reads: have it compute out of place"
        )
