"""``AdapterLayer``: the base class of frozen layers with an adapter, of every kind."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lorafast.core.dtypes import LEAST_NORM
from lorafast.nn import inactive, offload
from lorafast.nn.adapter_module import AdapterModule
from lorafast.nn.checks import (
    check_alpha,
    check_bool,
    check_dtype,
    check_mergeable,
    check_rank,
    count,
)
from lorafast.nn.plain import carry, move_hooks, why_not_its_forward
from lorafast.nn.rows import Rows
from lorafast.nn.sharded import beside, placed_as
from lorafast.nn.siblings import Siblings
from lorafast.ops import kept_norm
from lorafast.ops.kept_norm import NormOf
from lorafast.ops.siblings import Sibling

_HALF = (torch.float16, torch.bfloat16)
_PROPERTIES = ("r", "alpha", "scaling", "use_rslora")
Layer = TypeVar("Layer", bound="AdapterLayer")


class AdapterLayer(AdapterModule):
    """A frozen layer with an adapter of rank ``r``, in the place of the plain layer that it wraps.

    Its frozen tensors and its adapter's are its own parameters and buffers. A kind of adapter is a
    subclass: it says which parameters its adapter has (``shapes_of``) and what PEFT calls them
    (``peft_names``), draws them (``reset_adapter``), computes (``forward``) and merges
    (``merged_weight``). A row of ``lorafast.convert.kinds`` then makes it known to ``adapt``,
    ``merge``, ``save_adapter`` and the rest.
    """

    peft_names: ClassVar[Mapping[str, str]] = {}
    """The parameters that an adapter may have, and the endings of their names in PEFT's files."""
    own_names: ClassVar[frozenset[str]] = frozenset(
        {
            "bias", "_merged_weight", "merged", "dropout", "_r", "_alpha", "_scaling", "_use_rslora",
            "_plain_class", "_stored_names", "_use_dora", "_aside", "_siblings", "_adapter_name",
            "inactive", "_off", "_off_blocks", "_rows", "_local", "_awaits_weight",
        }
    )  # fmt: skip
    """Names that it has on its instance and the plain layer doesn't get back, beside PyTorch's."""

    _build: Callable[..., None]
    """``_build(plain, r, **options)`` takes the frozen tensors of ``plain`` and adds an adapter."""
    _use_dora = False
    _adapter_name = inactive.FIRST
    """Which of several adapters is active: see ``lorafast.nn.inactive``."""
    _aside = False
    """Whether the forward is not the plain adapter's: off, merged, DoRA, of siblings, of rows."""
    init_lora_weights: str | None = None
    """How A and B began, where that took a part of W away (PiSSA, OLoRA, CorDA)."""
    shares_x: ClassVar[bool] = False
    """Whether its forward can share x with others' (``sibling``)."""
    _siblings: tuple[Siblings, int] | None = None
    """The layers that are called with the same x, and this one's place among them."""
    _awaits_weight = False
    """Whether it has left meta, and its frozen tensors have yet to be loaded."""
    lora_magnitude: nn.Parameter
    _merged_weight: Tensor | None
    _plain_class: type[nn.Module]
    weight_name: ClassVar[str] = "weight"
    """What the plain layer calls the weight that ``merged_weight`` is one of."""
    _stored_names: tuple[str, ...] = ("weight",)
    """Of the tensors that the frozen weight is stored in."""

    @classmethod
    def taken_names(cls) -> frozenset[str]:
        """Names that a plain layer can't have for something of its own."""
        return (
            frozenset(dir(cls))
            | cls.own_names
            | cls.peft_names.keys()
            | {"in_features", "out_features", "weight"}
            | vars(nn.Module()).keys()
        )

    @classmethod
    @abstractmethod
    def of_plain(
        cls,
        plain: nn.Module,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "AdapterLayer":
        """Wraps ``plain``: takes over its tensors (no copy), its hooks, its mode and all it holds.

        Raises:
            TypeError, ValueError: ``plain`` can't be adapted, or an argument doesn't fit. ``plain`` is
                unchanged.
        """

    @classmethod
    @abstractmethod
    def why_not_adaptable(cls, plain: nn.Module) -> str | None:
        """The reason for which ``of_plain`` refuses ``plain``, or None."""

    @staticmethod
    def shapes_of(
        in_features: int, out_features: int, r: int, use_dora: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """The adapter's parameters and their shapes, in the order of the ``state_dict``."""
        raise NotImplementedError("its shapes depend on more than two sizes: see shapes_over")

    @classmethod
    def shapes_over(
        cls, layer: nn.Module, sizes: tuple[int, int], r: int, use_dora: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """The same over a layer, plain or adapted, of these ``in_features`` and ``out_features``."""
        return cls.shapes_of(*sizes, r, use_dora)

    @abstractmethod
    def reset_adapter(self) -> None:
        """Draws the adapter anew, so that it changes nothing."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """The weight of the plain layer that computes the same, in the dtype of ``weight``.

        Raises:
            ValueError: there are no values, or none that can be merged.
        """

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the frozen layer computes, without the adapter, merged or not; arguments as for
        ``forward``."""
        return self._plain(getattr(self, self.weight_name))(*args, **kwargs)

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of this layer's adapter, and the shapes that they have unsharded."""
        sizes = (self.in_features, self.out_features)
        return self.shapes_over(self, sizes, self._r, self.use_dora)

    def adapter_parameters(self) -> dict[str, Tensor]:
        """The parameters of the adapter by name."""
        return {name: getattr(self, name) for name in self.adapter_shapes()}

    def frozen_tensors(self) -> dict[str, Tensor | None]:
        """The tensors that the frozen weight is stored in; None for one that is computed."""
        own = self._parameters | self._buffers
        return {name: own.get(name) for name in self._stored_names}

    def peft_fields(self) -> dict[str, object]:
        """What PEFT's config says of such a layer, and once for all layers of a model."""
        return {
            "use_rslora": self._use_rslora,
            "use_dora": self._use_dora,
            "init_lora_weights": self.init_lora_weights or True,
        }

    def summary_remark(self) -> str:
        """What ``summary`` says of the layer beside its numbers, if anything."""
        return "DoRA" if self._use_dora else ""

    def to_resize(self) -> tuple[nn.Module, Callable[[Any], None]]:
        """A plain layer with the frozen tensors of this one, for the model's own resizing, and what is
        to be called with it afterwards: this layer takes them back, and has as much of an adapter.

        Raises:
            ValueError: they can't be resized.
        """
        raise ValueError(f"a {type(self).__name__} can't be resized: merge it first")

    @classmethod
    def _around(cls: type[Layer], plain: nn.Module, r: int, **options: Any) -> Layer:
        """Takes the place of ``plain``, of which all fits that ``_build`` doesn't check."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(plain, r, **options)
        # Not before: until here an error leaves ``plain`` as it was.
        layer._carry(plain)
        move_hooks(plain, layer)
        offload.wrap(plain, layer)
        if offload.hooks_of(plain):
            layer._reset_magnitude()  # of a weight that the hook brings
        layer.training = plain.training
        return layer

    def _carry(self, plain: nn.Module) -> None:
        """Freezes the parameters of ``plain``, and takes what else it holds."""
        for frozen in plain.parameters(recurse=False):
            frozen.requires_grad_(False)
        carry(plain, self, but=self.own_names | self.peft_names.keys() | {*self._stored_names})

    def _set(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float | None,
        use_rslora: bool,
        use_dora: bool = False,
    ) -> None:
        self._use_dora = check_bool("use_dora", use_dora)
        self.in_features, self.out_features = in_features, out_features
        self._r = check_rank("r", r)
        self.set_scaling(r if alpha is None else alpha, use_rslora)
        self._set_merged(False)

    def _add_adapter(
        self, dtype: torch.dtype, device: torch.device, adapter_dtype: torch.dtype | None
    ) -> None:
        """A fresh one, for a weight of ``dtype``."""
        check_dtype("adapter_dtype", adapter_dtype)
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if dtype in _HALF else dtype
        # An inference tensor could never be trained.
        with torch.inference_mode(False):
            for name, shape in self.adapter_shapes().items():
                empty = torch.empty(shape, device=device, dtype=adapter_dtype)
                self.register_parameter(name, nn.Parameter(empty))
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

    @property
    def use_dora(self) -> bool:
        """Whether the adapter is DoRA's, with ``lora_magnitude``."""
        return self._use_dora

    def _divisor(self, use_rslora: bool) -> float:
        return math.sqrt(self._r) if use_rslora else self._r

    def set_scaling(self, alpha: float, use_rslora: bool = False) -> None:
        """Sets ``scaling`` to ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

        A merged layer is merged again.

        Raises:
            ValueError: ``alpha`` is not a finite number, or the layer can't be merged with it. The layer
                is unchanged, as after any other error.
            TypeError: ``use_rslora`` is neither True nor False.
        """
        alpha, use_rslora = check_alpha("alpha", alpha), check_bool("use_rslora", use_rslora)
        before = dict(vars(self))
        self._alpha, self._use_rslora = alpha, use_rslora
        self._scaling = alpha / self._divisor(use_rslora)
        if self.merged:
            try:
                self.merge()
            except BaseException:
                vars(self).update(before)
                raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of the time when these four were plain attributes.
        renamed = {f"_{name}": state[name] for name in _PROPERTIES if name in state}
        super().__setstate__({k: v for k, v in state.items() if k not in _PROPERTIES} | renamed)
        self.set_siblings(self._siblings)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B·A`` in the shape of the weight, in float32 (float64 if the adapter is)."""
        with offload.present(self):
            return self._delta_weight()

    @abstractmethod
    def _delta_weight(self) -> Tensor: ...

    def _check_mergeable(self, weight: Tensor, shape: tuple[int, ...]) -> None:
        for name, tensor in ({"weight": weight} | self.adapter_parameters()).items():
            check_mergeable(name, tensor)
        if weight.shape != shape:
            raise ValueError(
                f"its weight has shape {list(weight.shape)}, expected {list(shape)}: "
                "merge it unsharded"
            )

    def merge(self) -> None:
        """From now on computes with one weight, made once, as fast as a plain layer.

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
            self._merged_weight = self._laid_out(self.merged_weight())
        kept_norm.forget(self)
        self._set_merged(True)

    def _laid_out(self, merged: Tensor) -> Tensor:
        """The merged weight as a forward reads it fastest."""
        return merged.contiguous()

    def unmerge(self) -> None:
        """Undoes ``merge()``, exactly."""
        self._merged_weight = None
        kept_norm.forget(self)
        self._set_merged(False)

    def _set_merged(self, merged: bool) -> None:
        aside = (
            self._off
            or merged
            or self._use_dora
            or self._siblings is not None
            or self._rows is not None
        )
        # As an attribute each is set, without nn.Module's search for parameters.
        vars(self).update(merged=merged, _aside=aside)

    def switch(self, blocks: int) -> None:
        """One block of ``disabled`` more (1) that the adapter is off in, or one fewer (-1)."""
        super().switch(blocks)
        self._set_merged(self.merged)

    def mix(self, rows: Rows | None) -> None:
        """In a block of ``mixed``, or None: outside."""
        super().mix(rows)
        self._set_merged(self.merged)

    def set_siblings(self, siblings: tuple[Siblings, int] | None) -> None:
        """Lets it share x with others, if no other layer has its place among them, or with none."""
        if siblings is not None and not siblings[0].join(siblings[1], self):
            siblings = None
        self._siblings = siblings
        self._set_merged(self.merged)

    def sibling(self) -> Sibling | None:
        """Its tensors, where its forward can share x with others' as it is now."""
        return None

    def _with_delta(
        self, weight: Tensor, dim: int | tuple[int, ...], magnitude: Tensor | None = None
    ) -> Tensor:
        """``W + scaling · B·A`` in the dtype of ``weight``; of DoRA its norms over ``dim`` are m.

        ``magnitude``: m in the shape of those norms, where it isn't one ``dim`` that they lack.

        Raises:
            ValueError: an element of it is beyond that dtype.
        """
        # Of a layer that lorafast.parallel left whole W may be on FSDP's mesh alone, or on none.
        delta = beside(self._delta_weight(), weight)
        merged, formula = weight.to(delta.dtype) + delta, "W + scaling · B·A"
        if self._use_dora:
            if magnitude is None:
                assert isinstance(dim, int)
                magnitude = self.lora_magnitude.unsqueeze(dim)
            m = beside(magnitude, weight).to(merged.dtype)
            norm = torch.linalg.vector_norm(merged, dim=dim, keepdim=True)
            merged = m / norm.clamp_min(LEAST_NORM) * merged
            formula = f"m · ({formula}) / ‖…‖"
        return placed_as(self._rounded(merged, weight, formula), weight)

    @staticmethod
    def _rounded(merged: Tensor, weight: Tensor, formula: str) -> Tensor:
        """``merged`` in the dtype of ``weight``; ``ValueError`` if an element is beyond it."""
        merged = merged.to(weight.dtype)
        spoilt = count(weight.isfinite() & ~merged.isfinite())
        if spoilt:
            raise ValueError(
                f"{formula} is beyond {weight.dtype} in {spoilt} of {merged.numel()} elements"
            )
        return merged

    def _weight_norm(self) -> Tensor:
        """``‖W + scaling · B·A‖``, what DoRA divides by, ``[out_features]``."""
        raise NotImplementedError(f"a {type(self).__name__} has no DoRA")

    def _norm_of(self, x: Tensor, compute: NormOf) -> NormOf | None:
        """What takes DoRA's norm in a forward of ``x``, if it is kept; None if ``compute`` does."""
        # torch.fx has something else in the place of x, and compiled code keeps nothing.
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return None
        if self.training:
            kept_norm.mark_trained(self)
            return None
        adapter = [self._parameters.get(n) for n in self.peft_names if n != "lora_magnitude"]
        return kept_norm.keeping(self, [*self.frozen_tensors().values(), *adapter], compute)

    def train(self: Layer, mode: bool = True) -> Layer:
        """As of any module; DoRA's norm is taken anew after it, and after ``eval()``."""
        kept_norm.forget(self)
        return super().train(mode)

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        """Sets ``lora_magnitude`` to the norms that there are, which makes the layer LoRA's."""
        if not self._use_dora:
            return
        with offload.present(self):
            if not any(t is not None and t.is_meta for t in self.frozen_tensors().values()):
                self.lora_magnitude.copy_(placed_as(self._weight_norm(), self.lora_magnitude))

    def to_plain(self) -> nn.Module:
        """A plain layer of the merged weight; this layer stays as it is.

        It is of the class that was wrapped. The weight is new, and sharded if this layer's is; the
        bias and whatever else a subclass had are shared. No parameter that was frozen requires a
        gradient. It has no hooks; ``lorafast.merge`` moves those.

        Raises:
            ValueError: as for ``merge()``, or ``forward`` was replaced on this instance.
        """
        reason = why_not_its_forward(self, type(self))
        if reason is not None:
            raise ValueError(reason)
        with torch.inference_mode(False), torch.no_grad(), offload.present(self):
            return self._plain(nn.Parameter(self._plain_weight(), requires_grad=False))

    def _plain(self, weight: Tensor, fill: Callable[[nn.Module], None] | None = None) -> nn.Module:
        """A plain layer of this weight, of the class that was wrapped, with all else that it had.

        ``fill`` does what ``_fill`` does, where it isn't that.
        """
        plain = self._plain_class.__new__(self._plain_class)
        nn.Module.__init__(plain)
        setattr(plain, self.weight_name, weight)
        (fill or self._fill)(plain)
        but = self.own_names | self.peft_names.keys() | {"parametrizations", *self._stored_names}
        carry(self, plain, but=but)
        plain.training = self.training
        return plain

    def _plain_weight(self) -> Tensor:
        """The merged weight as the plain layer keeps it."""
        return self.merged_weight()

    def _fill(self, plain: nn.Module) -> None:
        """Gives the plain layer what it has beside its weight and what is carried."""

    def _apply(self: Layer, fn: Any, recurse: bool = True) -> Layer:
        kept_norm.forget(self)
        was_meta = self._adapter_is_meta()
        super()._apply(fn, recurse)
        if was_meta and not self._adapter_is_meta():
            # to_empty(): a checkpoint of the plain layer, loaded next, leaves the adapter alone.
            self._of_each(type(self).reset_adapter)
            self._of_each(type(self)._unset_magnitude)
            self._awaits_weight = True
        return self

    def _of_each(self: Layer, call: Callable[[Layer], None]) -> None:
        """``call(self)`` with each of its adapters as the active one."""
        call(self)
        for name in [*inactive.waiting(self)]:
            with inactive.shown(self, name):
                call(self)

    def _adapter_is_meta(self) -> bool:
        tensors = [self._parameters.get(name) for name in self.adapter_shapes()]
        return all(tensor is not None and tensor.is_meta for tensor in tensors)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        inactive.describe_active(self, destination, prefix)

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
        kept_norm.forget(self)
        inactive.follow(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        adapter = [prefix + name for name in self.adapter_shapes()]
        # A checkpoint of the plain layer has none of them; some without the others are a broken one.
        whole = all(prefix + name in state_dict for name in self._stored_names)
        plain = whole and all(key not in state_dict for key in adapter)
        if plain:
            for key in adapter:
                if key in missing_keys:  # not there if a parametrization computes it
                    missing_keys.remove(key)
            self._of_each(type(self)._plain_loaded)
        if whole and self._awaits_weight:
            # set_model_state_dict passes a layer's own tensors for those that a checkpoint lacks.
            self._of_each(type(self)._fill_in_magnitude)
            self._awaits_weight = False
        self._of_each(type(self)._follow_weight)
        for held in inactive.waiting(self).values():
            held.may_be_missing = plain
        if self.merged:
            try:
                self.merge()
            except ValueError as error:
                self.unmerge()
                error_msgs.append(f"{prefix[:-1] or 'the layer'} can't be merged again: {error}")
            except BaseException:
                self.unmerge()
                raise

    @torch.no_grad()
    def _unset_magnitude(self) -> None:
        """NaN until the frozen tensors have values."""
        if self._use_dora:
            self.lora_magnitude.fill_(float("nan"))

    def _fill_in_magnitude(self) -> None:
        if self._use_dora and count(self.lora_magnitude.isnan()):
            self._reset_magnitude()

    def _plain_loaded(self) -> None:
        """A checkpoint of the plain layer has replaced the frozen tensors alone."""
        zero = getattr(self, self.watched_parameter)
        if self._use_dora and not zero.is_meta and count(zero != 0) == 0:
            self._reset_magnitude()

    def _follow_weight(self) -> None:
        """Gives an adapter that is on meta without its weight memory, and the values of a fresh one."""
        weight = next(iter(self.frozen_tensors().values()))
        if weight is None or weight.is_meta or not self._adapter_is_meta():
            return
        with torch.inference_mode(False):
            for name in self.adapter_shapes():
                tensor = self._parameters[name]
                assert tensor is not None
                empty = torch.empty_like(tensor, device=weight.device)
                self._parameters[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        self.reset_adapter()


def resized(old: nn.Parameter, dim: int, size: int) -> nn.Parameter:
    """``old`` with ``size`` rows or columns, added ones zero; it is trained where ``old`` is."""
    shape = list(old.shape)
    shape[dim] = size
    kept = min(size, old.shape[dim])
    with torch.no_grad():
        made = old.new_zeros(shape)
        made.narrow(dim, 0, kept).copy_(old.narrow(dim, 0, kept))
    return nn.Parameter(made, requires_grad=old.requires_grad)
