"""``LoRALinear``: a frozen ``nn.Linear`` with a low-rank adapter."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lorafast.functional import lora_linear
from lorafast.nn.scripted import ScriptedLoRALinear
from lorafast.ops import packing
from lorafast.ops.checks import FLOATS

# For torch.fx a call is one node, as one of nn.Linear is.
torch.fx.wrap("lora_linear")

_HALF = (torch.float16, torch.bfloat16)
_DISTRIBUTED = "torch.distributed."
_FLOATS = "float16, bfloat16, float32 or float64"
# What nn.Module keeps of a module's hooks; they move with the layer when it is wrapped.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def why_not_adaptable(linear: nn.Module) -> str | None:
    """The reason for which ``linear`` can't become a ``LoRALinear``, or None if it can."""
    if not isinstance(linear, nn.Linear):
        return f"it is a {type(linear).__name__}, expected an nn.Linear"
    if isinstance(linear, nn.modules.linear.LazyLinear):
        return "it is a LazyLinear whose shape is not known yet: run it once first"
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return f"its forward is not that of nn.Linear ({type(linear).__name__})"
    for name in ("weight", "bias"):
        if name not in linear._parameters:
            return f"its {name} is computed by a parametrization: remove that first"
    if linear.weight.dtype not in FLOATS:
        return f"its weight is {linear.weight.dtype}, expected {_FLOATS}"
    return _why_not_plain(linear.weight)


def _why_not_plain(weight: Tensor) -> str | None:
    kind = type(weight)
    if kind.__module__.startswith(_DISTRIBUTED):
        weight = getattr(weight, "_local_tensor", weight)  # of a DTensor
    elif kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_fake(weight):
        return f"its weight is of class {kind.__name__} (quantized?), expected a plain tensor"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}, expected a dense one"
    return None if type(weight) is kind else _why_not_plain(weight)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the hooks of ``source``, whose place it takes; their handles go on working."""
    for name in _HOOKS:
        if name in vars(source):
            setattr(target, name, getattr(source, name))


def check_rank(name: str, value: object) -> int:
    """``value``, an integer of at least 1; else ``ValueError``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    return value


def check_alpha(name: str, value: object) -> float:
    """``value`` as a float, a finite number; else ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return float(value)


def check_probability(name: str, value: object) -> float:
    """``value`` as a float, a number from 0 to 1; else ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} is {value!r}, expected a probability from 0 to 1")
    return float(value)


def _check_dtype(name: str, value: object) -> None:
    if value is not None and value not in FLOATS:
        raise TypeError(f"{name} is {value!r}, expected {_FLOATS}")


class LoRALinear(nn.Module):
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` with W and bias frozen (Hu et al., 2021).

    Parameters: ``weight [out_features, in_features]`` and ``bias [out_features]`` (frozen),
    ``lora_A [r, in_features]`` and ``lora_B [out_features, r]`` (trained). These four are the keys
    of its ``state_dict``; one of a plain ``nn.Linear`` loads as it is and leaves the adapter alone.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        r: rank of the adapter, at least 1.
        alpha: ``scaling`` is ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski,
            2023); None stands for ``r``, a scaling of 1, where PEFT's default ``lora_alpha`` is 8.
        dropout: probability of dropping an element of ``x`` on its way into the adapter in training.
        bias: whether the frozen layer has a bias.
        use_rslora: see ``alpha``.
        device: where the parameters live.
        dtype: dtype of ``weight`` and ``bias``: float16, bfloat16, float32 or float64.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``. None means the dtype of ``weight``, but
            float32 if that is float16 or bfloat16, whose steps are too coarse for an optimizer (as
            in PEFT).

    ``lora_A`` starts Kaiming-uniform with ``a = sqrt(5)`` and ``lora_B`` zero, the distribution of
    PEFT: a fresh adapter changes nothing.

    Raises:
        TypeError, ValueError: an argument doesn't fit.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _merged_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_dtype("dtype", dtype)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._build(linear, r, alpha, dropout, use_rslora, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRALinear":
        """Wraps ``linear``: takes over its parameters (no copy), its hooks and its mode.

        The parameters are the same objects, so tied weights stay tied; they are frozen. Arguments as
        for the class.

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear``, or its dtype or ``adapter_dtype`` is not
                one of float16, bfloat16, float32 and float64. ``linear`` is unchanged.
            ValueError: another argument doesn't fit. ``linear`` is unchanged.
        """
        reason = why_not_adaptable(linear)
        if reason is not None:
            raise TypeError(f"linear can't be adapted: {reason}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(linear, r, alpha, dropout, use_rslora, adapter_dtype)
        move_hooks(linear, layer)
        return layer.train(linear.training)

    def _build(
        self,
        linear: nn.Linear,
        r: int,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        _check_dtype("adapter_dtype", adapter_dtype)
        weight = linear.weight
        assert isinstance(weight, nn.Parameter)
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if weight.dtype in _HALF else weight.dtype
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.r = check_rank("r", r)
        self.set_scaling(r if alpha is None else alpha, use_rslora)
        self.dropout = check_probability("dropout", dropout)
        self.merged = False
        self.weight = weight
        self.bias = linear.bias
        factory: dict[str, Any] = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty((r, self.in_features), **factory))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, r), **factory))
        self.register_buffer("_merged_weight", None, persistent=False)
        self.reset_adapter()
        # Last: until here an error leaves ``linear`` as it was.
        for frozen in linear.parameters(recurse=False):
            frozen.requires_grad_(False)

    def set_scaling(self, alpha: float, use_rslora: bool = False) -> None:
        """Sets ``scaling`` to ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

        Raises:
            ValueError: ``alpha`` is not a finite number.
        """
        self.alpha = check_alpha("alpha", alpha)
        self.use_rslora = use_rslora
        self.scaling = self.alpha / (math.sqrt(self.r) if use_rslora else self.r)

    def reset_adapter(self) -> None:
        """Draws ``lora_A`` anew (Kaiming-uniform, ``a = sqrt(5)``) and sets ``lora_B`` to zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, the frozen ones as ``nn.Linear`` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        if self.merged:
            return packing.linear(x, self._merged_weight, self.bias)  # type: ignore[arg-type]
        p = self._parameters
        try:
            # Four times nn.Module.__getattr__ is a fifth of a small layer's forward.
            weight, bias, lora_A, lora_B = p["weight"], p["bias"], p["lora_A"], p["lora_B"]
        except KeyError:  # a parametrization or a wrapper computes one of them
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        dropout_p = self.dropout if self.training else 0.0
        return lora_linear(x, weight, lora_A, lora_B, self.scaling, bias, dropout_p=dropout_p)  # type: ignore[arg-type]

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B·A``, ``[out_features, in_features]``, in float32 (float64 if the adapter is)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    @torch.no_grad()
    def _with_delta(self) -> Tensor:
        delta = self.delta_weight()
        return (self.weight.to(delta.dtype) + delta).to(self.weight.dtype)

    def merge(self) -> None:
        """From now on multiplies by ``W + scaling · B·A``, made once, as fast as a plain layer.

        The sum is rounded to the dtype of ``weight``, which loses small updates in bfloat16 and
        float16. ``weight`` itself and the ``state_dict`` stay as they are. Until ``unmerge()`` the
        adapter gets no gradient and there is no dropout. Merging again takes the current adapter.
        """
        self._merged_weight = self._with_delta()
        self.merged = True

    def unmerge(self) -> None:
        """Undoes ``merge()``, exactly."""
        self._merged_weight = None
        self.merged = False

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with weight ``W + scaling · B·A``; this layer stays as it is.

        The bias is shared, the weight is new; neither requires a gradient.
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self._with_delta(), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this layer's place."""
        if self.merged:
            return self.to_linear()
        scripted = ScriptedLoRALinear(
            self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, self.dropout
        )
        return scripted.train(self.training)

    def pack_(self) -> "LoRALinear":
        """Packs the frozen weight once for the vendor's product on a CPU; the layer itself.

        Worth it in bfloat16 for few rows, at the price of about the weight's memory once more. The
        packed copy serves every product that needs no gradient of its own; in training that is the
        forward (but of small layers). It is invisible to ``state_dict``, not copied by ``deepcopy``,
        shared by layers that share the weight, and dropped when the weight changes: pack again then.
        Changes that PyTorch doesn't count (through ``weight.data``, NumPy or another tensor over the
        same memory) are looked for in a few elements of the weight; call ``unpack_()`` after one that
        touches single elements. A merged layer packs its merged weight.

        Raises:
            ValueError: the weight can't be packed (it is not bfloat16, not on a CPU, ...).
        """
        weight = self._merged_weight if self.merged else self._parameters.get("weight")
        if weight is None:
            raise ValueError("weight can't be packed: it is computed anew in every forward")
        packing.pack(weight)
        return self

    def unpack_(self) -> "LoRALinear":
        """Undoes ``pack_()``; the layer itself."""
        for weight in self._packable():
            packing.unpack(weight)
        return self

    def _packable(self) -> list[Tensor]:
        """The weights of which there may be packed copies; none that a parametrization computes."""
        weights = (self._parameters.get("weight"), self._merged_weight)
        return [weight for weight in weights if weight is not None]

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRALinear":
        if torch.__future__.get_swap_module_params_on_conversion():
            for weight in self._packable():
                packing.forget(weight)
        super()._apply(fn, recurse)
        for weight in self._packable():
            packing.is_packed(weight)  # drops a copy that has lost its weight
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if torch.__future__.get_swap_module_params_on_conversion():
            for weight in self._packable():
                packing.forget(weight)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        adapter = [prefix + "lora_A", prefix + "lora_B"]
        # A checkpoint of the plain layer has neither; one without the other is a broken one.
        if prefix + "weight" in state_dict and all(key not in state_dict for key in adapter):
            for key in adapter:
                if key in missing_keys:  # not there if a parametrization computes it
                    missing_keys.remove(key)
        if self.merged:
            self.merge()

    def extra_repr(self) -> str:
        """The constructor's arguments, as in ``nn.Linear``."""
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"r={self.r}",
            f"alpha={self.alpha:g}",
            f"dropout={self.dropout:g}",
            f"bias={self.bias is not None}",
        ]
        if self.use_rslora:
            parts.append("use_rslora=True")
        if self.merged:
            parts.append("merged=True")
        if any(packing.is_packed(weight) for weight in self._packable()):
            parts.append("packed=True")
        return ", ".join(parts)
