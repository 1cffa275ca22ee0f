"""``LoRALinear``: a frozen ``nn.Linear`` with a low-rank adapter."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafast import operands, ops
from lorafast.core.context import autocast_anywhere, without_autocast
from lorafast.core.problem import Problem
from lorafast.functional import dora_linear, lora_linear
from lorafast.nn import lora_rows, offload
from lorafast.nn.adaptable import why_not_claimed, why_not_linear
from lorafast.nn.adapter_layer import AdapterLayer, resized
from lorafast.nn.checks import check_dtype, check_probability
from lorafast.nn.plain import features, is_conv1d
from lorafast.nn.problems import linear_problems
from lorafast.nn.scripted import ScriptedDoRALinear, ScriptedLoRALinear
from lorafast.nn.sharded import draw_
from lorafast.operands import Operand, Weight, packed
from lorafast.ops.calls import Memory
from lorafast.ops.siblings import Sibling
from lorafast.ops.unstrided import is_sharded

# For torch.fx a call is one node, as one of nn.Linear is.
torch.fx.wrap("lora_linear")
torch.fx.wrap("dora_linear")


class LoRALinear(AdapterLayer):
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
        use_dora: DoRA instead of LoRA: see below.
        device: where the parameters live.
        dtype: dtype of ``weight`` and ``bias``: float16, bfloat16, float32 or float64.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``. None means the dtype of ``weight``, but
            float32 if that is float16 or bfloat16, whose steps are too coarse for an optimizer (as
            in PEFT).

    With ``use_dora`` it is DoRA (Liu et al., 2024): ``y = m / ‖W + scaling·B·A‖ ⊙ (x·Wᵀ + scaling ·
    x·Aᵀ·Bᵀ) + bias``, with the norm of each row and a fifth parameter, ``lora_magnitude
    [out_features]``, which is m. It starts as the norms of the rows of W. A checkpoint of the plain
    layer sets it so again where ``lora_B`` is zero. Dropout and gradients are as in
    ``functional.dora_linear``.

    ``alpha``, ``use_rslora`` and ``scaling`` can be set and follow each other; a merged layer is merged
    again. ``r`` is fixed.

    ``lora_A`` starts Kaiming-uniform with ``a = sqrt(5)`` and ``lora_B`` zero, the distribution of
    PEFT: a fresh adapter changes nothing.

    Raises:
        TypeError, ValueError: an argument doesn't fit.
    """

    peft_names: ClassVar = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude": "lora_magnitude_vector.weight",
    }
    watched_parameter = "lora_B"
    operation = "lora_linear"
    shares_x = True
    has_several = True
    own_names = AdapterLayer.own_names | {"_memory", "_description"}

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _plain_class: type[nn.Module] = nn.Linear

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
        use_dora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._build(
            linear, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora,
            use_dora=use_dora, adapter_dtype=adapter_dtype,
        )  # fmt: skip
        self._carry(linear)

    @classmethod
    def why_not_adaptable(cls, linear: nn.Module) -> str | None:
        """The reason for which ``linear`` can't become a ``LoRALinear``, or None if it can."""
        weight = operands.of_layer(linear)
        if weight is None:
            return why_not_linear(linear, cls.taken_names())
        from lorafast.nn.lora_operand_linear import why_not_held  # which is of LoRALinears

        return why_not_claimed(linear, weight) or why_not_held(
            weight, getattr(linear, "bias", None)
        )

    @staticmethod
    def shapes_of(
        in_features: int, out_features: int, r: int, use_dora: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """``lora_A [r, in_features]``, ``lora_B [out_features, r]``, of DoRA ``lora_magnitude``."""
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (r, in_features),
            "lora_B": (out_features, r),
        }
        return shapes | {"lora_magnitude": (out_features,)} if use_dora else shapes

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
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
        reason = cls.why_not_adaptable(linear)
        if reason is not None:
            raise TypeError(f"linear can't be adapted: {reason}")
        weight = operands.of_layer(linear)
        if weight is not None:
            from lorafast.nn.lora_operand_linear import LoRAOperandLinear  # which is a LoRALinear

            return LoRAOperandLinear.of_layer(
                linear, weight, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora,
                use_dora=use_dora, adapter_dtype=adapter_dtype,
            )  # fmt: skip
        if is_conv1d(linear):
            from lorafast.nn.lora_conv1d import LoRAConv1D  # which is a LoRALinear

            cls = cls if issubclass(cls, LoRAConv1D) else LoRAConv1D
        return cls._around(
            linear, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora,
            use_dora=use_dora, adapter_dtype=adapter_dtype,
        )  # fmt: skip

    @classmethod
    def of_plain(cls, plain: nn.Module, r: int, **options: Any) -> "LoRALinear":
        """``from_linear``."""
        return cls.from_linear(plain, r, **options)

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
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRALinear":
        """A layer over a frozen weight of another format than dense (``lorafast.operands``).

        Its tensors, by the names that the format gives them, become frozen parameters of the layer
        where they are parameters, and else buffers; so does ``bias [out_features]``, as a parameter.
        Other arguments as for the class.

        Raises:
            TypeError: ``weight`` is no operand that a layer can hold, as when a scale is NaN, ``bias``
                doesn't fit it, or ``adapter_dtype`` is not one of float16, bfloat16, float32 and
                float64.
            ValueError: another argument doesn't fit.
        """
        from lorafast.nn.lora_operand_linear import LoRAOperandLinear  # which is a LoRALinear

        return LoRAOperandLinear.over(
            weight, r, bias=bias, alpha=alpha, dropout=dropout, use_rslora=use_rslora,
            use_dora=use_dora, adapter_dtype=adapter_dtype,
        )  # fmt: skip

    def _build(
        self,
        plain: nn.Module,
        r: int,
        *,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        use_dora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        weight = plain.weight
        assert isinstance(weight, nn.Parameter)
        self._plain_class = type(plain)
        self._set_linear(*features(plain), r, alpha, dropout, use_rslora, use_dora)
        self.weight = weight
        self.bias = plain.bias  # type: ignore[assignment]
        self._add_adapter(weight.dtype, offload.device_of(plain, weight), adapter_dtype)

    def _set_linear(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        use_dora: bool,
    ) -> None:
        self._memory = Memory()
        self._set(in_features, out_features, r, alpha, use_rslora, use_dora)
        self.dropout = check_probability("dropout", dropout)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_memory"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory = Memory()
        super().__setstate__(state)

    def reset_adapter(self) -> None:
        """Draws ``lora_A`` anew (Kaiming-uniform, ``a = sqrt(5)``) and sets ``lora_B`` to zero.

        ``lora_magnitude`` becomes what the norms of the rows are then.
        """
        draw_(nn.init.kaiming_uniform_, self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self._reset_magnitude()

    def _weight_norm(self) -> Tensor:
        with without_autocast(self.lora_A):
            return ops.weight_norm(self.operand(), self.lora_A, self.lora_B, self._scaling)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, the frozen ones as ``nn.Linear`` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        if self._aside:
            aside = self._forward_aside(x)
            if aside is not None:
                return aside
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

    def _forward_aside(self, x: Tensor) -> Tensor | None:
        """What it is aside for; None if x is not shared with siblings, nor anything else."""
        if self._off:
            return self.base_forward(x)
        if self._rows is not None:
            return lora_rows.forward(self, self._rows, x)
        if self.merged:
            return self._forward_merged(x)
        if self._use_dora:
            return self._forward_dora(x)
        if torch.compiler.is_compiling() or self._siblings is None:
            return None
        siblings, place = self._siblings
        return siblings.forward(place, self, x)

    def forward_active(self, x: Tensor) -> Tensor:
        """What the active adapter gives, for all rows."""
        if self._use_dora:
            return self._forward_dora(x)
        dropout_p = self.dropout if self.training else 0.0
        weight, bias = self.fitted(x)
        return lora_linear(
            x, weight, self.lora_A, self.lora_B, self._scaling, bias, dropout_p=dropout_p
        )

    def fitted(self, x: Tensor) -> tuple[Weight, Tensor | None]:
        """The weight and the bias as a product with ``x`` takes them."""
        return self.operand(), self.bias

    def sibling(self) -> Sibling | None:
        """Its tensors, if it is on, neither merged nor DoRA's, and drops nothing: each layer has its
        mask."""
        if self._off or self.merged or self._use_dora or (self.dropout and self.training):
            return None
        p: Any = self._parameters
        if self._local is not None and is_sharded(p["lora_A"]):  # another one's forward asks
            p = p | self._local.parts(self)
        try:
            bias = p["bias"] if "bias" in p else self.__dict__["bias"]  # where it is a plain None
            return Sibling(p["weight"], p["lora_A"], p["lora_B"], self._scaling, bias)
        except KeyError:  # a parametrization or a wrapper computes one of them
            return None

    def _forward_dora(self, x: Tensor) -> Tensor:
        return dora_linear(
            x, self.base_weight(), self.lora_A, self.lora_B, self.lora_magnitude, self._scaling,
            self.bias, dropout_p=self.dropout, training=self.training,
            norm_of=self._norm_of(x, ops.weight_norm),
        )  # fmt: skip

    def _forward_merged(self, x: Tensor) -> Tensor:
        weight: Any = self._buffers["_merged_weight"]
        if type(weight) is not Tensor and is_sharded(weight) and not is_sharded(x):
            # FSDP makes the layer's own parameters whole in its forward.
            weight = weight.full_tensor()
        if torch.compiler.is_compiling():
            return F.linear(x, weight, self.bias)
        return packed.linear(x, weight, self.bias)

    def base_forward(self, x: Tensor) -> Tensor:
        """``x·Wᵀ + bias``, ``[..., out_features]``."""
        return F.linear(x, self.weight, self.bias)

    def base_weight(self) -> Tensor:
        """W as ``[out_features, in_features]``, whichever way the layer keeps it."""
        return self.weight

    @torch.no_grad()
    def take_away(self, A: Tensor, B: Tensor, how: str) -> None:
        """Begins with ``A [r, K]`` and ``B [N, r]``; ``W − scaling·B·A``, rounded once, stays frozen.

        The weight is another parameter afterwards: one that other modules share stays as it was.
        """
        W = self.base_weight()
        left = W.to(torch.promote_types(W.dtype, torch.float32)) - self.scaling * B @ A
        kept = self._as_kept(left.to(W.dtype))
        self.weight = nn.Parameter(kept, requires_grad=self.weight.requires_grad)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.init_lora_weights = how

    @torch.no_grad()
    def begin(self, A: Tensor, alpha: float) -> None:
        """Begins with ``A [r, K]``, of any rank, ``alpha``, and a B that is zero.

        Where the rank is another than before, ``lora_A`` and ``lora_B`` are other parameters.
        """
        if len(A) != self._r:
            self._r, self._memory = len(A), Memory()
            for name, shape in (("lora_A", A.shape), ("lora_B", (self.out_features, len(A)))):
                old = getattr(self, name)
                with torch.inference_mode(False):
                    made = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)
                self.register_parameter(name, made)
        self.lora_A.copy_(A)
        self.lora_B.zero_()
        self.set_scaling(alpha, self._use_rslora)

    def without_adapter(self) -> nn.Module:
        """The frozen layer by itself, over the same tensors, without its hooks."""
        return self._plain(self.weight)

    def _as_kept(self, W: Tensor) -> Tensor:
        """``W [N, K]`` as the layer keeps it."""
        return W

    def example_input(self, rows: int) -> Tensor:
        """``[rows, in_features]`` zeros, where a forward has its input."""
        weight = self.operand()
        device = offload.device_of(self, weight)
        K = self.in_features if self._local is None else self._local.width(self.in_features)
        return torch.zeros((rows, K), dtype=weight.dtype, device=device)

    def operand(self) -> Weight:
        """The frozen weight as products take it: W, or an operand of another format."""
        return self.base_weight()

    def _delta_weight(self) -> Tensor:
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with without_autocast(self.lora_A):
            return self._scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def merged_weight(self) -> Tensor:
        """``W + scaling · B·A``, ``[out_features, in_features]``, rounded to the dtype of ``weight``.

        Of DoRA the rows of that have the norms ``lora_magnitude``.

        Raises:
            ValueError: there are no values, or none that can be merged.
        """
        weight = self.base_weight()
        self._check_mergeable(weight, (self.out_features, self.in_features))
        return self._with_delta(weight, dim=1)

    def peft_fields(self) -> dict[str, object]:
        """What PEFT's config says of such a layer, and once for all layers of a model."""
        return super().peft_fields() | {"lora_dropout": self.dropout}

    def problems(self, x: Tensor | None) -> tuple[Problem, ...]:
        """``lora_linear`` and its backward; DoRA calls them too, but not over float16 from float32."""
        dropout = bool(self.dropout and self.training)
        weight, lora_A, bias = self.operand(), self.lora_A, self.bias
        if self._use_dora:
            dtype = weight.dtype if x is None else x.dtype
            if dtype is torch.float16 and lora_A.dtype is torch.float32:
                return ()
            bias = bias if dropout else None
        return linear_problems(x, weight, lora_A, self.lora_B, bias, dropout)

    def to_linear(self) -> nn.Module:
        """A plain layer with the merged weight: see ``to_plain``."""
        return self.to_plain()

    def _fill(self, plain: nn.Module) -> None:
        if isinstance(plain, nn.Linear):
            plain.in_features, plain.out_features = self.in_features, self.out_features
        plain.register_parameter("bias", self.bias)

    def to_resize(self) -> tuple[nn.Module, Callable[[Any], None]]:
        """An ``nn.Linear`` with the frozen tensors of this layer, and what takes them back."""
        weight = self.operand()
        if isinstance(weight, Operand):
            raise ValueError(f"it is stored as {weight.format} (resize the model before)")
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear, self._take_resized

    def _take_resized(self, plain: Any) -> None:
        """Takes the parameters of ``plain``, and ``lora_B`` gets as many rows: zero where it had none.

        They are trained, or frozen, as this layer's were: a tied weight is the input embedding's too.
        The magnitudes of added rows are their norms.
        """
        assert isinstance(plain.weight, nn.Parameter)
        rows = plain.weight.shape[0]
        plain.weight.requires_grad_(self.weight.requires_grad)
        if plain.bias is not None and self.bias is not None:
            plain.bias.requires_grad_(self.bias.requires_grad)
        self.weight = plain.weight
        self.bias = plain.bias
        if rows == self.out_features:
            return
        before, self.out_features = self.out_features, rows
        self.lora_B = resized(self.lora_B, 0, rows)
        if self._use_dora:
            self.lora_magnitude = resized(self.lora_magnitude, 0, rows)
            with torch.no_grad():
                self.lora_magnitude[before:] = self._weight_norm()[before:]
        if self.merged:
            self.merge()

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this layer's place."""
        if self.merged:
            return self.to_linear()
        weight = self.base_weight()
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight.detach(), requires_grad=False)
        if self._use_dora:
            scripted: nn.Module = ScriptedDoRALinear(
                weight, self.bias, self.lora_A, self.lora_B, self.lora_magnitude, self.scaling,
                self.dropout,
            )  # fmt: skip
        else:
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
        super()._apply(fn, recurse)
        for weight in self._packable():
            packed.is_packed(weight)  # drops a copy that has lost its weight
        return self

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
        if self.use_dora:
            parts.append("use_dora=True")
        if self.merged:
            parts.append("merged=True")
        if self._siblings is not None:
            parts.append(f"siblings={len(self._siblings[0])}")
        if any(packed.is_packed(weight) for weight in self._packable()):
            parts.append("packed=True")
        return ", ".join(parts)
