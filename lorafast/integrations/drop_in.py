"""``accelerate``: the layers of other packages, served by this one's kernels. PEFT's, so far."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from lorafast.convert import siblings
from lorafast.nn import explain as explain_own

Model = TypeVar("Model", bound=nn.Module)


@overload
def accelerate(model: Model, *, quiet: bool = False) -> Model: ...
@overload
def accelerate(model: None = None, *, quiet: bool = False) -> None: ...
def accelerate(model: Model | None = None, *, quiet: bool = False) -> Model | None:
    """Makes the LoRA layers of a PEFT model fast, in place; nothing else changes.

    Linear layers of VeRA, AdaLoRA, (IA)³, LoHa, LoKr, OFT and BOFT too: ``docs/peft.md`` has a table.
    Each layer keeps its parameters, state, adapters and place, and everything that PEFT does with
    them; only its ``forward`` is another. Calls that aren't served fast are PEFT's own, by rule:
    ``explain`` lists them; but where a backend is forced that can't serve a call, the call raises.
    A dropout mask, DoRA's too, is drawn from PyTorch's generator, but not the one that
    ``nn.Dropout`` draws. A pickle of the model holds PEFT's layers: accelerate what it loads again.
    What a layer keeps for its backward is its input itself, of which PEFT's may keep a copy (cast,
    or after dropout): it must not be changed in place before (``x = x + layer(x)``, not
    ``x += layer(x)``). A second derivative needs ``lora_A`` to require a gradient.

    Any release of PEFT will do: where one has changed what a fast layer stands in for, layers of that
    kind stay PEFT's own, and a warning says so once.

    Args:
        model: a ``PeftModel``, or any module with PEFT's adapter layers in it. Without it, PEFT makes
            fast layers from now on (``get_peft_model``, ``from_pretrained``, ``add_adapter``), until
            ``restore()``.
        quiet: doesn't print how many layers are fast.

    Returns:
        ``model``.

    Raises:
        ImportError: PEFT is not installed.
        RuntimeError: it is one without the layers that are known here.
        ValueError: the model has no adapter layers.
    """
    swap, from_now_on = _rooms()
    if model is None:
        swap.warn_of_changes()
        from_now_on.begin_everywhere()
        return None
    swap.accelerate(model, quiet=quiet)
    return model


def restore(model: Model | None = None) -> Model | None:
    """Undoes ``accelerate``: ``model`` has PEFT's own layers again; without it, PEFT makes its own.

    Layers that ``adapt(..., fuse="siblings")`` made siblings are each by themselves again. A block of
    ``accelerated`` lasts until it ends.

    Raises:
        ValueError: a layer has been given another class since, as FSDP does to what it shards.
    """
    if model is not None and siblings.separate(model) and "peft" not in sys.modules:
        return model
    swap, from_now_on = _rooms()
    if model is None:
        from_now_on.end_everywhere()
        return None
    swap.restore(model)
    return model


@contextlib.contextmanager
def accelerated() -> Iterator[None]:
    """PEFT makes fast layers within the block; those stay fast after it. Blocks nest.

    A block holds for its own thread, or asynchronous task and the tasks that it starts; other threads'
    models stay PEFT's. ``accelerate()`` holds for all.
    """
    swap, from_now_on = _rooms()
    swap.warn_of_changes()
    block = from_now_on.Block()
    try:
        yield
    finally:
        block.end()


def explain(module: nn.Module, x: Tensor | None = None) -> Any:
    """What serves each adapted layer of ``module``, and why; prints as text.

    For a model with PEFT's adapter layers: which are fast and which PEFT's own, and why, as the model is
    now, for an input that fits it. For one with adapted layers of ``lorafast.nn``: the backend of each
    operation, and why not the others, for an input like ``x`` (only its device, dtype and number of rows
    count), else for many rows of the weight's.

    Raises:
        ValueError: there is neither.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None and any(isinstance(m, tuners.BaseTunerLayer) for m in module.modules()):
        return _rooms()[0].explain(module)
    return explain_own(module, x)


def _rooms() -> tuple[ModuleType, ModuleType]:
    """``swap`` and ``from_now_on`` of the room for PEFT."""
    try:
        from lorafast.integrations.peft import from_now_on, swap
    except ImportError as error:
        peft = sys.modules.get("peft")
        if peft is None or error.name == "transformers":
            raise ImportError(
                "lorafast.accelerate is for PEFT's layers, and PEFT is not installed: pip install peft",
                name=error.name,
            ) from error
        if (error.name or "").partition(".")[0] == "peft":
            raise RuntimeError(
                f"lorafast.accelerate stands in for layers that PEFT {peft.__version__} doesn't have: "
                f"{error}"
            ) from error
        raise
    return swap, from_now_on
