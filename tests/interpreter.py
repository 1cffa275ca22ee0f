"""Triton's interpreter, quicker.

It puts functions of its own in place of the language's at a launch, and again at every call of a device
function: a third of its time. Here once a launch.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def replace_once_a_launch() -> None:
    """From now on, in this process; nothing where Triton isn't or has another interpreter."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        replace, scope_of = interpreter._patch_lang, interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return

    done: set[Any] = set()

    class OfLaunch(scope_of):  # type: ignore[misc,valid-type]
        def restore(self) -> None:
            done.clear()
            super().restore()

    @functools.cache
    def seen_by(fn: Callable[..., Any]) -> frozenset[Any]:
        names = fn.__globals__.values()
        return frozenset(v for v in names if inspect.ismodule(v) and v in (tl, tl.core))

    def once(fn: Callable[..., Any]) -> Any:
        seen = seen_by(fn)
        if done and seen <= done:
            return scope_of()
        scope = replace(fn)
        if not done:  # of the launch; nobody restores what a device function has replaced
            scope.__class__ = OfLaunch
        done.update(seen)
        return scope

    interpreter._patch_lang = once
