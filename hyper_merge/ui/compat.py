"""Handles all differences between gradio 3.41 (AUTOMATIC1111) and gradio 4 (Forge, the app)."""

from __future__ import annotations

from typing import Any, Final

import gradio as gr

IS_GRADIO_4: Final = int(gr.__version__.split(".")[0]) >= 4


def browser_code(code: str) -> dict[str, Any]:
    """Returns the arguments of an event that first runs a JavaScript function in the browser."""
    return {"js" if IS_GRADIO_4 else "_js": code}


def quiet_event(*, queued: bool) -> dict[str, Any]:
    """Returns the arguments of every event: no spinner over its outputs, no entry in the public API.

    Args:
        queued: whether it may take long or sends several results, which needs gradio's queue.
    """
    common: dict[str, Any] = {"show_progress": "hidden", "api_name": False, "queue": queued}
    if not IS_GRADIO_4:
        return common
    # By default gradio 4 drops a click while the last one is answered, as gradio 3.41 always does,
    # and answers one page at a time.
    return {
        **common,
        "show_api": False,
        "trigger_mode": "multiple",
        "concurrency_limit": None,
    }
