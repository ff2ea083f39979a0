"""The main job: a recipe in; hyper-model, LoRAs, multipliers and a report out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from hyper_merge import __version__, analysis_cache
from hyper_merge.analysis import LayerAnalysis, Work, run_pass
from hyper_merge.analysis_cache import Analysis, new_analysis, open_analysis
from hyper_merge.checkpoints.outputs import Outputs
from hyper_merge.checkpoints.prediction import config_beside, configuration_for
from hyper_merge.checkpoints.staging import require_free
from hyper_merge.checkpoints.writer import SafetensorsWriter
from hyper_merge.control import Control
from hyper_merge.costs import Costs, Existing, average_costs
from hyper_merge.errors import RecipeError
from hyper_merge.exact import find_companions, write_companion
from hyper_merge.folders import (
    AVERAGE_ID,
    MANIFEST,
    MULTIPLIERS,
    REPORT,
    Folders,
    Place,
    require_no_source,
)
from hyper_merge.lineage import lineage_of
from hyper_merge.lora import (
    CARD_SUFFIXES,
    Lineage,
    LoraFile,
    checkpoint_metadata,
    stage_checkpoint_card,
    write_lora,
)
from hyper_merge.preflight import Preflight, require_disks, resolve_device
from hyper_merge.prompts import companion_names, lora_names
from hyper_merge.recipe import AVERAGE
from hyper_merge.report import BlockChoice, Fit, Recovered, Report, Sizes, fit, make_report
from hyper_merge.report_text import text
from hyper_merge.rounding import Rounded, rounded
from hyper_merge.settle import solved_as_asked
from hyper_merge.solution import find_blocks
from hyper_merge.weighting import layer_weights
from hyper_merge.widths import widths_for

MANIFEST_VERSION: Final = 1


@dataclass(frozen=True)
class Merged:
    """Where everything is, and how good it is."""

    report: Report
    place: Place
    loras: tuple[Path, ...]
    reused_analysis: bool


@dataclass(frozen=True, eq=False)
class _Solved:
    """What the files are made of."""

    blocks: Rounded
    found: Fit
    losses: tuple[float, ...]


def run_merge(
    preflight: Preflight,
    control: Control,
    folders: Folders | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Merged:
    """Makes everything that the recipe asks for; on any failure every existing file stays as it was.

    Args:
        preflight: the examined recipe.
        control: progress and interrupt.
        folders: where everything goes; None for those that the recipe was examined with.
        start: multipliers (k, R) that are worth a try besides the others, by the layers' part.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    if folders is not None:
        preflight = replace(preflight, folders=folders)
    recipe, sources, folders = preflight.recipe, preflight.sources, preflight.folders
    place = folders.place(recipe, preflight.average_id)
    if not recipe.finds_ranks:
        _require_free(place, _names(preflight, place), overwrite=recipe.overwrite)
    work = preflight.work
    cached = analysis_cache.find(folders.cache, sources, work, recipe.ranks)
    preflight.require_room(place)
    existing = Existing(folders.cache, average=place.exists, analysis=cached is not None)
    costs = preflight.costs(existing)
    hashing, reading, solving, writing = control.split(
        (costs.hashing, costs.reading, costs.solving + costs.rounding, costs.writing)
    )
    with Outputs(overwrite=recipe.overwrite) as outputs:
        lineage = lineage_of(sources, recipe, folders.cache, hashing)
        lineage = replace(lineage, name=place.hyper_model.stem)  # it may be an earlier merge's
        if not place.exists:
            stage_checkpoint_card(outputs, place.hyper_model, lineage, overwrite=recipe.overwrite)
        path = cached or analysis_cache.path_for(folders.cache, sources, work)
        if cached:
            analysis_cache.mark_used(cached)
        _read(
            preflight,
            place,
            outputs,
            lineage,
            (None if cached else path, work),
            reading,
        )
        with open_analysis(path, sources) as analysis:
            preflight, solved = solved_as_asked(
                analysis, preflight, partial(_solve, analysis, (costs, start or {})), solving
            )
            lineage = replace(lineage, recipe=preflight.recipe.to_metadata())
            names = _names(preflight, place)
            _require_free(place, names, overwrite=recipe.overwrite)
            if recipe.overwrite:
                _remove_outdated(outputs, folders, place.run, names)
            files = _lora_files(preflight, place, lineage, solved)
            _stage_loras(outputs, preflight, place, files, solved, writing)
            recovered = _stage_companions(outputs, preflight, place, files, solved.found, writing)
            report = make_report(
                analysis,
                solved.found,
                BlockChoice(solved.blocks.ranks, preflight.allowance, preflight.groups),
                (place.run, tuple(files), [header.stem for header in sources.headers]),
                (recipe.method, solved.losses),
                _sizes(preflight, place, outputs, names),
            )
            report = replace(report, companions=names[len(files) :], recovered=recovered)
        _stage_texts(outputs, preflight, place, lineage, report)
        control.step("putting the files in place", 1.0)
    analysis_cache.prune(folders.cache, folders.cache_limit)
    paths = tuple(place.loras / f"{name}.safetensors" for name in names)
    return Merged(report, place, paths, cached is not None)


def run_average(preflight: Preflight, control: Control, folders: Folders | None = None) -> Path:
    """Writes the hyper-model alone; arguments as for `run_merge`.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    recipe, sources = preflight.recipe, preflight.sources
    folders = folders or preflight.folders
    path = folders.models / f"{recipe.name}.safetensors"
    if recipe.base != AVERAGE:
        raise RecipeError(f"the average has no use for the base {recipe.base}; leave it out")
    require_no_source(path, recipe.models)
    require_free(path, overwrite=recipe.overwrite)
    folders.require_unused(path, preflight.average_id)
    require_disks({folders.models: preflight.estimate.average})
    work = Work(resolve_device(recipe.device), recipe.seed)
    with Outputs(overwrite=recipe.overwrite) as outputs:
        hashing, reading = control.split(average_costs(sources, folders.cache))
        lineage = lineage_of(sources, recipe, folders.cache, hashing)
        with _average_writer(outputs, path, preflight, lineage) as writer:
            run_pass(sources, work, writer.write, _ignore, reading)
    return path


def _read(
    preflight: Preflight,
    place: Place,
    outputs: Outputs,
    lineage: Lineage,
    wanted: tuple[Path | None, Work],  # where the analysis goes, if one is to be made
    control: Control,
) -> None:
    """The pass over the files, for whatever is not there yet: average, analysis, both or neither."""
    path, work = wanted
    if place.exists and path is None:
        return
    if path is None:
        with _average_writer(outputs, place.hyper_model, preflight, lineage) as average:
            work = Work(work.device, work.seed)
            run_pass(preflight.sources, work, average.write, _ignore, control)
        return
    work = replace(work, widths=widths_for(preflight.sources, work.width or 0, control))
    with new_analysis(path, preflight.sources, work) as analysis:
        if place.exists:
            not_carried = run_pass(preflight.sources, work, None, analysis.keep, control)
        else:
            with _average_writer(outputs, place.hyper_model, preflight, lineage) as average:
                not_carried = run_pass(
                    preflight.sources, work, average.write, analysis.keep, control
                )
        analysis.close_with(not_carried)


def _names(preflight: Preflight, place: Place) -> tuple[str, ...]:
    """Of the LoRAs and, after them, of their companions if there are any."""
    names = lora_names(place.run, preflight.recipe.ranks)
    return (*names, *companion_names(names)) if preflight.vectors else names


def _solve(
    analysis: Analysis,
    given: tuple[Costs, Mapping[str, Tensor]],  # and multipliers that are worth a try
    preflight: Preflight,
    control: Control,
) -> _Solved:
    costs, start = given
    recipe, allowance = preflight.recipe, preflight.allowance
    solving, rounding = control.split((costs.solving, costs.rounding))
    where = preflight.work.device, solving
    found = find_blocks(analysis, recipe, preflight.ranks, allowance, where, start)
    stored = (preflight.alphas, preflight.sources.dtype)
    blocks = rounded(analysis, found, preflight.groups, stored, rounding)
    fitted = fit(analysis, blocks, preflight.groups, layer_weights(analysis, recipe))
    return _Solved(blocks, fitted, found.losses)


def _average_writer(
    outputs: Outputs, path: Path, preflight: Preflight, lineage: Lineage
) -> SafetensorsWriter:
    metadata = {**checkpoint_metadata(lineage), AVERAGE_ID: preflight.average_id}
    config = configuration_for(preflight.sources.headers[0], preflight.sources.layout.family)
    if config is not None:
        outputs.text(config_beside(path), config)
    elif preflight.recipe.overwrite and config_beside(path).exists():
        outputs.remove(config_beside(path))  # that of the file which is replaced
    return outputs.safetensors(path, preflight.sources.outputs(), metadata)


def _lora_files(
    preflight: Preflight, place: Place, lineage: Lineage, solved: _Solved
) -> dict[str, LoraFile]:
    """What is written of every block besides its tensors, by name."""
    recipe = preflight.recipe
    stems = [header.stem for header in preflight.sources.headers]
    names = lora_names(place.run, recipe.ranks)
    text = solved.found.multipliers.get("text_encoder")
    return {
        name: LoraFile(
            lineage=lineage,
            run=place.run,
            index=block,
            count=len(names),
            rank=recipe.ranks[block],
            multipliers=_column(solved.found.multipliers["unet"], block, stems),
            explained=1 - solved.found.loss,
            dtype=preflight.sources.dtype,
            text_multipliers=None if text is None else _column(text, block, stems),
        )
        for block, name in enumerate(names)
    }


def _column(multipliers: Tensor, block: int, stems: Sequence[str]) -> dict[str, float]:
    return dict(zip(stems, multipliers[:, block].tolist(), strict=True))


def _stage_loras(
    outputs: Outputs,
    preflight: Preflight,
    place: Place,
    files: Mapping[str, LoraFile],
    solved: _Solved,
    control: Control,
) -> None:
    layers = preflight.sources.layout.layers
    costs = {
        name: 2 * sum(up.nbytes + down.nbytes for up, down in factors)  # hashed and written
        for name, factors in zip(files, zip(*solved.blocks.factors, strict=True), strict=True)
    }
    tally = control.tally("writing the LoRAs", costs)

    def tick(name: str, count: int) -> None:
        tally.add(name, count)
        tally.tell()

    for name, file in files.items():
        factors = {
            layer.module: solved.blocks.factors[index][file.index]
            for index, layer in enumerate(layers)
        }
        path = place.loras / f"{name}.safetensors"
        write_lora(outputs, path, layers, factors, file, partial(tick, name))
        tally.finish(name)


def _stage_companions(
    outputs: Outputs,
    preflight: Preflight,
    place: Place,
    files: Mapping[str, LoraFile],
    found: Fit,
    control: Control,
) -> tuple[Recovered, ...]:
    """Writes the companions if any are wanted; returns what they bring back."""
    if not preflight.vectors:
        return ()
    vectors = preflight.vectors
    companions = find_companions(
        preflight.sources, vectors, found.multipliers["unet"], control.check
    )
    names = companion_names(tuple(files))
    for name, file, tensors in zip(names, files.values(), companions.tensors, strict=True):
        path = place.loras / f"{name}.safetensors"
        write_companion(outputs, path, tensors, file, preflight.recipe.exact)
    return companions.recovered


def _stage_texts(
    outputs: Outputs, preflight: Preflight, place: Place, lineage: Lineage, report: Report
) -> None:
    lines = (f"{row.name}: {report.tags(row)}\n" for row in report.checkpoints)
    manifest = json.dumps(
        {**_manifest(preflight, place, lineage, report), "files": _hashes(outputs, place, report)},
        indent=1,
    )
    outputs.text(place.folder / MULTIPLIERS, "".join(lines))
    outputs.text(place.folder / REPORT, text(report))
    outputs.text(place.folder / MANIFEST, manifest + "\n")


def _manifest(
    preflight: Preflight, place: Place, lineage: Lineage, report: Report
) -> dict[str, Any]:
    """What later commands read: the run's files, sources and figures."""
    paths = [str(header.path.absolute()) for header in preflight.sources.read]
    return {
        "version": MANIFEST_VERSION,
        "hyper_merge": __version__,
        "created": lineage.date,
        "name": place.run,
        "family": lineage.family.name,
        "recipe": dict(lineage.recipe),
        "settings": preflight.recipe.to_settings(),
        "average_id": preflight.average_id,
        "hyper_model": str(place.hyper_model.absolute()),
        "sources": [
            {
                "path": path,
                "name": each.name,
                "sha256": each.sha256,
                "legacy_hash": each.legacy_hash,
            }
            for path, each in zip(paths, lineage.sources, strict=True)
        ],
        "base_is_first_source": preflight.sources.base is not None,
        "multipliers": {row.name: list(row.multipliers) for row in report.checkpoints},
        "text_multipliers": {row.name: list(row.text_multipliers) for row in report.checkpoints},
        "report": report.as_dict(),
    }


def _hashes(outputs: Outputs, place: Place, report: Report) -> dict[str, str]:
    """By the name of each LoRA and companion: SHA-256 of its tensors' bytes, as hosts know it."""
    return {
        name: outputs.metadata_of(place.loras / f"{name}.safetensors")["sshs_model_hash"]
        for name in (*report.loras, *report.companions)
    }


def _remove_outdated(outputs: Outputs, folders: Folders, run: str, names: Sequence[str]) -> None:
    """A replaced run's LoRAs whose names the new one has no use for, and its fits, go with it."""
    for path in folders.lora_files_of(run):
        if path.stem not in names:
            outputs.remove(path)
    for path in folders.fit_files_of(run):
        outputs.remove(path)


def _sizes(preflight: Preflight, place: Place, outputs: Outputs, names: Sequence[str]) -> Sizes:
    model = place.hyper_model
    return Sizes(
        before=sum(header.size for header in preflight.sources.headers),
        average=model.stat().st_size if place.exists else outputs.size_of(model),
        loras=sum(outputs.size_of(place.loras / f"{name}.safetensors") for name in names),
    )


def _require_free(place: Place, names: Sequence[str], *, overwrite: bool) -> None:
    for name in names:
        for suffix in (".safetensors", *CARD_SUFFIXES):
            require_free(place.loras / f"{name}{suffix}", overwrite=overwrite)


def _ignore(layer: LayerAnalysis) -> None:
    """No layer is analysed without a width."""
