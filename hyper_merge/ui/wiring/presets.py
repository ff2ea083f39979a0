"""Wires the presets, and the form that a page begins with."""

from __future__ import annotations

import functools
from typing import Any

from hyper_merge.ui.handlers.saved_forms import (
    delete_named_preset,
    list_presets,
    load_named_preset,
    restore_form,
    save_named_preset,
)
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.common import Trigger, Wiring

_KEPT = "(kept, ...values) => [hyperMergeForm.kept(values), ...values]"
_ASK = "(name) => [hyperMergeForm.mayDelete(name) ? name : '']"


def wire_presets(wires: Wiring) -> None:
    """Wires saving, loading and deleting presets."""
    panel, form, host = wires.preset, in_order(wires.form), wires.host
    note = panel.note
    wires.on(
        panel.load.click,
        functools.partial(load_named_preset, host),
        [panel.preset],
        [*form, panel.name, note],
        note,
    )
    wires.on(
        panel.save.click,
        functools.partial(save_named_preset, host),
        [panel.name, *form],
        [panel.preset, note],
        note,
    )
    wires.on(
        panel.delete.click,
        functools.partial(delete_named_preset, host),
        [panel.preset],
        [panel.preset, note],
        note,
        _ASK,
    )


def wire_opened_form(wires: Wiring, trigger: Trigger) -> Any:
    """Wires the list of presets and the form of a page that opens; returns the latter's event."""
    panel, host, form = wires.preset, wires.host, in_order(wires.form)
    wires.on(
        trigger,
        functools.partial(list_presets, host),
        [panel.preset],
        [panel.preset, panel.note],
        panel.note,
    )
    restore = functools.partial(restore_form, host, wires.jobs)
    return wires.on(trigger, restore, [panel.kept, *form], form, None, _KEPT)
