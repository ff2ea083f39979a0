"""Reads dataclasses from the plain data of a JSON file."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Final, get_args, get_origin, get_type_hints

_LARGEST: Final = sys.float_info.max
_WHOLE_LIMIT: Final = 2**64  # of whole numbers: more than any file has bytes

_WORDS: Final = {
    float: "a finite number",
    int: "a whole number",
    str: "text",
    bool: "yes or no",
    tuple: "a list",
}


def read_plain(kind: Any, value: Any, where: str) -> Any:
    """Returns a value of plain data as the annotated kind.

    Args:
        kind: a dataclass, tuple, mapping, text, number or truth value, as a field is annotated.
        value: what JSON gave.
        where: name of the value, for messages.

    Raises:
        ValueError: it is missing or of another kind; says where.
    """
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _read_fields(kind, value, where)
    (first, *_, last), origin = get_args(kind) or (None, None), get_origin(kind) or kind
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(read_plain(first, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {str(key): read_plain(last, item, f"{where}.{key}") for key, item in value.items()}
    if origin is float and type(value) in (int, float) and -_LARGEST <= value <= _LARGEST:
        return float(value)
    if origin is int and type(value) is int and abs(value) < _WHOLE_LIMIT:
        return value
    if origin in (str, bool) and type(value) is origin:
        return value
    raise ValueError(
        f"expected {_WORDS.get(origin, 'named figures')} in {where}, got {value!r:.60}"
    )


def _read_fields(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    kinds = _annotations(kind)
    known = {field.name: field for field in fields(kind)}
    missing = [name for name, f in known.items() if name not in value and f.default is MISSING]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return kind(
        **{
            name: _read_optional(kinds[name], value[name], f"{where}.{name}")
            for name in known & value.keys()
        }
    )


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    """Returns the types of a class's fields; they are compiled from text, which takes its time."""
    return get_type_hints(kind)


def _read_optional(kind: Any, value: Any, where: str) -> Any:
    """Returns a value as a kind, or None where the kind is annotated with it."""
    if get_origin(kind) is not types.UnionType:
        return read_plain(kind, value, where)
    return None if value is None else read_plain(get_args(kind)[0], value, where)
