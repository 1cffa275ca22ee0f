"""``LoRALinear``: a frozen ``nn.Linear`` with a low-rank adapter."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lorafast import operands, ops
from lorafast.core.context import autocast_anywhere
from lorafast.core.dtypes import FLOATS
from lorafast.functional import lora_linear
from lorafast.nn import offload
from lorafast.nn.checks import (
    FLOAT_NAMES,
    check_alpha,
    check_dtype,
    check_mergeable,
    check_probability,
    check_rank,
    count,
)
from lorafast.nn.plain import (
    carry,
    features,
    is_conv1d,
    is_own_forward,
    move_hooks,
    stock_class,
    why_not_carried,
)
from lorafast.nn.scripted import ScriptedLoRALinear
from lorafast.operands import Operand, Weight, packed
from lorafast.ops.calls import Memory
from lorafast.ops.unstrided import is_sharded

# For torch.fx a call is one node, as one of nn.Linear is.
torch.fx.wrap("lora_linear")

_HALF = (torch.float16, torch.bfloat16)
_DISTRIBUTED = "torch.distributed."
# What a LoRALinear has on its instance beside PyTorch's machinery.
_OWN = frozenset(
    {
        "weight", "bias", "lora_A", "lora_B", "_merged_weight", "merged", "dropout",
        "_memory", "_r", "_alpha", "_scaling", "_use_rslora", "_plain_class", "_stored_names",
        "_description",
    }
)  # fmt: skip
_PROPERTIES = ("r", "alpha", "scaling", "use_rslora")


def why_not_adaptable(linear: nn.Module) -> str | None:
    """The reason for which ``linear`` can't become a ``LoRALinear``, or None if it can."""
    weight = operands.of_layer(linear)
    if weight is not None:
        return _why_not_claimed(linear, weight)
    stock = stock_class(linear)
    if stock is None:
        return f"it is a {type(linear).__name__}, expected an nn.Linear"
    if isinstance(linear, nn.modules.linear.LazyLinear):
        return "it is a LazyLinear whose shape is not known yet: run it once first"
    if type(linear).forward is not stock.forward:
        expected = "nn.Linear" if stock is nn.Linear else stock.__name__
        return f"its forward is not that of {expected} ({type(linear).__name__})"
    reason = _why_not_its_forward(linear, stock)
    if reason is not None:
        return reason
    for name in ("weight", "bias"):
        if name not in linear._parameters:
            return f"its {name} is computed by a parametrization: remove that first"
    dense = linear._parameters["weight"]
    assert dense is not None
    if dense.dtype not in FLOATS:
        return f"its weight is {dense.dtype}, expected {FLOAT_NAMES}"
    return _why_not_plain(dense) or why_not_carried(linear, stock, TAKEN)


def _why_not_claimed(layer: nn.Module, weight: Operand) -> str | None:
    """The reason for which a layer that a format claims can't be adapted, or None."""
    from lorafast.nn.lora_operand_linear import why_not_held  # which is of LoRALinears

    reason = _why_not_its_forward(layer, type(layer))
    if reason is not None:
        return reason
    if vars(layer).get("_compiled_call_impl") is not None:
        return "it was compiled in place: adapt it before Module.compile()"
    own = layer._parameters | layer._buffers
    if offload.hooks_of(layer) and any(own.get(n) is not t for n, t in weight.tensors().items()):
        return (
            f"Accelerate's hook serves its tensors by other names than {weight.format} has for them "
            f"({', '.join(weight.tensors())})"
        )
    return why_not_held(weight, getattr(layer, "bias", None))


def _why_not_plain(weight: Tensor) -> str | None:
    kind = type(weight)
    if kind.__module__.startswith(_DISTRIBUTED):
        weight = getattr(weight, "_local_tensor", weight)  # of a DTensor
    elif kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_fake(weight):
        return f"its weight is of class {kind.__name__} (quantized?), expected a plain tensor"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}, expected a dense one"
    return None if type(weight) is kind else _why_not_plain(weight)


def _why_not_its_forward(module: nn.Module, stock: type[nn.Module]) -> str | None:
    """The reason for which a forward on the instance itself would be lost with it, or None."""
    forward = vars(module).get("forward")
    if forward is None or is_own_forward(module, forward, stock):
        return None
    if offload.is_wrapped(module):
        return offload.why_not_movable(module)
    return f"its forward is replaced on the instance ({type(module).__name__}), which would be lost"


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

    ``alpha``, ``use_rslora`` and ``scaling`` can be set and follow each other; a merged layer is merged
    again. ``r`` is fixed.

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
    _plain_class: type[nn.Module] = nn.Linear
    _stored_names: tuple[str, ...] = ("weight",)
    """Of the tensors that the frozen weight is stored in."""
    merged = False

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
        check_dtype("dtype", dtype)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._build(linear, r, alpha, dropout, use_rslora, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRALinear":
        """Wraps ``linear``: takes over its parameters (no copy), its hooks, its mode and all it holds.

        The parameters are the same objects, so tied weights stay tied; they are frozen. Attributes,
        buffers and submodules of a subclass are taken over too, its methods are not; merging gives
        back a layer of its class. Arguments as for the class.

        ``linear`` may be Transformers' ``Conv1D`` (GPT-2's linear layer); its ``weight`` stays
        ``[in_features, out_features]``. It may be offloaded by Accelerate: its hook goes on serving
        ``weight`` and ``bias``, the adapter stays in memory.

        It may also be a layer that a format of ``lorafast.operands`` claims. Of that the operand, the
        bias, the hooks and the mode are taken over, and merging gives an ``nn.Linear``.

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear`` or ``Conv1D``, has what would be lost, or
                its dtype or ``adapter_dtype`` is not one of float16, bfloat16, float32 and float64.
                ``linear`` is unchanged.
            ValueError: another argument doesn't fit. ``linear`` is unchanged.
        """
        reason = why_not_adaptable(linear)
        if reason is not None:
            raise TypeError(f"linear can't be adapted: {reason}")
        weight = operands.of_layer(linear)
        if weight is not None:
            from lorafast.nn.lora_operand_linear import LoRAOperandLinear  # which is a LoRALinear

            return LoRAOperandLinear.of_layer(
                linear, weight, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora,
                adapter_dtype=adapter_dtype,
            )  # fmt: skip
        if is_conv1d(linear):
            from lorafast.nn.lora_conv1d import LoRAConv1D  # which is a LoRALinear

            cls = cls if issubclass(cls, LoRAConv1D) else LoRAConv1D
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(linear, r, alpha, dropout, use_rslora, adapter_dtype)
        carry(linear, layer, but=_OWN)
        move_hooks(linear, layer)
        offload.wrap(linear, layer)
        layer.training = linear.training
        return layer

    @classmethod
    def from_operand(
        cls,
        weight: Operand,
        r: int,
        *,
        bias: Tensor | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRALinear":
        """A layer over a frozen weight of another format than dense (``lorafast.operands``).

        Its tensors, by the names that the format gives them, become frozen parameters of the layer
        where they are parameters, and else buffers; so does ``bias [out_features]``, as a parameter.
        Other arguments as for the class.

        Raises:
            TypeError: ``weight`` is no operand that a layer can hold, ``bias`` doesn't fit it, or
                ``adapter_dtype`` is not one of float16, bfloat16, float32 and float64.
            ValueError: another argument doesn't fit.
        """
        from lorafast.nn.lora_operand_linear import LoRAOperandLinear  # which is a LoRALinear

        return LoRAOperandLinear.over(
            weight, r, bias=bias, alpha=alpha, dropout=dropout, use_rslora=use_rslora,
            adapter_dtype=adapter_dtype,
        )  # fmt: skip

    def _build(
        self,
        linear: nn.Module,
        r: int,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        weight = linear.weight
        assert isinstance(weight, nn.Parameter)
        self._plain_class = type(linear)
        self._set(*features(linear), r, alpha, dropout, use_rslora)
        self.weight = weight
        self.bias = linear.bias  # type: ignore[assignment]
        self._add_adapter(weight.dtype, offload.device_of(linear, weight), adapter_dtype)
        # Last: until here an error leaves ``linear`` as it was.
        for frozen in linear.parameters(recurse=False):
            frozen.requires_grad_(False)

    def _set(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
    ) -> None:
        self._memory = Memory()
        self.in_features, self.out_features = in_features, out_features
        self._r = check_rank("r", r)
        self.set_scaling(r if alpha is None else alpha, use_rslora)
        self.dropout = check_probability("dropout", dropout)
        self.merged = False

    def _add_adapter(
        self, dtype: torch.dtype, device: torch.device, adapter_dtype: torch.dtype | None
    ) -> None:
        """A fresh one, for a weight of ``dtype``."""
        check_dtype("adapter_dtype", adapter_dtype)
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if dtype in _HALF else dtype
        factory: dict[str, Any] = {"device": device, "dtype": adapter_dtype}
        # An inference tensor could never be trained.
        with torch.inference_mode(False):
            self.lora_A = nn.Parameter(torch.empty((self._r, self.in_features), **factory))
            self.lora_B = nn.Parameter(torch.empty((self.out_features, self._r), **factory))
        self.register_buffer("_merged_weight", None, persistent=False)
        self.reset_adapter()

    @property
    def r(self) -> int:
        """The rank."""
        return self._r

    @property
    def alpha(self) -> float:
        """``scaling`` is ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.set_scaling(value, self._use_rslora)

    @property
    def use_rslora(self) -> bool:
        """Whether ``scaling`` is ``alpha / sqrt(r)``."""
        return self._use_rslora

    @use_rslora.setter
    def use_rslora(self, value: bool) -> None:
        self.set_scaling(self._alpha, value)

    @property
    def scaling(self) -> float:
        """The factor before ``B·A``."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        value = check_alpha("scaling", value)
        self.set_scaling(value * self._divisor(self._use_rslora), self._use_rslora)
        self._scaling = value  # which the quotient may miss by a rounding

    def _divisor(self, use_rslora: bool) -> float:
        return math.sqrt(self._r) if use_rslora else self._r

    def set_scaling(self, alpha: float, use_rslora: bool = False) -> None:
        """Sets ``scaling`` to ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

        A merged layer is merged again.

        Raises:
            ValueError: ``alpha`` is not a finite number, or the layer can't be merged with it. The layer
                is unchanged, as after any other error.
        """
        alpha = check_alpha("alpha", alpha)
        before = dict(vars(self))
        self._alpha, self._use_rslora = alpha, use_rslora
        self._scaling = alpha / self._divisor(use_rslora)
        if self.merged:
            try:
                self.merge()
            except BaseException:
                vars(self).update(before)
                raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_memory"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory = Memory()
        # Pickles of the time when these four were plain attributes.
        renamed = {f"_{name}": state[name] for name in _PROPERTIES if name in state}
        super().__setstate__({k: v for k, v in state.items() if k not in _PROPERTIES} | renamed)

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
            return self._forward_merged(x)
        p: Any = self._parameters
        try:
            # Four times nn.Module.__getattr__ is a fifth of a small layer's forward.
            weight, bias, lora_A, lora_B = p["weight"], p["bias"], p["lora_A"], p["lora_B"]
        except KeyError:  # a parametrization or a wrapper computes one of them
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        dropout_p = self.dropout if self.training else 0.0
        # torch.fx sees the other call.
        if dropout_p == 0.0 and not autocast_anywhere() and type(x) is Tensor:
            return ops.lora_linear(
                x, weight, lora_A, lora_B, self._scaling, bias, memory=self._memory
            )
        return lora_linear(x, weight, lora_A, lora_B, self._scaling, bias, dropout_p=dropout_p)

    def _forward_merged(self, x: Tensor) -> Tensor:
        weight: Any = self._buffers["_merged_weight"]
        if type(weight) is not Tensor and is_sharded(weight) and not is_sharded(x):
            # FSDP makes the layer's own parameters whole in its forward.
            weight = weight.full_tensor()
        if torch.compiler.is_compiling():
            return F.linear(x, weight, self.bias)
        return packed.linear(x, weight, self.bias)

    def base_weight(self) -> Tensor:
        """W as ``[out_features, in_features]``, whichever way the layer keeps it."""
        return self.weight

    def operand(self) -> Weight:
        """The frozen weight as products take it: W, or an operand of another format."""
        return self.base_weight()

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B·A``, ``[out_features, in_features]``, in float32 (float64 if the adapter is)."""
        with offload.present(self):
            return self._delta_weight()

    def _delta_weight(self) -> Tensor:
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self._scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def _with_delta(self) -> Tensor:
        """``W + scaling · B·A``, ``[out_features, in_features]``, rounded to the dtype of ``weight``.

        Raises:
            ValueError: there are no values, or none that can be merged.
        """
        weight = self.base_weight()
        for name, tensor in (("weight", weight), ("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            check_mergeable(name, tensor)
        expected = [self.out_features, self.in_features]
        if list(weight.shape) != expected:
            raise ValueError(
                f"its weight has shape {list(weight.shape)}, expected {expected}: merge it unsharded"
            )
        delta = self._delta_weight()
        merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
        spoilt = count(weight.isfinite() & ~merged.isfinite())
        if spoilt:
            raise ValueError(
                f"W + scaling · B·A is beyond {weight.dtype} in {spoilt} of {merged.numel()} elements"
            )
        return merged

    def merge(self) -> None:
        """From now on multiplies by ``W + scaling · B·A``, made once, as fast as a plain layer.

        The sum is rounded to the dtype of ``weight``, which loses small updates in bfloat16 and
        float16. ``weight`` itself and the ``state_dict`` stay as they are. Until ``unmerge()`` the
        adapter gets no gradient and there is no dropout. Merging again takes the current adapter.
        Values that Accelerate has offloaded are brought in; the merged weight stays in memory.

        Raises:
            ValueError: the adapter has NaN or infinite values, or makes some; or the layer is on meta.
                The layer is unchanged.
        """
        # A weight made in inference mode would refuse every later training step.
        with torch.inference_mode(False), torch.no_grad(), offload.present(self):
            self._merged_weight = self._with_delta().contiguous()
        self.merged = True

    def unmerge(self) -> None:
        """Undoes ``merge()``, exactly."""
        self._merged_weight = None
        self.merged = False

    def to_linear(self) -> nn.Module:
        """A plain layer with weight ``W + scaling · B·A``; this layer stays as it is.

        It is of the class that was wrapped, ``nn.Linear`` as a rule. The weight is new, and sharded if
        this layer's is; the bias and whatever else a subclass had are shared. No parameter that was
        frozen requires a gradient. It has no hooks; ``lorafast.merge`` moves those.

        Raises:
            ValueError: as for ``merge()``, or ``forward`` was replaced on this instance.
        """
        reason = _why_not_its_forward(self, type(self))
        if reason is not None:
            raise ValueError(reason)
        plain = self._plain_class.__new__(self._plain_class)
        nn.Module.__init__(plain)
        if isinstance(plain, nn.Linear):
            plain.in_features, plain.out_features = self.in_features, self.out_features
        with torch.inference_mode(False), torch.no_grad(), offload.present(self):
            plain.weight = nn.Parameter(self._plain_weight(), requires_grad=False)
            plain.register_parameter("bias", self.bias)
        carry(self, plain, but=_OWN | {"parametrizations", *self._stored_names})
        plain.training = self.training
        return plain

    def _plain_weight(self) -> Tensor:
        """The merged weight as the plain layer keeps it."""
        return self._with_delta()

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this layer's place."""
        if self.merged:
            return self.to_linear()
        weight = self.base_weight()
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight.detach(), requires_grad=False)
        scripted = ScriptedLoRALinear(
            weight, self.bias, self.lora_A, self.lora_B, self.scaling, self.dropout
        )
        return scripted.train(self.training)

    def pack_(self) -> "LoRALinear":
        """Packs the frozen weight once for oneDNN's GEMM on a CPU; returns the layer itself.

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
        packed.pack(weight)
        return self

    def unpack_(self) -> "LoRALinear":
        """Undoes ``pack_()``; the layer itself."""
        for weight in self._packable():
            packed.unpack(weight)
        return self

    def _packable(self) -> list[Tensor]:
        """The weights of which there may be packed copies; none that a parametrization computes."""
        weights = (self._parameters.get("weight"), self._merged_weight)
        return [weight for weight in weights if weight is not None]

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRALinear":
        self._memory = Memory()
        was_meta = self._adapter_is_meta()
        super()._apply(fn, recurse)
        if was_meta and not self._adapter_is_meta():
            # to_empty(): a checkpoint of the plain layer, loaded next, leaves the adapter alone.
            self.reset_adapter()
        for weight in self._packable():
            packed.is_packed(weight)  # drops a copy that has lost its weight
        return self

    def _adapter_is_meta(self) -> bool:
        halves = (self._parameters.get("lora_A"), self._parameters.get("lora_B"))
        return all(half is not None and half.is_meta for half in halves)

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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        adapter = [prefix + "lora_A", prefix + "lora_B"]
        # A checkpoint of the plain layer has neither; one without the other is a broken one.
        whole = all(prefix + name in state_dict for name in self._stored_names)
        if whole and all(key not in state_dict for key in adapter):
            for key in adapter:
                if key in missing_keys:  # not there if a parametrization computes it
                    missing_keys.remove(key)
        self._follow_weight()
        if self.merged:
            try:
                self.merge()
            except ValueError as error:
                self.unmerge()
                error_msgs.append(f"{prefix[:-1] or 'the layer'} can't be merged again: {error}")
            except BaseException:
                self.unmerge()
                raise

    def _follow_weight(self) -> None:
        """Gives an adapter that is on meta without its weight memory, and the values of a fresh one."""
        own = self._parameters | self._buffers
        weight = own.get(self._stored_names[0])
        if weight is None or weight.is_meta or not self._adapter_is_meta():
            return
        with torch.inference_mode(False):
            for name in ("lora_A", "lora_B"):
                half = self._parameters[name]
                assert half is not None
                empty = torch.empty_like(half, device=weight.device)
                self._parameters[name] = nn.Parameter(empty, requires_grad=half.requires_grad)
        self.reset_adapter()

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
        if any(packed.is_packed(weight) for weight in self._packable()):
            parts.append("packed=True")
        return ", ".join(parts)


TAKEN = (
    frozenset(dir(LoRALinear)) | _OWN | {"in_features", "out_features"} | vars(nn.Module()).keys()
)
"""Names that a plain layer can't have for something of its own."""
