"""``LoRAEmbedding``: a frozen ``nn.Embedding`` with a low-rank adapter."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafast import ops
from lorafast.core.context import without_autocast
from lorafast.functional import lora_embedding
from lorafast.nn import offload
from lorafast.nn.adaptable import scales_output, why_not_embedding
from lorafast.nn.adapter_layer import AdapterLayer, resized
from lorafast.nn.checks import check_dtype, check_probability
from lorafast.nn.scripted import ScriptedDoRAEmbedding, ScriptedLoRAEmbedding
from lorafast.nn.sharded import draw_
from lorafast.operands import Weight, kept_transposed
from lorafast.ops.kept_norm import NormOf
from lorafast.ops.unstrided import is_sharded


def column_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``‖W + scaling · (B·A)ᵀ‖`` of each column, ``[N]``."""
    assert isinstance(weight, Tensor)
    return ops.weight_norm(kept_transposed(weight), lora_A, lora_B, scaling)


def dora_embedding(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    padding_idx: int | None,
    norm_of: NormOf | None = None,
) -> Tensor:
    """``y = m / ‖W + scaling · (B·A)ᵀ‖ ⊙ lora_embedding(x)``; no gradient flows through the norm."""
    with without_autocast(weight):
        scale = magnitude / (norm_of or column_norm)(weight, lora_A, lora_B, scaling)
    y = lora_embedding(tokens, weight, lora_A, lora_B, scaling, padding_idx=padding_idx)
    return (y * scale).to(y.dtype)


# For torch.fx a call is one node, as one of nn.Embedding is.
torch.fx.wrap("lora_embedding")
torch.fx.wrap("dora_embedding")


class LoRAEmbedding(AdapterLayer):
    """``y = W[x] + scaling · Aᵀ[x]·Bᵀ`` with W frozen (Hu et al., 2021), over the tokens ``x``.

    Parameters: ``weight [num_embeddings, embedding_dim]`` (frozen), ``lora_embedding_A
    [r, num_embeddings]`` and ``lora_embedding_B [embedding_dim, r]`` (trained), by PEFT's names. These
    three are the keys of its ``state_dict``; one of a plain ``nn.Embedding`` loads as it is and leaves
    the adapter alone. In ``in_features`` and ``out_features`` it has the two sizes, as PEFT calls them.

    Args:
        num_embeddings: number of rows of the table, V.
        embedding_dim: size of a row, N.
        r: rank of the adapter, at least 1.
        alpha: ``scaling`` is ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski,
            2023); None stands for ``r``, a scaling of 1, where PEFT's default ``lora_alpha`` is 8.
        padding_idx: the row that starts at zero and gets no gradient, as in ``nn.Embedding``.
        use_rslora: see ``alpha``.
        use_dora: DoRA instead of LoRA: see below.
        device: where the parameters live.
        dtype: dtype of ``weight``: float16, bfloat16, float32 or float64.
        adapter_dtype: dtype of the adapter. None means the dtype of ``weight``, but float32 if that is
            float16 or bfloat16.

    ``lora_embedding_A`` starts zero and ``lora_embedding_B`` normal, as in PEFT: a fresh adapter changes
    nothing. There is no dropout of tokens, which PEFT doesn't have either.

    With ``use_dora`` it is DoRA (Liu et al., 2024), as in PEFT: ``y = m / ‖W + scaling · (B·A)ᵀ‖ ⊙
    (W[x] + scaling · Aᵀ[x]·Bᵀ)``, with the norm of each column, which has no gradient, and a fourth
    parameter, ``lora_magnitude [embedding_dim]``, which is m. A forward in training then reads all of W,
    in evaluation the first one. The magnitude starts as those norms, and does so again when a plain
    checkpoint is loaded where ``lora_embedding_A`` is zero. When the table is resized it changes so that
    the tokens that stay keep their rows.

    Raises:
        TypeError, ValueError: an argument doesn't fit.
    """

    peft_names: ClassVar = {
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_magnitude": "lora_magnitude_vector.weight",
    }
    watched_parameter = "lora_embedding_A"
    own_names = AdapterLayer.own_names | {"_scales"}
    operation = "lora_embedding"

    weight: nn.Parameter
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    _plain_class: type[nn.Module] = nn.Embedding
    _scales = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int,
        *,
        alpha: float | None = None,
        padding_idx: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype)
        plain = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._build(
            plain,
            r,
            alpha=alpha,
            use_rslora=use_rslora,
            use_dora=use_dora,
            adapter_dtype=adapter_dtype,
        )
        self._carry(plain)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Module,
        r: int,
        *,
        alpha: float | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRAEmbedding":
        """Wraps ``embedding``: takes over its weight (no copy), its hooks, its mode and all it holds.

        The weight is the same object, so an output head that is tied to it stays so, without this
        adapter, as in PEFT; it is frozen. Merging gives back a layer of its class. Arguments as for the
        class. Where ``embedding`` is one of Transformers' that multiply by ``embed_scale`` (Gemma's,
        BART's), by their source, the adapted one does too, as in PEFT.

        Raises:
            TypeError: ``embedding`` is not a plain ``nn.Embedding``, has a ``max_norm`` or
                ``scale_grad_by_freq`` or what would be lost, or a dtype is not one of float16,
                bfloat16, float32 and float64. ``embedding`` is unchanged.
            ValueError: another argument doesn't fit. ``embedding`` is unchanged.
        """
        reason = cls.why_not_adaptable(embedding)
        if reason is not None:
            raise TypeError(f"embedding can't be adapted: {reason}")
        return cls._around(
            embedding,
            r,
            alpha=alpha,
            use_rslora=use_rslora,
            use_dora=use_dora,
            adapter_dtype=adapter_dtype,
        )

    @classmethod
    def of_plain(
        cls,
        plain: nn.Module,
        r: int,
        *,
        dropout: float = 0.0,
        **options: Any,
    ) -> "LoRAEmbedding":
        """``from_embedding``; ``dropout`` is of other layers, as in PEFT."""
        check_probability("dropout", dropout)
        return cls.from_embedding(plain, r, **options)

    @classmethod
    def why_not_adaptable(cls, plain: nn.Module) -> str | None:
        """The reason for which ``plain`` can't become a ``LoRAEmbedding``, or None if it can."""
        return why_not_embedding(plain, cls.taken_names())

    @staticmethod
    def shapes_of(
        in_features: int, out_features: int, r: int, use_dora: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """``lora_embedding_A [r, V]``, ``lora_embedding_B [N, r]``, of DoRA ``lora_magnitude [N]``."""
        shapes: dict[str, tuple[int, ...]] = {
            "lora_embedding_A": (r, in_features),
            "lora_embedding_B": (out_features, r),
        }
        return shapes | {"lora_magnitude": (out_features,)} if use_dora else shapes

    def _build(
        self,
        plain: nn.Module,
        r: int,
        *,
        alpha: float | None,
        use_rslora: bool,
        use_dora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        weight = plain.weight
        assert isinstance(weight, nn.Parameter)
        self._plain_class = type(plain)
        num_embeddings, embedding_dim = weight.shape
        self._set(num_embeddings, embedding_dim, r, alpha, use_rslora, use_dora)
        self.weight = weight
        self._scales = scales_output(plain)
        self._add_adapter(weight.dtype, offload.device_of(plain, weight), adapter_dtype)

    def reset_adapter(self) -> None:
        """Sets ``lora_embedding_A`` to zero and draws ``lora_embedding_B`` anew, normal.

        ``lora_magnitude`` becomes what the norms of the columns are then.
        """
        nn.init.zeros_(self.lora_embedding_A)
        draw_(nn.init.normal_, self.lora_embedding_B)
        self._reset_magnitude()

    def _weight_norm(self) -> Tensor:
        A, B = self.lora_embedding_A, self.lora_embedding_B
        with without_autocast(A):
            return column_norm(self.weight, A, B, self._scaling)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, the frozen one as ``nn.Embedding`` does."""
        nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)
        self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """``[...]`` integers → ``[..., embedding_dim]``."""
        if self._aside:
            return self._forward_aside(x)
        return self.forward_active(x)

    def forward_active(self, x: Tensor) -> Tensor:
        """What the active adapter gives, for all rows."""
        if self._use_dora:
            return self._forward_dora(x)
        y = lora_embedding(
            x, self.weight, self.lora_embedding_A, self.lora_embedding_B, self._scaling,
            padding_idx=self.padding_idx,
        )  # fmt: skip
        return self._scaled(y) if self._scales else y

    def _forward_aside(self, x: Tensor) -> Tensor:
        if self._off:
            return self.base_forward(x)
        if self._rows is not None:
            return self._rows.by_parts((x,), self.forward_active, self.base_forward)
        if self.merged:
            return self._forward_merged(x)
        return self._forward_dora(x)

    def _forward_dora(self, x: Tensor) -> Tensor:
        y = dora_embedding(
            x, self.weight, self.lora_embedding_A, self.lora_embedding_B, self.lora_magnitude,
            self._scaling, self.padding_idx, self._norm_of(x, column_norm),
        )  # fmt: skip
        return self._scaled(y) if self._scales else y

    def _forward_merged(self, x: Tensor) -> Tensor:
        weight: Any = self._merged_weight
        if is_sharded(weight) and not is_sharded(x):
            # FSDP makes the layer's own parameters whole in its forward.
            weight = weight.full_tensor()
        y = F.embedding(x, weight, self.padding_idx)
        return self._scaled(y) if self._scales else y

    def _scaled(self, y: Tensor) -> Tensor:
        scale: Any = self.embed_scale  # a number or a buffer of the plain layer's
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

    def example_input(self, rows: int) -> Tensor:
        """``[rows]`` zeros, where a forward has its input."""
        return torch.zeros(rows, dtype=torch.int64, device=offload.device_of(self, self.weight))

    def summary_remark(self) -> str:
        """What it is, for ``summary``."""
        return "embedding, DoRA" if self._use_dora else "embedding"

    def _delta_weight(self) -> Tensor:
        dtype = torch.promote_types(self.lora_embedding_A.dtype, torch.float32)
        A, B = self.lora_embedding_A.to(dtype), self.lora_embedding_B.to(dtype)
        with without_autocast(A):
            return self._scaling * (A.t() @ B.t())

    def merged_weight(self) -> Tensor:
        """``W + scaling · (B·A)ᵀ``, ``[num_embeddings, embedding_dim]``, in the dtype of ``weight``.

        Of DoRA the columns of that have the norms ``lora_magnitude``.

        Raises:
            ValueError: there are no values, or none that can be merged.
        """
        self._check_mergeable(self.weight, (self.in_features, self.out_features))
        return self._with_delta(self.weight, dim=0)

    def to_embedding(self) -> nn.Module:
        """A plain layer with weight ``W + scaling · (B·A)ᵀ``: see ``to_plain``."""
        return self.to_plain()

    def to_resize(self) -> tuple[nn.Module, Callable[[Any], None]]:
        """A plain embedding with the frozen tensor of this layer, and what takes it back."""
        # Transformers may change the weight in place.
        before = self._weight_norm() if self._use_dora else None
        return self._plain(self.weight), functools.partial(self._take_resized, norm=before)

    def _take_resized(self, plain: Any, norm: Tensor | None) -> None:
        """Takes the weight of ``plain``; ``lora_embedding_A`` gets as many columns, new ones zero.

        ``norm``, of DoRA, is what it was: the magnitude changes as the norm does, so that the tokens
        that stay keep their rows.
        """
        assert isinstance(plain.weight, nn.Parameter)
        V = plain.weight.shape[0]
        plain.weight.requires_grad_(self.weight.requires_grad)
        self.weight = plain.weight
        if self.in_features == V:
            return
        self.in_features = self.num_embeddings = V
        self.lora_embedding_A = resized(self.lora_embedding_A, 1, V)
        if norm is not None:
            with torch.no_grad():
                self.lora_magnitude.mul_(self._weight_norm() / norm)
        if self.merged:
            self.merge()

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this layer's place."""
        if self.merged:
            return self.to_plain()
        scale = float(self._scaled(self.weight.new_ones(()))) if self._scales else 1.0
        if self._use_dora:
            dora = ScriptedDoRAEmbedding(
                self.weight,
                self.lora_embedding_A,
                self.lora_embedding_B,
                self.lora_magnitude,
                self.scaling,
                self.padding_idx,
                scale,
            )
            return dora.train(self.training)
        scripted = ScriptedLoRAEmbedding(
            self.weight,
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.scaling,
            self.padding_idx,
            scale,
        )
        return scripted.train(self.training)

    def extra_repr(self) -> str:
        """The constructor's arguments, as in ``nn.Embedding``."""
        parts = [
            f"{self.num_embeddings}, {self.embedding_dim}",
            f"r={self.r}",
            f"alpha={self.alpha:g}",
        ]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.use_rslora:
            parts.append("use_rslora=True")
        if self.use_dora:
            parts.append("use_dora=True")
        if self.merged:
            parts.append("merged=True")
        return ", ".join(parts)
