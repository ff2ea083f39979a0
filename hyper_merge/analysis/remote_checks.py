"""Refuses workers that cannot take part in a pass, before any work: by what they see, and by their memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hyper_merge.analysis.device_bytes import IN_FLIGHT
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.remote_pass import chunk_memory, portable
from hyper_merge.analysis.streaming_pass import PassOptions, pass_costs
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.leftovers import claimed
from hyper_merge.checkpoints.io.output_errors import as_output_error
from hyper_merge.checkpoints.io.temporary_names import TEMPORARY, temporary_path
from hyper_merge.errors import ClusterError
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.remote import RemoteWorkers

_PROCESS: Final = 400 * 2**20  # bytes: Python, torch, and what the files' headers take
_USABLE: Final = 0.9  # of a limit: at 0.95 of it dask ends a worker


def require_workers(
    workers: RemoteWorkers, inputs: MergeInputs, options: PassOptions, folder: Path
) -> None:
    """Returns if every worker sees the files and the folder, and has memory for the largest tensor.

    Args:
        workers: that will take part in the pass.
        inputs: the files.
        options: the options of the pass.
        folder: for the shards; it need not exist yet.

    Raises:
        ClusterError: a worker does not, or has too little.
    """
    _require_memory(workers, inputs, options)
    headers = portable(inputs).read
    with _token(folder) as (path, text):
        faults = workers.on_each(_find_fault, headers, path, text)
    for name, fault in faults.items():
        if fault:
            raise ClusterError(
                f"the worker {name} {fault}",
                hint="checkpoints and models folder must lie on storage that every worker sees under"
                " the same paths",
            )


def _require_memory(workers: RemoteWorkers, inputs: MergeInputs, options: PassOptions) -> None:
    sizes = {key: chunk_memory(inputs, options, key) for key in pass_costs(inputs, options)}
    largest = max(sizes, key=sizes.__getitem__)
    for worker in workers.workers:
        at_once = max(sizes[largest], min(worker.slots * sizes[largest], IN_FLIGHT))
        needed = _PROCESS + at_once
        if worker.memory is not None and needed > _USABLE * worker.memory:
            raise ClusterError(
                f"the worker {worker.name} may take {format_size(worker.memory)} of memory, and needs"
                f" about {format_size(needed)} for {largest} of {len(inputs.read)} files",
                hint=f"give each worker {format_size(int(needed / _USABLE) + 1)} or more",
            )


@contextmanager
def _token(folder: Path) -> Iterator[tuple[Path, str]]:
    """Gives the path of a file in a folder, or in the first above that exists, and its text."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    text = secrets.token_hex(16)
    with claimed(place) as owner:
        path = temporary_path(place / "_", TEMPORARY, owner)
        try:
            with as_output_error(path):
                path.write_text(text, encoding="ascii")
            yield path, text
        finally:
            with suppress(OSError):
                path.unlink()


def _find_fault(headers: Sequence[Header], token: Path, text: str) -> str | None:
    """Returns what keeps a worker, which calls this, from taking part; None if nothing does."""
    for header in headers:
        try:
            status = header.path.stat()
        except OSError as error:
            return f"does not see {header.path} ({error.strerror})"
        if (status.st_size, status.st_mtime_ns) != (header.size, header.mtime_ns):
            return f"sees another file as {header.path}: size or time of change differ"
    try:
        if token.read_text(encoding="ascii") != text:
            return f"sees another folder as {token.parent}"
    except (OSError, ValueError):
        return f"does not see the folder {token.parent}, or sees another one there"
    probe = temporary_path(token, TEMPORARY)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"may not write to the folder {token.parent} ({error.strerror})"
    return None
