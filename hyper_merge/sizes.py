"""How numbers of bytes are said: decimal units everywhere, as on the boxes of disks."""

from __future__ import annotations

from typing import Final

GB: Final = 10**9


def size_text(count: float) -> str:
    """Bytes for people.

    >>> size_text(2_132_000_000), size_text(584_000_000), size_text(12_000)
    ('2.13 GB', '584 MB', '12 kB')
    """
    if count >= 999.5e6:
        return f"{count / GB:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 999.5e3 else f"{count / 1e3:.0f} kB"
