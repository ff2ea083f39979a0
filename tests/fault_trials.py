"""Work on a tiny models folder that is tried with faults, and what must be true after each."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from fault_injection import BROKEN, END, ERRORS, FULL, IN_USE, Fault, Outcome, attempt
from tiny_family import TINY, merge, write

from hyper_merge.analysis.cache import prune_analyses
from hyper_merge.checkpoints.io.leftovers import remove_leftovers
from hyper_merge.checkpoints.io.temporary_names import owner_of
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.loras import card_images
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.recipe.request import key_place
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import list_runs, load_run
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import tensors

State = Mapping[str, bytes]
"""Content of files by path relative to the models folder."""

# What marks a file as SD 1.x, with a few layers: each tensor is read several times.
_KEPT: Final = re.compile(
    r"model\.diffusion_model\.(input_blocks\.(0\.0\.weight|[369]\.0\.op\.bias"
    r"|[147]\.1\.transformer_blocks\.0\.norm1\.bias"
    r"|1\.1\.transformer_blocks\.0\.attn2\.to_[kq]\.weight)"
    r"|middle_block\.1\.transformer_blocks\.0\.attn2\.to_k\.weight|out\.2\.weight)"
    r"|.*text_model\.encoder\.layers\.0\.mlp\.fc1\.weight|first_stage_model\.quant_conv\.weight"
)
_OWN_NAME: Final = re.compile(rb"\.hyper-merge-[0-9a-f]{16}")


@dataclass(frozen=True)
class Scenario:
    """Work on a models folder.

    Attributes:
        name: Of the work.
        before: What was done before it.
        work: Itself.
        every_kind: Whether each use is tried with every kind of error, not with one of them.
    """

    name: str
    before: tuple[Callable[[Path], object], ...]
    work: Callable[[Path], object]
    every_kind: bool = False


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

    def faults(self, sample: int = 0) -> Iterator[Fault]:
        """Yields the end and an error for every use of the file system, and beyond the last.

        Args:
            sample: number of faults at regular distances instead; 0 for all.
        """
        kinds, uses = list(ERRORS), sum(self.uses.values())
        if sample:
            for place in range(sample):
                kind = kinds[place // 2 % len(kinds)] if place % 2 else END
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


def write_sources(root: Path) -> None:
    """Writes a models folder of four tiny checkpoints, and files of others."""
    (root / "Stable-diffusion").mkdir(parents=True)
    (root / "Lora").mkdir()
    exact = {key: stack for key, stack in tensors(replace(TINY, count=4)) if _KEPT.fullmatch(key)}
    for c, path in enumerate(_sources(root)):
        state = {
            key: stack[c].to(torch.float16 if stack.is_floating_point() else stack.dtype)
            for key, stack in exact.items()
        }
        write(path, {key: tensor.contiguous() for key, tensor in state.items()})
    (root / "Lora/mix_notes.txt").write_text("mine")
    (root / "Lora/mine.safetensors").write_bytes(b"mine")


def make_repeatable() -> None:
    """Gives all files the same date, so that the same work writes the same bytes; and small pictures."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("hyper_merge.") and hasattr(module, "current_time"):
            module.current_time = lambda: "2030-01-01T00:00:00+00:00"
    card_images._png = lambda *_arguments: b"picture"


def _sources(root: Path) -> list[Path]:
    return [root / "Stable-diffusion" / f"{name}.safetensors" for name in "abcd"]


def _change(root: Path) -> None:
    """Changes files in several folders in one transaction."""
    with FileTransaction(overwrite=True) as outputs:
        outputs.text(root / "Lora/mix_notes.txt", "new")
        outputs.text(root / "new/deep.txt", "new")
        outputs.text(root / "Lora/deep.txt", "new")
        outputs.remove(root / "Lora/mine.safetensors")
        outputs.remove(root / "Stable-diffusion/d.safetensors")


def _change_without_links(root: Path) -> None:
    """Does the same on a file system without hard links, such as FAT."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = refuse
    _change(root)


def _merge(root: Path, *which: int, **settings: Any) -> None:
    files = _sources(root)
    settings = {"ranks": (2, 1), "iterations": 1, "method": "greedy", **settings}
    merge([files[i] for i in which or (0, 1, 2)], root, **settings)


def _rerun(root: Path) -> None:
    _merge(root, ranks=(1,))


def _overwrite(root: Path) -> None:
    _merge(root, 2, 1, ranks=(3,), overwrite=True)


def _fit(root: Path) -> None:
    values = {"run": "mix", "checkpoint": _sources(root)[3], "topup": "2"}
    run_fit(FitRequest.parse(values, key_place), Folders.under(root), Progress())


def _restore(root: Path) -> None:
    values = {"run": "mix", "shares": {"a": 1.0}}
    run_restore(RestoreRequest.parse(values, key_place), Folders.under(root), Progress())


def _delete(root: Path) -> None:
    folders = Folders.under(root)
    delete_run(load_run(folders, "mix"), folders)


SCENARIOS: Final = (
    Scenario("transaction", (), _change, every_kind=True),
    Scenario("transaction without links", (), _change_without_links, every_kind=True),
    Scenario("merge", (), _merge),
    Scenario("re-run", (_merge,), _rerun),
    Scenario("fit", (_merge,), _fit),
    Scenario("restore", (_merge,), _restore),
    Scenario("overwrite", (_merge, _fit), _overwrite),
    Scenario("deletion", (_merge, _fit), _delete),
)
