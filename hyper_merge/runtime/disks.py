"""What disks say of themselves: their free space and their time."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
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


def disk_time(folder: Path) -> float:
    """Returns the time in seconds by the clock of a folder's disk, which may be another machine's.

    Where nothing can be written there it is our own clock's.
    """
    probe = folder / f".hyper-merge-{secrets.token_hex(8)}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()
