"""Work on a tiny models folder that is tried with faults, and what must be true after each."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from fault_injection import BROKEN, END, ERRORS, FULL, IN_USE, Fault, Outcome, attempt
from fault_scenarios import Scenario

from hyper_merge.analysis.cache import prune_analyses
from hyper_merge.checkpoints.io.leftovers import remove_leftovers
from hyper_merge.checkpoints.io.temporary_names import owner_of
from hyper_merge.loras import card_images
from hyper_merge.operations.loras.known_layers import known_family, known_names
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import list_runs

State = Mapping[str, bytes]
"""Content of files by path relative to the models folder."""

_OWN_NAME: Final = re.compile(rb"\.hyper-merge-[0-9a-f]{16}")


class Trial:
    """A scenario that is tried with one fault after another."""

    def __init__(self, scenario: Scenario, sources: Path, place: Path) -> None:
        """Does the work once without a fault.

        Args:
            scenario: the work.
            sources: a models folder with checkpoints and files of others.
            place: path of a folder for all of it.
        """
        self.injected: Counter[str] = Counter()
        self._scenario = scenario
        self._root = place / "models"
        self._start = place / "start"
        self._seen: set[tuple[object, ...]] = set()
        shutil.copytree(sources, self._root)
        for step in scenario.before:
            self._attempt(step)
        shutil.copytree(self._root, self._start)
        self._before = state_of(self._root)
        outcome = self._attempt(scenario.work)
        if outcome.how != "done":
            raise RuntimeError(f"{scenario.name} without a fault: {outcome.words}")
        self._after = state_of(self._root)
        self.uses = outcome.uses

    def faults(self, sample: int = 0, first: int = 0) -> Iterator[Fault]:
        """Yields the end and an error for every use of the file system, and beyond the last.

        Args:
            sample: number of faults at regular distances instead; 0 for all.
            first: place of the sample's first kind of error among all.
        """
        kinds, uses = list(ERRORS), sum(self.uses.values())
        if sample:
            for place in range(sample):
                kind = kinds[(first + place // 2) % len(kinds)] if place % 2 else END
                yield Fault(1 + place * uses // sample, kind)
            return
        for n in range(1, 2 * uses):
            errors = kinds if self._scenario.every_kind else [kinds[n % len(kinds)]]
            yield from (Fault(n, kind) for kind in (END, *errors))

    def is_reached(self, fault: Fault) -> bool:
        """Does the work with a fault; returns False where the work ends before it.

        Raises:
            AssertionError: something is lost, or the next run does not succeed.
        """
        shutil.rmtree(self._root)
        shutil.copytree(self._start, self._root)
        outcome = self._attempt(self._scenario.work, fault)
        if not outcome.use:
            return False
        self.injected[fault.kind] += 1
        try:
            self._check(fault, outcome)
        except AssertionError as error:
            place = f"{self._scenario.name}, {fault.kind} at {fault.n} ({outcome.use})"
            raise AssertionError(f"{place}: {error}\n{outcome.words}") from error
        return True

    def _check(self, fault: Fault, outcome: Outcome) -> None:
        assert outcome.how != "failed", "an unexpected error"
        state = state_of(self._root)
        for name in state:
            is_whole = state[name] in (self._before.get(name), self._after.get(name))
            assert is_whole, f"{name} is neither the old one nor the new one"
        if fault.kind not in (END, IN_USE):
            self._require_all_or_none(state)
        assert outcome.how != "done" or state == self._after, "done, but not all is there"
        settles = bool(fault.n % 2)  # else the next run comes at once
        disk = (settles, *_disk(self._root))
        if disk not in self._seen:
            self._seen.add(disk)
            # What cannot be mapped looks broken, whatever the kind.
            is_broken = fault.kind in (BROKEN, FULL) or "mmap" in outcome.use
            self._check_next(settles=settles, may_be_damaged=is_broken)

    def _check_next(self, *, settles: bool, may_be_damaged: bool) -> None:
        """Checks the next run, whose outcome depends on nothing but the disk."""
        if settles:
            settle(self._root)
            self._require_all_or_none(state_of(self._root))
        again = self._attempt(self._scenario.work)
        state = state_of(self._root)
        assert again.how != "failed", f"the next run: {again.words}"
        assert state == self._after, (
            f"the next run ({again.how}) gives other {_changes(self._after, state)}: {again.words}"
        )
        files = [path for path in left_over(self._root) if path.stat().st_size]
        files = [path for path in files if not (may_be_damaged and path.suffix == ".damaged")]
        assert not files or again.how == "refused", (
            f"left over: {files}"
        )  # all is done already then
        settle(self._root)  # as by further work in all folders: the locks' empty files go too
        files = [path for path in left_over(self._root) if path.suffix != ".damaged"]
        assert not files, f"left over: {files}"

    def _require_all_or_none(self, state: State) -> None:
        assert state in (self._before, self._after), (
            f"neither all old (but {_changes(self._before, state)}) nor all new (but"
            f" {_changes(self._after, state)})"
        )

    def _attempt(self, work: Callable[[Path], object], fault: Fault | None = None) -> Outcome:
        return attempt(lambda: work(self._root), self._root, fault)


def state_of(root: Path) -> State:
    """Returns all files but the cache, and but those that are there for a moment only."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "cache" not in path.parts and not _is_passing(path)
    }


def left_over(root: Path) -> list[Path]:
    """Returns the files that no work leaves."""
    return [path for path in root.rglob("*") if _is_passing(path)]


def settle(root: Path) -> None:
    """Does what the next start begins with, the next transaction in each folder, and the next merge."""
    folders = Folders.under(root)
    list_runs(folders)
    prune_analyses(folders.cache, folders.cache_limit)
    for folder in [path for path in (root, *root.rglob("*")) if path.is_dir()]:
        remove_leftovers(folder)


def _is_passing(path: Path) -> bool:
    return owner_of(path.name) is not None or path.suffix in (".lock", ".making", ".damaged")


def _disk(root: Path) -> Iterator[object]:
    """Yields all that decides what comes next: files without chance names, and but for unread ones."""
    for path in sorted(root.rglob("*")):
        name = _OWN_NAME.sub(b"own", str(path.relative_to(root)).encode())
        is_read = path.is_file() and path.suffix != ".tmp"
        yield name, _OWN_NAME.sub(b"own", path.read_bytes()) if is_read else b""


def _changes(one: State, other: State) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def make_repeatable() -> None:
    """Gives all files the same date, so that the same work writes the same bytes; and small pictures.

    What each process would compute anew is made beforehand.
    """
    for name in known_names():
        known_family(name)
    for module in list(sys.modules.values()):
        if module.__name__.startswith("hyper_merge.") and hasattr(module, "current_time"):
            module.current_time = lambda: "2030-01-01T00:00:00+00:00"
    card_images._png = lambda *_arguments: b"picture"
