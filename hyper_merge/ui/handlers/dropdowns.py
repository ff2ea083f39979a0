"""A dropdown's list that is filled anew while somebody may be choosing from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr


def refill(names: Sequence[str], picked: str | None, otherwise: str | None = None) -> Any:
    """The list; where what was picked is gone, something else is picked.

    Else nothing is said of what is picked: it may have changed since the page asked.
    """
    if picked in names:
        return gr.update(choices=list(names))
    return gr.update(choices=list(names), value=otherwise)
