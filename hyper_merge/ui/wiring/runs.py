"""Wires the events of the panel that shows a run, and of the tab "Runs"."""

from __future__ import annotations

import functools
from typing import Any

from hyper_merge.ui.handlers import history
from hyper_merge.ui.handlers.compare import compare_run
from hyper_merge.ui.handlers.result import (
    hide_deleted_run,
    remove_run_styles,
    save_run_styles,
    show_run,
)
from hyper_merge.ui.handlers.send import send_tags
from hyper_merge.ui.handlers.use import use_run
from hyper_merge.ui.panels.history import HistoryPanel
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.common import REFRESH_STYLES, Wiring
from hyper_merge.ui.wiring.events import in_browser

_COPY = "(text) => { hyperMerge.copy(text, ''); return []; }"
_PROMPT = "(name, prompts) => JSON.parse(prompts || '{}')[name] || ''"
_HIDDEN = '{"visible": false, "__type__": "update"}'  # gr.update() as a page reads it
_CLEAR = f'() => ["", {_HIDDEN}, {_HIDDEN}, ""]'
_GO = "() => { hyperMerge.go(%d, '%s'); return []; }"
_GO_BY_KIND = "() => { hyperMergeRuns.isOfLoras() ? hyperMerge.go(3, '%s') : hyperMerge.go(0, '%s'); return []; }"


def wire_result(wires: Wiring) -> None:
    """Wires the prompt tags and styles of the run that is shown."""
    panel, view, host = wires.result, wires.result.view, wires.host
    in_browser(view.checkpoint.change, _PROMPT, [view.checkpoint, view.prompts], [view.prompt])
    in_browser(panel.copy.click, _COPY, [view.prompt])
    wires.send(panel.send, send_tags, view.prompt, view.run, view.title, panel)
    for button, handler in (
        (panel.save_styles, save_run_styles),
        (panel.remove_styles, remove_run_styles),
    ):
        done = wires.on(
            button.click, functools.partial(handler, host), [view.run], [view.note], view.note
        )
        in_browser(done.then, REFRESH_STYLES)


def wire_next_steps(wires: Wiring) -> None:
    """Wires the buttons that lead on from the run that is shown: mix, compare, another size."""
    panel, use, compare = wires.result, wires.use, wires.compare
    run, host = panel.view.run, wires.host
    listed = in_order(use.listed)
    mixed = wires.on(
        panel.mix.click,
        functools.partial(use_run, host),
        [run, use.listed.run, *listed[5:]],
        [*listed, *in_order(use.outcomes)[:7], use.message],
        use.message,
    )
    in_browser(mixed.then, _GO % (1, "use_tab"))
    compared = wires.on(
        panel.compare.click,
        functools.partial(compare_run, host),
        [run],
        [
            *(compare.form.run, compare.form.checkpoints, compare.earlier, compare.comparison),
            compare.message,
        ],
        compare.message,
    )
    in_browser(compared.then, _GO % (2, "compare_columns"))
    _wire_copy(wires, panel.resize, run, _GO % (0, "size"))


def _wire_copy(wires: Wiring, button: Any, run: Any, go: str) -> None:
    """Wires a button that copies a run's settings into the form, and goes there."""
    note, copy = wires.size.note, functools.partial(history.copy_settings, wires.host)
    copied = wires.on(button.click, copy, [run], [*in_order(wires.form), note], note)
    in_browser(copied.then, go)


def wire_history(wires: Wiring) -> None:
    """Wires picking, opening, copying and showing earlier runs, and the cache."""
    panel, host = wires.history, wires.host
    for trigger in (panel.refresh.click, panel.opened.select, wires.use.opened.select):
        wires.list_runs(trigger)  # another page may have made or deleted some
    opened = wires.show(panel.open.click, functools.partial(show_run, host), [panel.run])
    in_browser(opened.then, _GO_BY_KIND % ("lora_result", "result"))
    _wire_copy(wires, panel.copy, panel.run, _GO_BY_KIND % ("lora_columns", "columns"))
    wires.on(
        panel.run.input,
        functools.partial(history.list_others, host),
        [panel.run, panel.other],
        [panel.other],
        panel.outcome,
    )
    # not by the server, whose late answer would clear what the next button shows
    in_browser(panel.run.input, _CLEAR, [], _asking(panel))
    wires.on(
        panel.beside.click,
        functools.partial(history.show_side_by_side, host),
        [panel.run, panel.other],
        [panel.outcome],
        panel.outcome,
    )
    clear = functools.partial(history.clear_idle_cache, host, wires.jobs)
    cleared = wires.on(panel.clear.click, clear, [], [panel.outcome], panel.outcome)
    wires.list_runs(cleared.then)


def wire_deletion(wires: Wiring) -> None:
    """Wires deleting a run, which lists its files and asks first."""
    panel, host = wires.history, wires.host
    asking = _asking(panel)
    ask = functools.partial(history.ask_to_delete_run, host, wires.jobs)
    wires.on(panel.delete.click, ask, [panel.run], asking, panel.outcome)
    delete = functools.partial(history.delete_confirmed_run, host, wires.jobs)
    deleted = wires.on(panel.confirm.click, delete, [panel.to_delete], asking, panel.outcome)
    in_browser(wires.list_runs(deleted.then).then, REFRESH_STYLES)
    run = wires.result.view.run
    wires.show(deleted.then, functools.partial(hide_deleted_run, host), [run])
    wires.on(panel.cancel.click, history.cancel_deletion, [], asking, panel.outcome)


def _asking(panel: HistoryPanel) -> list[Any]:
    """The widgets that list the files of a run and ask whether to delete them."""
    return [panel.outcome, panel.confirm, panel.cancel, panel.to_delete]
