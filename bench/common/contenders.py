"""Who is compared: each contender is a layer over the same frozen weight and adapter.

Add one by a function from the problem and its tensors to a ``Contender``, entered in ``BUILDERS``;
it raises ``UnavailableError`` where this machine can't run it. Over a quantized weight the frozen layer
has the same W dense, and PEFT adapts the layer of bitsandbytes over the same codes.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lorafast.bench.common import bitsandbytes
from lorafast.bench.common.problem import SCALING, Problem, Tensors
from torch import Tensor, nn

from lorafast.backends import forced, registry
from lorafast.backends.plan import Refusal
from lorafast.nn import LoRALinear
from lorafast.ops.problems import layer_problem, why_not
from lorafast.reference.dropout import survivor_scale

FROZEN = "frozen"
SIBLINGS = "lorafast-siblings"
"""Of whole models: ``adapt`` with ``fuse="siblings"``."""
FULL = "full"
"""Of whole models: every weight is trained."""


class UnavailableError(RuntimeError):
    """This machine can't run the contender; the message says why."""


@dataclass
class Contender:
    """A layer to be timed: ``layer(x)``, within ``context()``.

    ``lora_A`` and ``lora_B`` are its own parameters (none on the frozen layer), ``survivor_scale``
    what it multiplies elements with that its dropout keeps.
    """

    name: str
    layer: Callable[[Tensor], Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    survivor_scale: float = 1.0

    def clear_gradients(self) -> None:
        """As after an optimizer's step: the next backward writes its gradients and adds to none."""
        for parameter in self.parameters.values():
            parameter.grad = None


Builder = Callable[[Problem, Tensors], Contender]


def linear(tensors: Tensors) -> nn.Linear:
    """The frozen layer; its parameters share the memory of ``tensors``."""
    N, K = tensors.weight.shape
    layer = nn.Linear(K, N, bias=tensors.bias is not None, device="meta")
    layer.weight = nn.Parameter(tensors.weight, requires_grad=False)
    if tensors.bias is not None:
        layer.bias = nn.Parameter(tensors.bias, requires_grad=False)
    return layer


def _frozen(problem: Problem, tensors: Tensors) -> Contender:
    return Contender(FROZEN, linear(tensors))


def _lora_linear(problem: Problem, tensors: Tensors) -> LoRALinear:
    options: dict[str, Any] = {
        "alpha": SCALING * problem.r,
        "dropout": problem.dropout_p,
        "adapter_dtype": tensors.lora_A.dtype,
        "use_dora": problem.use_dora,
    }
    if tensors.operand is None:
        layer = LoRALinear.from_linear(linear(tensors), problem.r, **options)
    else:
        layer = LoRALinear.from_operand(tensors.operand, problem.r, bias=tensors.bias, **options)
    with torch.no_grad():
        layer.lora_A.copy_(tensors.lora_A)
        layer.lora_B.copy_(tensors.lora_B)
    return layer.train()


def _lorafast(problem: Problem, tensors: Tensors, *, backend: str = registry.AUTO) -> Contender:
    if backend != registry.AUTO:
        reason = _why_not(backend, tensors)
        if reason is not None:
            raise UnavailableError(reason)
    layer = _lora_linear(problem, tensors)
    return Contender(
        "lorafast" if backend == registry.AUTO else backend,
        layer,
        dict(layer.adapter_parameters()),
        # Unforced, as a user calls it: a context manager more would count on a tiny layer.
        contextlib.nullcontext
        if backend == registry.AUTO
        else functools.partial(forced.use_backend, backend),
        survivor_scale(problem.dropout_p),
    )


def _why_not(backend: str, tensors: Tensors) -> str | None:
    if tensors.operand is None:
        return why_not(backend, tensors.weight)
    described = layer_problem(
        tensors.x[0], tensors.operand, tensors.lora_A, tensors.lora_B, tensors.bias, False, ("y",),
        layouts=True,
    )  # fmt: skip
    answer = registry.plan_of(backend, described)
    return answer.reason if isinstance(answer, Refusal) else None


def _packed(problem: Problem, tensors: Tensors) -> Contender:
    contender = _lorafast(problem, tensors)
    layer = contender.layer
    assert isinstance(layer, LoRALinear)

    def context() -> contextlib.AbstractContextManager[Any]:
        layer.pack_()  # again before every turn: the check writes to the weight
        return contextlib.nullcontext()

    try:
        context()
    except ValueError as error:
        raise UnavailableError(str(error)) from None
    contender.name = "lorafast-packed"
    contender.context = context
    return contender


def _peft(problem: Problem, tensors: Tensors) -> Contender:
    try:
        import peft
    except ImportError:
        raise UnavailableError("PEFT is not installed (pip install peft)") from None
    config = peft.LoraConfig(
        r=problem.r,
        lora_alpha=SCALING * problem.r,  # an int by its hint alone
        lora_dropout=problem.dropout_p,
        target_modules=["0"],
        use_dora=problem.use_dora,
    )
    # autocast_adapter_dtype makes float32 adapters; with it off they take the dtype of the weight.
    model = peft.get_peft_model(
        _peft_base(problem, tensors),
        config,
        autocast_adapter_dtype=tensors.lora_A.dtype != tensors.weight.dtype,
    )
    layer: Any = model.get_submodule("base_model.model.0").train()
    if tensors.operand is not None:  # whose dtype, that of codes, says nothing to PEFT
        layer.lora_A.to(tensors.lora_A.dtype)
        layer.lora_B.to(tensors.lora_B.dtype)
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if lora_A.dtype != tensors.lora_A.dtype:
        raise UnavailableError(f"PEFT makes {lora_A.dtype} adapters here")
    with torch.no_grad():
        lora_A.copy_(tensors.lora_A)
        lora_B.copy_(tensors.lora_B)
    return Contender(
        "peft",
        layer,
        {"lora_A": lora_A, "lora_B": lora_B},
        survivor_scale=1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0,
    )


def _peft_base(problem: Problem, tensors: Tensors) -> nn.Module:
    """A model of the one layer; of a quantized weight the layer is bitsandbytes'."""
    if tensors.operand is None:
        return nn.Sequential(linear(tensors))
    reason = bitsandbytes.why_not(tensors.operand)
    if reason is not None:
        raise UnavailableError(reason)
    model = nn.Sequential(bitsandbytes.layer_of(tensors.operand, tensors.bias))
    setattr(model, bitsandbytes.FLAGS[problem.base], True)
    return model


def _compiled(problem: Problem, tensors: Tensors, *, of: Builder) -> Contender:
    contender = of(problem, tensors)
    contender.name += "-compiled"
    contender.layer = torch.compile(contender.layer, dynamic=False)
    return contender


def _siblings(problem: Problem, tensors: Tensors) -> Contender:
    raise UnavailableError("one layer has no siblings to share x with: --models has them")


def _full(problem: Problem, tensors: Tensors) -> Contender:
    raise UnavailableError("full fine-tuning is timed as steps of a whole model: --models has it")


BUILDERS: dict[str, Builder] = {
    FROZEN: _frozen,
    "lorafast": _lorafast,
    "lorafast-compiled": functools.partial(_compiled, of=_lorafast),
    "lorafast-packed": _packed,
    SIBLINGS: _siblings,
    FULL: _full,
    "peft": _peft,
    "peft-compiled": functools.partial(_compiled, of=_peft),
    **{name: functools.partial(_lorafast, backend=name) for name in registry.names()},
}
