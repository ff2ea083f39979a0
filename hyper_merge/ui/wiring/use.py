"""Wires the events of the tab "Use": its run, its sliders, and the jobs that it starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from hyper_merge.ui.handlers.merge import stop_job
from hyper_merge.ui.handlers.send import send_fit_tags, send_tags
from hyper_merge.ui.handlers.use import (
    Panel,
    choose_used_run,
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
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.common import CLEARED, REFRESH_STYLES, Wiring
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
    in_browser(listed.run.input, CLEARED, None, [use.message])
    for button, mode in ((use.mix.equal, "equal"), (use.mix.reset, "reset")):
        in_browser(button.click, _MIX % mode)
    mix, fit = use.mix, use.fit
    in_browser(mix.copy.click, _COPY % "mix_", [mix.tags])
    wires.send(mix.send, send_tags, mix.tags, listed.run, listed.title, mix)
    in_browser(fit.copy.click, _COPY % "fit_", [outcomes.tags])
    wires.send(fit.send, send_fit_tags, outcomes.tags, outcomes.fitted, outcomes.title, fit)
    save = functools.partial(save_fit_style, host)
    saved = wires.on(fit.save_style.click, save, [outcomes.fitted], [fit.note], fit.note)
    in_browser(saved.then, REFRESH_STYLES)


def wire_use_jobs(wires: Wiring) -> None:
    """Wires the jobs, and Stop."""
    use, more, run = wires.use, wires.use.more, wires.use.listed.run
    listed, mix, fit = use.listed, use.mix, use.fit
    inputs = [run, listed.fitted, fit.topup, fit.name, fit.replace, fit.damaged]
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
    inputs.append(more.extract_damaged)
    _wire_job(wires, "extract", more.extract, start_extraction, inputs)
    stop = functools.partial(stop_job, wires.jobs)
    wires.on(use.stop.click, stop, [], [use.message], use.message)


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
    wires.watch(started.then, outcome, panel)
