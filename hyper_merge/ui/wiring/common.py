"""Holds the panels with host and jobs, and wires the events that several panels share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.operations.catalogue import Catalogue
from hyper_merge.ui.handlers import history
from hyper_merge.ui.handlers.merge import show_merge_result
from hyper_merge.ui.handlers.picker import list_checkpoints, show_plan
from hyper_merge.ui.handlers.use import (
    Panel,
    list_usable_runs,
    show_outcome,
    watch_job_in_both_tabs,
)
from hyper_merge.ui.panels.compare import ComparePanel
from hyper_merge.ui.panels.history import HistoryPanel
from hyper_merge.ui.panels.loras import LoraPanel
from hyper_merge.ui.panels.picker import PickerPanel
from hyper_merge.ui.panels.presets import PresetsPanel
from hyper_merge.ui.panels.result import ResultPanel
from hyper_merge.ui.panels.run import RunPanel
from hyper_merge.ui.panels.settings import FormWidgets
from hyper_merge.ui.panels.size import SizePanel
from hyper_merge.ui.panels.use import UsePanel
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.wiring.events import guarded, guarded_stream, in_browser, in_python

Trigger = Callable[..., Any]
"""A method such as `button.click` or `event.then`."""

LISTED = "(list) => { hyperMergePicker.list(list); return []; }"
CLEARED = "() => ''"  # of a message about what was chosen before
REPLAN = "() => { hyperMerge.replan(); return []; }"
_KEEP = "(...values) => { hyperMergeForm.keep(%s, values.slice(1)); return values; }"
_TXT2IMG = "(tags, run, title, _) => [tags, run, title, hyperMerge.txt2img()]"
_SEND = "(sent, title) => { hyperMerge.send(sent, title); return []; }"
REFRESH_STYLES = "() => { hyperMerge.refresh('styles'); return []; }"
_REFRESH_ALL = "(run) => { hyperMerge.refresh('all', run); return []; }"
REFRESH_FILES = "(task) => { hyperMerge.refresh('files', task); return []; }"


@dataclass(frozen=True)
class Wiring:
    """Everything that events need. Each method wires a handler to a trigger and returns the event."""

    host: Host
    jobs: Jobs
    catalogue: Catalogue
    picker: PickerPanel
    form: FormWidgets
    preset: PresetsPanel
    presets: list[gr.Button]
    size: SizePanel
    run: RunPanel
    result: ResultPanel
    history: HistoryPanel
    use: UsePanel
    compare: ComparePanel
    loras: LoraPanel

    def on(
        self,
        trigger: Trigger,
        fn: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        message: Any = None,
        code: str = "",
    ) -> Any:
        """Wires a quick handler.

        Args:
            trigger: the event that it answers.
            fn: the handler; an unexpected error in it is logged and shown.
            inputs: widgets.
            outputs: widgets, one per value.
            message: widget that shows an unexpected error; None for the message of the tab "Merge".
            code: a JavaScript function that first replaces the inputs' values; empty for none.
        """
        answer, widgets = guarded(fn, outputs, message or self.run.message, self.host.log)
        return in_python(trigger, answer, inputs, widgets, code=code)

    def list_checkpoints(self, trigger: Trigger) -> Any:
        """Reads the host's list of checkpoints again."""
        listed = self.on(
            trigger,
            functools.partial(list_checkpoints, self.host, self.catalogue),
            [],
            [self.picker.catalogue, self.form.base, self.picker.demo],
        )
        in_browser(listed.then, LISTED, [self.picker.catalogue])
        return listed

    def plan(self, trigger: Trigger) -> Any:
        """Describes the merge of the picked checkpoints."""
        run, size, groups = self.run, self.size, in_order(self.picker.groups)
        return self.on(
            trigger,
            functools.partial(show_plan, self.host, self.catalogue),
            [groups[0], *in_order(self.form)],
            [run.plan, self.form.name, size.choice, size.forecast, *groups],
            message=run.plan,
            code=_KEEP % json.dumps([field.name for field in fields(self.form)]),
        )

    def list_runs(self, trigger: Trigger) -> Any:
        """Reads the list of runs again, in the tabs "Use" and "Runs", and the size of the cache."""
        listed = in_order(self.use.listed)
        self.on(
            trigger,
            functools.partial(list_usable_runs, self.host),
            [*listed[:2], *listed[5:]],
            listed,
            message=self.use.message,
        )
        panel = self.history
        return self.on(
            trigger,
            functools.partial(history.list_earlier_runs, self.host),
            [panel.run, panel.other],
            [panel.table, panel.run, panel.other, panel.cache],
            message=panel.outcome,
        )

    def show(self, trigger: Trigger, fn: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Shows a run in the result panel, by a handler that returns all values of its widgets."""
        return self.on(
            trigger, fn, inputs, in_order(self.result.view), message=self.result.view.empty
        )

    def send(
        self, button: Any, fn: Callable[..., Any], tags: Any, run: Any, title: Any, panel: Any
    ) -> None:
        """Wires a button that selects a hyper-model and puts tags into the prompt of txt2img.

        Args:
            button: the button.
            fn: `send_tags`, or a handler like it.
            tags: the box of tags.
            run: the widget that holds the run, as the handler takes it.
            title: the widget that holds the title of its hyper-model.
            panel: the panel, whose `note` says what was done and whose `sent` holds it.
        """
        note = self.result.view.note if panel is self.result else panel.note
        handler = functools.partial(fn, self.host)
        inputs, outputs = [tags, run, title, panel.sent], [panel.sent, note]
        sent = self.on(button.click, handler, inputs, outputs, note, _TXT2IMG)
        in_browser(sent.then, _SEND, [panel.sent, title])

    def watch(self, trigger: Trigger, refusal: Any = None, panel: Panel | None = None) -> Any:
        """Follows the running job until it ends, also in the panel that started it.

        Args:
            trigger: the event that it answers.
            refusal: the widget that says why no job was started; None where none was to be.
            panel: the panel whose button was pressed; None for none of the tab "Use".
        """
        outputs = [
            *(self.run.status, self.run.stop, self.run.message),
            *(self.use.status, self.use.stop, self.use.message, self.run.ended),
            *([getattr(self.use.outcomes, panel)] if panel else ()),
        ]
        answers = guarded_stream(
            functools.partial(watch_job_in_both_tabs, self.jobs, panel),
            lambda text: (*(text, gr.update(), gr.update()) * 2, gr.update(), text)[: len(outputs)],
            self.host.log,
        )
        inputs = [] if refusal is None else [refusal]
        return in_python(trigger, answers, inputs, outputs, queued=True)

    def show_outcome(self) -> Any:
        """Shows the result of each job that ends, reads all lists and the plan again.

        It follows the end itself and no button: what was refused changes nothing. Returns the result's
        event.
        """
        outcomes, ended = self.use.outcomes, self.run.ended.change
        outcome = self.on(
            ended,
            functools.partial(show_outcome, self.jobs),
            [],
            in_order(outcomes),
            message=self.use.message,
        )
        in_browser(outcome.then, REFRESH_FILES, [outcomes.wrote])
        view = self.show(ended, functools.partial(show_merge_result, self.host, self.jobs), [])
        in_browser(view.then, _REFRESH_ALL, [self.result.view.run])
        in_browser(self.list_runs(view.then).then, REPLAN)
        return view
