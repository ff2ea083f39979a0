"""Several files that appear and disappear together: all, or every existing file is as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from torch import Tensor

from hyper_merge.checkpoints.io import output_errors
from hyper_merge.checkpoints.io.atomic_file import StagedFile
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.journal import Journal, Step
from hyper_merge.checkpoints.io.leftovers import ClaimedFolders, remove_leftovers
from hyper_merge.checkpoints.io.mapped_tensors import MappedTensors
from hyper_merge.checkpoints.io.output_errors import as_output_error, sync_folder
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.errors import NameTakenError, OutputError
from hyper_merge.runtime.names import name_key

_Bytes: TypeAlias = bytes  # the method `bytes` hides the name inside of the class
_Path: TypeAlias = "str | os.PathLike[str]"


class FileTransaction:
    """Files staged one by one and put in place together when the block is left.

        with FileTransaction() as outputs:
            with outputs.safetensors(model, tensors, metadata) as writer:
                writer.write(key, tensor)
            outputs.text(folder / "multipliers.txt", lines)

    An exception within the block (Ctrl-C too) removes everything staged and every folder made, and
    so does a refusal while the files are put in place: those already replaced are restored.
    After a kill in that last moment the next transaction in one of the folders restores them, or
    `remove_leftovers`, by a journal (`journal.py`). What a kill leaves over goes at the same time.
    Two files of one block never have the same place, on no file system: names that differ by case
    alone are refused, for on Windows and macOS one would silently replace the other.
    """

    def __init__(self, *, overwrite: bool = False) -> None:
        """Starts with no files.

        Args:
            overwrite: whether existing files may be replaced.
        """
        self._overwrite = overwrite
        self._parts: dict[Path, SafetensorsWriter | StagedFile] = {}  # in the order of staging
        self._removals: list[Path] = []
        self._written: dict[str, Path] = {}  # by the key that no file system gives to two places
        self._folders: list[Path] = []
        self._claimed = ClaimedFolders()

    def __enter__(self) -> FileTransaction:
        return self

    def safetensors(
        self, path: _Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> SafetensorsWriter:
        """Returns a writer for a `with` block within this one; makes missing folders.

        Raises:
            OutputError: the place is taken, also by another file of this block whose name differs
                by case alone, or its folder cannot be made.
            ValueError: the path is staged already.
        """
        path = self._prepare(path)
        writer = SafetensorsWriter(
            path,
            tensors,
            metadata,
            overwrite=self._overwrite,
            deferred=True,
            owner=self._claimed.owner,
        )
        self._parts[path] = writer
        return writer

    def text(self, path: _Path, content: str) -> None:
        """Stages a text file in UTF-8; errors as for `safetensors`."""
        self.bytes(path, content.encode())

    def bytes(self, path: _Path, content: _Bytes) -> None:
        """Stages a file of any content; errors as for `safetensors`."""
        path = self._prepare(path)
        owner = self._claimed.owner
        staged = StagedFile(path, overwrite=self._overwrite, size=len(content), owner=owner)
        self._parts[path] = staged
        staged.create()
        staged.write_at(memoryview(content), 0)
        staged.seal()

    def remove(self, path: _Path) -> None:
        """Stages the removal of an existing file; it goes when the new ones are in their places."""
        path = Path(path)
        if path in self._parts or path in self._removals:
            raise ValueError(f"{path} is staged twice")
        _require_apart(path, self._written.get(_place_key(path)))
        self._claimed.claim(path.parent)
        self._removals.append(path)

    def size_of(self, path: _Path) -> int:
        """Returns the size of a staged file in bytes."""
        return self._parts[Path(path)].size

    def metadata_of(self, path: _Path) -> Mapping[str, str]:
        """Returns the metadata of a staged .safetensors file; empty for any other file."""
        part = self._parts[Path(path)]
        return part.metadata if isinstance(part, SafetensorsWriter) else {}

    @contextmanager
    def reading(self, path: _Path) -> Iterator[Callable[[str], Tensor]]:
        """Gives the tensors of a staged .safetensors file, whose own block is left, by their keys."""
        staged = _staged(self._parts[Path(path)])
        with as_output_error(Path(path)), MappedTensors(staged.temporary) as tensors:
            yield tensors.get

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()
        self._claimed.release()

    def _prepare(self, path: _Path) -> Path:
        """Returns the path, free to be written to, in a folder that exists."""
        path = Path(path)
        if path in self._parts or path in self._removals:
            raise ValueError(f"{path} is staged twice")
        removed = {_place_key(removal): removal for removal in self._removals}
        key = _place_key(path)
        _require_apart(path, self._written.get(key, removed.get(key)))
        require_free(path, overwrite=self._overwrite)
        with as_output_error(path):
            missing = [folder for folder in path.parents if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._folders.append(folder)
                sync_folder(folder.parent)
            self._claimed.claim(path.parent)
        self._written[key] = path
        return path

    def _commit(self) -> None:
        files = self._finished()
        if len(files) == 1 and not self._removals:
            files[0].commit()  # which is the change of all: there is nothing to undo
            return
        owner = self._claimed.owner
        steps = [Step.write(file, owner) for file in files]
        steps += [Step.remove(path, owner) for path in self._removals]
        if not steps:
            return
        journal = Journal(steps, owner, overwrite=self._overwrite)
        try:
            journal.carry_out()
        except BaseException:
            journal.undo()
            raise
        journal.forget()

    def _finished(self) -> list[StagedFile]:
        """Returns all staged files, whole, with their places still free."""
        for part in self._parts.values():
            if isinstance(part, SafetensorsWriter):
                part.finish()
        files = [_staged(part) for part in self._parts.values()]
        for file in files:
            require_free(file.path, overwrite=self._overwrite)  # all, before the first is placed
        return files

    def _discard(self) -> None:
        for part in self._parts.values():
            with suppress(ValueError):  # a writer that was never entered has nothing staged
                _staged(part).discard()
        self._claimed.release()
        for folder in reversed(self._folders):
            with suppress(OSError):  # somebody else's file is in it by now
                folder.rmdir()


def require_free(path: Path, *, overwrite: bool) -> None:
    """Returns if a file may be written there, perhaps after what a kill has left there is undone.

    Raises:
        OutputError: a folder is there, a file that may not be replaced, or a file in place of its
            folder.
    """
    try:
        output_errors.require_unoccupied(path, overwrite=overwrite)
    except OutputError:
        remove_leftovers(path.parent)
        output_errors.require_unoccupied(path, overwrite=overwrite)


def _staged(part: SafetensorsWriter | StagedFile) -> StagedFile:
    return part.staged if isinstance(part, SafetensorsWriter) else part


def _place_key(path: Path) -> str:
    """Returns a text that is equal for two paths where any file system has one file for both."""
    with as_output_error(path):
        return name_key(str(Path(os.path.realpath(path.parent)) / path.name))


def _require_apart(path: Path, other: Path | None) -> None:
    """Returns if no other file of the same block has the place.

    Raises:
        NameTakenError: one has, on a file system that ignores the case of letters.
    """
    if other is not None:
        raise NameTakenError(
            f"cannot write {path}: {other}, which belongs to the same work, is the same file on"
            " Windows and macOS",
            hint="give one of the two another name",
            file=path,
        )
