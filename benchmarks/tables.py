"""Tables of figures as aligned Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a Markdown table whose columns stand below one another; words left, figures right."""
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(2, *map(len, column)) for column in columns]  # a rule needs a dash
    is_words = [any(cell and not cell[0].isdigit() for cell in column[1:]) for column in columns]
    sides = list(zip(widths, is_words, strict=True))
    rule = ["-" * width if words else "-" * (width - 1) + ":" for width, words in sides]
    return "\n".join(_line(line, sides) for line in (heads, rule, *rows))


def _line(cells: Sequence[str], sides: Sequence[tuple[int, bool]]) -> str:
    padded = (
        cell.ljust(width) if words else cell.rjust(width)
        for cell, (width, words) in zip(cells, sides, strict=True)
    )
    return f"| {' | '.join(padded)} |"
