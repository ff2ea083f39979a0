"""Which originals of a run could be deleted, and what would be lost with them; deletes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyper_merge.errors import RunError
from hyper_merge.operations.inspect import inspect_files
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders, same_place
from hyper_merge.runs.integrity import require_hyper_model, require_own
from hyper_merge.runs.originals import LocatedSource, locate_sources
from hyper_merge.runs.report import CheckpointReport
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import one_line
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class DeletionVerdict:
    """One original."""

    name: str  # of its file
    path: Path
    restored_as: str  # by what name the run brings it back
    safe: bool
    reason: str  # in words, why it is not
    frees: int  # bytes that deleting it would free; 0 where nothing is there
    explained: float  # share of its differences in the layers, 0..1
    everything: float  # share of all its differences, with what LoRAs do not carry
    not_carried: float  # share of these that no LoRA carries
    vae_differs: bool | None  # from the hyper-model's; None where it is not known


@dataclass(frozen=True)
class DeletionReport:
    """All originals of a run against a threshold."""

    run: str
    threshold: float  # fraction 0..1
    verdicts: tuple[DeletionVerdict, ...]
    problem: str  # why the run cannot bring anything back as it is; empty where it can

    @property
    def frees(self) -> int:
        """Bytes that deleting all that is safe to delete would free."""
        return sum(each.frees for each in self.verdicts if each.safe)


def find_deletable(
    name: str, threshold: float, folders: Folders, progress: Progress
) -> DeletionReport:
    """Looks at every original of a run, and at the checkpoints that were fitted onto it.

    Args:
        name: of the run.
        threshold: share of all differences that must come back, 0..1.
        folders: where the run is, its files and the checkpoints.
        progress: progress and interrupt; files whose hashes are not known are read.

    Raises:
        RunError: there is no such run, or it cannot be read.
        InterruptedRun: the user's wish.
    """
    run = load_run(folders, name)
    checking, finding = progress.split([1.0, 4.0])
    problem = _problem(run, checking)
    fits, _ = load_fits(run)
    rows = [
        *run.report.checkpoints,
        *(replace(each.row, explained=each.explained) for each in fits),
    ]
    count = len(run.report.checkpoints)
    sources = [*run.sources[-count:], *(each.source for each in fits)]
    originals = locate_sources(sources, folders, finding)
    vae = None if problem else inspect_files(run.hyper_model).vae
    verdicts = [
        _verdict(row, original, (threshold, problem or _needed(original.path, folders)), vae)
        for row, original in zip(rows, originals, strict=True)
    ]
    explained = [_with_loss(each, run) for each in _once(verdicts)]
    return DeletionReport(run.name, threshold, tuple(explained), problem)


def format_deletion_report(safety: DeletionReport) -> str:
    """The verdicts as plain text."""
    width = max(len("checkpoint"), *(len(one_line(each.name)) for each in safety.verdicts))
    lines = [
        f"{safety.run}: safe to delete is what comes back to {100 * safety.threshold:.4g}%",
        "",
        f"{'checkpoint':{width}}  delete?      frees  layers  everything  not carried  VAE differs",
        *(_line(each, width) for each in safety.verdicts),
        "",
        f"deleting what is safe to delete would free {format_size(safety.frees)}",
        "nothing was deleted; that is up to you",
    ]
    if safety.problem:
        lines.insert(1, f"nothing is safe to delete: {safety.problem}")
    return "\n".join(lines)


def _line(each: DeletionVerdict, width: int) -> str:
    differs = {None: "not known", True: "yes", False: "no"}[each.vae_differs]
    answer = "yes" if each.safe else "no"
    why = "" if each.safe else f"  ({each.reason})"
    if each.restored_as != each.path.stem:
        why += f"  (restored as {each.restored_as})"
    return (
        f"{one_line(each.name):{width}}  {answer:7}  {format_size(each.frees):>9}  {each.explained:6.2%}"
        f"  {each.everything:10.2%}  {each.not_carried:11.3%}  {differs}{why}"
    )


def _problem(run: Run, progress: Progress) -> str:
    try:
        require_hyper_model(run)
        topups = [each.name for fitted in load_fits(run)[0] for each in fitted.topups]
        beside = [run.loras[0].with_name(f"{name}.safetensors") for name in topups]
        require_own(run, [*run.loras, *beside], progress)
    except RunError as error:
        return str(error)
    return ""


def _verdict(
    row: CheckpointReport,
    original: LocatedSource,
    against: tuple[float, str],  # threshold, and what forbids it whatever the shares
    vae: str | None,
) -> DeletionVerdict:
    threshold, forbidden = against
    everything = row.explained * (1 - row.not_carried)
    reason = _reason(original, everything, threshold) or forbidden
    there = original.state == "there"
    return DeletionVerdict(
        name=original.source.name,
        path=original.path,
        restored_as=row.name,
        safe=not reason,
        reason=reason,
        frees=_size(original.path) if there else 0,
        explained=row.explained,
        everything=everything,
        not_carried=row.not_carried,
        vae_differs=inspect_files(original.path).vae != vae if there and vae else None,
    )


def _reason(original: LocatedSource, everything: float, threshold: float) -> str:
    if original.state == "missing":
        return "it is not there any more"
    if original.state == "changed":
        return "it was changed since the merge, so the run has nothing of what it is now"
    return f"less than {100 * threshold:.4g}% comes back" if everything < threshold else ""


def _with_loss(verdict: DeletionVerdict, run: Run) -> DeletionVerdict:
    """The verdict with the reason for so small a share, where a private LoRA is not there."""
    if verdict.safe or verdict.restored_as not in run.lost:
        return verdict
    return replace(verdict, reason=f"{verdict.reason}: its private LoRA is not there")


def _once(verdicts: Sequence[DeletionVerdict]) -> tuple[DeletionVerdict, ...]:
    """One verdict for each file: of several fits of it, that which brings back most."""
    best: dict[str, DeletionVerdict] = {}
    for each in verdicts:
        place = os.path.realpath(each.path)
        if place not in best or each.everything > best[place].everything:
            best[place] = each
    return tuple(best.values())


def _needed(path: Path, folders: Folders) -> str:
    """What else needs a checkpoint: runs whose hyper-model it is."""
    users = [
        run.name for run in folders.outlines() if same_place(folders.hyper_model_of(run), path)
    ]
    return f"it is the hyper-model of {', '.join(users)}" if users else ""


def _size(path: Path) -> int:
    """Bytes that go with the file: none with a link, or one of a file's several names."""
    status = os.lstat(path)
    return status.st_size if not path.is_symlink() and status.st_nlink == 1 else 0
