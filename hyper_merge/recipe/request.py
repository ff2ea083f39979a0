"""From plain values to a request: one way for recipe files, command line, form and API.

A request is a frozen dataclass with a parser for each of its fields. Its constructor takes values of
the annotated types and checks them; its `parse` takes what a user wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeAlias, TypeVar

from hyper_merge.errors import settings_placed

Parsers: TypeAlias = "Mapping[str, Callable[[object], object]]"
"""Parser of every field of a request, by the field's name."""

PlaceOf: TypeAlias = "Callable[[str], str]"
"""Returns the place of a setting by its key, as people read it: 'option --rank'."""

_Request = TypeVar("_Request")
_Checked = TypeVar("_Checked", bound="Request")


def parse_request(
    kind: Callable[..., _Request], values: Mapping[str, object], parsers: Parsers, where: PlaceOf
) -> _Request:
    """Returns the request that plain values describe.

    Args:
        kind: class of the request.
        values: plain values by field; a field that is left out has its default.
        parsers: those of the class.
        where: the place of a setting, for messages.

    Raises:
        RecipeError: a value is refused; says where it stands.
    """
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        with settings_placed(where, name):
            parsed[name] = parsers[name](value)
    with settings_placed(where):
        return kind(**parsed)


def check_request(request: Any, parsers: Parsers) -> None:
    """Returns if every field of a request is what its parser makes of it.

    Raises:
        RecipeError: a value is refused.
        TypeError: a value is of the form that users write; a bug of the caller, who is to `parse`.
    """
    for field in fields(request):
        value = getattr(request, field.name)
        with settings_placed(key_place, field.name):
            is_typed = parsers[field.name](value) == value
        if not is_typed:
            kind = type(request).__name__
            raise TypeError(f"{kind}.{field.name}: expected {field.type}, got {value!r}")


def key_place(key: str) -> str:
    """Returns the place of a setting in a request that is made by code."""
    return f'recipe, key "{key}"'


class Request:
    """Base of the frozen dataclasses that describe an operation; `PARSERS` has one for every field."""

    PARSERS: ClassVar[Parsers]

    def __post_init__(self) -> None:
        check_request(self, self.PARSERS)

    @classmethod
    def parse(cls: type[_Checked], values: Mapping[str, object], where: PlaceOf) -> _Checked:
        """Returns the request that plain values describe; `where` gives the place of each.

        Raises:
            RecipeError: a value is refused.
        """
        return parse_request(cls, values, cls.PARSERS, where)
