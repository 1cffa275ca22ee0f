"""Registration of the operations with ``torch.library``, for ``torch.compile`` and everything that
traces. Eager code takes the shorter path in ``lora_linear``."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafast.kernels.common import counters

_LIBRARY = torch.library.Library("lorafast", "DEF")


# Private, but ten times as cheap as asking for the device of a tensor; without it every call asks.
_autocast_anywhere: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


# Private, but the one cheap question; without it the autograd.Function refuses transforms aloud.
transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; meta has none and can't be asked."""
    return (
        _autocast_anywhere()
        and isinstance(x, Tensor)
        and not x.is_meta
        and torch.is_autocast_enabled(x.device.type)
    )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside an operation dtypes are settled: autocast must not change them again."""
    if autocast_enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def register(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Defines ``lorafast::name``; the first argument of ``implementation`` is a tensor."""

    def kernel(x: Tensor, *arguments: Any) -> Any:
        with without_autocast(x), counters.fresh():
            return implementation(x, *arguments)

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafast::{name}", fake, lib=_LIBRARY)


def register_autograd(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Registers the backward of ``lorafast::name``."""
    torch.library.register_autograd(
        f"lorafast::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def differentiate_by_reference(name: str, reference: Callable[..., Any]) -> None:
    """The backward of ``lorafast::name`` is that of its reference, run again: right, any number of
    times, and not fast. ``lora_linear`` has a backward of its own and never comes here."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(i if isinstance(i, Tensor) else None for i in inputs))
        ctx.arguments = [None if isinstance(i, Tensor) else i for i in inputs]

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        inputs = [
            argument if tensor is None else tensor
            for tensor, argument in zip(ctx.saved_tensors, ctx.arguments, strict=True)
        ]
        needed = [i for i, needs in enumerate(ctx.needs_input_grad) if needs]
        if not again:
            for i in needed:
                inputs[i] = inputs[i].detach().requires_grad_()
        with torch.enable_grad():
            outputs = reference(*inputs)
        found = torch.autograd.grad(
            outputs, [inputs[i] for i in needed], gradients, create_graph=again, allow_unused=True
        )
        result: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(needed, found, strict=True):
            result[i] = gradient
        return tuple(result)

    register_autograd(name, setup_context, backward)
