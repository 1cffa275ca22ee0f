"""``disabled``: a model as if it had no adapters, for the time of a block."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

from lorafast.convert.kinds import has_peft_adapter, is_peft_wrapper
from lorafast.convert.targets import check_module
from lorafast.nn.adapter_module import AdapterModule, adapters_in

_lock = threading.RLock()


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block ``model`` computes without its adapters, the same bits as the frozen model.

        with lorafast.disabled(model):
            reference_logits = model(x)

    Each adapted layer calls the frozen layer that it is over, and each module with a bottleneck gives
    its own output. A merged layer does so too, and is merged as before after the block. What is trained
    besides adapters (a head, norms) stays as it is. Of PiSSA, OLoRA and CorDA the
    frozen layer is what they left of the weight, and not that of the model before ``adapt``. A layer
    over a quantized weight computes as ``lorafast.nn.QuantizedLinear`` does; PyTorch's encoders go on
    calling their layers, without the fused kernels of inference.

    Models of PEFT's are disabled by PEFT's own ``disable_adapter``, accelerated or not, and
    ``requires_grad`` is afterwards as it was.

    Run a backward inside too where a forward inside is checkpointed: it computes the forward again.

    Blocks may be nested, and an error inside ends them as usual. The model is disabled in all threads:
    until the last block around it has ended, where several threads have one (of PEFT's models, as PEFT
    has it: until the first). A copy or a pickle that is made inside has its adapters on. A compiled
    model is compiled once more, without adapters.

    Yields:
        ``model``.

    Raises:
        ValueError: it has no adapters.
        TypeError: it is no module.
    """
    check_module(model)
    ours = list(adapters_in(model).values())
    theirs = _of_peft(model)
    if not ours and not theirs:
        raise ValueError("the model has no adapter: there is no adapter to disable")
    with contextlib.ExitStack() as stack:
        if theirs:
            stack.enter_context(_peft_disabled(model, theirs))
        if ours:
            stack.enter_context(_disabled(ours))
        yield model


@contextlib.contextmanager
def _disabled(ours: list[AdapterModule]) -> Iterator[None]:
    with _lock:
        for one in ours:
            one.switch(1)
    try:
        yield
    finally:
        with _lock:
            for one in ours:
                one.switch(-1)


def _of_peft(model: nn.Module) -> list[Any]:
    """PEFT's adapter layers in ``model``, and its wrappers of modules that are stored whole."""
    return [m for m in model.modules() if has_peft_adapter(m) or is_peft_wrapper(m)]


@contextlib.contextmanager
def _peft_disabled(model: Any, theirs: list[Any]) -> Iterator[None]:
    on = [layer for layer in theirs if not layer.disable_adapters]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    peft_model = getattr(sys.modules.get("peft"), "PeftModel", ())
    try:
        if not on:
            yield
        elif isinstance(model, peft_model) and len(on) == len(theirs):
            with model.disable_adapter():
                yield
        else:
            try:
                for layer in on:
                    layer.enable_adapters(False)
                yield
            finally:
                for layer in on:
                    layer.enable_adapters(True)
    finally:
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
