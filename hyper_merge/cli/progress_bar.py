"""A run on the terminal: one bar with phase and time left, warnings above it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from hyper_merge.runtime.progress import Progress


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Gives a progress that draws on the terminal; the bar goes away when the block is left."""
    warnings: set[str] = set()
    with tqdm(
        total=100.0,
        leave=False,
        file=sys.stderr,
        disable=None,  # where standard error is no terminal, only messages go there
        bar_format="{desc:28} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left",
    ) as bar:

        def on_progress(phase: str, fraction: float) -> None:
            bar.set_description_str(phase, refresh=False)
            bar.update(max(100.0 * fraction - bar.n, 0.0))

        def warn(message: str) -> None:
            if message not in warnings:
                warnings.add(message)
                bar.write(f"note: {message}", file=sys.stderr)

        yield Progress(on_progress, lambda: False, warn)


def say_above(message: str) -> None:
    """Writes a line to standard output, above the bar where one is drawn."""
    tqdm.write(message, file=sys.stdout)
