"""Forms that were kept, in a browser or in a preset, as plain data: all that is read back is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Final, cast

from hyper_merge.hosts.host import Host
from hyper_merge.ui.form import Form
from hyper_merge.ui.form_fields import BASE_AVERAGE, FORM_FIELDS, FormField

_LONGEST: Final = {"text": 1000, "lines": 100_000}  # letters of a field
_MOST: Final = 10_000  # checkpoints


def default_form(host: Host) -> Form:
    """Returns the form before the user touches it, by the host's settings."""
    defaults = host.defaults()
    values = {field.name: field.default for field in FORM_FIELDS}
    values |= {
        "checkpoints": [],
        "ranks": defaults.ranks,
        "base": BASE_AVERAGE,
        "save_styles": defaults.save_styles and host.has_txt2img,
    }
    return Form(**values)


def form_to_plain(form: Form) -> dict[str, Any]:
    """Returns a form as plain data, for `form_from_plain`."""
    return asdict(form)


def form_from_plain(
    saved: object, otherwise: Form, listed: Sequence[str], devices: Sequence[str]
) -> Form:
    """Returns the form that was saved; values that make no sense here are those of another form.

    Picked checkpoints stay though they are not listed: the table says so.

    Args:
        saved: the plain data, of any origin.
        otherwise: the form with the values for what is missing or wrong.
        listed: the host's checkpoints, one of which may be the base.
        devices: names of the devices that there are.
    """
    if not isinstance(saved, Mapping):
        return otherwise
    choices = {"base": [BASE_AVERAGE, *listed], "device": list(devices)}
    known = {field.name: field for field in FORM_FIELDS}
    values = {
        field.name: saved[field.name]
        for field in fields(Form)
        if field.name in saved
        and _is_possible(saved[field.name], known.get(field.name), choices.get(field.name))
    }
    return replace(otherwise, **values)


def _is_possible(value: object, field: FormField | None, choices: Sequence[str] | None) -> bool:
    """Tells whether a widget can hold a value; what a merge makes of it is checked with the form."""
    if field is not None and field.name == "checkpoints":
        is_list = isinstance(value, list) and len(value) <= _MOST
        return is_list and all(isinstance(name, str) for name in cast("list[object]", value))
    if field is None or field.kind == "checkbox":
        return isinstance(value, bool)
    if field.kind == "number":
        return type(value) in (int, float) and math.isfinite(cast("float", value))
    if field.kind in _LONGEST:
        return isinstance(value, str) and len(value) <= _LONGEST[field.kind]
    return value in (choices if choices is not None else field.options)
