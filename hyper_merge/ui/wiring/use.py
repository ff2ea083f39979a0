"""Wires the events of the tab "Use": its run, its sliders, and the jobs that it starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from hyper_merge.ui.handlers.merge import stop_job
from hyper_merge.ui.handlers.result import explain_sent_prompt
from hyper_merge.ui.handlers.use import (
    Panel,
    choose_used_run,
    explain_sent_fit,
    hide_fit_tags,
    save_fit_style,
)
from hyper_merge.ui.handlers.use_actions import (
    start_deletable_check,
    start_export,
    start_extension,
    start_extraction,
    start_fit,
    start_mixture,
    start_restore,
)
from hyper_merge.ui.panels.use import FitPanel, MixPanel
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.common import REFRESH_STYLES, SELECT, Wiring
from hyper_merge.ui.wiring.events import in_browser

_COPY = "(text) => { hyperMerge.copy(text, '%s'); return []; }"
_MIX = "() => { hyperMerge.mix('%s'); return []; }"
_SHARES = "(run, _, name) => [run, hyperMerge.shares(), name]"


def wire_use(wires: Wiring) -> None:
    """Wires the run, and everything that needs no job."""
    use, host = wires.use, wires.host
    listed, outcomes = use.listed, use.outcomes
    refreshed = wires.on(use.refresh.click, host.refresh, [], [], use.message)
    wires.list_runs(refreshed.then)
    wires.on(
        listed.run.input,
        functools.partial(choose_used_run, host),
        [listed.run, listed.restored, listed.exported],
        [*in_order(listed)[2:7], *in_order(outcomes)[:7]],
        use.message,
    )
    for button, mode in ((use.mix.equal, "equal"), (use.mix.reset, "reset")):
        in_browser(button.click, _MIX % mode)
    mix_run = [listed.run, listed.title]
    _wire_tags(wires, "mix", use.mix, use.mix.tags, explain_sent_prompt, mix_run)
    fit_run = [outcomes.fitted, outcomes.title]
    _wire_tags(wires, "fit", use.fit, outcomes.tags, explain_sent_fit, fit_run)
    save = functools.partial(save_fit_style, host)
    saved = wires.on(
        use.fit.save_style.click, save, [outcomes.fitted], [use.fit.note], use.fit.note
    )
    in_browser(saved.then, REFRESH_STYLES)


def wire_use_jobs(wires: Wiring) -> None:
    """Wires the jobs, and Stop."""
    use, more, run = wires.use, wires.use.more, wires.use.listed.run
    listed, mix, fit = use.listed, use.mix, use.fit
    inputs = [run, listed.fitted, fit.topup, fit.name, fit.replace]
    _wire_job(wires, "fit", fit.fit, start_fit, inputs)
    _wire_job(wires, "fit", fit.absorb, start_extension, [run, listed.fitted, fit.name])
    for button in (fit.fit, fit.absorb):
        wires.on(button.click, hide_fit_tags, [], [use.outcomes.tags_group], use.message)
    inputs = [run, mix.shares, mix.name]
    _wire_job(wires, "mix", mix.write, start_mixture, inputs, _SHARES)
    inputs = [run, listed.restored, more.restore_dtype, more.restore_name]
    _wire_job(wires, "restore", more.restore, start_restore, inputs)
    inputs = [run, listed.exported, more.export_rank, more.export_replace]
    _wire_job(wires, "export", more.export, start_export, inputs)
    _wire_job(wires, "safe", more.safe, start_deletable_check, [run, more.threshold])
    inputs = [listed.base, listed.target, more.extract_rank, more.extract_name]
    _wire_job(wires, "extract", more.extract, start_extraction, inputs)
    stop = functools.partial(stop_job, wires.jobs)
    wires.on(use.stop.click, stop, [], [use.message], use.message)


def _wire_tags(
    wires: Wiring,
    name: str,
    panel: MixPanel | FitPanel,
    tags: Any,
    explain: Callable[..., str],
    run: list[Any],
) -> None:
    """Wires the buttons that copy and send prompt tags.

    Args:
        wires: the tab.
        name: first part of the ids of the panel's box and button.
        panel: the panel with the buttons.
        tags: the box of tags.
        explain: returns a request to the user after sending; empty if there is none.
        run: the widgets that hold the run and the title of its hyper-model.
    """
    in_browser(panel.copy.click, _COPY % f"{name}_", [tags])
    in_browser(panel.send.click, SELECT, run[1:])
    wires.on(panel.send.click, explain, run, [panel.note], panel.note)
    wires.host.connect_send(panel.send, tags)


def _wire_job(
    wires: Wiring,
    panel: Panel,
    button: Any,
    start: Callable[..., str],
    inputs: Sequence[Any],
    code: str = "",
) -> None:
    """Wires a button that starts a job; refusals, progress and result appear below it."""
    outcome = getattr(wires.use.outcomes, panel)
    begin = functools.partial(start, wires.host, wires.jobs)
    started = wires.on(button.click, begin, inputs, [outcome], outcome, code)
    wires.show_outcome(wires.watch(started.then, panel))
