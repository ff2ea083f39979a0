"""The main job: a recipe in; hyper-model, LoRAs, multipliers and a report out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from hyper_merge import __version__, analysis_cache
from hyper_merge.analysis import LayerAnalysis, Work, run_pass
from hyper_merge.analysis_cache import Analysis, AnalysisWriter
from hyper_merge.checkpoints.outputs import Outputs
from hyper_merge.checkpoints.prediction import config_beside, configuration_for
from hyper_merge.checkpoints.staging import require_free
from hyper_merge.checkpoints.writer import SafetensorsWriter
from hyper_merge.control import Control
from hyper_merge.errors import RecipeError
from hyper_merge.folders import AVERAGE_ID, MANIFEST, Folders, Place, require_no_source
from hyper_merge.lineage import lineage_of
from hyper_merge.lora import Lineage, LoraFile, checkpoint_metadata, write_lora
from hyper_merge.preflight import Preflight, require_disk, resolve_device
from hyper_merge.prompts import lora_names, multipliers_text
from hyper_merge.recipe import AVERAGE
from hyper_merge.report import Fit, Report, Sizes, fit, make_report, text
from hyper_merge.solution import Rounded, find_blocks, rounded

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


def run_merge(preflight: Preflight, control: Control) -> Merged:
    """Makes everything that the recipe asks for; on any failure every existing file stays as it was.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    recipe, sources = preflight.recipe, preflight.sources
    folders = Folders(recipe.output)
    place = folders.place(recipe, preflight.average_id)
    names = lora_names(place.run, recipe.ranks)
    for name in names:
        for suffix in (".safetensors", ".json"):
            require_free(place.loras / f"{name}{suffix}", overwrite=recipe.overwrite)
    work = Work(resolve_device(recipe.device), recipe.seed, analysis_cache.width_for(recipe.ranks))
    cached = analysis_cache.find(folders.cache, sources, work, recipe.ranks)
    _require_room(preflight, place, cached)
    with Outputs(overwrite=recipe.overwrite) as outputs:
        lineage = lineage_of(preflight, folders.cache, control.part(0.0, 0.03))
        path = cached or analysis_cache.path_for(folders.cache, sources, work)
        _read(
            preflight,
            place,
            outputs,
            lineage,
            (None if cached else path, work),
            control.part(0.03, 0.6),
        )
        with Analysis(path, sources) as analysis:
            solved = _solve(analysis, preflight, work.device, control.part(0.6, 0.97))
            _stage_loras(outputs, preflight, place, lineage, solved)
            report = make_report(
                analysis,
                solved.found,
                preflight.ranks,
                (place.run, names, [header.stem for header in sources.headers]),
                (recipe.method, solved.losses),
                _sizes(preflight, place),
            )
        _stage_texts(outputs, preflight, place, lineage, report)
        control.step("putting the files in place", 1.0)
    analysis_cache.prune(folders.cache)
    paths = tuple(place.loras / f"{name}.safetensors" for name in names)
    return Merged(report, place, paths, cached is not None)


def run_average(preflight: Preflight, control: Control) -> Path:
    """Writes the hyper-model alone.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    recipe = preflight.recipe
    folders = Folders(recipe.output)
    path = folders.models / f"{recipe.name}.safetensors"
    if recipe.base != AVERAGE:
        raise RecipeError(f"the average has no use for the base {recipe.base}; leave it out")
    require_no_source(path, recipe.models)
    require_free(path, overwrite=recipe.overwrite)
    require_disk(recipe.output, preflight.estimate.average)
    work = Work(resolve_device(recipe.device), recipe.seed)
    with Outputs(overwrite=recipe.overwrite) as outputs:
        lineage = lineage_of(preflight, folders.cache, control.part(0.0, 0.1))
        with _average_writer(outputs, path, preflight, lineage) as writer:
            run_pass(preflight.sources, work, writer.write, _ignore, control.part(0.1, 1.0))
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
    with AnalysisWriter(path, preflight.sources, work) as analysis:
        if place.exists:
            not_carried = run_pass(preflight.sources, work, None, analysis.keep, control)
        else:
            with _average_writer(outputs, place.hyper_model, preflight, lineage) as average:
                not_carried = run_pass(
                    preflight.sources, work, average.write, analysis.keep, control
                )
        analysis.close_with(not_carried)


def _solve(
    analysis: Analysis, preflight: Preflight, device: torch.device, control: Control
) -> _Solved:
    recipe = preflight.recipe
    batches, solution = find_blocks(
        analysis, recipe, preflight.ranks, device, control.part(0.0, 0.8)
    )
    has_alphas = preflight.sources.layout.family.lora_alpha
    alphas = recipe.ranks if has_alphas else (None,) * len(recipe.ranks)
    stored = (alphas, preflight.sources.dtype)
    blocks = rounded(analysis, batches, solution, stored, control.part(0.8, 1.0))
    return _Solved(blocks, fit(analysis, blocks), solution.losses)


def _average_writer(
    outputs: Outputs, path: Path, preflight: Preflight, lineage: Lineage
) -> SafetensorsWriter:
    metadata = {**checkpoint_metadata(lineage), AVERAGE_ID: preflight.average_id}
    config = configuration_for(preflight.sources.headers[0], preflight.sources.layout.family)
    if config is not None:
        outputs.text(config_beside(path), config)
    return outputs.safetensors(path, preflight.sources.outputs(), metadata)


def _stage_loras(
    outputs: Outputs, preflight: Preflight, place: Place, lineage: Lineage, solved: _Solved
) -> None:
    recipe, layers = preflight.recipe, preflight.sources.layout.layers
    stems = [header.stem for header in preflight.sources.headers]
    for block, name in enumerate(lora_names(place.run, recipe.ranks)):
        column = solved.found.multipliers[:, block].tolist()
        file = LoraFile(
            lineage=lineage,
            index=block,
            rank=recipe.ranks[block],
            multipliers=dict(zip(stems, column, strict=True)),
            explained=1 - solved.found.loss,
            dtype=preflight.sources.dtype,
        )
        factors = {
            layer.module: solved.blocks.factors[index][block] for index, layer in enumerate(layers)
        }
        write_lora(outputs, place.loras / f"{name}.safetensors", layers, factors, file)


def _stage_texts(
    outputs: Outputs, preflight: Preflight, place: Place, lineage: Lineage, report: Report
) -> None:
    rows = report.checkpoints
    multipliers = multipliers_text(
        [row.name for row in rows], report.loras, [row.multipliers for row in rows]
    )
    manifest = json.dumps(_manifest(preflight, place, lineage, report), indent=1)
    outputs.text(place.folder / "multipliers.txt", multipliers)
    outputs.text(place.folder / "report.txt", text(report))
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
        "average_id": preflight.average_id,
        "hyper_model": str(place.hyper_model),
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
        "report": report.as_dict(),
    }


def _sizes(preflight: Preflight, place: Place) -> Sizes:
    estimate = preflight.estimate
    average = place.hyper_model.stat().st_size if place.exists else estimate.average
    return Sizes(sum(header.size for header in preflight.sources.headers), average, estimate.loras)


def _require_room(preflight: Preflight, place: Place, cached: Path | None) -> None:
    estimate = preflight.estimate
    needed = estimate.loras
    needed += 0 if place.exists else estimate.average
    needed += 0 if cached else estimate.analysis
    require_disk(preflight.recipe.output, needed)


def _ignore(layer: LayerAnalysis) -> None:
    """No layer is analysed without a width."""
