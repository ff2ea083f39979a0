"""Files that Windows refuses to replace or remove for a moment, or for long, and what is left of them."""

import os
import time
from pathlib import Path

import pytest

from hyper_merge.checkpoints.io.leftovers import remove_leftovers
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import OutputError
from hyper_merge.runtime import file_lock
from hyper_merge.runtime.file_lock import LockState

HOUR = 3600.0


@pytest.fixture
def refuse(monkeypatch):
    """Makes a method of `Path` refuse some files, as Windows does while another program has them."""

    def refuse(method, concerns, times=1000):
        original, refused = getattr(Path, method), []

        def refusing(self, *arguments, **options):
            if concerns(self, *arguments) and len(refused) < times:
                refused.append(self)
                raise PermissionError(13, "in use", str(self))
            return original(self, *arguments, **options)

        monkeypatch.setattr(Path, method, refusing)
        return refused

    return refuse


@pytest.fixture
def soon(monkeypatch):
    """Gives up early."""
    monkeypatch.setattr(file_lock, "_MOMENT", 0.1)


def replace(folder, *names):
    """Replaces files in one transaction."""
    with FileTransaction(overwrite=True) as outputs:
        for name in names:
            outputs.text(folder / name, "new")


def remove(folder, *names):
    """Removes files in one transaction."""
    with FileTransaction() as outputs:
        for name in names:
            outputs.remove(folder / name)


def contents(folder):
    """Text by name of all files."""
    return {path.name: path.read_text() for path in folder.iterdir()}


def is_former(path, *_):
    """Tells whether a path is the second name of a former file."""
    return path.suffix == ".old"


@pytest.fixture
def folder(tmp_path):
    """A folder with two files."""
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    return tmp_path


@pytest.mark.parametrize("times", [1, 3])
def test_a_replacement_is_tried_again_for_a_moment(folder, refuse, times):
    refused = refuse("replace", lambda path, target: target.name == "b", times)
    replace(folder, "a", "b")
    assert len(refused) == times
    assert contents(folder) == {"a": "new", "b": "new"}


@pytest.mark.parametrize("times", [1, 3])
def test_a_removal_is_tried_again_for_a_moment(folder, refuse, times):
    refused = refuse("replace", lambda path, target: path.name == "b", times)
    remove(folder, "b")
    assert len(refused) == times
    assert contents(folder) == {"a": "old"}


def test_restoring_is_tried_again_for_a_moment(folder, refuse, soon):
    refuse("replace", lambda path, target: target.name == "b")
    refused = refuse("replace", lambda path, target: path.suffix == ".old", 1)
    with pytest.raises(OutputError, match="another program uses the file"):
        replace(folder, "a", "b")
    assert len(refused) == 1
    assert contents(folder) == {"a": "old", "b": "old"}


def test_a_refused_replacement_leaves_no_second_names(folder, refuse, soon):
    refuse("replace", lambda path, target: target.name == "a")
    with pytest.raises(OutputError, match="another program uses the file"):
        replace(folder, "a", "b")
    assert contents(folder) == {"a": "old", "b": "old"}


@pytest.mark.parametrize("change", [replace, remove])
def test_a_former_file_in_use_goes_with_the_next_transaction(folder, refuse, monkeypatch, change):
    with monkeypatch.context() as patch:
        original = Path.unlink

        def refusing(path, **options):
            if is_former(path):
                raise PermissionError(13, "in use", str(path))
            original(path, **options)

        patch.setattr(Path, "unlink", refusing)
        change(folder, "a", "b")
        assert sum(map(is_former, folder.iterdir())) == 2
        replace(folder, "c")
        assert sum(map(is_former, folder.iterdir())) == 2
    replace(folder, "c")
    names = {path.name for path in folder.iterdir()}
    assert names == ({"a", "b", "c"} if change is replace else {"c"})


def test_an_open_transaction_keeps_its_files(folder):
    with FileTransaction(overwrite=True) as outputs:
        outputs.text(folder / "a", "first")
        for path in folder.iterdir():
            os.utime(path, (1, 1))
        replace(folder, "b")
    assert contents(folder) == {"a": "first", "b": "new"}


def test_what_cannot_be_restored_is_restored_by_a_later_transaction(
    folder, refuse, soon, monkeypatch
):
    with monkeypatch.context():
        refuse("replace", lambda path, target: target.name == "b" or path.suffix == ".old")
        with pytest.raises(OutputError, match="another program uses the file"):
            replace(folder, "a", "b")
        replace(folder, "c")
        (former,) = filter(is_former, folder.iterdir())
        assert (former.read_text(), (folder / "a").read_text()) == ("old", "new")
    monkeypatch.undo()
    replace(folder, "c")
    assert contents(folder) == {"a": "old", "b": "old", "c": "new"}


@pytest.mark.parametrize(("hours", "left"), [(1, {"tmp", "linked.old", "old"}), (25, {"old"})])
def test_files_without_a_lock_go_after_a_day(folder, monkeypatch, hours, left):
    paths = {
        "tmp": folder / ".hyper-merge-0123456789abcdef.tmp",
        "linked.old": folder / ".hyper-merge-1123456789abcdef.old",
        "old": folder / ".hyper-merge-2123456789abcdef.old",
    }
    paths["tmp"].touch()
    paths["linked.old"].hardlink_to(folder / "a")
    paths["old"].touch()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + hours * HOUR)
    remove_leftovers(folder)
    assert {name for name, path in paths.items() if path.exists()} == left


def test_files_of_others_stay(folder, monkeypatch):
    names = [".hyper-merge-x1.tmp", "hyper-merge-0123456789abcdef.tmp", ".hyper-merge-0.old"]
    for name in names:
        (folder / name).touch()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000 * HOUR)
    remove_leftovers(folder)
    assert {path.name for path in folder.iterdir()} == {"a", "b", *names}


def test_without_locks_files_are_written_too(folder, monkeypatch):
    monkeypatch.setattr(file_lock, "_lock", lambda file, *, shared: LockState.IMPOSSIBLE)
    with FileTransaction(overwrite=True) as outputs:
        outputs.text(folder / "a", "first")
        replace(folder, "b")
    assert contents(folder) == {"a": "first", "b": "new"}
