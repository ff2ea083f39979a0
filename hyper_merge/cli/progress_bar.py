"""A run on the terminal: one bar with phase and time left, warnings above it; elsewhere a line at times."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from tqdm import tqdm

from hyper_merge.cli.output import say
from hyper_merge.runtime.progress import Progress

SECONDS_BETWEEN_LINES: Final = 5.0  # where standard error is no terminal


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Gives a progress that draws on the terminal; the bar goes away when the block is left.

    Where standard error is no terminal but a file or a pipe, a line every few seconds goes there.
    """
    warnings: set[str] = set()
    with (
        _noticing_ctrl_c() as was_pressed,
        tqdm(
            total=100.0,
            leave=False,
            file=sys.stderr,
            disable=None,  # where standard error is no terminal
            bar_format="{desc:28} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left",
        ) as bar,
    ):

        def on_progress(phase: str, fraction: float) -> None:
            bar.set_description_str(phase, refresh=False)
            bar.update(max(100.0 * fraction - bar.n, 0.0))

        def warn(message: str) -> None:
            if message not in warnings:
                warnings.add(message)
                bar.write(f"note: {message}", file=sys.stderr)

        yield Progress(_line_writer() if bar.disable else on_progress, was_pressed, warn)


@contextmanager
def _noticing_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C was pressed within the block.

    Where its exception would be lost, none is raised: the work ends when the function is asked next.
    """
    pressed = threading.Event()
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def notice(number: int, frame: FrameType | None) -> None:
        pressed.set()
        if not _loses_errors(frame):
            usual(number, frame)

    signal.signal(signal.SIGINT, notice)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, usual)


def _loses_errors(frame: FrameType | None) -> bool:
    """Tells whether Python prints an error that is raised in a frame, and goes on.

    It does in finalizers and in callbacks of the garbage collector, such as dask has.
    """
    functions = [getattr(callback, "__func__", callback) for callback in gc.callbacks]
    callbacks = {getattr(function, "__code__", None) for function in functions}
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _line_writer() -> Callable[[str, float], None]:
    """Returns a function that writes phase and fraction as a line now and then, never at once."""
    start = last = time.monotonic()

    def on_progress(phase: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        elapsed = now - start
        line = f"{phase}: {fraction:.0%}, {tqdm.format_interval(elapsed)} so far"
        if 0.0 < fraction < 1.0:
            line += f", {tqdm.format_interval(elapsed / fraction - elapsed)} left"
        say(line, sys.stderr)

    return on_progress


def say_above(message: str) -> None:
    """Writes a line to standard output, above the bar where one is drawn."""
    tqdm.write(message, file=sys.stdout)
