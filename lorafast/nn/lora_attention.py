"""``LoRAMultiheadAttention``: a frozen ``nn.MultiheadAttention`` with low-rank adapters."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafast.core.context import without_autocast
from lorafast.core.problem import Problem
from lorafast.nn import offload
from lorafast.nn.adaptable import why_not_attention
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.attention import Heads, Projection, multihead_attention
from lorafast.nn.checks import check_dtype, check_probability
from lorafast.nn.plain import carry
from lorafast.nn.problems import linear_problems
from lorafast.nn.sharded import beside, draw_
from lorafast.ops.checks import check_not_sharded_alone
from lorafast.ops.unstrided import is_sharded

# For torch.fx a call is one node, as one of nn.MultiheadAttention is.
torch.fx.wrap("multihead_attention")

OUT_PROJ_TIMES = 2
"""How often PEFT adds the change of ``out_proj``, in a forward and in ``merge_and_unload``."""


class LoRAMultiheadAttention(AdapterLayer):
    """``nn.MultiheadAttention`` (Vaswani et al., 2017), frozen, with LoRA (Hu et al., 2021) over both of
    its projections, as PEFT has it.

    With ``in_proj(x) = x·W_inᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` for q, k and v and ``out_proj(o) =
    o·W_outᵀ + 2 · scaling · (drop(o)·A_outᵀ)·B_outᵀ + bias``,

        y = out_proj(softmax(q·kᵀ / √D + mask)·v), by heads of D = embed_dim / num_heads.

    q, k and v share one A. PEFT adds the change of ``out_proj`` twice, when it computes and when it
    merges, and an adapter of its file is one of that: hence the 2. The gradients are those of this
    formula; PEFT's for ``out_proj`` are half of them.

    Parameters: those of the plain layer, frozen (``in_proj_weight [3E, E]``, ``in_proj_bias [3E]``,
    ``out_proj.weight [E, E]``, ``out_proj.bias [E]``, and ``bias_k``, ``bias_v [1, 1, E]``), and trained
    ones, ``lora_A [r, E]``, ``lora_B [3E, r]``, ``out_lora_A [r, E]`` and ``out_lora_B [E, r]``. A
    ``state_dict`` of a plain layer loads as it is.

    W is never merged in a forward: q, k and v of self-attention are one product, of attention over other
    keys two, and of three different inputs three. Arguments and results of ``forward`` are those of
    ``nn.MultiheadAttention``, whose fused kernel for inference is not called. PyTorch's encoder layers
    don't call theirs either: they ask for ``_qkv_same_embed_dim``, which is False.

    Nested tensors are refused. An ``nn.TransformerEncoder`` makes them of padded inputs in inference;
    ``lorafast.adapt`` sets its ``use_nested_tensor`` to False. Where this layer is put into one by hand,
    do the same, or make the encoder with ``enable_nested_tensor=False``.

    Args:
        embed_dim, num_heads, bias, add_bias_kv, add_zero_attn, batch_first: as for the plain layer.
            ``kdim`` and ``vdim`` are ``embed_dim``: over others PEFT has no adapter.
        r: rank of the adapters, at least 1.
        attention_dropout: probability of dropping an attention weight in training, the plain layer's
            ``dropout``.
        alpha: ``scaling`` is ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski,
            2023); None stands for ``r``, a scaling of 1, where PEFT's default ``lora_alpha`` is 8.
        dropout: probability of dropping an element of an input on its way into an adapter in training.
            PEFT's layer ignores its ``lora_dropout``.
        use_rslora: see ``alpha``.
        device: where the parameters live.
        dtype: dtype of the frozen parameters: float16, bfloat16, float32 or float64.
        adapter_dtype: dtype of the adapters. None means that dtype, but float32 if it is float16 or
            bfloat16.

    Accelerate's offloading serves it where ``preload_module_classes`` names this class: ``out_proj`` is
    never called, so that a hook of its own would never bring its values in.

    The A's start Kaiming-uniform with ``a = sqrt(5)`` and the B's zero, as in PEFT: a fresh adapter
    changes nothing. There is no DoRA over attention, as in PEFT.

    Raises:
        TypeError, ValueError: an argument doesn't fit.
    """

    peft_names: ClassVar = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "out_lora_A": "base_layer.out_proj.lora_A.weight",
        "out_lora_B": "base_layer.out_proj.lora_B.weight",
    }
    watched_parameter = "lora_B"
    operation = "lora_linear"
    has_rows = False
    parts = ("in_proj", "out_proj")
    own_names = AdapterLayer.own_names | {
        "_merged_out_weight", "_qkv_same_embed_dim", "attention_dropout", "out_proj",
    }  # fmt: skip
    weight_name = "in_proj_weight"
    _stored_names = ("in_proj_weight",)
    _plain_class: type[nn.Module] = nn.MultiheadAttention

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    out_lora_A: nn.Parameter
    out_lora_B: nn.Parameter
    embed_dim: int
    num_heads: int
    head_dim: int
    batch_first: bool
    add_zero_attn: bool
    attention_dropout: float
    _merged_out_weight: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        r: int,
        *,
        attention_dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        batch_first: bool = False,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype)
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim is {embed_dim}, expected a multiple of num_heads, {num_heads}"
            )
        plain = nn.MultiheadAttention(
            embed_dim, num_heads, check_probability("attention_dropout", attention_dropout), bias,
            add_bias_kv, add_zero_attn, batch_first=batch_first, device=device, dtype=dtype,
        )  # fmt: skip
        self._build(
            plain, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, use_dora=False,
            adapter_dtype=adapter_dtype,
        )  # fmt: skip
        self._carry(plain)

    @classmethod
    def why_not_adaptable(cls, plain: nn.Module) -> str | None:
        """The reason for which ``plain`` can't become one, or None if it can."""
        return why_not_attention(plain, cls.taken_names())

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRAMultiheadAttention":
        """Wraps ``attention``: takes over its parameters (no copy), hooks, mode and whatever it holds.

        The parameters are the same objects, and are frozen. Merging gives back a layer of its class.
        Arguments as for the class.

        Raises:
            TypeError: ``attention`` is not a plain ``nn.MultiheadAttention``, has a ``kdim`` or ``vdim``
                of its own or what would be lost, or a dtype is not one of float16, bfloat16, float32 and
                float64. ``attention`` is unchanged.
            ValueError: another argument doesn't fit: ``use_dora`` is True. ``attention`` is unchanged.
        """
        reason = cls.why_not_adaptable(attention)
        if reason is not None:
            raise TypeError(f"attention can't be adapted: {reason}")
        return cls._around(
            attention, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, use_dora=use_dora,
            adapter_dtype=adapter_dtype,
        )  # fmt: skip

    @classmethod
    def of_plain(cls, plain: nn.Module, r: int, **options: Any) -> "LoRAMultiheadAttention":
        """``from_attention``."""
        return cls.from_attention(plain, r, **options)

    @staticmethod
    def shapes_of(
        in_features: int, out_features: int, r: int, use_dora: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """``lora_A [r, E]``, ``lora_B [3E, r]``, ``out_lora_A [r, E]`` and ``out_lora_B [E, r]``."""
        return {
            "lora_A": (r, in_features),
            "lora_B": (out_features, r),
            "out_lora_A": (r, in_features),
            "out_lora_B": (in_features, r),
        }

    def _build(
        self,
        plain: Any,
        r: int,
        *,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        use_dora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        self._plain_class = type(plain)
        self._set(plain.embed_dim, 3 * plain.embed_dim, r, alpha, use_rslora, use_dora)
        if use_dora:
            raise ValueError(
                "use_dora is True, expected False for attention, of which PEFT has no DoRA"
            )
        self.dropout = check_probability("dropout", dropout)
        self.attention_dropout = plain.dropout
        self.in_proj_weight, self.out_proj = plain.in_proj_weight, plain.out_proj
        weight = self.in_proj_weight
        self._add_adapter(weight.dtype, weight.device, adapter_dtype)
        self.register_buffer("_merged_out_weight", None, persistent=False)

    def _carry(self, plain: nn.Module) -> None:
        for frozen in self.out_proj.parameters():
            frozen.requires_grad_(False)
        super()._carry(plain)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: else PyTorch's encoders hand ``in_proj_weight`` to a fused kernel, past the adapter."""
        return False

    def frozen_tensors(self) -> dict[str, Tensor | None]:
        """``in_proj_weight`` and ``out_proj.weight``; None for one that is computed."""
        return super().frozen_tensors() | {
            "out_proj.weight": self.out_proj._parameters.get("weight")
        }

    def reset_adapter(self) -> None:
        """Draws the A's anew (Kaiming-uniform, ``a = sqrt(5)``) and sets the B's to zero."""
        for A, B in ((self.lora_A, self.lora_B), (self.out_lora_A, self.out_lora_B)):
            draw_(nn.init.kaiming_uniform_, A, a=math.sqrt(5))
            nn.init.zeros_(B)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, the frozen ones as ``nn.MultiheadAttention`` does."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)
        self.reset_adapter()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of ``nn.MultiheadAttention``."""
        if self._off:
            return self.base_forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
        heads = Heads(
            self.num_heads, self.batch_first, self.attention_dropout if self.training else 0.0,
            self.bias_k, self.bias_v, self.add_zero_attn,
        )  # fmt: skip
        return multihead_attention(
            query, key, value, *self._projections(), heads, key_padding_mask=key_padding_mask,
            need_weights=need_weights, attn_mask=attn_mask,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``nn.MultiheadAttention`` computes with the frozen weights."""
        return self._plain(self.in_proj_weight, self._fill_frozen)(*args, **kwargs)

    def _projections(self) -> tuple[Projection, Projection]:
        """``in_proj`` and ``out_proj`` as they are now."""
        out = self.out_proj
        if self.merged:
            whole = (_whole(self._merged_weight), _whole(self._merged_out_weight))
            return Projection(whole[0], self.in_proj_bias), Projection(whole[1], out.bias)
        p = self.dropout if self.training else 0.0
        check_not_sharded_alone(self.in_proj_weight, **{"out_proj.weight": out.weight})
        return (
            Projection(
                self.in_proj_weight, self.in_proj_bias, self.lora_A, self.lora_B, self._scaling, p
            ),
            Projection(
                out.weight, out.bias, self.out_lora_A, self.out_lora_B,
                OUT_PROJ_TIMES * self._scaling, p,
            ),
        )  # fmt: skip

    def example_input(self, rows: int) -> Tensor:
        """``[rows, embed_dim]`` zeros: a sequence, where a forward has its query."""
        weight = self.in_proj_weight
        return torch.zeros((rows, self.embed_dim), dtype=weight.dtype, device=weight.device)

    def example_arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of self-attention."""
        return x, x, x

    def summary_remark(self) -> str:
        """What it is, for ``summary``."""
        return "attention, with out_proj"

    def peft_fields(self) -> dict[str, object]:
        """What PEFT's config says of such a layer, and once for all layers of a model."""
        return super().peft_fields() | {"lora_dropout": self.dropout}

    def problems(self, x: Tensor | None) -> tuple[Problem, ...]:
        """``lora_linear`` and its backward for ``in_proj`` of self-attention, then for ``out_proj``."""
        dropout = bool(self.dropout and self.training)
        out = self.out_proj
        return (
            *linear_problems(
                x, self.in_proj_weight, self.lora_A, self.lora_B, self.in_proj_bias, dropout
            ),
            *linear_problems(x, out.weight, self.out_lora_A, self.out_lora_B, out.bias, dropout),
        )

    def _delta_weight(self) -> Tensor:
        """That of ``in_proj``."""
        return self._delta(self.lora_A, self.lora_B, self._scaling)

    def _delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        with without_autocast(lora_A):
            return scaling * (lora_B.to(dtype) @ lora_A.to(dtype))

    def merged_weight(self) -> Tensor:
        """``W_in + scaling · B·A``, ``[3E, E]``, in the dtype of ``in_proj_weight``.

        Raises:
            ValueError: there are no values, or none that can be merged.
        """
        self._check_mergeable(self.in_proj_weight, (self.out_features, self.in_features))
        return self._with_delta(self.in_proj_weight, dim=1)

    def merged_out_weight(self) -> Tensor:
        """``W_out + 2 · scaling · B_out·A_out``, ``[E, E]``, in the dtype of ``out_proj.weight``.

        Raises:
            ValueError: there are no values, or none that can be merged.
        """
        weight, scaling = self.out_proj.weight, OUT_PROJ_TIMES * self._scaling
        self._check_mergeable(weight, (self.in_features, self.in_features))
        delta = beside(self._delta(self.out_lora_A, self.out_lora_B, scaling), weight)
        return self._rounded(
            weight.to(delta.dtype) + delta, weight, "W + 2 · scaling · B·A of out_proj"
        )

    def merge(self) -> None:
        """From now on computes with two weights, made once; see ``AdapterLayer.merge``."""
        with torch.inference_mode(False), torch.no_grad(), offload.present(self):
            out = self.merged_out_weight()
        super().merge()
        self._merged_out_weight = out

    def unmerge(self) -> None:
        """Undoes ``merge()``, exactly."""
        super().unmerge()
        self._merged_out_weight = None

    def _fill(self, plain: Any) -> None:
        out = self.out_proj
        merged = type(out).__new__(type(out))
        nn.Module.__init__(merged)
        merged.in_features, merged.out_features = out.in_features, out.out_features
        merged.weight = nn.Parameter(self.merged_out_weight(), requires_grad=False)
        carry(out, merged, but=("weight",))
        merged.training = out.training
        self._fill_frozen(plain)
        plain.out_proj = merged

    def _fill_frozen(self, plain: Any) -> None:
        plain.out_proj = self.out_proj
        plain.dropout = self.attention_dropout
        plain._qkv_same_embed_dim = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        if self.merged:  # and will be merged again, before PyTorch comes to the submodule
            self.out_proj._load_from_state_dict(
                state_dict, f"{prefix}out_proj.", local_metadata, False, [], [], []
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this layer's place."""
        if not self.merged:
            raise ValueError(
                f"a {type(self).__name__} can't be scripted: merge it first, or export the model "
                "(torch.export)"
            )
        return self.to_plain()

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        parts = [f"{self.embed_dim}, {self.num_heads}", f"r={self.r}", f"alpha={self.alpha:g}"]
        parts += [f"dropout={self.dropout:g}", f"bias={self.in_proj_bias is not None}"]
        if self.attention_dropout:
            parts.append(f"attention_dropout={self.attention_dropout:g}")
        parts += [
            f"{name}=True"
            for name, value in (
                ("add_bias_kv", self.bias_k is not None), ("add_zero_attn", self.add_zero_attn),
                ("batch_first", self.batch_first), ("use_rslora", self.use_rslora),
                ("merged", self.merged),
            )
            if value
        ]  # fmt: skip
        return ", ".join(parts)


def _whole(weight: Any) -> Tensor:
    """A merged weight, of which FSDP may have made shards."""
    whole: Tensor = weight.full_tensor() if is_sharded(weight) else weight
    return whole
