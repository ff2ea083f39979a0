"""Updates dropdowns whose list is read again while somebody may be choosing from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr


def refill(names: Sequence[str], picked: str | None, otherwise: str | None = None) -> Any:
    """Returns an update of the list, which picks something else if the picked name is gone.

    Otherwise it leaves the value alone, which may have changed since the page asked.
    """
    if picked in names:
        return gr.update(choices=list(names))
    return gr.update(choices=list(names), value=otherwise)
