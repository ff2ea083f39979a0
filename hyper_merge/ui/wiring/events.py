"""Wiring one event: quick or queued, in Python or in the browser; no error ever leaves a handler.

What was refused is a handler's own answer. An error that nobody expected goes in full to the host's
log, and in one line to a widget of the tab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from hyper_merge.ui.compat import browser_code, quiet_event
from hyper_merge.ui.html.common import format_unexpected_error

Log = Callable[[BaseException], None]


def guarded(
    fn: Callable[..., Any], outputs: Sequence[Any], said: Any, log: Log
) -> tuple[Callable[..., Any], list[Any]]:
    """A handler that never raises, and its outputs, to which `said` is added where it lacks.

    Args:
        fn: gives one value per output, bare where there is one.
        outputs: widgets.
        said: HTML that shows what went wrong.
        log: takes the error.
    """
    all_outputs = [*outputs] if said in outputs else [*outputs, said]

    def answer(*values: Any) -> Any:
        try:
            given = fn(*values)
        except Exception as error:
            log(error)
            text = format_unexpected_error(error)
            given = tuple(text if widget is said else gr.update() for widget in outputs)
            missing: tuple[Any, ...] = (text,)
        else:
            given = given if len(outputs) > 1 else (given,) * len(outputs)
            missing = (gr.update(),)
        row = (*given, *missing)[: len(all_outputs)]
        return row if len(row) != 1 else row[0]

    return _like(fn, answer), all_outputs


def guarded_stream(
    fn: Callable[..., Iterator[Any]], last: Callable[[str], Any], log: Log
) -> Callable[..., Iterator[Any]]:
    """A handler that gives value after value and never raises; `last` is what an error ends with."""

    def answers(*values: Any) -> Iterator[Any]:
        try:
            yield from fn(*values)
        except Exception as error:
            log(error)
            yield last(format_unexpected_error(error))

    return _like(fn, answers)


def in_browser(
    trigger: Callable[..., Any],
    code: str,
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
) -> Any:
    """Wires an event that only the browser answers.

    Args:
        trigger: such as `button.click`, or `event.then`.
        code: of a JavaScript function, which takes the inputs' values and gives a list of values.
        inputs: widgets; None for none.
        outputs: widgets; None for none.
    """
    return trigger(None, inputs, outputs, **browser_code(code))


def in_python(
    trigger: Callable[..., Any],
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *,
    queued: bool = False,
    code: str = "",
) -> Any:
    """Wires an event that a guarded handler answers.

    Args:
        trigger: such as `button.click`, or `event.then`.
        fn: the handler.
        inputs: widgets.
        outputs: widgets.
        queued: as for `compat.quiet`.
        code: of a JavaScript function, which makes a list of inputs' values out of them first.
            Nothing can follow an event that only the browser answers.
    """
    first = browser_code(code) if code else {}
    return trigger(fn, list(inputs), list(outputs), **first, **quiet_event(queued=queued))


def _like(fn: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """The answer with the handler's signature, by which gradio checks the number of inputs."""
    functools.update_wrapper(answer, fn)
    answer.__annotations__ = {}  # gradio looks for their names in the handler's module; a partial has none
    return answer
