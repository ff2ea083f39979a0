"""Turns many LoRAs of one base into a few shared ones, with one multiplier each for every input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.errors import NameTakenError, RecipeError
from hyper_merge.loras.metadata import Lineage
from hyper_merge.operations.loras.analysis import analyze_loras
from hyper_merge.operations.loras.by_relatives import share_by_relatives
from hyper_merge.operations.loras.inputs import LoraSet, read_loras
from hyper_merge.operations.loras.relatives import find_relative_sets, may_fall_apart
from hyper_merge.operations.merge.file_overhead import FileOverhead
from hyper_merge.operations.merge.naming import suggest_name
from hyper_merge.operations.merge.outputs import (
    MergeOutputs,
    named_topups,
    require_free_names,
    shared_names,
)
from hyper_merge.operations.merge.preflight import (
    Preflight,
    check_stems,
    with_lora_dtype,
    with_ranks,
)
from hyper_merge.operations.merge.report_builder import FileSizes, make_report
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.operations.merge.solving import Search, solve_shared, with_private_loras
from hyper_merge.recipe.recipe import AVERAGE, Recipe
from hyper_merge.runs.folders import (
    LORA_MANIFEST,
    MANIFEST,
    MULTIPLIERS,
    REPORT,
    Folders,
    Place,
    require_no_source,
)
from hyper_merge.runs.hash_cache import current_time, hash_sources
from hyper_merge.runs.manifest import RunManifest, RunSource
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runs.report import Report
from hyper_merge.runs.report_text import format_report
from hyper_merge.runtime.devices import device_job, resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.names import one_line, unique_name
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.metric import Metric

DEFAULTS: Final = {"exact": "none", "layer_weights": "plain"}
"""The settings that go with LoRAs and not with checkpoints, where nothing else is asked for."""

# Settings that are about checkpoints, with the values that they can have here.
_FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "base": (AVERAGE,),
    "weights": (None,),
    "block_weights": (None,),
    "training": (0, "auto"),
    "vae": ("first",),
    "exact": ("none",),
}


@dataclass(frozen=True, eq=False)
class SharePreflight:
    """A recipe that was validated against its LoRAs; nothing is written yet."""

    merge: Preflight
    loras: LoraSet

    @property
    def recipe(self) -> Recipe:
        """The settings."""
        return self.merge.recipe


@dataclass(frozen=True)
class ShareResult:
    """The files of shared LoRAs, and their report."""

    report: Report
    folder: Path  # of manifest, multipliers and report
    loras: tuple[Path, ...]  # with private ones


def preflight_share(recipe: Recipe, folders: Folders | None = None) -> SharePreflight:
    """Validates a recipe whose models are LoRAs, by their headers.

    Args:
        recipe: the settings; those about checkpoints must have their defaults, and `exact` none.
        folders: where the files go; None for those of the recipe's output folder.

    Raises:
        HyperMergeError: a file is missing, damaged, no LoRA, or does not go with the others; or a
            setting does not go with them.
    """
    resolve_device(recipe.device)
    require_several(recipe.models)
    for key, values in _FIXED.items():
        if getattr(recipe, key) not in values:
            raise RecipeError(
                f"{key} {getattr(recipe, key)} goes with checkpoints, not with LoRAs",
                hint=f"choose {key} {values[0]}" if values[0] else "leave it out",
                key=key,
            )
    loras = read_loras(recipe.models, accepts_damaged=recipe.damaged == "accept")
    check_stems(loras.headers)
    recipe = with_lora_dtype(recipe, loras.family)
    inputs = loras.inputs(DTYPES_BY_WORD[recipe.dtype])
    recipe = with_ranks(recipe, inputs)
    folders = folders or Folders.under(recipe.output)
    return SharePreflight(Preflight(recipe, inputs, loras.warnings, folders), loras)


def require_several(loras: Sequence[Path]) -> None:
    """Returns if there are two LoRAs or more to be shared.

    Raises:
        RecipeError: there are not.
    """
    if len(loras) < 2:
        raise RecipeError(
            f"Fewer than two LoRAs: expected 2 files or more, got {len(loras)}",
            hint="resize makes a single one smaller",
            key="models",
        )


def share_recipe(
    settings: Mapping[str, object],
    loras: Sequence[Path],
    folders: Folders,
    place: Callable[[str], str],
) -> Recipe:
    """Returns the recipe for shared LoRAs from settings as somebody gave them.

    Args:
        settings: by name; those that are left out have the defaults that go with LoRAs.
        loras: the files.
        folders: where the shared LoRAs go.
        place: what a screen calls a setting, for messages.

    Raises:
        RecipeError: a setting is not allowed.
    """
    output = folders.models.parent
    return Recipe.parse({**DEFAULTS, **settings, "models": tuple(loras), "output": output}, place)


def free_run_name(loras: Sequence[Path], folders: Folders) -> str:
    """Returns a name for shared LoRAs that no run has and none of whose files is there."""

    def is_taken(name: str) -> bool:
        return folders.is_used(name) or any(folders.loras.glob(f"{name}_*.safetensors"))

    return unique_name(suggest_name([path.name for path in loras]), is_taken)


def share_loras(recipe: Recipe, folders: Folders, progress: Progress) -> ShareResult:
    """Validates a recipe whose models are LoRAs, tells its warnings, and writes the shared LoRAs.

    Raises:
        HyperMergeError: as `preflight_share` and `run_share`.
    """
    preflight = preflight_share(recipe, folders)
    for warning in preflight.merge.warnings:
        progress.warn(warning)
    return run_share(preflight, progress)


def run_share(
    preflight: SharePreflight, progress: Progress, effort: SearchEffort | None = None
) -> ShareResult:
    """Writes the shared LoRAs, all files or none.

    Args:
        preflight: the validated recipe.
        progress: progress and interrupt.
        effort: how thorough the search for a start is; None for the default.

    Raises:
        HyperMergeError: a name is taken, a file was changed, a full disk, or the user's interrupt.
    """
    recipe, folders = preflight.recipe, preflight.merge.folders
    holds = (Hold("merge", recipe.name), Hold("run", recipe.name))
    with device_job(preflight.merge.pass_options.device), held(folders.runs, *holds):
        place = _place(recipe, folders)
        if not recipe.finds_ranks:
            names = shared_names(preflight.merge, place)
            _require_free_names(preflight.merge, place, names)
        return _write_all(preflight, place, Search(effort=effort), progress)


def _write_all(
    preflight: SharePreflight, place: Place, search: Search, progress: Progress
) -> ShareResult:
    merge = preflight.merge
    hashing, solving, writing = progress.split((1.0, 10.0, 1.0))
    with (
        FileTransaction(overwrite=merge.recipe.overwrite) as transaction,
        ExitStack() as resources,
    ):
        lineage = _lineage(merge, hashing)
        overhead = FileOverhead(merge.recipe, merge.inputs, (), lineage, place.run)
        metric, solved = _solve(preflight, overhead, search, resources, solving)
        merge = replace(merge, recipe=solved.plan.recipe)
        lineage = replace(lineage, recipe=merge.recipe.to_metadata())
        outputs = MergeOutputs(transaction, place, lineage)
        report, names = _stage(outputs, merge, metric, solved, writing)
        progress.report("putting the files in place", 1.0)
    return ShareResult(report, place.folder, tuple(outputs.lora_path(name) for name in names))


def _solve(
    preflight: SharePreflight,
    overhead: FileOverhead,
    search: Search,
    resources: ExitStack,
    progress: Progress,
) -> tuple[Metric, SolvedMerge]:
    """Returns the shared LoRAs with the metric that they were found in, set by set where many fall apart."""
    merge, loras = preflight.merge, preflight.loras
    if may_fall_apart(merge):
        comparing, progress = progress.split((0.1, 0.9))
        sets = find_relative_sets(merge, loras, comparing)
        if len(sets) > 1:
            return share_by_relatives(sets, merge, loras, overhead, search, progress)
    reading, solving, adding = progress.split((3.0, 6.0, 1.0))
    analysis = resources.enter_context(
        analyze_loras(loras, merge.recipe, merge.folders.cache, reading)
    )
    metric = Metric.of(analysis, merge.recipe, solving)
    solved = solve_shared(metric, merge, overhead, search, solving)
    return metric, with_private_loras(metric, solved, overhead, adding)


def _stage(
    outputs: MergeOutputs,
    merge: Preflight,
    metric: Metric,
    solved: SolvedMerge,
    progress: Progress,
) -> tuple[Report, tuple[str, ...]]:
    """Stages all files; returns the report, and the names of the LoRAs."""
    folders, place = merge.folders, outputs.place
    private = outputs.named_private_loras(merge, solved)
    names = (*shared_names(merge, place, solved), *private)
    _require_free_names(merge, place, names)
    require_disks({place.loras: solved.factor_bytes()})
    if merge.recipe.overwrite:
        outputs.remove_outdated(folders, names)
    files = outputs.lora_files(merge, solved)
    outputs.stage_loras(merge, files, solved, progress)
    outputs.stage_private_loras(merge, solved)
    stems = [header.stem for header in merge.inputs.headers]
    loras = sum(outputs.transaction.size_of(outputs.lora_path(name)) for name in names)
    sizes = FileSizes(sum(header.size for header in merge.inputs.headers), 0, loras)
    report = make_report(metric, solved, place.run, tuple(files), stems, sizes)
    topups = named_topups(outputs.transaction, place.loras, private)
    rows = tuple(replace(row, topup=topups.get(row.name, "")) for row in report.checkpoints)
    # Groups say what an average for each would take away, and there is none.
    report = replace(report, checkpoints=rows, groups=(), between_groups=0.0)
    _stage_texts(outputs, merge, report)
    return report, names


def _require_free_names(merge: Preflight, place: Place, names: Sequence[str]) -> None:
    """Returns if LoRAs of these names replace nothing but what the user has agreed to.

    Raises:
        OutputError: a name is taken, or a LoRA that is read would be replaced or removed: the folder
            of the inputs may be that of the outputs, and a run may be replaced by one of its LoRAs.
    """
    folders, overwrite = merge.folders, merge.recipe.overwrite
    require_free_names(place, names, folders, overwrite=overwrite)
    paths = [place.loras / f"{name}.safetensors" for name in names]
    if overwrite:
        paths += folders.lora_files_of(place.run) + folders.fit_files_of(place.run)
    for path in paths:
        require_no_source(path, merge.recipe.models)


def _stage_texts(outputs: MergeOutputs, merge: Preflight, report: Report) -> None:
    lines = (f"{one_line(row.name)}: {report.tags(row)}\n" for row in report.checkpoints)
    folder, transaction = outputs.place.folder, outputs.transaction
    transaction.text(folder / MULTIPLIERS, "".join(lines))
    transaction.text(folder / REPORT, format_report(report, of_loras=True))
    manifest = _manifest(outputs, merge, report)
    transaction.text(folder / LORA_MANIFEST, json.dumps(manifest.to_json(), indent=1) + "\n")


def _manifest(outputs: MergeOutputs, merge: Preflight, report: Report) -> RunManifest:
    lineage = outputs.lineage
    pairs = zip(merge.inputs.headers, lineage.sources, strict=True)
    return RunManifest(
        name=outputs.place.run,
        created=lineage.date,
        family=lineage.family.name,
        recipe=lineage.recipe,
        settings=merge.recipe.to_settings(),
        average_id=None,
        hyper_model=Path(),
        sources=tuple(
            RunSource(header.path.absolute(), source.name, source.sha256, source.legacy_hash)
            for header, source in pairs
        ),
        base_is_first_source=False,
        report=report,
        hashes=outputs.hashes(report),
    )


def _place(recipe: Recipe, folders: Folders) -> Place:
    """Returns where the files go.

    Raises:
        NameTakenError: another run has the name, or the same one and it may not be replaced.
    """
    folder = folders.runs / recipe.name
    folders.require_same_case(recipe.name)
    if (folder / MANIFEST).exists():
        raise NameTakenError(
            f"{recipe.name} is a run of checkpoints", hint="choose another name", key="name"
        )
    if folders.is_used(recipe.name) and not recipe.overwrite:
        raise NameTakenError(
            f"{folder} exists already", hint="choose another name, or --overwrite", key="name"
        )
    model = folders.models / f"{recipe.name}.safetensors"
    return Place(recipe.name, model, exists=True, loras=folders.loras, folder=folder)


def _lineage(merge: Preflight, progress: Progress) -> Lineage:
    headers = merge.inputs.headers
    bases = {header.metadata.get("ss_sd_model_name", "") for header in headers}
    base = bases.pop() if len(bases) == 1 else ""
    return Lineage(
        name=base.removesuffix(".safetensors"),
        family=merge.inputs.layout.family,
        recipe=merge.recipe.to_metadata(),
        sources=hash_sources(headers, merge.folders.cache, progress),
        date=current_time(),
        of_loras=True,
    )
