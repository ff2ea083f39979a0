"""Maps over layers on other processes or machines that see the same cache: the solve takes place there.

Each item is worked on by one pure function with one thread, and results are taken in the order of the items, so
that they are those of one process. What is large of them, the factors of layers, lies in hidden files in the
cache's folder, which whoever needs them next reads there; only sums and the places of tensors travel.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import torch

from hyper_merge.checkpoints.io.leftovers import claimed
from hyper_merge.checkpoints.io.output_errors import as_output_error
from hyper_merge.checkpoints.io.temporary_names import (
    TEMPORARY,
    own_files,
    owner_of,
    temporary_path,
)
from hyper_merge.errors import ClusterError
from hyper_merge.runtime.parallel import (
    LayerMaps,
    import_numpy_in_torch,
    parallel_map,
    return_memory,
)
from hyper_merge.runtime.parcels import (
    MappedFiles,
    Packer,
    Place,
    SentOnce,
    TensorFile,
    Unpacker,
    checked_by,
    read_place,
)
from hyper_merge.runtime.remote import Check, RemoteWorkers

_PER_SLOT: Final = 4  # pieces: the last ones end at about the same time
_LEAST_SENT: Final = 2**16  # bytes of a tensor that goes to workers in a file
_LEAST_RETURNED: Final = 2**10  # bytes of one that comes back in a file: all are needed again

# As in the pass: the last digits of QR depend on the number of threads.
_THREADS: Final = 1

_JOBS: Final = 4  # whose values a worker keeps


@dataclass(frozen=True)
class _Job:
    """What all pieces of all maps have in common."""

    folder: Path  # of the files
    owner: str  # digits with which their names begin

    def new_path(self) -> Path:
        """Returns the path of a new file."""
        return temporary_path(self.folder / "_", TEMPORARY, self.owner)


@dataclass(frozen=True)
class _Piece:
    """Some items of a map, which a worker works on in one go."""

    name: str
    function: bytes
    items: tuple[bytes, ...]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _Results:
    """What came out of a piece."""

    path: Path
    size: int  # bytes of the file; 0 where there is none
    items: tuple[bytes, ...]
    seconds: tuple[float, ...]  # that each took


class RemoteMaps:
    """Maps over layers on workers, with the files that lie in the cache's folder meanwhile."""

    def __init__(self, workers: RemoteWorkers, job: _Job) -> None:
        """Takes workers that see the folder of the job."""
        self._workers = workers
        self._job = job
        self._files = MappedFiles(_remove)
        self._names: dict[
            int, tuple[SentOnce, str]
        ] = {}  # by id, which is its as long as it is here
        self._values: dict[str, SentOnce] = {}
        self._seconds: dict[tuple[str, int], Sequence[float]] = {}

    @contextmanager
    def open(self, check: Check, work: str) -> Iterator[LayerMaps]:
        """Gives maps within the block.

        Args:
            check: called in the caller's thread while it waits; may raise, which ends the work.
            work: the work, as text.
        """

        def layers(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
            return self._mapped(function, zip(*arguments, strict=True), check, work)

        with parallel_map(torch.device("cpu"), check, _THREADS) as small:
            yield LayerMaps(layers, small)

    def _mapped(
        self,
        function: Callable[..., Any],
        arguments: Iterable[tuple[Any, ...]],
        check: Check,
        work: str,
    ) -> Iterator[Any]:
        items = deque(arguments)
        if not items:
            return
        measured = (_name_of(function), len(items))
        sent: deque[list[tuple[Any, ...]]] = deque()  # whose files must stay until it is done
        sizes = self._sizes(measured)
        seconds: list[float] = []

        def pieces() -> Iterator[_Piece]:
            for number, size in enumerate(sizes, 1):
                sent.append([items.popleft() for _ in range(size)])
                yield self._piece(f"{work}, part {number} of {len(sizes)}", function, sent[-1])

        with self._workers.mapped(_work_on, self._job, pieces(), check) as results:
            for result in results:
                sent.popleft()
                seconds += result.seconds
                yield from self._unpacked(result)
        self._seconds[measured] = seconds

    def _sizes(self, measured: tuple[str, int]) -> list[int]:
        """Returns the numbers of items of pieces that take about as long, by the last map's times."""
        count = measured[1]
        seconds = self._seconds.get(measured) or [1.0] * count
        pieces = min(_PER_SLOT * self._workers.slots, count)
        total = sum(seconds) or 1.0
        numbers = [
            min(int(pieces * (end - each / 2) / total), pieces - 1)
            for each, end in zip(seconds, accumulate(seconds), strict=True)
        ]
        sizes = [numbers.count(number) for number in range(pieces)]
        return [size for size in sizes if size]

    def _piece(self, name: str, function: Callable[..., Any], items: Sequence[Any]) -> _Piece:
        with _new_file(self._job) as file, as_output_error(file.path):
            packer = self._packer(file)
            return _Piece(name, packer.pack(function), tuple(map(packer.pack, items)))

    def _packer(self, file: TensorFile) -> Packer:
        return Packer(file, _LEAST_SENT, self._files.place_of, self._name_once)

    def _name_once(self, value: SentOnce) -> str:
        """Returns the name of a value that is sent once; writes it where that was not done yet."""
        known = self._names.get(id(value))
        if known:
            return known[1]
        path = self._job.new_path()
        with _new_file(self._job) as file, as_output_error(path):
            content = self._packer(file).pack((type(value), value.sent()))
            path.write_bytes(content)
        name = f"{hashlib.sha256(content).hexdigest()} {path}"
        self._names[id(value)] = value, name
        self._values[name] = value
        return name

    def _unpacked(self, results: _Results) -> Iterator[Any]:
        """Yields the results of a piece; their tensors lie in its file."""
        content = torch.empty(0, dtype=torch.uint8)
        if results.size:
            try:
                content = self._files.open(results.path, results.size)
            except OSError as error:
                raise _damaged(results.path, str(error)) from error

        def read(place: Place, nbytes: int) -> torch.Tensor:
            return content[place.start : place.start + nbytes]

        unpacker = Unpacker(read, self._values.__getitem__)
        for item in results.items:
            yield unpacker.unpack(item)

    def close(self) -> None:
        """Ends what workers know of the job, and removes its files."""
        with suppress(ClusterError):
            self._workers.on_each(_forget, self._job.owner)
        for path in own_files(self._job.folder):
            if owner_of(path.name) == self._job.owner and path.suffix == TEMPORARY:
                _remove(path)


@contextmanager
def open_maps(workers: RemoteWorkers, folder: Path) -> Iterator[RemoteMaps]:
    """Gives maps on workers within the block.

    Args:
        workers: which see the folder.
        folder: of the cache; takes what is large of arguments and results, until the block is left.
    """
    with claimed(folder) as owner:
        maps = RemoteMaps(workers, _Job(folder.absolute(), owner))
        try:
            yield maps
        finally:
            maps.close()


@contextmanager
def _new_file(job: _Job) -> Iterator[TensorFile]:
    """Gives a new file, which an error removes."""
    file = TensorFile(job.new_path())
    try:
        yield file
        with as_output_error(file.path):
            file.close()
    except BaseException:
        file.discard()
        raise


class _ReceivedValues:
    """The values that this process has received once, of the jobs that it had last."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._values: dict[str, dict[str, Any]] = {}  # by owner and name
        self._names: dict[int, str] = {}  # by id

    def value_of(self, name: str) -> Any:
        """Returns the value of a name.

        Raises:
            ClusterError: its file is not what was written.
        """
        digest, _, path = name.partition(" ")
        owner = owner_of(Path(path).name) or ""
        with self._lock:
            values = self._values.setdefault(owner, {})
            if name not in values:
                for former in list(self._values)[:-_JOBS]:  # of a process that was killed
                    self.forget(former)
                values[name] = value = self._read(Path(path), digest)
                self._names[id(value)] = name
            return values[name]

    def name_of(self, value: SentOnce) -> str:
        """Returns the name with which a value came."""
        return self._names[id(value)]

    def forget(self, owner: str) -> None:
        """Ends the values of a job."""
        with self._lock:
            for value in self._values.pop(owner, {}).values():
                self._names.pop(id(value))

    def _read(self, path: Path, digest: str) -> Any:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _damaged(path, str(error)) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(path, "it has another hash")
        kind, attributes = Unpacker(_read, self.value_of).unpack(content)
        return kind.received(attributes)


_RECEIVED: Final = _ReceivedValues()
_FIRST_CALL: Final = threading.Lock()


def _work_on(job: _Job, piece: _Piece, check: Check) -> _Results:
    """Calls a function for the items of a piece, on a worker."""
    with _FIRST_CALL:
        torch.set_num_threads(_THREADS)
        import_numpy_in_torch()
    unpacker = Unpacker(_read, _RECEIVED.value_of)
    packed, seconds = [], []
    try:
        with checked_by(check), _new_file(job) as file:
            packer = Packer(file, _LEAST_RETURNED, lambda _tensor: None, _RECEIVED.name_of)
            function = unpacker.unpack(piece.function)
            for item in piece.items:
                check()
                begin = time.perf_counter()
                result = function(*unpacker.unpack(item))
                with as_output_error(file.path):
                    packed.append(packer.pack(result))
                del result
                seconds.append(time.perf_counter() - begin)
            check()  # else nobody would remove the file
    finally:
        return_memory()
    return _Results(file.path, file.size, tuple(packed), tuple(seconds))


def _read(place: Place, nbytes: int) -> torch.Tensor:
    try:
        return read_place(place, nbytes)
    except OSError as error:
        raise _damaged(Path(place.path), str(error)) from error


def _forget(owner: str) -> None:
    _RECEIVED.forget(owner)


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return function.__qualname__


def _damaged(path: Path, reason: str) -> ClusterError:
    return ClusterError(
        f"{path} is not what a process of this merge has written ({reason})",
        hint="nothing was changed; run again, and where this is said again check the shared storage",
        file=path,
    )


def _remove(path: Path) -> None:
    with suppress(OSError):  # the next transaction in the folder removes it
        path.unlink(missing_ok=True)
