"""The frame of the picker; `javascript/hyper_merge_picker.js` draws lists and table into it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Final

from hyper_merge.ui.element_ids import elem_id

_ORDERS: Final = {
    "name": "By name",
    "time": "Newest first",
    "size": "Largest first",
    "family": "By family",
}


def format_picker(folder: Path) -> str:
    """Returns search, order and folder over the list to pick from, beside the table of the picked ones.

    Args:
        folder: where checkpoints are to be put, for those who have none yet.
    """
    orders = "".join(f"<option value={key}>{word}</option>" for key, word in _ORDERS.items())
    return (
        f'<div class=hm-picker data-folder="{html.escape(str(folder))}"><div class=hm-available><div class=hm-tools>'
        f'<input type=search id={elem_id("search")} placeholder="Search, any words"'
        ' aria-label="Search checkpoints by any words" autocomplete=off spellcheck=false>'
        f'<select id={elem_id("order")} aria-label="Order of the checkpoints">{orders}</select>'
        f'<select id={elem_id("folder")} aria-label="Folder"></select></div>'
        f'<ul id={elem_id("available")} aria-label="Checkpoints to pick from"></ul>'
        f"<p id={elem_id('available_note')} class=hm-hint role=status></p></div>"
        f"<div class=hm-chosen><div id={elem_id('checkpoints_table')}></div>"
        f"<p id={elem_id('picked_note')} class=hm-hint role=status></p></div></div>"
    )
