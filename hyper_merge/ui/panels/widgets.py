"""Makes the widgets of all panels, with our ids and with values that the WebUI does not save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from hyper_merge.ui.element_ids import elem_id

Widget = TypeVar("Widget")


def in_order(panel: Any) -> list[Any]:
    """Returns the widgets of a panel, in the order of its fields."""
    return [getattr(panel, field.name) for field in dataclasses.fields(panel)]


def widget(kind: Callable[..., Widget], name: str, **settings: Any) -> Widget:
    """Makes a widget with our id, whose value the WebUI does not keep between starts."""
    component = kind(elem_id=elem_id(name), **settings)
    component.do_not_save_to_config = True  # type: ignore[attr-defined]
    return component


def button(name: str, text: str, *, visible: bool = True) -> gr.Button:
    """Makes a small button."""
    return widget(gr.Button, name, value=text, size="sm", min_width=90, visible=visible)


def hidden_text(name: str, value: str = "") -> gr.Textbox:
    """Makes a text that only handlers and scripts read."""
    return widget(gr.Textbox, name, value=value, visible=False)


def html(name: str, value: str = "") -> gr.HTML:
    """Makes a place for a fragment of `ui.html`."""
    return widget(gr.HTML, name, value=value)


def explain(text: str) -> None:
    """Says what a panel is for."""
    gr.HTML(f"<p class=hm-hint>{text}</p>")


def checkbox(name: str, label: str) -> gr.Checkbox:
    """Makes a checkbox that is not ticked."""
    return widget(gr.Checkbox, name, value=False, label=label)


def line(name: str, label: str, info: str, value: str = "") -> gr.Textbox:
    """Makes a field for one line of text."""
    return widget(gr.Textbox, name, value=value, label=label, info=info, max_lines=1)


def menu(name: str, label: str, info: str, *, several: bool = False) -> gr.Dropdown:
    """Makes a menu that is filled later, of one choice or of several."""
    value: list[str] | None = [] if several else None
    return widget(
        gr.Dropdown, name, choices=[], value=value, multiselect=several, label=label, info=info
    )


def tags_box(name: str) -> gr.Textbox:
    """Makes a box of prompt tags."""
    return widget(
        gr.Textbox,
        name,
        label="Prompt tags",
        show_label=False,
        container=False,
        lines=2,
        interactive=True,
    )
