"""Computes the hashes by which hosts know checkpoints, and remembers them, since it takes a while."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Final

import torch

from hyper_merge.checkpoints.io.hashes import file_sha256, legacy_hash
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.shared_text import put_text
from hyper_merge.errors import OutputError
from hyper_merge.loras.metadata import SourceRecord
from hyper_merge.runtime.checked_json import read_sealed, sealed
from hyper_merge.runtime.damaged_files import DamagedFiles
from hyper_merge.runtime.file_lock import alone
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress, ProgressCounter
from hyper_merge.runtime.remote import Check, RemoteWorkers

_FILE: Final = "hashes.json"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def bytes_to_hash(headers: Iterable[Header], cache: Path | None) -> int:
    """Returns the bytes of the files whose hashes are not known yet."""
    known = _known(cache)
    return sum(header.size for header in headers if _key(header) not in known)


def hash_sources(
    headers: Sequence[Header],
    cache: Path | None,
    progress: Progress,
    workers: RemoteWorkers | None = None,
) -> tuple[SourceRecord, ...]:
    """Returns names and hashes of files; those of unchanged files come from the cache folder.

    Args:
        headers: of the files.
        cache: folder where hashes are remembered; None to remember none.
        progress: progress and interrupt.
        workers: hash in place of this process; None for none.
    """
    known = _known(cache, progress.warn)
    new = [header for header in headers if _key(header) not in known]

    counter = progress.counter(
        "hashing the checkpoints", {_key(header): header.size for header in new}
    )
    hashing = _hashed_here(new, counter) if workers is None else _hashed_on(workers, new, counter)
    with hashing as digests:
        for header, digest in zip(new, digests, strict=True):
            known[_key(header)] = digest
            counter.finish(_key(header))
    if new and cache:
        with alone(cache / _FILE):  # other processes may have added hashes since
            known = _known(cache, progress.warn) | known
            _remember(known, cache / _FILE, progress.warn)
    return tuple(_source(header, known[_key(header)]) for header in headers)


@contextmanager
def _hashed_here(headers: Sequence[Header], counter: ProgressCounter) -> Iterator[Iterator[str]]:
    """Gives the hashes of files, computed in threads of this process."""

    def sha256(header: Header) -> str:
        return file_sha256(header.path, partial(counter.add, _key(header)))

    with parallel_map(torch.device("cpu"), counter.report) as parallel, counter:
        yield parallel(sha256, headers)


def _hashed_on(
    workers: RemoteWorkers, headers: Sequence[Header], counter: ProgressCounter
) -> AbstractContextManager[Iterator[str]]:
    """Gives the hashes of files, computed by workers that see them."""
    paths = [header.path.absolute() for header in headers]
    return workers.mapped(_sha256_of, None, paths, counter.report)


def _sha256_of(_common: None, path: Path, check: Check) -> str:
    return file_sha256(path, lambda _count: check())


def find_by_hash(sha256: str, cache: Path) -> list[Path]:
    """Returns the files of a hash that is remembered, as far as they did not change since."""
    keys = [key for key, digest in _known(cache).items() if digest == sha256]
    return [path for key in keys if (path := _unchanged(key))]


def _unchanged(key: str) -> Path | None:
    """Returns the path of a file's key if the file is still the one of that key; else None."""
    try:
        path, size, mtime_ns = key.rsplit("|", 2)
        status = Path(path).stat()
    except (OSError, ValueError):  # gone, or never a key of ours
        return None
    return (
        Path(path) if (str(status.st_size), str(status.st_mtime_ns)) == (size, mtime_ns) else None
    )


def current_time() -> str:
    """Returns the time in ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _source(header: Header, sha256: str) -> SourceRecord:
    return SourceRecord(header.name, sha256, legacy_hash(header.path), header.metadata)


def _key(header: Header) -> str:
    return f"{header.path.resolve()}|{header.size}|{header.mtime_ns}"


def _known(cache: Path | None, warn: Callable[[str], None] | None = None) -> dict[str, str]:
    """Returns hashes by the files' keys; none where there is no file or a damaged one.

    Args:
        cache: its folder; None for no file.
        warn: called with a message about a damaged file, which is set aside then; None to leave it
            where it is.
    """
    if cache is None:
        return {}
    try:
        known = read_sealed(cache / _FILE)
        _require_hashes(known)
    except OSError:
        return {}
    except ValueError as error:
        if warn is not None:
            DamagedFiles(warn).take(cache / _FILE, str(error))
        return {}
    return dict(known)


def _remember(known: Mapping[str, str], path: Path, warn: Callable[[str], None]) -> None:
    """Replaces the file; where that is refused the run continues, and the next one hashes again."""
    try:
        put_text(path, sealed(known))
    except OutputError as error:
        warn(f"the hashes of the checkpoints are not remembered: {error}")


def _require_hashes(data: object) -> None:
    """Returns if plain data are hashes by keys.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(data, Mapping):
        raise ValueError("expected hashes by file")  # noqa: TRY004 - the file is wrong, not a type
    for key, digest in data.items():
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"expected 64 hex digits for {key!r:.200}, got {digest!r:.80}")
