"""Judges which originals of a run could be deleted, and what would be lost; deletes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyper_merge.errors import RunError
from hyper_merge.operations.inspect import inspect_files
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.integrity import require_hyper_model, require_own
from hyper_merge.runs.originals import LocatedSource, locate_sources
from hyper_merge.runs.paths import same_place
from hyper_merge.runs.report import CheckpointReport
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class DeletionVerdict:
    """One original, and whether the run can replace it."""

    name: str  # of its file
    path: Path
    restored_as: str  # the name by which the run restores it
    safe: bool
    reason: str  # why it is not safe to delete; empty where it is
    frees: int  # bytes that deleting it would free; 0 where nothing is there
    explained: float  # share of its differences in the layers, as the merge counts them, 0..1
    everything: float  # share of all its differences, with what LoRAs do not carry
    not_carried: float  # share of these that no LoRA carries
    vae_differs: bool | None  # from the hyper-model's; None where it is not known


@dataclass(frozen=True)
class DeletionReport:
    """All originals of a run against a threshold."""

    run: str
    threshold: float  # fraction 0..1
    verdicts: tuple[DeletionVerdict, ...]
    problem: str  # why the run cannot restore anything as it is; empty where it can

    @property
    def frees(self) -> int:
        """Bytes that deleting all that is safe to delete would free."""
        return sum(verdict.frees for verdict in self.verdicts if verdict.safe)


def find_deletable(
    name: str, threshold: float, folders: Folders, progress: Progress
) -> DeletionReport:
    """Judges every original of a run, and the checkpoints that were fitted onto it.

    Args:
        name: of the run.
        threshold: share of all differences that the run must restore, 0..1.
        folders: where the run is, its files and the checkpoints.
        progress: progress and interrupt; files whose hashes are not known are read.

    Raises:
        RunError: there is no such run, or it cannot be read.
        InterruptedRun: the user cancelled.
    """
    run = load_run(folders, name)
    checking, finding = progress.split([1.0, 4.0])
    problem = _find_problem(run, checking)
    fits, _ = load_fits(run)
    rows = [
        *run.report.checkpoints,
        *(
            replace(fit.row, explained=fit.explained, explained_weighted=fit.fidelity)
            for fit in fits
        ),
    ]
    count = len(run.report.checkpoints)
    sources = [*run.sources[-count:], *(fit.source for fit in fits)]
    originals = locate_sources(sources, folders, finding)
    vae = None if problem else inspect_files(run.hyper_model).vae
    verdicts = [
        _judge(row, original, threshold, problem or _find_users(original.path, folders), vae)
        for row, original in zip(rows, originals, strict=True)
    ]
    explained = tuple(_with_loss(verdict, run) for verdict in _best_of_each_file(verdicts))
    return DeletionReport(run.name, threshold, explained, problem)


def _find_problem(run: Run, progress: Progress) -> str:
    """Returns why the run cannot restore anything as it is; "" where it can."""
    try:
        require_hyper_model(run)
        names = [lora.name for fit in load_fits(run)[0] for lora in fit.topups]
        private = [run.loras[0].with_name(f"{name}.safetensors") for name in names]
        require_own(run, [*run.loras, *private], progress)
    except RunError as error:
        return str(error)
    return ""


def _judge(
    row: CheckpointReport,
    original: LocatedSource,
    threshold: float,
    obstacle: str,  # what forbids deleting it, even if enough is restored; empty for nothing
    vae: str | None,  # fingerprint of the hyper-model's VAE
) -> DeletionVerdict:
    everything = row.fidelity * (1 - row.not_carried)
    reason = _find_reason(original, everything, threshold) or obstacle
    there = original.state == "there"
    return DeletionVerdict(
        name=original.source.name,
        path=original.path,
        restored_as=row.name,
        safe=not reason,
        reason=reason,
        frees=_freed_bytes(original.path) if there else 0,
        explained=row.fidelity,
        everything=everything,
        not_carried=row.not_carried,
        vae_differs=inspect_files(original.path).vae != vae if there and vae else None,
    )


def _find_reason(original: LocatedSource, everything: float, threshold: float) -> str:
    if original.state == "missing":
        return "it no longer exists"
    if original.state == "changed":
        return "it was changed since the merge, so the run holds only its earlier content"
    return f"less than {100 * threshold:.4g}% is restored" if everything < threshold else ""


def _with_loss(verdict: DeletionVerdict, run: Run) -> DeletionVerdict:
    """Returns the verdict, with a missing private LoRA named as the reason for a small share."""
    if verdict.safe or verdict.restored_as not in run.lost:
        return verdict
    return replace(verdict, reason=f"{verdict.reason}: its private LoRA is missing")


def _best_of_each_file(verdicts: Sequence[DeletionVerdict]) -> tuple[DeletionVerdict, ...]:
    """Returns one verdict for each file: of several fits, the one that restores most."""
    best: dict[str, DeletionVerdict] = {}
    for verdict in verdicts:
        place = os.path.realpath(verdict.path)
        if place not in best or verdict.everything > best[place].everything:
            best[place] = verdict
    return tuple(best.values())


def _find_users(path: Path, folders: Folders) -> str:
    """Returns a clause with the runs whose hyper-model a checkpoint is; "" for none."""
    users = [
        run.name for run in folders.outlines() if same_place(folders.hyper_model_of(run), path)
    ]
    return f"it is the hyper-model of {', '.join(users)}" if users else ""


def _freed_bytes(path: Path) -> int:
    """Returns the bytes that deleting a file frees: none for links and files with several names."""
    status = os.lstat(path)
    return status.st_size if not path.is_symlink() and status.st_nlink == 1 else 0
