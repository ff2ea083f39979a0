"""Checkpoints that were fitted onto a run after its merge, and their records on disk."""

from __future__ import annotations

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
from hyper_merge.runs.manifest import RunSource
from hyper_merge.runs.own_loras import is_own_lora
from hyper_merge.runs.plain_data import read_plain
from hyper_merge.runs.report import CheckpointReport, CompanionGain, PartLoss
from hyper_merge.runs.run import Run
from hyper_merge.runtime.checked_json import read_json
from hyper_merge.runtime.names import file_stem, name_key, one_line

FIT_VERSION: Final = 1


@dataclass(frozen=True)
class PrivateLoraRecord:
    """A private LoRA for what the shared ones leave of a fitted checkpoint; its multiplier is 1."""

    name: str  # in prompts
    rank: int  # in the mean of the layers
    explained: float  # of the checkpoint's deviation, together with the shared LoRAs, 0..1
    size: int  # bytes of the file
    sha256: str  # of the tensors' bytes
    explained_weighted: float = 0.0  # as the merge counts it; 0 in records of earlier versions

    @property
    def fidelity(self) -> float:
        """The explained share as the merge counts it, where it is known."""
        return self.explained_weighted or self.explained


@dataclass(frozen=True)
class FitRecord:
    """A checkpoint outside of a merge as a sum of its LoRAs; shares are of squared norms."""

    run: str
    run_created: str  # ISO 8601: a run that replaced it has other LoRAs
    created: str  # ISO 8601
    row: CheckpointReport  # with the shared LoRAs alone
    path: str  # of the checkpoint
    sha256: str  # of the whole file, 64 hex digits
    legacy_hash: str  # A1111's 8 digits
    differs: bool  # from the hyper-model, in any layer
    not_carried: Mapping[str, float]  # kind -> share of its whole deviation
    parts: tuple[PartLoss, ...]  # in the network's order, with the shared LoRAs alone
    recovered: tuple[CompanionGain, ...] = ()  # by the LoRAs' companions
    topups: tuple[PrivateLoraRecord, ...] = ()  # one at most

    @property
    def explained(self) -> float:
        """The share of the deviation in the layers that all LoRAs together explain, 0..1."""
        return self.topups[-1].explained if self.topups else self.row.explained

    @property
    def fidelity(self) -> float:
        """The same as the merge counts it, where it is known."""
        if self.topups:
            return self.topups[-1].fidelity
        return self.row.fidelity

    @property
    def source(self) -> RunSource:
        """The checkpoint, described like those of the merge."""
        return RunSource(Path(self.path), Path(self.path).name, self.sha256, self.legacy_hash)

    def tags(self, run: Run) -> str:
        """Returns the prompt tags that turn the hyper-model into this checkpoint."""
        private = [format_tag(lora.name, 1.0) for lora in self.topups]
        return " ".join(filter(None, [run.report.tags(self.row), *private]))

    def style(self, run: Run) -> tuple[str, str]:
        """Returns the name of the checkpoint's prompt style, and its prompt."""
        return f"{run.name}: {one_line(self.row.name)}", self.tags(run)


def fit_record_paths(run: Run, name: str) -> tuple[Path, Path]:
    """Returns where the record and the text of a fit belong."""
    folder, stem = run.folder / FITS, file_stem(name)
    return folder / f"{stem}.json", folder / f"{stem}.txt"


def require_own_record(run: Run, name: str) -> None:
    """Returns if the record of a fit would replace no other checkpoint's record.

    Raises:
        NameTakenError: another record has the same file name where letter case is ignored.
    """
    path, _ = fit_record_paths(run, name)
    for other in path.parent.glob("*.json"):
        known = _recorded_name(other)
        if known != name and name_key(other.stem) == name_key(path.stem):
            raise NameTakenError(
                f"the fit of {one_line(known)} exists already, and {one_line(name)} would"
                f" have the same file ({other}) on Windows and macOS",
                hint="choose another name for it",
            )


def _recorded_name(record: Path) -> str:
    """Returns the checkpoint of a record; the stem of the file where the record is damaged."""
    try:
        return str(read_json(record)["fit"]["row"]["name"])
    except (OSError, ValueError, LookupError, TypeError):
        return record.stem


def stage_fit(outputs: FileTransaction, run: Run, record: FitRecord, text: str) -> None:
    """Stages a fit's record, and its text in the same folder."""
    data = {"version": FIT_VERSION, "hyper_merge": __version__, "fit": asdict(record)}
    record_path, text_path = fit_record_paths(run, record.row.name)
    outputs.text(record_path, json.dumps(data, indent=1) + "\n")
    outputs.text(text_path, text)


def load_fits(run: Run) -> tuple[tuple[FitRecord, ...], tuple[str, ...]]:
    """Returns a run's fits by name, and a sentence for each that cannot be used as it is."""
    folder = run.folder / FITS
    paths = () if folder.is_symlink() else sorted(folder.glob("*.json"))
    results = [_load_or_explain(path, run) for path in paths]
    fits = tuple(result for result in results if isinstance(result, FitRecord))
    problems = (result for result in results if isinstance(result, str))
    lost = (_find_lost_lora(record, run) for record in fits)
    return fits, (*problems, *filter(None, lost))


def _find_lost_lora(record: FitRecord, run: Run) -> str:
    """Returns a sentence about a file of the fit's prompt that is gone or replaced; "" for none."""
    for lora in record.topups:
        path = run.loras[0].with_name(f"{lora.name}.safetensors")
        if not is_own_lora(path, lora.sha256, record.row.name):
            return (
                f"{path.name}, the private LoRA of the fit {one_line(record.row.name)} of the run"
                f" {run.name}, is missing or another file, so that {record.row.fidelity:.2%} of"
                f" that {'LoRA' if run.of_loras else 'checkpoint'} is restored; copy it back from a"
                " backup, or fit it again"
            )
    return ""


def _load_or_explain(path: Path, run: Run) -> FitRecord | str:
    """Returns the fit, or a sentence about why it cannot be used."""
    try:
        return _load(path, run)
    except RunError as error:
        return str(error)


def _load(path: Path, run: Run) -> FitRecord:
    try:
        data = read_json(path)
        _require_readable_version(data, path, run)
        record: FitRecord = read_plain(FitRecord, data["fit"], "fit")
        _require_complete(record, path, run)
    except RunError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"the fit {path.stem} of the run {run.name} cannot be read: {path} is damaged"
            f" ({error})",
            hint="fit it again",
        ) from error
    return record


def _require_readable_version(data: object, path: Path, run: Run) -> None:
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(version, int) and version > FIT_VERSION:
        raise RunError(
            f"the fit {path.stem} of the run {run.name} was made by Hyper-Merge"
            f" {data.get('hyper_merge')}, this is {__version__}",
            hint="update Hyper-Merge to use it",
        )


def _require_complete(record: FitRecord, path: Path, run: Run) -> None:
    """Returns if a fit is of this run as it is now, and complete.

    Raises:
        ValueError: it is not.
        RunError: another run had this name when the fit was made.
    """
    stems = (record.row.name, file_stem(record.row.name))  # older records have the former
    if record.run != run.name or path.stem not in stems:
        raise ValueError("it is that of another run or checkpoint: was it renamed?")
    if record.run_created != run.created:
        raise RunError(
            f"the fit {path.stem} is of an earlier run {run.name}, which was replaced since",
            hint="fit it again",
        )
    for rows in (record.row.multipliers, record.row.text_multipliers or record.row.multipliers):
        if len(rows) != len(run.report.loras):
            raise ValueError("it has another number of multipliers than the run has LoRAs")
    names = [lora.name for lora in record.topups]
    names += [record.row.topup] if record.row.topup else []
    if any(os.path.basename(name) != name for name in names):  # noqa: PTH119 - a name, not a path
        raise ValueError("a top-up has a folder in its name")
    for name in names:
        format_tag(name, 1.0)  # prompts can hold it


def prompts_of(run: Run) -> dict[str, str]:
    """Returns the tags of every checkpoint of a run, and of those fitted later, by name."""
    fits, _ = load_fits(run)
    fitted = {record.row.name: record.tags(run) for record in fits}
    merged = {row.name: run.report.tags(row) for row in run.report.checkpoints}
    return {**merged, **fitted, **merged}  # a fit of a merged checkpoint adds nothing


def styles_of(run: Run) -> dict[str, str]:
    """Returns the prompt of every checkpoint's style by the style's name."""
    return {f"{run.name}: {one_line(name)}": text for name, text in prompts_of(run).items()}
