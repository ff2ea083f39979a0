"""Checks the free space on disks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from hyper_merge.errors import OutputError
from hyper_merge.runtime.formatting import format_size


def require_disks(needed: Mapping[Path, int]) -> None:
    """Returns if the disks of all folders have enough free space; the folders need not exist yet.

    Args:
        needed: bytes by folder; the needs of folders on one disk add up.

    Raises:
        OutputError: too little is free; the message gives both numbers.
    """
    total: dict[int, int] = {}
    for folder, size in needed.items():
        if not size:
            continue
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        disk = existing.stat().st_dev
        total[disk] = total.get(disk, 0) + size
        free = shutil.disk_usage(existing).free
        if free < total[disk]:
            raise OutputError(
                f"{folder} needs {format_size(total[disk])} but its disk has"
                f" {format_size(free)} free",
                hint="make room or choose another output folder",
            )
