"""Registration of the operations with ``torch.library``, for ``torch.compile`` and everything that
traces. Eager code takes the shorter path in ``lora_linear``."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from lorafast.backends import forced
from lorafast.core.context import needs_plain_pytorch, watched, without_autocast
from lorafast.ops import flops

_LIBRARY = torch.library.Library("lorafast", "DEF")
_implementations: dict[str, Callable[..., Any]] = {}


def implementation_of(operation: Any) -> Callable[..., Any] | None:
    """What runs for an overload of ``torch.ops``, below autograd; None if it is not registered here.

    For modes that look inside an operation, which is one call to them.
    """
    namespace, _, name = operation._overloadpacket._qualified_op_name.partition("::")
    return _implementations.get(name) if namespace == "lorafast" else None


def register(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Defines ``lorafast::name``; the first argument of ``implementation`` is a tensor."""

    def kernel(x: Tensor, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, (x, *arguments))
        with without_autocast(x):
            return implementation(x, *arguments)

    _implementations[name] = kernel
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafast::{name}", fake, lib=_LIBRARY)


def _refuse_tangents(name: str, arguments: Iterable[Any]) -> None:
    """Below autograd a tangent would be lost without a word."""
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"torch.ops.lorafast.{name} has no forward-mode derivative: begin forward mode before "
                "the forward, outside compiled code, and call lorafast.functional or lorafast.ops"
            )


def runner(
    name: str, reference: Callable[..., Any], check: Callable[..., object]
) -> Callable[..., Any]:
    """``torch.ops.lorafast.name``, or on checked arguments its reference where only operations that
    PyTorch differentiates itself will do."""
    operation = getattr(torch.ops.lorafast, name)

    def run(*arguments: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        reason = needs_plain_pytorch(compiling)
        if reason is None:
            if not compiling and watched():
                flops.tell_counters()
            return operation(*arguments)
        forced.check_plain_pytorch(name, reason)
        check(*arguments)
        return reference(*arguments)

    return run


def register_autograd(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Registers the backward of ``lorafast::name``."""
    torch.library.register_autograd(
        f"lorafast::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def pass_no_gradient(name: str) -> None:
    """What ``lorafast::name`` returns requires none, whatever its arguments do."""
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def differentiate_by_reference(name: str, reference: Callable[..., Any]) -> None:
    """The backward of ``lorafast::name`` is that of its reference, run again: right, any number of
    times, and not fast. ``lora_linear`` has a backward of its own and never comes here."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.structure = tree_flatten(inputs)  # a weight is a list of tensors
        ctx.save_for_backward(*(i if isinstance(i, Tensor) else None for i in leaves))
        ctx.arguments = [None if isinstance(i, Tensor) else i for i in leaves]

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()
        leaves = [
            argument if tensor is None else tensor
            for tensor, argument in zip(ctx.saved_tensors, ctx.arguments, strict=True)
        ]
        # PyTorch leaves out trailing arguments that have their default.
        needs, structure = tree_flatten(ctx.needs_input_grad)
        needed = [i for i, need in enumerate(needs) if need]
        if not again:
            for i in needed:
                leaves[i] = leaves[i].detach().requires_grad_()
        with torch.enable_grad():
            outputs = reference(*tree_unflatten(leaves, ctx.structure))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            [leaves[i] for i in needed],
            [dy for _, dy in pairs],
            create_graph=again,
            allow_unused=True,
        )
        result: list[Tensor | None] = [None] * len(needs)
        for i, gradient in zip(needed, found, strict=True):
            result[i] = gradient
        return tuple(tree_unflatten(result, structure))

    register_autograd(name, setup_context, backward)
