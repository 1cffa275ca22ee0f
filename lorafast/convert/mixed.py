"""``mixed``: a batch of which each element has an adapter of its own, or none."""

import contextlib
import difflib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lorafast.convert.kinds import has_peft_adapter
from lorafast.nn import AdapterLayer, inactive
from lorafast.nn.adapter_module import AdapterModule, adapters_in
from lorafast.nn.rows import Rows


@contextlib.contextmanager
def mixed(
    model: nn.Module, names: Sequence[str | None], *, base_grad: bool = True
) -> Iterator[nn.Module]:
    """Within the block element i of a batch has the adapter ``names[i]``, or none where that is None.

        rows = ["default"] * n + [None] * n
        with lorafast.mixed(model, rows, base_grad=False):
            policy, reference = model(torch.cat([tokens, tokens])).chunk(2)

    One forward gives the log-probabilities of a policy and of its reference: FSDP gathers, and the GPU
    reads, each frozen weight once. What an element gets is what it would get alone, to rounding: those
    without an adapter what ``disabled`` gives, computed in a batch of another size. These meet no number
    of an adapter's, be it infinite or NaN. Adapters' gradients come from their own elements alone.

    Elements are those of the first dimension of what an adapted module is called with; a linear layer's
    input has two dimensions or more. Fast, one product with W for all: LoRA over linear layers,
    quantized too, where the elements of the one adapter are neighbours, or without dropout; in eager
    code outside autocast. DoRA, embeddings, convolutions and bottlenecks, and all else under autocast
    and compiled, compute their elements and the others in two calls. Modules that are trained whole
    (a head, norms) have no names: all elements go through them.

    Within the block the active adapter stays the one that it is. As for ``disabled``, run the backward
    inside too where a forward inside is checkpointed, and the block holds in all threads.

    Args:
        model: adapted by ``adapt``, or a model of PEFT's with LoRA, whose own layers then get
            ``adapter_names`` (in training too, where PEFT's models refuse them).
        names: one for each element. Names beside that of the active adapter are for LoRA over linear
            layers.
        base_grad: whether gradients pass the elements that have no adapter. False makes them constants:
            what a reference model's are. Their backward is then left out of linear layers. PEFT's
            models have no such choice.

    Yields:
        ``model``.

    Raises:
        ValueError: the model has no adapters or none of such a name, an adapted module can't carry them
            (merged, attention, DoRA and other kinds under a second name), or there is a block around
            it. In a forward: a batch of another size. The model is unchanged.
        TypeError: ``names`` is not a sequence of names and None.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names is a {type(names).__name__}, expected a sequence of names and None")
    for i, name in enumerate(names):
        if name is not None and not isinstance(name, str):
            raise TypeError(f"names holds {name!r} at {i}, expected a name or None")
    if not names:
        raise ValueError("names is empty, expected one for each element of a batch")
    rows = Rows(names, constants=not base_grad)
    ours = adapters_in(model)
    theirs = [m for m in model.modules() if has_peft_adapter(m)]
    if not ours and not theirs:
        raise ValueError("the model has no adapter: there is none to name")
    for place, one in ours.items():
        reason = _why_not(one, rows)
        if reason is not None:
            raise ValueError(f"{place or 'the model'} can't be mixed: {reason}")
    with contextlib.ExitStack() as stack:
        for layer in theirs:
            stack.enter_context(_named_in_peft(layer, rows))
        try:
            for one in ours.values():
                one.mix(rows)
            yield model
        finally:
            for one in ours.values():
                one.mix(None)


def _why_not(one: AdapterModule, rows: Rows) -> str | None:
    """Why a module can't carry the names, or None."""
    if one._rows is not None:
        return "there is a block of mixed around this one"
    if one.merged:
        return "it is merged: call unmerge before"
    if not one.has_rows:
        return "it is attention, of which a batch has one adapter"
    known = inactive.names_of(one) if isinstance(one, AdapterLayer) else [inactive.FIRST]
    for name in rows.used:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f": did you mean {near[0]!r}?" if near else f", but {', '.join(map(repr, known))}"
            )
            return f"it has no adapter {name!r}{hint}"
    if len(rows.used) > 1 or rows.used[:1] not in ([], known[:1]):
        dora = any(_is_dora(one, name) for name in rows.used)
        if not one.has_several or dora:
            return "but for LoRA over linear layers, elements have the active adapter or none"
    return None


def _is_dora(layer: Any, name: str) -> bool:
    if name == layer._adapter_name:
        return bool(layer._use_dora)
    return bool(inactive.waiting(layer)[name].settings["_use_dora"])


class _Names:
    """A forward pre-hook: the call gets ``adapter_names``."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "adapter_names": self.names}


@contextlib.contextmanager
def _named_in_peft(layer: Any, rows: Rows) -> Iterator[None]:
    """Within the block the layer is called with ``adapter_names``."""
    lora = sys.modules.get("peft.tuners.lora")
    if lora is None or not isinstance(layer, lora.LoraLayer):
        raise ValueError(
            f"the model has a {type(layer).__module__}.{type(layer).__name__}: of PEFT's kinds LoRA "
            "alone has mixed batches"
        )
    if rows.constants:
        raise ValueError("base_grad is False, and a PEFT model passes gradients for every element")
    known = sorted(layer._get_available_adapters())
    for name in rows.used:
        if name not in known:
            raise ValueError(f"a layer of PEFT's has no adapter {name!r}, but {', '.join(known)}")
    names = ["__base__" if name is None else name for name in rows.names]

    if any(isinstance(hook, _Names) for hook in layer._forward_pre_hooks.values()):
        raise ValueError("there is a block of mixed around this one")
    handle = layer.register_forward_pre_hook(_Names(names), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
