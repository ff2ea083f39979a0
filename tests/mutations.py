"""Damage done to files of JSON: every place replaced by what does not belong there, or taken away."""

import json
from collections.abc import Iterator
from typing import Any

NESTED = "[" * 100_000 + "]" * 100_000
TEXTS = ("", "{", "null", "3", '"x"', "[]", "[[1]]", NESTED, '{"a": ' * 5000, "9" * 5000, "\0" * 99)
VALUES = (None, True, 3, -1.5, "", "x", "\ud800", "\0", "../../x", [], {}, [[]], [1, 2], {"x": 1})
VALUES += ([[1, "x"]], [[None], [1]], 2**63, 10**400, -(10**400), float("nan"), float("inf"))

Place = tuple[str | int, ...]


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Yields every place in plain data, the whole included; of a list the first two."""
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:2]):
            yield from places(item, (*at, index))


def changed(value: Any, at: Place, new: Any) -> Any:
    """Returns plain data with something else in one place."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def removed(value: Any, at: Place) -> Any:
    """Returns plain data without the item in one place."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = removed(value[at[0]], at[1:])
    return copy


def mutations(value: Any) -> list[str]:
    """Yields texts that hold plain data with one thing changed, or none at all."""
    texts = list(TEXTS)
    for at in places(value):
        texts += [json.dumps(changed(value, at, new)) for new in VALUES]
        texts += [json.dumps(removed(value, at))] if at else []
    return texts
