"""Wires a single event: quick or queued, in Python or in the browser; no error leaves a handler.

Handlers return refusals themselves. An unexpected error goes to the host's log in full, and as one line
to a widget of the tab.
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
    fn: Callable[..., Any], outputs: Sequence[Any], message: Any, log: Log
) -> tuple[Callable[..., Any], list[Any]]:
    """Returns a handler that never raises, and its outputs, among them always `message`.

    Args:
        fn: the handler; returns one value per output, not in a tuple if there is just one.
        outputs: widgets.
        message: HTML widget that shows an unexpected error.
        log: takes the error.
    """
    all_outputs = [*outputs] if message in outputs else [*outputs, message]

    def answer(*values: Any) -> Any:
        try:
            results = fn(*values)
        except Exception as error:
            log(error)
            text = format_unexpected_error(error)
            results = tuple(text if widget is message else gr.update() for widget in outputs)
            missing: tuple[Any, ...] = (text,)
        else:
            results = results if len(outputs) > 1 else (results,) * len(outputs)
            missing = (gr.update(),)
        row = (*results, *missing)[: len(all_outputs)]
        return row if len(row) != 1 else row[0]

    return _like(fn, answer), all_outputs


def guarded_stream(
    fn: Callable[..., Iterator[Any]], last: Callable[[str], Any], log: Log
) -> Callable[..., Iterator[Any]]:
    """Returns a generator that never raises; after an error it yields `last` of the error's text."""

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
        trigger: a method such as `button.click` or `event.then`.
        code: a JavaScript function, which takes the inputs' values and returns a list of values.
        inputs: widgets; None for none.
        outputs: widgets; None for none.
    """
    return trigger(None, inputs, outputs, **browser_code(code), **quiet_event(queued=False))


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
        trigger: a method such as `button.click` or `event.then`.
        fn: the handler.
        inputs: widgets.
        outputs: widgets.
        queued: whether it may take long or sends several results, which needs gradio's queue.
        code: a JavaScript function, which first replaces the inputs' values by a list of its own.
            Nothing can follow an event that only the browser answers.
    """
    first = browser_code(code) if code else {}
    return trigger(fn, list(inputs), list(outputs), **first, **quiet_event(queued=queued))


def _like(fn: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the answer the handler's signature, by which gradio checks the number of inputs."""
    functools.update_wrapper(answer, fn)
    answer.__annotations__ = {}  # gradio looks for their names in the handler's module; a partial has none
    return answer
