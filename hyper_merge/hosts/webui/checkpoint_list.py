"""Reads the WebUI's list of checkpoints, which any thread may refill while another one reads it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any, Final

from modules import sd_models

# Keeps our own threads from a list that another one has only half filled. The WebUI takes no lock.
_FILLING: Final = threading.RLock()

_TRIES: Final = 20
_PAUSE: Final = 0.05  # seconds


def refresh_list() -> None:
    """Fills the list again, as the WebUI's own refresh button does."""
    with _FILLING:
        sd_models.list_models()


def list_entries() -> tuple[Any, ...]:
    """Returns the WebUI's entries (`CheckpointInfo`), in its order."""
    with _FILLING:
        return tuple(sd_models.checkpoints_list.values())  # in one step: no thread comes between


def list_titled_entries() -> tuple[tuple[str, Any], ...]:
    """Returns the entries with their titles in the WebUI's menu: in A1111 with a hash, in Forge without.

    Returns nothing where the WebUI keeps changing its list for a second.
    """
    with _FILLING:
        for _ in range(_TRIES):
            with suppress(RuntimeError, ValueError):  # filled again during one, or between the two
                return tuple(zip(sd_models.checkpoint_tiles(), list_entries(), strict=True))
            time.sleep(_PAUSE)
    return ()


def name_selected_by(title: str) -> str:
    """Returns the name that Forge takes for a title: the first that holds it, or is held by it."""
    with _FILLING:
        return str(sd_models.match_checkpoint_to_name(title))
