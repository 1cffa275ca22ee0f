"""``LoRAConv1d``, ``LoRAConv2d`` and ``LoRAConv3d``: a frozen convolution with a low-rank adapter."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafast.core.context import without_autocast
from lorafast.functional import filter_norm, lora_conv
from lorafast.nn import offload
from lorafast.nn.adaptable import why_not_convolution
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.checks import check_dtype, check_probability
from lorafast.nn.scripted import ScriptedDoRAConv, ScriptedLoRAConv
from lorafast.nn.sharded import draw_
from lorafast.ops.unstrided import is_sharded

# For torch.fx a call is one node, as one of a convolution is.
torch.fx.wrap("lora_conv")


class LoRAConv(AdapterLayer):
    """What the convolutions of one, two and three dimensions share: see ``LoRAConv2d``."""

    peft_names: ClassVar = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude": "lora_magnitude_vector.weight",
    }
    watched_parameter = "lora_B"
    operation = "lora_conv"
    served_by = (
        "PyTorch's convolutions, but a 1 x 1 one of channels-last images is the operation lora_linear, "
        "that with A of float32 channels-last images on a CPU with AVX-512 may be native, and ds and dB "
        "of channels-last or 16-bit ones without groups are expand_backward, of the backends that serve "
        "those"
    )
    stock: ClassVar[Any] = nn.Conv2d
    """The plain layer of as many dimensions."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        r: int,
        *,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype)
        plain = self.stock(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        reason = self.why_not_adaptable(plain)
        if reason is not None:
            raise ValueError(f"the convolution can't have an adapter: {reason}")
        self._build(
            plain, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, use_dora=use_dora,
            adapter_dtype=adapter_dtype,
        )  # fmt: skip
        self._carry(plain)

    @classmethod
    def why_not_adaptable(cls, plain: nn.Module) -> str | None:
        """The reason for which ``plain`` can't become a ``LoRAConv``, or None if it can."""
        return why_not_convolution(plain, cls.taken_names())

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRAConv":
        """Wraps ``conv``: takes over its parameters (no copy), its hooks, its mode and all it holds.

        The parameters are the same objects, and are frozen. Merging gives back a layer of its class.
        Arguments as for the class.

        Raises:
            TypeError: ``conv`` is not a plain ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, or has
                other dimensions than the class, pads or dilates otherwise than an adapter of PEFT's
                does, has what would be lost, or a dtype is not one of float16, bfloat16, float32 and
                float64. ``conv`` is unchanged.
            ValueError: another argument doesn't fit: r is no multiple of its groups, DoRA is asked for
                over groups. ``conv`` is unchanged.
        """
        reason = cls.why_not_adaptable(conv)
        if reason is not None:
            raise TypeError(f"conv can't be adapted: {reason}")
        kinds = LoRAConv1d, LoRAConv2d, LoRAConv3d
        of_stock = next(kind for kind in kinds if isinstance(conv, kind.stock))
        if issubclass(cls, kinds) and not issubclass(cls, of_stock):
            raise TypeError(
                f"conv can't be adapted: it is a {type(conv).__name__}, expected an "
                f"nn.{cls.stock.__name__} for a {cls.__name__}"
            )
        made = cls if issubclass(cls, of_stock) else of_stock
        return made._around(
            conv, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, use_dora=use_dora,
            adapter_dtype=adapter_dtype,
        )  # fmt: skip

    @classmethod
    def of_plain(cls, plain: nn.Module, r: int, **options: Any) -> "LoRAConv":
        """``from_conv``."""
        return cls.from_conv(plain, r, **options)

    @classmethod
    def shapes_over(
        cls, layer: Any, sizes: tuple[int, int], r: int, use_dora: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """``lora_A [r, C, *kernel]``, ``lora_B [N, r / groups, 1, …]``, of DoRA ``lora_magnitude
        [1, N, 1, …]``: PEFT's shapes."""
        C, N = sizes
        ones = (1,) * (layer.weight.dim() - 2)
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (r, C, *layer.weight.shape[2:]),
            "lora_B": (N, r // layer.groups, *ones),
        }
        return shapes | {"lora_magnitude": (1, N, *ones)} if use_dora else shapes

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
        self.groups = plain.groups  # its shapes take it, before all else is carried
        self._set(plain.in_channels, plain.out_channels, r, alpha, use_rslora, use_dora)
        self.dropout = check_probability("dropout", dropout)
        if r % plain.groups:
            raise ValueError(f"r is {r}, expected a multiple of the groups of {plain}")
        if use_dora and plain.groups > 1:
            raise ValueError(
                f"use_dora is True, expected False for {plain}: B·A is no change of a weight in groups"
            )
        self.weight, self.bias = plain.weight, plain.bias
        self._add_adapter(self.weight.dtype, offload.device_of(plain, self.weight), adapter_dtype)

    def reset_adapter(self) -> None:
        """Draws ``lora_A`` anew (Kaiming-uniform, ``a = sqrt(5)``) and sets ``lora_B`` to zero.

        ``lora_magnitude`` becomes what the norms of the filters are then.
        """
        draw_(nn.init.kaiming_uniform_, self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self._reset_magnitude()

    def _weight_norm(self) -> Tensor:
        with without_autocast(self.lora_A):
            norm = filter_norm(self.weight, self.lora_A, self.lora_B, self._scaling)
        return norm.view(self.adapter_shapes()["lora_magnitude"])

    def reset_parameters(self) -> None:
        """Draws all parameters anew, the frozen ones as PyTorch's convolutions do."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in = self.weight[0].numel()
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in_channels, *size]`` → ``[batch, out_channels, *size of y]``, batch or not."""
        if self._off:
            return self.base_forward(x)
        if self._rows is not None:
            if x.dim() != self.weight.dim():
                raise ValueError(
                    f"x has shape {list(x.shape)}, without a batch, in a block of mixed, which names "
                    "adapters for the elements of one"
                )
            return self._rows.by_parts((x,), self.forward_active, self.base_forward)
        if self.merged:
            return self._forward_merged(x)
        return self.forward_active(x)

    def forward_active(self, x: Tensor) -> Tensor:
        """What the active adapter gives, for all rows."""
        return lora_conv(
            x, self.weight, self.lora_A, self.lora_B, self._scaling, self.bias, stride=self.stride,
            padding=self.padding, dilation=self.dilation, groups=self.groups,
            magnitude=self.lora_magnitude if self._use_dora else None, dropout_p=self.dropout,
            training=self.training,
            norm_of=self._norm_of(x, filter_norm) if self._use_dora else None,
        )  # fmt: skip

    def _forward_merged(self, x: Tensor) -> Tensor:
        weight: Any = self._merged_weight
        if is_sharded(weight) and not is_sharded(x):
            # FSDP makes the layer's own parameters whole in its forward.
            weight = weight.full_tensor()
        convolve: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
        y: Tensor = convolve(
            x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return y

    def example_input(self, rows: int) -> Tensor:
        """``[rows, in_channels, *size]`` zeros of one window each, where a forward has its input."""
        size = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        device = offload.device_of(self, self.weight)
        return torch.zeros((rows, self.in_features, *size), dtype=self.weight.dtype, device=device)

    def summary_remark(self) -> str:
        """What it is, for ``summary``."""
        return "convolution, DoRA" if self._use_dora else "convolution"

    def peft_fields(self) -> dict[str, object]:
        """What PEFT's config says of such a layer, and once for all layers of a model."""
        return super().peft_fields() | {"lora_dropout": self.dropout}

    def _delta_weight(self) -> Tensor:
        """``[N, C, *kernel]``; over groups too, whose weight sees fewer channels."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        parts = A.flatten(1).unflatten(0, (self.groups, -1))  # [groups, r / groups, C · kernel]
        product = torch.bmm(B.flatten(1).unflatten(0, (self.groups, -1)), parts)
        return self._scaling * product.view(self.out_features, *A.shape[1:])

    def merged_weight(self) -> Tensor:
        """``W + scaling · B·A``, ``[N, C, *kernel]``, in the dtype and memory format of ``weight``.

        Of DoRA the filters of that have the norms ``lora_magnitude``.

        Raises:
            ValueError: there are no values, none that can be merged, or the convolution is in groups:
                A sees all channels, and a filter of W those of its group.
        """
        if self.groups > 1:
            raise ValueError(
                f"it is a convolution in {self.groups} groups, whose filters don't see all the channels "
                "that lora_A sees"
            )
        self._check_mergeable(
            self.weight, (self.out_features, self.in_features, *self.lora_A.shape[2:])
        )
        dims = tuple(range(1, self.weight.dim()))
        magnitude = self.lora_magnitude.transpose(0, 1) if self._use_dora else None
        return self._laid_out(self._with_delta(self.weight, dims, magnitude))

    def _laid_out(self, merged: Tensor) -> Tensor:
        if is_sharded(merged):
            return merged
        return torch.empty_like(self.weight).copy_(merged)

    def _fill(self, plain: nn.Module) -> None:
        plain.register_parameter("bias", self.bias)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this layer's place."""
        if self.merged:
            return self.to_plain()
        scripted = ScriptedDoRAConv(self) if self._use_dora else ScriptedLoRAConv(self)
        return scripted.train(self.training)

    def extra_repr(self) -> str:
        """The constructor's arguments, as in PyTorch's convolutions."""
        parts = [
            f"{self.in_features}, {self.out_features}",
            f"kernel_size={tuple(self.weight.shape[2:])}",
            f"r={self.r}",
            f"alpha={self.alpha:g}",
            f"stride={self.stride}",
        ]
        if isinstance(self.padding, str) or any(self.padding):
            parts.append(f"padding={self.padding!r}")
        if any(one != 1 for one in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        parts += [f"dropout={self.dropout:g}", f"bias={self.bias is not None}"]
        parts += [
            f"{name}=True"
            for name, value in (
                ("use_rslora", self.use_rslora), ("use_dora", self.use_dora), ("merged", self.merged)
            )
            if value
        ]  # fmt: skip
        return ", ".join(parts)


class LoRAConv1d(LoRAConv):
    """``LoRAConv2d`` in one dimension: ``[batch, C, length]``. GPT-2's ``Conv1D`` is a linear layer."""

    stock = nn.Conv1d
    _plain_class: type[nn.Module] = nn.Conv1d


class LoRAConv2d(LoRAConv):
    """``y = conv(x, W) + scaling · conv(conv(drop(x), A), B) + bias`` with W and bias frozen (Hu et al.,
    2021, over a kernel, as PEFT has it).

    Parameters: ``weight [out_channels, in_channels / groups, *kernel]`` and ``bias [out_channels]``
    (frozen), ``lora_A [r, in_channels, *kernel]`` and ``lora_B [out_channels, r / groups, 1, 1]``
    (trained). A has stride, padding and dilation of W and sees all channels; B is a product at each
    position. These four are the keys of its ``state_dict``; one of a plain ``nn.Conv2d`` loads as it
    is. In ``in_features`` and ``out_features`` it has the numbers of channels.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for
            ``nn.Conv2d``. It pads with zeros, and dilates only along axes where the kernel is 1: so
            PEFT does for A, whatever ``padding_mode`` and dilation W has.
        r: rank of the adapter, a positive multiple of ``groups``.
        alpha: ``scaling`` is ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski,
            2023); None stands for ``r``, a scaling of 1, where PEFT's default ``lora_alpha`` is 8.
        dropout: probability of dropping an element of ``x`` on its way into the adapter in training.
        use_rslora: see ``alpha``.
        use_dora: DoRA instead of LoRA: see below.
        device: where the parameters live.
        dtype: dtype of ``weight`` and ``bias``: float16, bfloat16, float32 or float64.
        adapter_dtype: dtype of the adapter. None means the dtype of ``weight``, but float32 if that is
            float16 or bfloat16.

    With ``use_dora`` it is DoRA (Liu et al., 2024), as in PEFT: ``y = m / ‖W + scaling · B·A‖ ⊙
    (conv(x, W) + scaling · conv(conv(x, A), B)) + bias``, with the norm of each filter, which has no
    gradient, and a fifth parameter, ``lora_magnitude [1, out_channels, 1, 1]``, which is m. It starts as
    those norms. For ``groups`` 1.

    ``lora_A`` starts Kaiming-uniform with ``a = sqrt(5)`` and ``lora_B`` zero, as in PEFT: a fresh
    adapter changes nothing. A convolution in groups can't be merged: A sees channels that a filter of W
    doesn't.

    Raises:
        TypeError, ValueError: an argument doesn't fit.
    """

    stock = nn.Conv2d
    _plain_class: type[nn.Module] = nn.Conv2d


class LoRAConv3d(LoRAConv):
    """``LoRAConv2d`` in three dimensions: ``[batch, C, depth, height, width]``."""

    stock = nn.Conv3d
    _plain_class: type[nn.Module] = nn.Conv3d
