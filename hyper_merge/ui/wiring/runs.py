"""Events of what was made: its prompts and styles; earlier runs, and the cache."""

from __future__ import annotations

import functools

from hyper_merge.ui.handlers import history
from hyper_merge.ui.handlers import result as results
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.common import REFRESH_STYLES, SELECT, Wires
from hyper_merge.ui.wiring.events import in_browser

_COPY = "(text) => { hyperMerge.copy(text, ''); return []; }"
_PROMPT = "(name, prompts) => JSON.parse(prompts || '{}')[name] || ''"
_OPEN_MERGE = "() => { hyperMerge.openTab(0); return []; }"


def wire_result(wires: Wires) -> None:
    """Prompts and styles of the run that is shown."""
    panel, shown, host = wires.result, wires.result.shown, wires.host
    in_browser(shown.checkpoint.change, _PROMPT, [shown.checkpoint, shown.prompts], [shown.prompt])
    in_browser(panel.copy.click, _COPY, [shown.prompt])
    in_browser(panel.send.click, SELECT, [shown.title])
    wires.on(panel.send.click, results.sent, [shown.run, shown.title], [shown.note], shown.note)
    host.connect_send(panel.send, shown.prompt)
    for button, handler in (
        (panel.save_styles, results.save_styles),
        (panel.remove_styles, results.remove_styles),
    ):
        done = wires.on(
            button.click, functools.partial(handler, host), [shown.run], [shown.note], shown.note
        )
        in_browser(done.then, REFRESH_STYLES)


def wire_history(wires: Wires) -> None:
    """Earlier runs: open, copy, compare, delete; and the cache."""
    panel, host = wires.history, wires.host
    wires.list_runs(panel.refresh.click)
    opened = wires.show(panel.open.click, functools.partial(results.show, host), [panel.run])
    in_browser(opened.then, _OPEN_MERGE)
    wires.on(
        panel.copy.click,
        functools.partial(history.copy_settings, host),
        [panel.run],
        [*in_order(wires.form), panel.outcome],
        panel.outcome,
    )
    wires.on(
        panel.compare.click,
        functools.partial(history.compare, host),
        [panel.run, panel.other],
        [panel.outcome],
        panel.outcome,
    )
    clear = functools.partial(history.clear, host, wires.jobs)
    cleared = wires.on(panel.clear.click, clear, [], [panel.outcome], panel.outcome)
    wires.list_runs(cleared.then)


def wire_deletion(wires: Wires) -> None:
    """Deleting a run: asked first, and then the one that was asked about."""
    panel, host = wires.history, wires.host
    asking = [panel.outcome, panel.confirm, panel.cancel, panel.asked]
    ask = functools.partial(history.ask_to_delete, host, wires.jobs)
    wires.on(panel.delete.click, ask, [panel.run], asking, panel.outcome)
    delete = functools.partial(history.delete, host, wires.jobs)
    deleted = wires.on(panel.confirm.click, delete, [panel.asked], asking, panel.outcome)
    in_browser(wires.list_runs(deleted.then).then, REFRESH_STYLES)
    wires.on(panel.cancel.click, history.keep, [], asking, panel.outcome)
