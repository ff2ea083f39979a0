"""Changes of several files whose process ends in their middle, and the next start."""

import json
import os
import shutil
import time

import pytest
from killed_transactions import killed_after

from hyper_merge.checkpoints.io import leftovers
from hyper_merge.checkpoints.io.journal import Journal
from hyper_merge.checkpoints.io.leftovers import remove_leftovers
from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.runtime import file_lock
from hyper_merge.runtime.checked_json import sealed
from hyper_merge.runtime.file_lock import LockState

OLD = {"one/a": "old", "two/b": "old", "two/gone": "old"}
NEW = {"one/a": "newer", "two/b": "newer", "three/c": "newer"}


@pytest.fixture
def root(tmp_path):
    """Three folders with files."""
    for name, text in OLD.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "root"


@pytest.fixture
def kill(root):
    """Changes all files, and ends the process after some of the four steps."""

    def kill(steps):
        with killed_after(steps):
            change(root)

    return kill


def change(root):
    """Writes three files and removes one, in three folders."""
    with FileTransaction(overwrite=True) as outputs:
        for name, text in NEW.items():
            outputs.text(root / name, text)
        outputs.remove(root / "two/gone")


def contents(root):
    """Text by path of all files but locks, which are empty."""
    paths = (path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    return {str(path.relative_to(root)): path.read_text() for path in paths}


@pytest.mark.parametrize("folder", ["one", "two", "three"])
@pytest.mark.parametrize("steps", range(4))
def test_the_next_transaction_in_any_folder_undoes_a_change(root, kill, steps, folder):
    kill(steps)
    assert len(contents(root)) > len(OLD)
    with FileTransaction() as outputs:
        outputs.text(root / folder / "next", "next")
    assert contents(root) == {**OLD, f"{folder}/next": "next"}


def test_a_place_is_free_after_what_a_kill_left_there(root, kill):
    kill(3)
    require_free(root / "three/c", overwrite=False)
    assert contents(root) == OLD


def test_what_somebody_changed_since_stays(root, kill):
    kill(3)
    for name in ("one/a", "three/c"):
        (root / name).write_text("mine!")  # of the same size as ours
    remove_leftovers(root / "one")
    assert contents(root) == {**OLD, "one/a": "mine!", "three/c": "mine!"}


def test_a_file_that_somebody_put_in_place_of_a_removed_one_stays(root, kill):
    kill(3)
    (journal,) = (root / "one").glob("*.journal")
    (step,) = (s for s in json.loads(journal.read_text())["content"]["steps"] if not s["written"])
    (root / "two/gone").rename(root / "two" / step["kept"])  # as the last step does
    (root / "two/gone").write_text("mine")
    remove_leftovers(root / "one")
    assert contents(root) == {**OLD, "two/gone": "mine"}


def test_a_change_is_undone_where_all_folders_were_moved_to(root, kill, tmp_path):
    kill(3)
    moved = shutil.move(root, tmp_path / "moved")
    remove_leftovers(moved / "two")
    assert contents(moved) == OLD


@pytest.mark.parametrize("away", ["one", "two"])
def test_nothing_is_given_up_while_a_disk_is_away(root, kill, tmp_path, away):
    kill(3)
    shutil.move(root / away, tmp_path / "away")
    for folder in {"one", "two", "three"} - {away}:
        remove_leftovers(root / folder)
    shutil.move(tmp_path / "away", root / away)
    for folder in ("one", "two", "three"):
        remove_leftovers(root / folder)
    assert contents(root) == OLD


def test_a_damaged_journal_is_left_alone_with_its_files(root, kill):
    kill(2)
    (journal,) = (root / "one").glob("*.journal")
    journal.write_text(journal.read_text().replace("gone", "b"))
    before = contents(root)
    for folder in ("one", "two", "three"):
        remove_leftovers(root / folder)
    assert contents(root) == before


def test_a_journal_changes_no_file_of_folders_that_are_not_its_own(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("mine", ".hyper-merge-00000000aaaaaaaa.old"):
        (other / name).write_text("mine")
    status = (other / "mine").stat()
    step = {
        "path": "../../other/mine",
        "kept": ".hyper-merge-00000000aaaaaaaa.old",
        "temporary": ".hyper-merge-00000000aaaaaaaa.tmp",
        "was_free": True,
        "written": [status.st_size, status.st_mtime_ns],
    }
    name = ".hyper-merge-00000000bbbbbbbb"
    (root / "one" / f"{name}.lock").touch()
    (root / "one" / f"{name}.journal").write_text(sealed({"folders": ["."], "steps": [step]}))
    remove_leftovers(root / "one")
    assert len(contents(other)) == 2
    assert contents(root) == OLD


@pytest.mark.parametrize(("minutes", "is_undone"), [(1, False), (11, True)])
def test_without_locks_a_journal_is_over_after_ten_minutes(
    root, kill, monkeypatch, minutes, is_undone
):
    monkeypatch.setattr(file_lock, "_lock", lambda file, *, shared: LockState.IMPOSSIBLE)
    kill(3)
    now = time.time() + 60 * minutes
    monkeypatch.setattr(leftovers, "disk_time", lambda folder: now)
    for folder in ("one", "two", "three"):
        remove_leftovers(root / folder)
    assert (contents(root) == OLD) == is_undone


def test_a_change_leaves_nothing_but_itself(root):
    change(root)
    assert contents(root) == NEW
    assert not list(root.rglob(".*"))


def test_one_file_is_replaced_without_a_journal(root, monkeypatch):
    monkeypatch.setattr(Journal, "__init__", lambda *_: pytest.fail("a journal"))
    with FileTransaction(overwrite=True) as outputs:
        outputs.text(root / "one/a", "newer")
    assert contents(root)["one/a"] == "newer"


def test_an_interrupt_after_the_last_moment_leaves_all_new(root, monkeypatch):
    unlink = os.unlink

    def interrupted(path, **options):
        unlink(path, **options)
        if str(path).endswith(".journal"):
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        change(root)
    assert contents(root) == NEW
