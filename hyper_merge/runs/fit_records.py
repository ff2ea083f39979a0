"""Checkpoints that were fitted onto a run after its merge: their records on disk, and as plain text."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from hyper_merge import __version__
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import NameTakenError, RunError
from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.runs.folders import FITS
from hyper_merge.runs.manifest import Run, RunSource
from hyper_merge.runs.own_loras import is_own_lora
from hyper_merge.runs.plain_data import read_plain
from hyper_merge.runs.report import PARTS, CheckpointReport, CompanionGain, PartLoss
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import file_stem, name_key, one_line

FIT_VERSION: Final = 1

_WORST: Final = 3  # sections that are named


@dataclass(frozen=True)
class PrivateLoraRecord:
    """A private LoRA of what the shared ones leave of a fitted checkpoint; its multiplier is 1."""

    name: str  # in prompts
    rank: int  # in the mean of the layers
    explained: float  # of the checkpoint's deviation, together with the shared LoRAs, 0..1
    size: int  # bytes of the file
    sha256: str  # of the tensors' bytes


@dataclass(frozen=True)
class FitRecord:
    """A checkpoint outside of a merge in terms of its LoRAs; shares are of squared norms ("energy")."""

    run: str
    run_created: str  # ISO 8601: a run that replaced it has other LoRAs
    created: str  # ISO 8601
    row: CheckpointReport  # with the shared LoRAs alone
    path: str  # of the checkpoint
    sha256: str  # of the same
    legacy_hash: str  # A1111's 8 digits
    differs: bool  # from the hyper-model, in any layer
    not_carried: Mapping[str, float]  # kind -> share of its whole deviation
    parts: tuple[PartLoss, ...]  # in the network's order, with the shared LoRAs alone
    recovered: tuple[CompanionGain, ...] = ()  # by the LoRAs' companions
    topups: tuple[PrivateLoraRecord, ...] = ()  # one at most

    @property
    def explained(self) -> float:
        """Share of the deviation in the layers, by all LoRAs together."""
        return self.topups[-1].explained if self.topups else self.row.explained

    @property
    def source(self) -> RunSource:
        """The checkpoint, as those of the merge are described."""
        return RunSource(Path(self.path), Path(self.path).name, self.sha256, self.legacy_hash)

    def tags(self, run: Run) -> str:
        """What makes the hyper-model this checkpoint in a prompt."""
        own = [format_tag(each.name, 1.0) for each in self.topups]
        return " ".join([run.report.tags(self.row), *own])

    def style(self, run: Run) -> tuple[str, str]:
        """Name of a prompt style, and the prompt that it stands for, as for the run's checkpoints."""
        return f"{run.name}: {one_line(self.row.name)}", self.tags(run)


def style_line(fitted: FitRecord, run: Run) -> str:
    """A fit as a line of the WebUI's styles.csv: name, prompt, negative prompt."""
    name, prompt = fitted.style(run)
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([name, prompt, ""])
    return line.getvalue()


def fit_record_paths(run: Run, name: str) -> tuple[Path, Path]:
    """Where the record and the text of a fit belong."""
    folder, stem = run.folder / FITS, file_stem(name)
    return folder / f"{stem}.json", folder / f"{stem}.txt"


def require_own_record(run: Run, name: str) -> None:
    """Returns if the record of a fit would replace that of no other checkpoint.

    Raises:
        NameTakenError: one has the same file name, on a file system that does not tell letters by
            case.
    """
    path, _ = fit_record_paths(run, name)
    for other in path.parent.glob("*.json"):
        known = _recorded_name(other)
        if known != name and name_key(other.stem) == name_key(path.stem):
            raise NameTakenError(
                f"the fit of {one_line(known)} is there already, and {one_line(name)} would"
                f" have the same file ({other}) on Windows and macOS",
                hint="give this one a name of its own",
            )


def _recorded_name(record: Path) -> str:
    """The checkpoint that a record is of; by its file's name where it does not say."""
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["fit"]["row"]["name"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return record.stem


def stage_fit(outputs: FileTransaction, run: Run, fitted: FitRecord) -> None:
    """Stages a fit's record and its text."""
    record = {"version": FIT_VERSION, "hyper_merge": __version__, "fit": asdict(fitted)}
    path, words = fit_record_paths(run, fitted.row.name)
    outputs.text(path, json.dumps(record, indent=1) + "\n")
    outputs.text(words, format_fit(fitted, run))


def load_fits(run: Run) -> tuple[tuple[FitRecord, ...], tuple[str, ...]]:
    """A run's fits by name, and in words what is wrong with those that cannot be used as they are."""
    folder = run.folder / FITS
    paths = () if folder.is_symlink() else sorted(folder.glob("*.json"))
    found = [_loaded(path, run) for path in paths]
    fits = tuple(each for each in found if isinstance(each, FitRecord))
    lost = (problem for each in fits if (problem := _lost(each, run)))
    return fits, (*(each for each in found if isinstance(each, str)), *lost)


def _lost(fitted: FitRecord, run: Run) -> str:
    """In words, if the file that a fit's prompt names is not there, or is another one."""
    for each in fitted.topups:
        path = run.loras[0].with_name(f"{each.name}.safetensors")
        if not is_own_lora(path, each.sha256, fitted.row.name):
            return (
                f"{path.name}, the private LoRA of the fit {one_line(fitted.row.name)} of the run"
                f" {run.name}, is missing or another file; without it {fitted.row.explained:.2%} of"
                " that checkpoint come back: bring it back from a copy, or fit the checkpoint again"
            )
    return ""


def format_fit(fitted: FitRecord, run: Run) -> str:
    """A fit as plain text."""
    row = fitted.row
    lines = [
        f"{one_line(row.name)}, fitted onto the run {fitted.run}: {len(run.report.loras)} shared LoRAs",
        "",
        *(_explained(fitted) if fitted.differs else [_nothing(run)]),
        *_outside(fitted),
        *map(_topped_up, fitted.topups),
        "",
        f"To get {one_line(row.name)}, load {run.hyper_model.stem} and put this into the prompt:",
        fitted.tags(run),
    ]
    return "\n".join(lines) + "\n"


def _explained(fitted: FitRecord) -> list[str]:
    row = fitted.row
    shares = {"unet": row.explained_unet, "text_encoder": row.explained_text_encoder}
    present = [part for part in PARTS if any(each.which == part for each in fitted.parts)]
    parts = ", ".join(f"{PARTS[part]} {shares[part]:.2%}" for part in present)
    worst = sorted(fitted.parts, key=lambda part: -part.lost)[:_WORST]
    left = ", ".join(f"{part.name} {part.lost:.2%}" for part in worst if part.lost > 0)
    return [
        f"explained: {row.explained:.2%} of its difference in the layers ({parts})",
        f"relative error: {row.error:.4f}",
        f"what remains, by section: {left or 'nothing'}",
    ]


def _nothing(run: Run) -> str:
    name = run.hyper_model.name
    return f"explained: nothing; in all layers it is {name} itself, and all multipliers are 0"


def _outside(fitted: FitRecord) -> list[str]:
    shares = ", ".join(f"{kind} {share:.3%}" for kind, share in fitted.not_carried.items() if share)
    lines = [f"not carried by LoRAs, as a share of all its differences: {shares or 'nothing'}"]
    if fitted.recovered:
        back = ", ".join(f"{each.kind} {each.share:.2%}" for each in fitted.recovered)
        lines.append(f"  of which the LoRAs' companions bring back: {back}")
    return lines


def _topped_up(topup: PrivateLoraRecord) -> str:
    size = format_size(topup.size)
    return f"with the top-up {topup.name} (rank {topup.rank}, {size}): {topup.explained:.2%}"


def _loaded(path: Path, run: Run) -> FitRecord | str:
    """The fit, or what is wrong with it."""
    try:
        return _load(path, run)
    except RunError as error:
        return str(error)


def _load(path: Path, run: Run) -> FitRecord:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record.get("version") if isinstance(record, dict) else None
        if isinstance(version, int) and version > FIT_VERSION:
            raise RunError(
                f"the fit {path.stem} of the run {run.name} was made by Hyper-Merge"
                f" {record.get('hyper_merge')}, this is {__version__}",
                hint="update Hyper-Merge to use it",
            )
        fitted: FitRecord = read_plain(FitRecord, record["fit"], "fit")
        _check(fitted, path, run)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"the fit {path.stem} of the run {run.name} cannot be read: {path} is damaged"
            f" ({error})",
            hint="fit the checkpoint again",
        ) from error
    return fitted


def _check(fitted: FitRecord, path: Path, run: Run) -> None:
    """Returns if a fit is of this run as it is now, and complete."""
    stems = (fitted.row.name, file_stem(fitted.row.name))  # as it is in older records
    if fitted.run != run.name or path.stem not in stems:
        raise ValueError("it is that of another run or checkpoint: was it renamed?")
    if fitted.run_created != run.created:
        raise RunError(
            f"the fit {path.stem} is of an earlier run {run.name}, which was replaced since",
            hint="fit the checkpoint again",
        )
    for rows in (fitted.row.multipliers, fitted.row.text_multipliers or fitted.row.multipliers):
        if len(rows) != len(run.report.loras):
            raise ValueError("it has another number of multipliers than the run has LoRAs")
    names = [each.name for each in fitted.topups]
    if any(os.path.basename(name) != name for name in names):  # noqa: PTH119 - a name, not a path
        raise ValueError("a top-up has a folder in its name")


def prompts_of(run: Run) -> dict[str, str]:
    """The tags of every checkpoint of a run, and of those fitted later, by name."""
    report = run.report
    later = {each.row.name: each.tags(run) for each in load_fits(run)[0]}
    own = {row.name: report.tags(row) for row in report.checkpoints}
    return {**own, **later, **own}  # a fit of the same checkpoint tells nothing new


def styles_of(run: Run) -> dict[str, str]:
    """One style per checkpoint: its name, and the prompt that it stands for."""
    return {f"{run.name}: {one_line(name)}": text for name, text in prompts_of(run).items()}
