"""Formats sizes, durations and counts as text; sizes are in decimal units everywhere, as disks are sold."""

from __future__ import annotations

from typing import Final

GB: Final = 10**9


def format_size(count: float) -> str:
    """Returns a number of bytes as text.

    >>> format_size(2_132_000_000), format_size(584_000_000), format_size(12_000)
    ('2.13 GB', '584 MB', '12 kB')
    """
    if count >= 999.5e6:
        return f"{count / GB:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 999.5e3 else f"{count / 1e3:.0f} kB"


def format_duration(seconds: float) -> str:
    """Returns an expected duration as a person would put it.

    >>> format_duration(268)
    'about 4 minutes'
    """
    if seconds < 8:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds / 10) * 10} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {round(seconds / 3600, 1):g} hours"


def format_count(count: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless it is 1."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
