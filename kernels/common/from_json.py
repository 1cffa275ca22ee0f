"""Dataclasses back from JSON, every field's type checked."""

import dataclasses
import functools
import reprlib
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_LARGEST_INT = 2**63
_LARGEST_FLOAT = 1e300
_EXPECTED = {
    int: "a whole number", float: "a finite number", bool: "true or false", str: "a text",
    list: "a list", dict: "an object",
}  # fmt: skip


def from_json(cls: type[T], value: object, where: str) -> T:
    """The dataclass ``cls`` whose ``dataclasses.asdict`` is ``value``; ``where`` is its name in errors.

    Fields may be whole numbers of 64 bits, finite numbers, texts, truth values, dataclasses, lists and
    dictionaries of these, or None where their type says so.

    Raises:
        ValueError: a field is missing, unknown or of another type; one sentence says which.
    """
    if type(value) is not dict:
        raise _unexpected(where, value, "an object")
    hints = _hints(cls)  # type: ignore[arg-type]
    unknown = [name for name in value if name not in hints]
    if unknown:
        raise ValueError(f"{where} has a field {reprlib.repr(unknown[0])}, which is not known")
    found: dict[str, Any] = {}
    for name, (kind, required) in hints.items():
        if name in value:
            found[name] = _converted(kind, value[name], f"{where}.{name}")
        elif required:
            raise ValueError(f"{where} has no {name}")
    return cls(**found)


@functools.cache
def _hints(cls: type) -> dict[str, tuple[Any, bool]]:
    """Field → its type, and whether it has no default."""
    hints = get_type_hints(cls)
    missing = dataclasses.MISSING
    return {
        field.name: (
            hints[field.name],
            field.default is missing and field.default_factory is missing,
        )
        for field in dataclasses.fields(cls)
    }


def _converted(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, where)  # type: ignore[arg-type]
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        (only,) = (one for one in inner if one is not types.NoneType)
        return None if value is None else _converted(only, value, where)
    if origin is list and type(value) is list:
        return [_converted(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and type(value) is dict:
        return {key: _converted(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is float and type(value) in (int, float) and abs(value) <= _LARGEST_FLOAT:
        return float(value)
    if origin is int and type(value) is int and abs(value) < _LARGEST_INT:
        return value
    if origin in (bool, str) and type(value) is origin:
        return value
    raise _unexpected(where, value, _EXPECTED[origin])


def _unexpected(where: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{where} is {reprlib.repr(value)}, expected {expected}")
