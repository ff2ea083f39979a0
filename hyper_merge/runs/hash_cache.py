"""Hashes of the source files, which hosts know checkpoints by; remembered, for they take a while."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Final

import torch

from hyper_merge.checkpoints.io.hashes import file_sha256, legacy_hash
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.shared_text import put_text
from hyper_merge.loras.metadata import SourceRecord
from hyper_merge.runtime.file_lock import alone
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress

_FILE: Final = "hashes.json"


def bytes_to_hash(headers: Iterable[Header], cache: Path | None) -> int:
    """Of the files whose hashes are not known yet."""
    known = _known(cache)
    return sum(header.size for header in headers if _key(header) not in known)


def hash_sources(
    headers: Sequence[Header], cache: Path | None, progress: Progress
) -> tuple[SourceRecord, ...]:
    """Names and hashes of files; those of unchanged files come from the cache folder.

    Args:
        headers: of the files.
        cache: folder where hashes are remembered; None to remember none.
        progress: progress and interrupt.
    """
    known = _known(cache)
    new = [header for header in headers if _key(header) not in known]

    counter = progress.counter("hashing the checkpoints", {_key(each): each.size for each in new})

    def sha256(header: Header) -> str:
        return file_sha256(header.path, partial(counter.add, _key(header)))

    with parallel_map(torch.device("cpu"), counter.tell) as each, counter:
        for header, digest in zip(new, each(sha256, new), strict=True):
            known[_key(header)] = digest
            counter.finish(_key(header))
    if new and cache:
        with alone(cache / _FILE):  # others have added theirs meanwhile
            known = _known(cache) | known
            put_text(cache / _FILE, json.dumps(known, indent=1))
    return tuple(_source(header, known[_key(header)]) for header in headers)


def find_by_hash(sha256: str, cache: Path) -> list[Path]:
    """Where files with a hash were when it was found; they may be gone or changed since."""
    known = _known(cache).items()
    return [Path(key.rsplit("|", 2)[0]) for key, digest in known if digest == sha256]


def current_time() -> str:
    """The time in ISO 8601, as files and manifests have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _source(header: Header, sha256: str) -> SourceRecord:
    return SourceRecord(header.name, sha256, legacy_hash(header.path), header.metadata)


def _key(header: Header) -> str:
    return f"{header.path.resolve()}|{header.size}|{header.mtime_ns}"


def _known(cache: Path | None) -> dict[str, str]:
    if cache is None:
        return {}
    try:
        known = json.loads((cache / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
