"""``adapt``: layers of a model become adapted ones, in place."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorafast.convert import bottlenecks, checkpointing, encoders, siblings
from lorafast.convert import targets as _targets
from lorafast.convert.all_or_nothing import all_or_nothing
from lorafast.convert.checkpointing import let_gradients_through
from lorafast.convert.first_backward import watch
from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.initialization import check_start, start
from lorafast.convert.kinds import adapted_layers, adapter_parameters, kind_of_layer
from lorafast.convert.left_out import large_share
from lorafast.convert.resizing import let_embeddings_resize
from lorafast.convert.save_pretrained import save_adapters_too
from lorafast.convert.targets import ALL_LINEAR, Pattern
from lorafast.nn import AdapterLayer
from lorafast.nn.bottleneck import Bottleneck, put_at, take_away

_RANK = 16


def adapt(
    model: nn.Module,
    r: int = _RANK,
    targets: Pattern = ALL_LINEAR,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    exclude: Pattern | None = None,
    freeze: bool = True,
    adapter_dtype: torch.dtype | None = None,
    fuse: str | None = None,
    init_lora_weights: str | bool | None = None,
    kind: str = "lora",
    bottleneck: int | None = None,
    reduction_factor: float | None = None,
    activation: str | None = None,
    scaling: float | None = None,
    layer_norm: bool = False,
    init: str = "zero",
) -> nn.Module:
    """Replaces layers of ``model`` by adapted ones that share their weights.

    A linear layer becomes a ``LoRALinear``. What ``targets`` names by itself becomes a
    ``LoRAEmbedding``, a ``LoRAConv2d`` and so on, or a ``LoRAMultiheadAttention``.

    A warning after the first backward names LoRA adapters that got no gradient where others did.
    Reentrant checkpointing trains the adapters of Transformers' models; one of your own must give it an
    input that requires a gradient, or be checkpointed with ``use_reentrant=False``.

    With ``kind="houlsby"``, ``"pfeiffer"`` or ``"parallel"`` no layer is replaced: a bottleneck adapter
    (``nn.Bottleneck``) stands at the output of modules, ``y + scaling · (f(y·Dᵀ + d)·Uᵀ + u)``, or, of
    ``"parallel"``, beside them, ``module(h) + scaling · (f(h·Dᵀ + d)·Uᵀ + u)``. ``remove_bottlenecks``
    takes them away, ``disabled`` switches them off.

    Args:
        model: any module; changed in place. If it is itself a layer to adapt, use what is returned.
        r: rank.
        targets: ``"all-linear"`` (every ``nn.Linear``, GPT-2's ``Conv1D``, each layer that a format of
            ``lorafast.operands`` claims, but those of a Transformers model's output head or
            classifier), a list of names (a layer's full name or its ending, as
            PEFT's ``target_modules``), or a string, a regex that must match the full name.
        alpha: ``scaling`` is ``alpha / r`` (with ``use_rslora`` ``alpha / sqrt(r)``). None is ``r``: a
            scaling of 1, where PEFT's default, ``lora_alpha=8``, gives 0.5 at r = 16.
        dropout: probability of dropping an element of a linear layer's input to the adapter.
        use_rslora: see ``alpha``.
        use_dora: DoRA (Liu et al., 2024) instead of LoRA: see ``LoRALinear``.
        exclude: layers to leave out, given like ``targets``. A layer that has two names is selected,
            or left out, by either.
        freeze: freeze every other parameter of the model too; adapters it has already stay trainable.
        adapter_dtype: as for ``LoRALinear``.
        fuse: ``"siblings"`` lets LoRA layers that a module calls with the same x (q, k and v; gate and
            up) share one pass over x in the forward and one in the backward, and one gradient of x that
            all add to: see ``docs/guide.md``. ``lorafast.restore(model)`` undoes it. A warning says so
            if no layer of the model has siblings.
        init_lora_weights: how A and B begin, as PEFT's numbers have it: None or True (A drawn, B zero),
            ``"pissa"`` (Meng et al., 2024: the largest singular values of W; ``alpha`` must be above
            0), ``"pissa_niter_<n>"`` (the same by n steps of a randomised decomposition, with PEFT's
            numbers only from the same state of PyTorch's generator), ``"olora"`` (Büyükakyüz, 2024:
            the QR decomposition of W). The last ones are of dense linear layers, and take
            ``scaling·B·A`` away from W: the layer keeps what is left as its weight, and until all
            are made the model's own weights are held beside. Saved adapters name it, and load where
            the same was done. EVA and CorDA begin from data: ``initialize_eva``, ``initialize_corda``.
        kind: ``"lora"``, ``"houlsby"`` (Houlsby et al., 2019: after attention and after the MLP, before
            their residual sums), ``"pfeiffer"`` (Pfeiffer et al., 2021: after the MLP alone; where
            Houlsby's is, while AdapterHub's ``seq_bn`` reads what LayerNorm makes of the sum) or
            ``"parallel"`` (He et al., 2022: beside the MLP). Of these three ``targets`` names any
            modules; without it they are found in the blocks of BERT, RoBERTa, Llama, Mistral, GPT-2
            and ViT. What follows are their arguments; ``r``, ``alpha``, ``dropout``, ``use_rslora``,
            ``use_dora`` and ``fuse`` are LoRA's.
        bottleneck: b, the width between D and U.
        reduction_factor: b as a part of the input's width: 16, of ``"parallel"`` 2, as in AdapterHub.
        activation: f, a name of ``functional.bottleneck``: ``"silu"`` of ``"houlsby"``, else ``"relu"``.
        scaling: 1, of ``"parallel"`` 4.
        layer_norm: whether a LayerNorm stands before D.
        init: ``"zero"``: the model computes what it did; ``"bert"``: nearly so (D and U normal).

    Returns:
        ``model``.

    Raises:
        ValueError: a name or regex matches no layer, the model has PEFT's adapters (which
            ``accelerate`` is for), or ``r``, ``alpha``, ``dropout``, ``fuse`` or ``init_lora_weights``
            doesn't fit. The model is unchanged.
        TypeError: a layer that was asked for can't be adapted, or FSDP has sharded it. The model is
            unchanged. With ``"all-linear"`` a layer that can't be adapted is left as it is, and a
            warning names it, as it does convolutions and stacked experts that hold a quarter of the
            parameters or more.
    """
    if init_lora_weights is True:  # PEFT's name of the default
        init_lora_weights = None
    if fuse not in (None, "siblings"):
        raise ValueError(f"fuse is {fuse!r}, expected 'siblings' or None")
    of_bottlenecks = {
        "bottleneck": bottleneck, "reduction_factor": reduction_factor, "activation": activation,
        "scaling": scaling, "layer_norm": layer_norm or None, "init": None if init == "zero" else init,
    }  # fmt: skip
    if kind != "lora":
        of_lora = {
            "r": None if r == _RANK else r, "alpha": alpha, "dropout": dropout or None, "fuse": fuse,
            "use_rslora": use_rslora or None, "use_dora": use_dora or None,
            "init_lora_weights": init_lora_weights,
        }  # fmt: skip
        _refuse_others(kind, of_lora)
        return _with_bottlenecks(
            model, kind, targets, bottleneck=bottleneck, reduction_factor=reduction_factor,
            activation=activation, scaling=scaling, layer_norm=layer_norm, init=init, exclude=exclude,
            adapter_dtype=adapter_dtype, freeze=freeze,
        )  # fmt: skip
    _refuse_others(kind, of_bottlenecks)
    inner = _targets.unwrapped(model)
    layers: dict[str, AdapterLayer] = {}
    found = _targets.find(inner, targets, exclude)
    sharded = name_of_sharded(inner, found)
    if sharded is not None:
        raise TypeError(
            f"{sharded} is sharded by FSDP, expected a whole model: adapt it before that"
        )
    begin = None if init_lora_weights is None else check_start(init_lora_weights, found, r, alpha)
    with all_or_nothing(inner) as undo:
        for plain, names in found.items():
            layer = undo.made[plain] = kind_of_layer(plain).layer.of_plain(
                plain,
                r,
                alpha=alpha,
                dropout=dropout,
                use_rslora=use_rslora,
                use_dora=use_dora,
                adapter_dtype=adapter_dtype,
            )
            if begin is not None:
                start(layer, begin)
            layers |= dict.fromkeys(names, layer)
        if freeze:
            freeze_base(inner)
        undo.replaced = {name: inner.get_submodule(name) for name in layers}
        adapted = put_in_place(inner, layers)
    if targets == ALL_LINEAR:
        sentence = large_share(adapted)
        if sentence is not None:
            warnings.warn(sentence, stacklevel=2)
    if fuse is not None:
        siblings.fuse(adapted)
        if not siblings.has_siblings(adapted):
            warnings.warn(siblings.NONE_FOUND, stacklevel=2)
    return model if adapted is inner else adapted


def _refuse_others(kind: str, others: Mapping[str, object]) -> None:
    """Arguments of other kinds, None where they have their default."""
    kinds = ("lora", *bottlenecks.KINDS)
    if kind not in kinds:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(kinds)}")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}, which adapters of the kind {kind!r} don't have")


def _with_bottlenecks(
    model: nn.Module, kind: str, targets: Pattern, *, freeze: bool, **arguments: Any
) -> nn.Module:
    inner = _targets.unwrapped(model)
    made = bottlenecks.make_bottlenecks(inner, kind, targets, **arguments)
    with all_or_nothing(inner):
        put_bottlenecks(inner, made, freeze)
    return model


def put_bottlenecks(
    model: nn.Module, made: Mapping[nn.Module, Bottleneck], freeze: bool = True
) -> None:
    """Puts bottlenecks at their modules and makes sure that the model calls and trains them.

    Where it fails none is there, and the caller undoes the rest (``all_or_nothing``).
    """
    try:
        for module, one in made.items():
            put_at(module, one)
        if freeze:
            freeze_base(model)
        save_adapters_too(model)
        encoders.avoid_fused(model, lambda module: bool(bottlenecks.bottlenecks(module)))
        let_gradients_through(model)
        watch(model)
    except BaseException:
        for module in made:
            take_away(module)
        if not adapter_parameters(model):
            checkpointing.undo(model)
        raise


def freeze_base(model: nn.Module) -> None:
    """Freezes every parameter but those of adapters."""
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad = False  # a lazy parameter refuses requires_grad_()


def put_in_place(model: nn.Module, layers: dict[str, AdapterLayer]) -> nn.Module:
    """Puts adapted layers into the model and makes sure that the model calls them."""
    model = _targets.replace(model, dict(layers))
    save_adapters_too(model)
    encoders.avoid_fused(model, lambda module: bool(adapted_layers(module)))
    let_gradients_through(model)
    let_embeddings_resize(model)
    watch(model)
    return model
