"""Finds the LoRA files, with multipliers, that turn the hyper-model into a checkpoint of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hyper_merge.checkpoints.architectures.spec import PartName
from hyper_merge.errors import RunError
from hyper_merge.loras.metadata import Lineage, SourceRecord
from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.recipe.plain_values import unknown_word
from hyper_merge.runs.fit_records import FitRecord, load_fits
from hyper_merge.runs.folders import metadata_of
from hyper_merge.runs.hash_cache import current_time
from hyper_merge.runs.integrity import require_family
from hyper_merge.runs.manifest import RunSource
from hyper_merge.runs.report import CheckpointReport
from hyper_merge.runs.run import Run


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA file, or a companion of one, with its multipliers."""

    path: Path
    multiplier: float  # of the UNet
    text_multiplier: float  # of the text encoder

    def times(self, part: PartName) -> float:
        """Returns the multiplier of the layers of a part."""
        return self.text_multiplier if part == "text_encoder" else self.multiplier


def weighted_loras_of(run: Run, checkpoint: str) -> tuple[WeightedLora, ...]:
    """Returns the LoRAs that make a checkpoint of the hyper-model, of the merge or fitted later.

    Raises:
        RunError: the run has no checkpoint of that name; suggests the nearest.
    """
    row, fit = find_row(run, checkpoint)
    report, folder = run.report, run.loras[0].parent
    unet, encoder = row.multipliers_of("unet"), row.multipliers_of("text_encoder")
    loras = [
        WeightedLora(folder / f"{name}.safetensors", *pair)
        for name, *pair in zip(report.loras, unet, encoder, strict=True)
    ]
    loras += [
        WeightedLora(folder / f"{name}.safetensors", x, x)
        for name, x in report.companion_multipliers(row)
    ]
    private = [lora.name for lora in fit.topups] if fit else []
    private += [row.topup] if row.topup else []
    return (*loras, *(WeightedLora(folder / f"{name}.safetensors", 1.0, 1.0) for name in private))


def weighted_loras_of_mixture(run: Run, shares: Mapping[str, float]) -> tuple[WeightedLora, ...]:
    """Returns the LoRAs that make a mixture of checkpoints, every file once.

    Multipliers are mixed like the checkpoints. Shares need not add up to 1: as in prompts, the
    hyper-model has the rest.

    Args:
        run: the run.
        shares: by checkpoint.

    Raises:
        RunError: the run has no checkpoint of a name; suggests the nearest.
    """
    sums: dict[Path, tuple[float, float]] = {}
    for name, share in shares.items():
        for lora in weighted_loras_of(run, name):
            x, y = sums.get(lora.path, (0.0, 0.0))
            sums[lora.path] = (x + share * lora.multiplier, y + share * lora.text_multiplier)
    return tuple(WeightedLora(path, *pair) for path, pair in sums.items())


def tag_rows(run: Run, checkpoint: str) -> tuple[tuple[str, float, float | None], ...]:
    """Returns name, multiplier, and text encoder's multiplier or None, for every prompt tag.

    Raises:
        RunError: the run has no checkpoint of that name; suggests the nearest.
    """
    row, _ = find_row(run, checkpoint)
    separate = run.report.loras if row.text_multipliers else ()
    return tuple(
        (name, lora.multiplier, lora.text_multiplier if name in separate else None)
        for lora in weighted_loras_of(run, checkpoint)
        for name in (lora.path.stem,)
    )


def mixture_tags(run: Run, shares: Mapping[str, float]) -> str:
    """Returns the prompt tags of a mixture of a run's checkpoints, one for each LoRA that takes part.

    Args:
        run: the run.
        shares: by checkpoint, of the merge or fitted later; those of 0 take no part.

    Raises:
        RunError: the run has no checkpoint of a name; suggests the nearest.
    """
    present = {name: share for name, share in shares.items() if share}
    rows = [row for name in present for row in tag_rows(run, name)]
    separate = {name for name, _, text in rows if text is not None}
    return " ".join(
        format_tag(name, lora.multiplier, lora.text_multiplier if name in separate else None)
        for lora in weighted_loras_of_mixture(run, present)
        for name in (lora.path.stem,)
        if lora.multiplier or lora.text_multiplier
    )


def checkpoint_names(run: Run) -> tuple[str, ...]:
    """Returns the names of a run's checkpoints, then of those that were fitted later."""
    fits, _ = load_fits(run)
    names = [row.name for row in (*run.report.checkpoints, *(record.row for record in fits))]
    return tuple(dict.fromkeys(names))


def shared_files(run: Run) -> tuple[Path, ...]:
    """Returns the files that all checkpoints of a run share: LoRAs, then their companions."""
    return run.loras[: len(run.report.loras) + len(run.report.companions)]


def find_row(run: Run, name: str) -> tuple[CheckpointReport, FitRecord | None]:
    """Returns the row with a checkpoint's multipliers, and its fit if it was fitted later.

    Raises:
        RunError: the run has no checkpoint of that name; suggests the nearest.
    """
    fits, _ = load_fits(run)
    known: dict[str, tuple[CheckpointReport, FitRecord | None]] = {
        record.row.name: (record.row, record) for record in fits
    }
    known |= {row.name: (row, None) for row in run.report.checkpoints}
    row = known.get(name) or known.get(name.removesuffix(".safetensors"))
    if row is None:
        message = f"the run {run.name} has no checkpoint {name}"
        raise unknown_word(RunError, message, name, known, "It has")
    return row


def prompt_tags_of(run: Run, name: str) -> str:
    """Returns the prompt tags of a checkpoint of a run, of the merge or fitted later.

    Raises:
        RunError: the run has no checkpoint of that name; suggests the nearest.
    """
    row, fit = find_row(run, name)
    return fit.tags(run) if fit else run.report.tags(row)


def source_of(run: Run, name: str) -> RunSource:
    """Returns the file that a checkpoint of a run was, of the merge or fitted later.

    Raises:
        RunError: the run has none of that name, or its manifest does not say which file it was.
    """
    row, fit = find_row(run, name)
    if fit is not None:
        return fit.source
    # The last of that name: a given base comes first.
    sources = [source for source in run.sources if Path(source.name).stem == row.name]
    if not sources:
        raise RunError(
            f"the manifest of the run {run.name} does not say which file {row.name} was",
            hint="copy it back from a backup, or merge again",
        )
    return sources[-1]


def base_name(run: Run) -> str:
    """Returns the file stem of what a run's LoRAs are added to: "" where it is not known."""
    if not run.of_loras:
        return run.hyper_model.stem
    return metadata_of(run.loras[0]).get("ss_sd_model_name", "").removesuffix(".safetensors")


def lineage_of_run(run: Run, name: str, further: Iterable[SourceRecord] = ()) -> Lineage:
    """Returns the lineage of a file that is made of a run's files.

    Args:
        run: the run.
        name: of the checkpoint that the file is, or goes with.
        further: checkpoints that went into it in addition to the run's.
    """
    merged = (SourceRecord(s.name, s.sha256, s.legacy_hash, {}) for s in run.sources)
    return Lineage(
        name,
        require_family(run),
        run.recipe.to_metadata(),
        (*merged, *further),
        current_time(),
        of_loras=run.of_loras,
    )
