"""Which LoRA files, with which multipliers, make up a checkpoint of a run; and that they are its own."""

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
from hyper_merge.runs.hash_cache import current_time
from hyper_merge.runs.integrity import require_family
from hyper_merge.runs.manifest import Run, RunSource
from hyper_merge.runs.report import CheckpointReport


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA file, or a companion of one, and what it is multiplied with."""

    path: Path
    multiplier: float  # of the UNet
    text_multiplier: float  # of the text encoder

    def times(self, part: PartName) -> float:
        """The multiplier of the layers of a part."""
        return self.text_multiplier if part == "text_encoder" else self.multiplier


def weighted_loras_of(run: Run, checkpoint: str) -> tuple[WeightedLora, ...]:
    """What is added to the hyper-model to become a checkpoint: of the merge, or fitted later.

    Raises:
        RunError: the run knows none of that name; says the nearest.
    """
    row, fitted = find_row(run, checkpoint)
    report, folder = run.report, run.loras[0].parent
    unet, encoder = row.multipliers_of("unet"), row.multipliers_of("text_encoder")
    terms = [
        WeightedLora(folder / f"{name}.safetensors", *pair)
        for name, *pair in zip(report.loras, unet, encoder, strict=True)
    ]
    if report.companions:
        pairs = zip(report.companions, unet, strict=True)
        terms += [WeightedLora(folder / f"{name}.safetensors", x, x) for name, x in pairs]
    own = [each.name for each in fitted.topups] if fitted else []
    own += [row.topup] if row.topup else []
    return (*terms, *(WeightedLora(folder / f"{name}.safetensors", 1.0, 1.0) for name in own))


def weighted_loras_of_mixture(run: Run, shares: Mapping[str, float]) -> tuple[WeightedLora, ...]:
    """The same for a mixture, each file once: multipliers mix as the checkpoints do.

    Shares need not add up to 1: as in prompts, the hyper-model has the rest.

    Args:
        run: the run.
        shares: by checkpoint.

    Raises:
        RunError: the run knows none of a name; says the nearest.
    """
    sums: dict[Path, tuple[float, float]] = {}
    for name, share in shares.items():
        for term in weighted_loras_of(run, name):
            x, y = sums.get(term.path, (0.0, 0.0))
            sums[term.path] = (x + share * term.multiplier, y + share * term.text_multiplier)
    return tuple(WeightedLora(path, *pair) for path, pair in sums.items())


def tag_rows(run: Run, checkpoint: str) -> tuple[tuple[str, float, float | None], ...]:
    """A checkpoint's prompt tags as numbers: LoRA, multiplier, the text encoder's if it has its own.

    Raises:
        RunError: the run knows none of that name; says the nearest.
    """
    row, _ = find_row(run, checkpoint)
    own = run.report.loras if row.text_multipliers else ()
    return tuple(
        (name, term.multiplier, term.text_multiplier if name in own else None)
        for term in weighted_loras_of(run, checkpoint)
        for name in (term.path.stem,)
    )


def mixture_tags(run: Run, shares: Mapping[str, float]) -> str:
    """What makes the hyper-model a mixture of checkpoints in a prompt: one tag for each LoRA.

    Args:
        run: the run.
        shares: by checkpoint, as for `weighted_loras_of_mixture`; those with a share of 0 are not there.

    Raises:
        RunError: the run knows none of a name; says the nearest.
    """
    present = {name: share for name, share in shares.items() if share}
    rows = [row for name in present for row in tag_rows(run, name)]
    own = {name for name, _, text in rows if text is not None}
    return " ".join(
        format_tag(name, term.multiplier, term.text_multiplier if name in own else None)
        for term in weighted_loras_of_mixture(run, present)
        for name in (term.path.stem,)
    )


def checkpoint_names(run: Run) -> tuple[str, ...]:
    """All that the run can become: its checkpoints, then those that were fitted later."""
    fits, _ = load_fits(run)
    names = [row.name for row in run.report.checkpoints] + [each.row.name for each in fits]
    return tuple(dict.fromkeys(names))


def shared_files(run: Run) -> tuple[Path, ...]:
    """The files that all checkpoints of a run share: LoRAs, then their companions."""
    return run.loras[: len(run.report.loras) + len(run.report.companions)]


def find_row(run: Run, name: str) -> tuple[CheckpointReport, FitRecord | None]:
    """A checkpoint's multipliers by its name, and its fit if it was fitted later.

    Raises:
        RunError: the run knows none of that name; says the nearest.
    """
    fits, _ = load_fits(run)
    known: dict[str, tuple[CheckpointReport, FitRecord | None]] = {
        each.row.name: (each.row, each) for each in fits
    }
    known |= {row.name: (row, None) for row in run.report.checkpoints}
    found = known.get(name) or known.get(name.removesuffix(".safetensors"))
    if found is None:
        message = f"the run {run.name} has no checkpoint {name}"
        raise unknown_word(RunError, message, name, known, "It has")
    return found


def prompt_tags_of(run: Run, name: str) -> str:
    """What makes the hyper-model a checkpoint of a run in a prompt, of the merge or fitted later.

    Raises:
        RunError: the run knows none of that name; says the nearest.
    """
    row, fitted = find_row(run, name)
    return fitted.tags(run) if fitted else run.report.tags(row)


def source_of(run: Run, name: str) -> RunSource:
    """The file that a checkpoint of a run was, of the merge or fitted later.

    Raises:
        RunError: the run knows none of that name, or its manifest does not say which file it was.
    """
    row, fitted = find_row(run, name)
    if fitted is not None:
        return fitted.source
    # The last of that name: a given base comes first.
    own = [each for each in run.sources if Path(each.name).stem == row.name]
    if not own:
        raise RunError(
            f"the manifest of the run {run.name} does not say which file {row.name} was",
            hint="bring it back from a copy, or merge again",
        )
    return own[-1]


def lineage_of_run(run: Run, name: str, further: Iterable[SourceRecord] = ()) -> Lineage:
    """What a file that is made of a run's says of where it comes from.

    Args:
        run: the run.
        name: of the checkpoint that the file is, or goes with.
        further: checkpoints that went into it besides the run's.
    """
    own = tuple(SourceRecord(each.name, each.sha256, each.legacy_hash, {}) for each in run.sources)
    return Lineage(
        name, require_family(run), run.recipe.to_metadata(), (*own, *further), current_time()
    )
