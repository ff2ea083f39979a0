"""Events of the tab "Use": its run, its sliders, and the jobs that it begins."""

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
    """The run, and what needs no job."""
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
    for button, what in ((use.mix.equal, "equal"), (use.mix.reset, "reset")):
        in_browser(button.click, _MIX % what)
    shown = [listed.run, listed.title]
    _prompt(wires, "mix", use.mix, use.mix.tags, (explain_sent_prompt, shown))
    shown = [outcomes.fitted, outcomes.title]
    _prompt(wires, "fit", use.fit, outcomes.tags, (explain_sent_fit, shown))
    save = functools.partial(save_fit_style, host)
    saved = wires.on(
        use.fit.save_style.click, save, [outcomes.fitted], [use.fit.note], use.fit.note
    )
    in_browser(saved.then, REFRESH_STYLES)


def wire_use_jobs(wires: Wiring) -> None:
    """What takes its time, and Stop."""
    use, more, run = wires.use, wires.use.more, wires.use.listed.run
    listed, mix, fit = use.listed, use.mix, use.fit
    asked = [run, listed.fitted, fit.topup, fit.name, fit.replace]
    _job(wires, "fit", fit.fit, start_fit, asked)
    _job(wires, "fit", fit.absorb, start_extension, [run, listed.fitted, fit.name])
    for button in (fit.fit, fit.absorb):
        wires.on(button.click, hide_fit_tags, [], [use.outcomes.tags_group], use.message)
    asked = [run, mix.shares, mix.name]
    _job(wires, "mix", mix.write, start_mixture, asked, _SHARES)
    asked = [run, listed.restored, more.restore_dtype, more.restore_name]
    _job(wires, "restore", more.restore, start_restore, asked)
    asked = [run, listed.exported, more.export_rank, more.export_replace]
    _job(wires, "export", more.export, start_export, asked)
    _job(wires, "safe", more.safe, start_deletable_check, [run, more.threshold])
    asked = [listed.base, listed.turned, more.extract_rank, more.extract_name]
    _job(wires, "extract", more.extract, start_extraction, asked)
    stop = functools.partial(stop_job, wires.jobs)
    wires.on(use.stop.click, stop, [], [use.message], use.message)


def _prompt(
    wires: Wiring,
    name: str,
    panel: MixPanel | FitPanel,
    tags: Any,
    sent: tuple[Callable[..., str], list[Any]],
) -> None:
    """Tags that are copied, or sent; `sent` says what is left to do, of run and title."""
    say, shown = sent
    in_browser(panel.copy.click, _COPY % f"{name}_", [tags])
    in_browser(panel.send.click, SELECT, shown[1:])
    wires.on(panel.send.click, say, shown, [panel.note], panel.note)
    wires.host.connect_send(panel.send, tags)


def _job(
    wires: Wiring,
    panel: Panel,
    button: Any,
    start: Callable[..., str],
    inputs: Sequence[Any],
    code: str = "",
) -> None:
    """A button that begins a job: refusals, progress and outcome are said below it."""
    said = getattr(wires.use.outcomes, panel)
    begin = functools.partial(start, wires.host, wires.jobs)
    started = wires.on(button.click, begin, inputs, [said], said, code)
    wires.show_outcome(wires.watch(started.then, panel))
