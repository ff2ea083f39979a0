"""How the change of several files is undone, also by another process, if it does not come to its end.

Before the first file is touched, a journal says on the disk what will be done. A file that is replaced or
removed keeps another name until the last one is in its place. Then the journal is removed, which
is the moment of the change: a process that ends before it leaves everything to be undone, and one that
ends after it leaves names that nobody needs. This is the rollback journal of SQLite
(https://www.sqlite.org/atomiccommit.html) with names in place of pages.

The journal lies in one of the folders; in the others a file of its name says in which. Whatever somebody
else has changed in the meantime is left alone: what was written is known by its size and time of change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hyper_merge.checkpoints.io.atomic_file import StagedFile
from hyper_merge.checkpoints.io.output_errors import (
    as_output_error,
    require_unoccupied,
    sync_folder,
)
from hyper_merge.checkpoints.io.temporary_names import (
    JOURNAL,
    PREVIOUS,
    TEMPORARY,
    owner_of,
    temporary_path,
)
from hyper_merge.errors import OutputError
from hyper_merge.runtime.checked_json import read_sealed, sealed
from hyper_merge.runtime.file_lock import patiently

_FOLDERS: Final = "folders"
_STEPS: Final = "steps"

_Identity = tuple[int, int]  # bytes, and time of change in nanoseconds


@dataclass(frozen=True)
class Step:
    """The change of one file.

    Attributes:
        path: The file.
        kept: Another name of the former file, which it has until the change is over.
        temporary: The new file's first name; None where the file is removed.
        was_free: Whether there is no former file.
        written: How the new file is recognised; None where the file is removed.
    """

    path: Path
    kept: Path
    temporary: Path | None
    was_free: bool
    written: _Identity | None

    @classmethod
    def write(cls, staged: StagedFile, owner: str) -> Step:
        """Returns the step that puts a sealed file in its place.

        Raises:
            OutputError: its temporary file is gone.
        """
        path, temporary = staged.path, staged.temporary
        with as_output_error(path):
            status = temporary.stat()
        kept = temporary_path(path, PREVIOUS, owner)
        written = (status.st_size, status.st_mtime_ns)
        return cls(path, kept, temporary, not os.path.lexists(path), written)

    @classmethod
    def remove(cls, path: Path, owner: str) -> Step:
        """Returns the step that removes a file."""
        return cls(path, temporary_path(path, PREVIOUS, owner), None, False, None)

    def apply(self, *, overwrite: bool) -> None:
        """Changes the file; a file to be removed that is gone already is no error.

        Args:
            overwrite: whether a file that is in the place of a new one may be replaced.

        Raises:
            OutputError: the operating system refuses, or the place was taken in the meantime.
        """
        if self.temporary is None:
            self._remove()
            return
        require_unoccupied(self.path, overwrite=overwrite)
        with as_output_error(self.path):
            if os.path.lexists(self.path):
                self._keep_former()
            _move(self.temporary, self.path, patiently)
            sync_folder(self.path.parent)

    def undo(self, repeat: Callable[[Callable[[], object]], object]) -> bool:
        """Restores the former file, however far the change came; returns whether it is restored.

        Args:
            repeat: makes an attempt, and perhaps further ones.
        """
        try:
            now = _identity(self.path)
            if os.path.lexists(self.kept) and now in (None, self.written):
                _move(self.kept, self.path, repeat)
            elif self.was_free and now is not None and now == self.written:
                repeat(lambda: self.path.unlink(missing_ok=True))
        except FileNotFoundError:  # another process undoes it as well
            pass
        except OSError:
            return False
        for name in (self.kept, self.temporary):
            _forget(name)
        sync_folder(self.path.parent)
        return True

    def forget(self) -> None:
        """Removes the former file for good; never fails."""
        _forget(self.kept)

    def _keep_former(self) -> None:
        """Gives the former file a second name, so that it never disappears from its place.

        Where there are no hard links (FAT, some network folders) it has to, for a moment.
        """
        try:
            self.kept.hardlink_to(self.path)
        except OSError:
            _move(self.path, self.kept, patiently)

    def _remove(self) -> None:
        try:
            _move(self.path, self.kept, patiently)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(
                f"cannot remove {self.path}: {error.strerror or error}",
                hint="close the programs that use it, or see to the rights of its folder",
                file=self.path,
            ) from error
        sync_folder(self.path.parent)


class Journal:
    """The changes of one transaction: all are made, or all are undone."""

    def __init__(self, steps: Sequence[Step], owner: str, *, overwrite: bool) -> None:
        """Takes the changes; does nothing yet.

        Args:
            steps: at least one.
            owner: digits of the transaction.
            overwrite: whether existing files may be replaced.
        """
        self._steps = steps
        self._overwrite = overwrite
        folders = list(dict.fromkeys(Path(os.path.realpath(s.path.parent)) for s in steps))
        home = temporary_path(folders[0] / "_", JOURNAL, owner)
        self._files = [StagedFile(f / home.name, overwrite=False, owner=owner) for f in folders]
        self._is_applied = False

    def carry_out(self) -> None:
        """Changes all files.

        Raises:
            OutputError: the operating system refuses; `undo` must follow, as after any exception.
        """
        home, *others = self._files
        for file in others:  # before the journal, whose presence says that all of them are there
            _write(file, self._about(file.path.parent))
        steps = [_plain(step, home.path.parent) for step in self._steps]
        _write(home, {**self._about(home.path.parent), _STEPS: steps})
        for step in self._steps:
            step.apply(overwrite=self._overwrite)
        self._is_applied = True
        with as_output_error(home.path):
            patiently(home.path.unlink)
            sync_folder(home.path.parent)

    def undo(self) -> None:
        """Restores all files; where one is refused the journal stays, and the next start tries again.

        An interrupt that comes when the journal is gone already comes too late: the change stays.
        """
        if self._is_applied and not os.path.lexists(self._files[0].path):
            self.forget()
            return
        undone = [step.undo(patiently) for step in reversed(self._steps)]
        if all(undone):
            self._remove()

    def forget(self) -> None:
        """Removes what was needed to undo the change; never fails."""
        for step in self._steps:
            step.forget()
        self._remove()

    def _about(self, folder: Path) -> dict[str, Any]:
        return {_FOLDERS: [_relative(file.path.parent, folder) for file in self._files]}

    def _remove(self) -> None:
        for file in self._files:  # the journal first: without it the others say nothing
            file.discard()
            _forget(file.path)


@dataclass(frozen=True)
class JournalFile:
    """A journal in a folder, or the file of its name in another folder of the transaction.

    Attributes:
        path: Of the file.
        folders: All folders of the transaction; the journal lies in the first.
        steps: The changes; none in a file that only says where the journal is.
    """

    path: Path
    folders: tuple[Path, ...]
    steps: tuple[Step, ...]

    @classmethod
    def read(cls, path: Path) -> JournalFile:
        """Returns what a file says.

        Raises:
            OSError: the file is gone or cannot be read.
            ValueError: it is damaged; the message says how.
        """
        data = read_sealed(path)
        if not isinstance(data, Mapping):
            raise ValueError("expected an object")  # noqa: TRY004 - the file is wrong, not a type
        folders, steps = data.get(_FOLDERS), data.get(_STEPS, [])
        if not folders or not isinstance(folders, list) or not isinstance(steps, list):
            raise ValueError("expected a list of folders, and perhaps one of steps")
        here = Path(os.path.realpath(path.parent))
        places = (Path(os.path.normpath(here / str(folder))) for folder in folders)
        return cls(path, tuple(places), tuple(_step(step, here) for step in steps))

    @property
    def is_journal(self) -> bool:
        """Whether this is the journal itself."""
        return bool(self.steps)

    @property
    def is_over(self) -> bool:
        """Whether the journal is gone, and not only its disk."""
        home = self.folders[0]
        return home.is_dir() and not (home / self.path.name).exists()

    def undo(self) -> bool:
        """Restores all files and removes the journal; returns whether nothing of it is left to do."""
        undone = [self._undo(step) for step in self.steps]
        if not all(undone):
            return False
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            return True
        return False

    def _undo(self, step: Step) -> bool:
        """Undoes a step; returns False where its folder is not there, perhaps on another disk."""
        folder = step.path.parent
        if not folder.is_dir():
            return False
        if not (folder / self.path.name).exists():
            return True  # the folder was made again, or is another one
        return step.undo(_once)


def _identity(path: Path) -> _Identity | None:
    """Returns size and time of change of a file, or of a link itself; None if there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size, status.st_mtime_ns


def _once(action: Callable[[], object]) -> None:
    """Makes a single attempt: the next start makes another one."""
    action()


def _move(source: Path, target: Path, repeat: Callable[[Callable[[], object]], object]) -> None:
    repeat(lambda: source.replace(target))


def _forget(path: Path | None) -> None:
    """Removes a file; one that is refused twice goes with the next transaction in its folder."""
    if path is None:
        return
    for _ in range(2):
        with suppress(OSError):
            path.unlink(missing_ok=True)
            return


def _write(file: StagedFile, content: Mapping[str, Any]) -> None:
    data = sealed(content).encode()
    file.create()
    file.write_at(memoryview(data), 0)
    file.seal()
    file.commit()


def _relative(path: Path, folder: Path) -> str:
    """Returns a path that stays right when all folders are moved together, as far as there is one."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # another drive of Windows
        return str(path)


def _plain(step: Step, folder: Path) -> dict[str, Any]:
    """Returns a step as plain data, with paths relative to a folder."""
    place = Path(os.path.realpath(step.path.parent)) / step.path.name
    return {
        "path": _relative(place, folder),
        "kept": step.kept.name,
        "temporary": step.temporary.name if step.temporary else "",
        "was_free": step.was_free,
        "written": list(step.written) if step.written else [],
    }


def _step(data: object, folder: Path) -> Step:
    """Returns a step from plain data.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(data, Mapping):
        raise ValueError("expected a step as an object")  # noqa: TRY004 - the file is wrong
    path = Path(os.path.normpath(folder / _text(data, "path")))
    kept, temporary = _text(data, "kept"), _text(data, "temporary")
    numbers = data.get("written")
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f"expected two whole numbers or none, got {numbers!r:.80}")
    for name, suffix in (
        (kept, PREVIOUS),
        (temporary or kept, TEMPORARY if temporary else PREVIOUS),
    ):
        if owner_of(name) is None or not name.endswith(suffix):
            raise ValueError(f"expected a name of our own, got {name!r:.80}")
    if len(numbers) != (2 if temporary else 0):
        raise ValueError(f"expected size and time of a file that is written, got {numbers!r:.80}")
    return Step(
        path=path,
        kept=path.with_name(kept),
        temporary=path.with_name(temporary) if temporary else None,
        was_free=data.get("was_free") is True,
        written=(numbers[0], numbers[1]) if temporary else None,
    )


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise ValueError(f"expected a text as {key}, got {value!r:.80}")  # noqa: TRY004 - as above
    return value
