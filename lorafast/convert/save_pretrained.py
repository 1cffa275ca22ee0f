"""``save_pretrained`` of an adapted Transformers model writes the adapter beside the model.

Transformers saves an adapter's parameters under names that its ``from_pretrained`` drops. But where
PEFT is installed it reads an adapter in PEFT's format that lies beside a model, and adds it.
"""

import functools
import importlib.util
import inspect
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lorafast.convert.bottlenecks import bottlenecks
from lorafast.convert.kinds import adapted_layers, adapter_parameters
from lorafast.nn import bitsandbytes_keys
from lorafast.nn.inactive import waiting

_lock = threading.Lock()


def save_adapters_too(model: nn.Module) -> None:
    """From now on ``save_pretrained`` of Transformers models writes adapters, where there are any, too.

    Those are meant that ``model`` is or holds. The method of their class is replaced, not one of the
    model: a model that is merged, copied or pickled has nothing of ours. Other libraries' models are
    left alone.
    """
    owners = (
        cls
        for kind in {type(module) for module in model.modules()}
        for cls in kind.__mro__
        if "save_pretrained" in vars(cls) and cls.__module__.partition(".")[0] == "transformers"
    )
    with _lock:
        for owner in owners:
            stock = vars(owner)["save_pretrained"]
            if isinstance(stock, types.FunctionType) and not hasattr(stock, "_saves_adapters"):
                owner.save_pretrained = _with_adapters(stock)  # type: ignore[attr-defined]


def _with_adapters(stock: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("is_main_process", True):
            # First, so that what is pushed to the hub has it.
            _save_beside(given["self"], Path(given["save_directory"]))
        # As from_pretrained reads a model that bitsandbytes has quantized.
        with bitsandbytes_keys():
            return stock(*args, **kwargs)

    save_pretrained._saves_adapters = True  # type: ignore[attr-defined]
    return save_pretrained


def _waiting(model: nn.Module) -> Iterator[str]:
    """A sentence if the model has adapters that aren't active."""
    found = {name: None for layer in adapted_layers(model).values() for name in waiting(layer)}
    if found:
        yield (
            f"from_pretrained drops the adapters {', '.join(found)}, which aren't active: save each "
            "with lorafast.save_adapter(..., adapter=name)"
        )


def _save_beside(model: nn.Module, folder: Path) -> None:
    # Not above: adapt, which save_adapter is built on, needs this module.
    from lorafast.convert.adapter_io import write_adapter
    from lorafast.convert.peft_format import CONFIG_FILE

    if bottlenecks(model):
        warnings.warn(
            "from_pretrained drops the model's bottleneck adapters: save them with "
            "lorafast.save_adapter, and load them with lorafast.load_adapter",
            stacklevel=3,
        )
    native = getattr(model, "_hf_peft_config_loaded", False)  # PEFT's, which Transformers saves
    if not adapted_layers(model):
        if not native and (folder / CONFIG_FILE).is_file():
            warnings.warn(
                f"{folder} holds an adapter, which from_pretrained will add to the model that is saved "
                f"there now: if it is merged, delete {CONFIG_FILE}",
                stacklevel=3,
            )
        return
    reason = None
    if any(hasattr(tensor, "full_tensor") for tensor in adapter_parameters(model)):
        reason = "the model is sharded, and only lorafast.save_adapter on every rank gathers them"
    elif native:
        reason = "the model has PEFT's too, which take the same files"
    else:
        try:
            # What is trained besides is in the model's own file.
            _, lost = write_adapter(model, folder)
        except (OSError, ValueError) as error:
            reason = f"{error}"
        else:
            for sentence in (*lost, *_waiting(model)):
                warnings.warn(sentence, stacklevel=3)
    if reason is not None:
        warnings.warn(
            f"save_pretrained writes lorafast's adapters so that from_pretrained drops them ({reason}): "
            "call lorafast.save_adapter, or lorafast.merge before",
            stacklevel=3,
        )
    elif importlib.util.find_spec("peft") is None:
        warnings.warn(
            "from_pretrained drops the adapters where PEFT isn't installed: load them with "
            "lorafast.load_adapter, or save after lorafast.merge",
            stacklevel=3,
        )
