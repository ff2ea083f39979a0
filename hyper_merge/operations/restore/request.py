"""Describes the request for a restored checkpoint, and parses the text of a mixture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from hyper_merge.errors import RecipeError
from hyper_merge.recipe.fields import FIELD_PARSERS
from hyper_merge.recipe.parsing import optional, parse_flag, parse_path
from hyper_merge.recipe.plain_values import describe_value
from hyper_merge.recipe.request import Parsers, Request

_SHARE: Final = re.compile(r"\s*(?P<name>[^:]+?)\s*:\s*(?P<share>[-+]?(\d+\.?\d*|\.\d+))\s*(,|$)")


def _parse_shares(value: object) -> dict[str, float]:
    """Returns shares by checkpoint, one or more, all of them finite."""
    if isinstance(value, Mapping) and value and all(map(math.isfinite, value.values())):
        return dict(value)
    raise RecipeError("expected one checkpoint or more, with finite shares", key="mix")


@dataclass(frozen=True)
class RestoreRequest(Request):
    """The request for a restored checkpoint.

    Attributes:
        run: Its name.
        shares: By checkpoint of the run; `{name: 1.0}` for that checkpoint itself.
        to: Path of the file; None for one among the checkpoints, named after what it is.
        dtype: Of the file; None for the run's.
        overwrite: Whether an existing file may be replaced.
    """

    run: str
    shares: Mapping[str, float]
    to: Path | None = None
    dtype: str | None = None
    overwrite: bool = False

    PARSERS: ClassVar[Parsers] = {
        "run": str,
        "shares": _parse_shares,
        "to": optional(parse_path),
        "dtype": optional(FIELD_PARSERS["dtype"]),
        "overwrite": parse_flag,
    }


def parse_mix(text: str) -> dict[str, float]:
    """Returns shares by checkpoint from a text such as `A:0.5, B:0.5`; a name may hold commas.

    Raises:
        RecipeError: the text is something else, or names a checkpoint twice.
    """
    shares: dict[str, float] = {}
    place = 0
    while place < len(text):
        match = _SHARE.match(text, place)
        if match is None or match["name"] in shares:
            twice = " twice" if match else ""
            raise RecipeError(
                f'expected checkpoints with their shares, such as "A:0.5,B:0.5", got'
                f" {describe_value(text[place:])}{twice}"
            )
        shares[match["name"]] = float(match["share"])
        place = match.end()
    if not shares:
        raise RecipeError('expected checkpoints with their shares, such as "A:0.5,B:0.5"')
    return shares
