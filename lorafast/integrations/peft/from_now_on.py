"""Whether the layers that PEFT makes are fast: everywhere, or within the blocks of a thread or task.

PEFT makes every layer of a kind in one place, which is replaced while anybody wants fast layers, and put
back when nobody does any more.
"""

import functools
import threading
from contextvars import ContextVar
from typing import Any

from peft.tuners.adalora.model import AdaLoraModel
from peft.tuners.boft.model import BOFTModel
from peft.tuners.ia3.model import IA3Model
from peft.tuners.lora.model import LoraModel
from peft.tuners.lycoris_utils import LycorisTuner
from peft.tuners.oft.model import OFTModel
from peft.tuners.vera.model import VeraModel
from torch import nn

from lorafast.integrations.peft.layers import fast_of

_PLACE = "_create_new_module"
_OWNERS: tuple[Any, ...] = (
    LoraModel, AdaLoraModel, BOFTModel, IA3Model, LycorisTuner, OFTModel, VeraModel,
)  # fmt: skip
"""The classes of PEFT's that have such a place of their own, a static or a class method."""


class Block:
    """A block in which PEFT makes fast layers, until ``end``; ``outer`` is the one around it, if any.

    A task that starts in a block inherits it, and may live on when it has ended.
    """

    def __init__(self) -> None:
        self.outer = _innermost()
        self.ended = False
        _retain()
        _block.set(self)

    def end(self) -> None:
        """Ends the block, in whatever context this is called; a generator may be closed in another."""
        with _lock:
            if self.ended:
                return
            self.ended = True
        _block.set(_innermost())
        _release()


_block: ContextVar[Block | None] = ContextVar("lorafast.accelerated", default=None)
_lock = threading.RLock()  # a block may be ended by the garbage collector, between any two lines
_everywhere = False
_wanted = 0
_replaced: dict[Any, tuple[Any, Any]] = {}
"""By class: what PEFT had in place, and what is there instead of it."""
_covered: dict[Any, Any] = {}
"""What was there instead when someone else replaced it, and what PEFT had in place."""


def begin_everywhere() -> None:
    """PEFT makes fast layers from now on, in every thread."""
    global _everywhere
    with _lock:
        if _everywhere:
            return
        _retain()
        _everywhere = True


def end_everywhere() -> None:
    """Undoes ``begin_everywhere``; blocks end by themselves."""
    global _everywhere
    with _lock:
        if not _everywhere:
            return
        _everywhere = False
        _release()


def _innermost() -> Block | None:
    """The block that this context is in."""
    block = _block.get()
    while block is not None and block.ended:
        block = block.outer
    return block


def _retain() -> None:
    global _wanted
    with _lock:
        if not _replaced:
            for owner in _OWNERS:
                before = vars(owner)[_PLACE]
                before = _covered.pop(before, before)
                own = type(before)(_making_fast(before.__func__))
                _replaced[owner] = before, own
                setattr(owner, _PLACE, own)
        _wanted += 1


def _release() -> None:
    global _wanted
    with _lock:
        _wanted -= 1
        if _wanted:
            return
        for owner, (before, own) in _replaced.items():
            # Not what someone else has put there since, who may put back what was found.
            if vars(owner)[_PLACE] is own:
                setattr(owner, _PLACE, before)
            else:
                _covered[own] = before
        _replaced.clear()


def _making_fast(before: Any) -> Any:
    @functools.wraps(before)
    def create(*args: Any, **kwargs: Any) -> nn.Module:
        module: nn.Module = before(*args, **kwargs)
        if _everywhere or _innermost() is not None:
            fast = fast_of(type(module))
            if fast is not None:
                module.__class__ = fast
        return module

    return create
