"""The WebUI's list of checkpoints, which any thread may fill anew while another one reads it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any, Final

from modules import sd_models

# For our own threads: none sees a list that another one has only half filled. The WebUI takes no lock.
_FILLING: Final = threading.RLock()

_TRIES: Final = 20
_PAUSE: Final = 0.05  # seconds


def fill() -> None:
    """As the WebUI's own refresh button."""
    with _FILLING:
        sd_models.list_models()


def entries() -> tuple[Any, ...]:
    """The WebUI's entries (`CheckpointInfo`), in its order."""
    with _FILLING:
        return tuple(sd_models.checkpoints_list.values())  # in one step: no thread comes between


def titled() -> tuple[tuple[str, Any], ...]:
    """The entries with their titles as in the WebUI's menu: with a hash in A1111, without in Forge.

    Nothing where the WebUI does not leave its list in peace for a second.
    """
    with _FILLING:
        for _ in range(_TRIES):
            with suppress(RuntimeError, ValueError):  # filled anew during one, or between both
                return tuple(zip(sd_models.checkpoint_tiles(), entries(), strict=True))
            time.sleep(_PAUSE)
    return ()


def name_selected_by(title: str) -> str:
    """What Forge takes for a title: the first that holds its name, or is held by it."""
    with _FILLING:
        return str(sd_models.match_checkpoint_to_name(title))
