"""What all panels are made of: widgets with our ids, which the WebUI does not keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from hyper_merge.ui.element_ids import elem_id

Widget = TypeVar("Widget")


def in_order(panel: Any) -> list[Any]:
    """The widgets of a panel, in the order of its fields."""
    return [getattr(panel, field.name) for field in dataclasses.fields(panel)]


def widget(kind: Callable[..., Widget], name: str, **settings: Any) -> Widget:
    """A widget with our id, whose value the WebUI does not keep between starts."""
    made = kind(elem_id=elem_id(name), **settings)
    made.do_not_save_to_config = True  # type: ignore[attr-defined]
    return made


def button(name: str, text: str, *, visible: bool = True) -> gr.Button:
    """A small button."""
    return widget(gr.Button, name, value=text, size="sm", min_width=90, visible=visible)


def html(name: str, value: str = "") -> gr.HTML:
    """A place for text of `views`."""
    return widget(gr.HTML, name, value=value)
