"""``disabled``: a model as if it had no adapters, for the time of a block."""

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lorafast.convert.kinds import adapted_layers
from lorafast.convert.places import has_peft_adapter
from lorafast.nn import AdapterLayer

_lock = threading.RLock()


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block ``model`` computes without its adapters, the same bits as the frozen model.

        with lorafast.disabled(model):
            reference_logits = model(x)

    Each adapted layer calls the frozen layer that it is over. A merged one does so too, and is merged
    as before after the block. What is trained besides adapters (a head, norms) stays as it is. A layer
    over a quantized weight computes as ``lorafast.nn.QuantizedLinear`` does; PyTorch's encoders go on
    calling their layers, without the fused kernels of inference.

    Models of PEFT's are disabled by PEFT's own ``disable_adapter``, accelerated or not, and
    ``requires_grad`` is afterwards as it was.

    Blocks may be nested, and an error inside ends them as usual. The model is disabled in all threads:
    until the last block around it has ended, where several threads have one (of PEFT's models, as PEFT
    has it: until the first). A copy or a pickle that is made inside has its adapters on. A compiled
    model is compiled once more, without adapters.

    Yields:
        ``model``.

    Raises:
        ValueError: it has no adapters.
    """
    layers = list(adapted_layers(model).values())
    theirs = _of_peft(model)
    if not layers and not theirs:
        raise ValueError("the model has no adapted layer: there is no adapter to disable")
    with contextlib.ExitStack() as stack:
        if theirs:
            stack.enter_context(_peft_disabled(model, theirs))
        if layers:
            stack.enter_context(_disabled(layers))
        yield model


class _Without:
    """The ``forward`` of an adapted layer while it is disabled, by ``count`` blocks."""

    def __init__(self, layer: AdapterLayer, place: str) -> None:
        self.layer, self.place, self.count = layer, place, 0
        self.before = vars(layer).get(place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.base_forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # What a copy of the layer gets in its place.
        return _own_forward, (self.layer,)


def _own_forward(layer: AdapterLayer) -> Any:
    return types.MethodType(type(layer).forward, layer)


@contextlib.contextmanager
def _disabled(layers: list[AdapterLayer]) -> Iterator[None]:
    with _lock:
        for layer in layers:
            # Accelerate's hook has replaced the forward, and calls what it has found.
            place = "_old_forward" if "_hf_hook" in vars(layer) else "forward"
            if not isinstance(vars(layer).get(place), _Without):
                vars(layer)[place] = _Without(layer, place)
            vars(layer)[place].count += 1
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                _end(layer)


def _end(layer: AdapterLayer) -> None:
    for place in ("_old_forward", "forward"):
        without = vars(layer).get(place)
        if isinstance(without, _Without):
            without.count -= 1
            if without.count == 0 and without.before is None:
                del vars(layer)[place]
            elif without.count == 0:
                vars(layer)[place] = without.before
            return


def _of_peft(model: nn.Module) -> list[Any]:
    """PEFT's adapter layers in ``model``, and its wrappers of modules that are stored whole."""
    others = getattr(sys.modules.get("peft.utils.other"), "AuxiliaryTrainingWrapper", ())
    return [m for m in model.modules() if has_peft_adapter(m) or isinstance(m, others)]


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
