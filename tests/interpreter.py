"""Triton's interpreter, quicker: the same numbers in two fifths of the time.

It puts functions of its own in place of the language's at a launch, and again at every call of a device
function: here once a launch. It makes the type of every block anew, with its shape twice: here once.
And it tells of every sum of integers whether it overflows, to an assertion that without TRITON_DEBUG
isn't there.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUICK = Path(__file__).with_name("quick_interpreter")
"""Its ``sitecustomize`` does to a process what ``conftest.py`` does to that of the tests."""


def of_a_process() -> dict[str, str]:
    """Variables of a process that interprets as quickly as this one."""
    folders = (str(QUICK), os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "TRITON_INTERPRET": "1"}


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


def remember_types() -> None:
    """From now on, in this process; nothing where Triton isn't or has another interpreter."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        core, semantic = tl.core, type(interpreter.interpreter_semantic)
        made_block, made_tensor = core.block_type.__init__, core.tensor.__init__
        unwrapped, same = core._unwrap_if_constexpr, core.dtype.__eq__
        stored_as, broadcast = interpreter._get_np_dtype, semantic.broadcast_impl_value
        options = interpreter.interpreter_builder.options
        if not options.debug:
            options = dataclasses.replace(options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return

    plain = {int, float, bool, str, type(None), core.dtype, core.pointer_type, core.block_type}

    def unwrap(value: Any) -> Any:
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return value if kind in plain else unwrapped(value)

    def is_same(self: Any, other: Any) -> bool:
        return self is other or same(self, other)

    # An element's type is kept by the block's, so that nothing else has its id.
    blocks: dict[tuple[Any, ...], Any] = {}

    def key_of(cls: type, element_ty: Any, shape: Any) -> tuple[Any, ...]:
        return cls, id(element_ty), *map(unwrap, shape)

    def new_block(cls: type, element_ty: Any = None, shape: Any = ()) -> Any:
        return blocks.get(key_of(cls, element_ty, shape)) or object.__new__(cls)

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        if not self.__dict__:
            made_block(self, element_ty, shape)
            if len(blocks) == 1 << 12:
                blocks.clear()
            blocks[key_of(type(self), element_ty, shape)] = self

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        remembered = type.__dict__.get("_remembered")
        if remembered is None:
            made_tensor(self, handle, type)
            type._remembered = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = remembered

    def as_numpy(type: Any) -> Any:
        found = type.__dict__.get("_as_numpy")
        if found is None:
            found = type._as_numpy = stored_as(type)
        return found

    def with_one_shape(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__new__, core.block_type.__init__ = new_block, init_block
    core._unwrap_if_constexpr, core.dtype.__eq__, core.tensor.__init__ = (
        unwrap,
        is_same,
        init_tensor,
    )
    interpreter._get_np_dtype, semantic.broadcast_impl_value = as_numpy, with_one_shape
    interpreter.interpreter_builder.options = options
