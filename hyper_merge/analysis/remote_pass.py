"""Analyses the tensors of a pass on other processes or machines that see the same files.

Each worker reads its tensors from the checkpoints itself, and writes averages, bases and cores to shards in the
cache's folder; only small sums travel. The shards are read in the order of the pass and removed at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from hyper_merge.analysis.damaged_tensors import DamagedTensors
from hyper_merge.analysis.device_bytes import IN_FLIGHT, host_bytes
from hyper_merge.analysis.file_layout import layer_infos
from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.shards import Shard, ShardWriter, average_key, read_shard
from hyper_merge.analysis.streaming_pass import (
    AnalyzedTensor,
    AnalyzeTensors,
    PassOptions,
    analyze_tensor,
)
from hyper_merge.checkpoints.io.header import Header, TensorInfo, TensorsAsKey
from hyper_merge.checkpoints.io.leftovers import claimed
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.io.temporary_names import TEMPORARY, own_files, owner_of
from hyper_merge.runtime.devices import device_job
from hyper_merge.runtime.parallel import MemoryLimit, import_numpy_in_torch, return_memory
from hyper_merge.runtime.progress import ProgressCounter
from hyper_merge.runtime.remote import AHEAD, Check, RemoteWorkers

_PER_SLOT: Final = 16  # chunks: the last ones end at about the same time
_CHUNK_BYTES: Final = 2**30  # of all files that a chunk reads, unless it is one tensor
_SHARE_AHEAD: Final = 1.25 * AHEAD / _PER_SLOT  # of all results, that lie in shards at a time

# One slot of each worker has one thread, however many cores there are: the last digits of QR depend
# on the number of threads.
_THREADS: Final = 1

_MEMORY: Final = MemoryLimit(IN_FLIGHT)  # of this process, whatever its slots
_FIRST_CALL: Final = threading.Lock()


@dataclass(frozen=True)
class _Chunk:
    """Tensors that a worker analyses in one go."""

    keys: tuple[str, ...]

    def __str__(self) -> str:
        others = len(self.keys) - 1
        return self.keys[0] + (f" and {others} other tensors" if others else "")


@dataclass(frozen=True, eq=False)
class _PassJob:
    """What all chunks of a pass have in common."""

    inputs: MergeInputs
    options: PassOptions
    folder: Path  # of the shards
    owner: str  # digits with which their names begin
    with_average: bool

    @cached_property
    def damaged(self) -> DamagedTensors:
        """Finds what looks damaged; made once for each worker."""
        return DamagedTensors(self.inputs)

    @cached_property
    def average_infos(self) -> dict[str, TensorInfo]:
        """Types and shapes of the average's tensors, if they are wanted."""
        return self.inputs.outputs() if self.with_average else {}

    def __getstate__(self) -> dict[str, object]:
        fields = ("inputs", "options", "folder", "owner", "with_average")
        return {name: getattr(self, name) for name in fields}

    def shard_infos(self, keys: Iterable[str]) -> dict[str, TensorInfo]:
        """Returns types and shapes of a shard's tensors."""
        infos: dict[str, TensorInfo] = {}
        for key in keys:
            if key in self.average_infos:
                infos[average_key(key)] = self.average_infos[key]
            if self.options.width is not None:
                for _, index in self.inputs.pieces(key):
                    if index is not None:
                        infos.update(layer_infos(self.inputs, self.options, index))
        return infos


def analyze_on(workers: RemoteWorkers, folder: Path, *, with_average: bool) -> AnalyzeTensors:
    """Returns what analyses the tensors of a pass on workers.

    Args:
        workers: which see the checkpoints and the folder.
        folder: takes the shards; it exists.
        with_average: whether the tensors of the average are wanted.
    """

    @contextmanager
    def analyze(
        inputs: MergeInputs,
        options: PassOptions,
        costs: Mapping[str, float],
        counter: ProgressCounter,
    ) -> Iterator[Iterator[AnalyzedTensor]]:
        with claimed(folder) as owner:
            # Of the GPUs each worker has its own, which is the first that it sees.
            there = replace(options, device=torch.device(options.device.type))
            job = _PassJob(portable(inputs), there, folder.absolute(), owner, with_average)
            chunks = _chunks(inputs, costs, workers.slots)
            try:
                with workers.mapped(_analyze_chunk, job, chunks, counter.report) as shards:
                    yield _tensors_of(shards)
            finally:
                _remove_shards(folder, owner)

    return analyze


def portable(inputs: MergeInputs) -> MergeInputs:
    """Returns inputs that mean the same in every working directory, and that are small when pickled."""
    known: dict[TensorsAsKey, Header] = {}

    def header(original: Header) -> Header:
        alike = known.setdefault(TensorsAsKey(original), original)
        path = original.path.absolute()
        return replace(original, path=path, metadata={}, tensors=alike.tensors)

    base = inputs.base and header(inputs.base)
    return replace(inputs, headers=tuple(map(header, inputs.headers)), base=base)


def bytes_in_shards(results: int) -> int:
    """Returns the bytes that shards take on the disk at a time, from those of all results."""
    return int(_SHARE_AHEAD * results)


def chunk_memory(inputs: MergeInputs, options: PassOptions, key: str) -> int:
    """Returns about how many bytes of memory a worker takes for a tensor, besides what it always has."""
    read = sum(header.tensors[key].nbytes for header in inputs.read)
    return read + host_bytes(inputs, key, options.width_of)


def _chunks(inputs: MergeInputs, costs: Mapping[str, float], slots: int) -> list[_Chunk]:
    """Returns the tensors in their order, in chunks of about the same cost."""
    most = sum(costs.values()) / (_PER_SLOT * slots)
    chunks: list[_Chunk] = []
    keys: list[str] = []
    cost, nbytes = 0.0, 0
    for key in costs:
        size = sum(header.tensors[key].nbytes for header in inputs.read)
        if keys and (cost + costs[key] > most or nbytes + size > _CHUNK_BYTES):
            chunks.append(_Chunk(tuple(keys)))
            keys, cost, nbytes = [], 0.0, 0
        keys.append(key)
        cost, nbytes = cost + costs[key], nbytes + size
    return [*chunks, _Chunk(tuple(keys))] if keys else chunks


def _analyze_chunk(job: _PassJob, chunk: _Chunk, check: Check) -> Shard:
    """Analyses tensors on a worker, which reads them itself, into a new shard."""
    inputs, options = job.inputs, job.options
    with _FIRST_CALL:
        torch.set_num_threads(_THREADS)
        import_numpy_in_torch()
    infos = job.shard_infos(chunk.keys)
    path = job.folder / "shard"  # of which nothing is made but a temporary file
    file = SafetensorsWriter(path, infos, {}, deferred=True, owner=job.owner)
    try:
        with (
            device_job(options.device),
            open_checkpoints(inputs.read, mapped=False) as files,
            file as writer,
        ):
            shard = ShardWriter(writer, infos)
            for key in chunk.keys:
                check()
                with _MEMORY.holding(chunk_memory(inputs, options, key)):
                    tensors = [file.tensor(key) for file in files]
                    damages = job.damaged.find(key, tensors)
                    analysis = analyze_tensor(inputs, key, tensors, options, lambda _: check())
                    del tensors
                    shard.add(key, analysis, damages)
            result = shard.finish()
            check()  # else nobody would remove the file
            return result
    finally:
        return_memory()


def _tensors_of(shards: Iterable[Shard]) -> Iterator[AnalyzedTensor]:
    for shard in shards:
        yield from read_shard(shard)
        _remove(shard.path)


def _remove_shards(folder: Path, owner: str) -> None:
    """Removes what is left of a pass, also what lost workers have written."""
    for path in own_files(folder):
        if owner_of(path.name) == owner and path.suffix == TEMPORARY:
            _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # the next transaction in the folder removes it
        path.unlink(missing_ok=True)
