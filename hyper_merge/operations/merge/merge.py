"""The main job: a recipe in; hyper-model, LoRAs, multipliers and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from hyper_merge.analysis import cache as analysis_cache
from hyper_merge.analysis.basis_widths import choose_widths
from hyper_merge.analysis.loss_weights import make_loss_weights
from hyper_merge.analysis.store import Analysis, create_analysis, open_analysis
from hyper_merge.analysis.streaming_pass import LayerAnalysis, PassOptions, stream_layers
from hyper_merge.checkpoints.io.atomic_file import require_free
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import RecipeError
from hyper_merge.loras.cards import stage_checkpoint_card
from hyper_merge.loras.metadata import Lineage
from hyper_merge.operations.merge.cost_model import ExistingFiles, MergeCosts, average_costs
from hyper_merge.operations.merge.host_precision import measure_precision_loss
from hyper_merge.operations.merge.lineage import lineage_of
from hyper_merge.operations.merge.outputs import (
    SolvedMerge,
    average_writer,
    host_loras,
    lora_files,
    names_of,
    remove_outdated,
    require_free_names,
    sizes_of,
    stage_companions,
    stage_loras,
    stage_texts,
    stage_topups,
    topups_of,
)
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.rank_search import solve_with_rank_search
from hyper_merge.operations.merge.report_builder import BlockChoice, make_report
from hyper_merge.recipe.recipe import AVERAGE
from hyper_merge.runs.folders import Folders, Place, require_no_source
from hyper_merge.runs.report import PrecisionLoss, Report
from hyper_merge.runtime.damaged_files import DamagedFiles, with_sound_cache
from hyper_merge.runtime.devices import resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.evaluation import evaluate
from hyper_merge.solver.private_loras import (
    SharedLoras,
    add_private_loras,
    find_private_loras,
    named_topups,
)
from hyper_merge.solver.quantization import quantize
from hyper_merge.solver.solve import find_blocks


@dataclass(frozen=True)
class MergeResult:
    """Where everything is, and how good it is."""

    report: Report
    place: Place
    loras: tuple[Path, ...]
    reused_analysis: bool


def run_merge(
    preflight: Preflight,
    progress: Progress,
    folders: Folders | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> MergeResult:
    """Makes everything that the recipe asks for; on any failure every existing file stays as it was.

    Args:
        preflight: the examined recipe.
        progress: progress and interrupt.
        folders: where everything goes; None for those that the recipe was examined with.
        start: multipliers (k, R) that are worth a try besides the others, by the layers' part.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    if folders is not None:
        preflight = replace(preflight, folders=folders)
    return with_sound_cache(partial(_merged, preflight, progress, start or {}), progress.warn)


def _merged(
    preflight: Preflight, progress: Progress, start: Mapping[str, Tensor], damaged: DamagedFiles
) -> MergeResult:
    """Makes everything, with what the cache holds besides the damaged files."""
    recipe, inputs, folders = preflight.recipe, preflight.inputs, preflight.folders
    place = folders.place(recipe, preflight.average_id)
    if not recipe.finds_ranks:
        shared = names_of(preflight, place)
        require_free_names(place, shared, folders, overwrite=recipe.overwrite)
    options = preflight.pass_options
    cached = analysis_cache.find_analysis(folders.cache, inputs, options, recipe.ranks, damaged)
    preflight.require_room(place)
    existing = ExistingFiles(folders.cache, average=place.exists, analysis=cached is not None)
    costs = preflight.costs(existing)
    hashing, reading, solving, writing = progress.split(
        (costs.hashing, costs.reading, costs.solving + costs.rounding, costs.writing)
    )
    with FileTransaction(overwrite=recipe.overwrite) as outputs:
        lineage = lineage_of(inputs, recipe, folders.cache, hashing)
        lineage = replace(lineage, name=place.hyper_model.stem)  # it may be an earlier merge's
        if not place.exists:
            stage_checkpoint_card(outputs, place.hyper_model, lineage, overwrite=recipe.overwrite)
        path = cached or analysis_cache.place_for(folders.cache, inputs, options, damaged)
        if cached:
            analysis_cache.mark_used(cached)
        _read(
            preflight,
            place,
            outputs,
            lineage,
            (None if cached else path, options),
            reading,
        )
        with open_analysis(path, inputs, progress.warn) as analysis:
            preflight, solved = solve_with_rank_search(
                analysis, preflight, partial(_solve, analysis, (costs, start)), solving
            )
            lineage = replace(lineage, recipe=preflight.recipe.to_metadata())
            report, names = _stage(outputs, preflight, place, lineage, (analysis, solved, writing))
        stage_texts(outputs, preflight, place, lineage, report)
        progress.report("putting the files in place", 1.0)
    analysis_cache.prune_analyses(folders.cache, folders.cache_limit)
    paths = tuple(place.loras / f"{name}.safetensors" for name in names)
    return MergeResult(report, place, paths, cached is not None)


def _stage(
    outputs: FileTransaction,
    preflight: Preflight,
    place: Place,
    lineage: Lineage,
    of: tuple[Analysis, SolvedMerge, Progress],
) -> tuple[Report, tuple[str, ...]]:
    """Stages all LoRAs; returns the report, and their names."""
    analysis, solved, progress = of
    recipe = preflight.recipe
    topping, writing = progress.split((1.0 if recipe.topup else 0.0, 1.0))
    solved = _topped_up(analysis, preflight, solved, topping)
    topups = topups_of(preflight, place, solved)
    shared = names_of(preflight, place)
    names = (*shared, *topups)
    require_free_names(place, names, preflight.folders, overwrite=recipe.overwrite)
    if recipe.overwrite:
        remove_outdated(outputs, preflight.folders, place.run, names)
    files = lora_files(preflight, place, lineage, solved)
    stage_loras(outputs, preflight, place, files, solved, writing)
    recovered = stage_companions(outputs, preflight, place, files, solved.found, writing)
    stage_topups(outputs, preflight, place, lineage, solved)
    report = make_report(
        analysis,
        solved.found,
        _choice(preflight, solved),
        (place.run, tuple(files), [header.stem for header in preflight.inputs.headers]),
        (recipe.method, solved.losses),
        sizes_of(preflight, place, outputs, names),
    )
    own = named_topups(outputs, place.loras, topups)
    rows = tuple(replace(row, topup=own.get(row.name, "")) for row in report.checkpoints)
    report = replace(
        report,
        checkpoints=rows,
        companions=shared[len(files) :],
        recovered=recovered,
        rounding=_host_rounding(outputs, preflight, place, solved, writing),
    )
    return report, names


def _host_rounding(
    outputs: FileTransaction,
    preflight: Preflight,
    place: Place,
    solved: SolvedMerge,
    progress: Progress,
) -> tuple[PrecisionLoss, ...]:
    """What rounding adds to the loss where the files are used."""
    layout, path = preflight.inputs.layout, place.hyper_model
    of, energies = (layout.family, layout.layers), solved.found.energies.sum(0)
    with _tensors(path) if place.exists else outputs.reading(path) as average:
        return measure_precision_loss(
            average, of, host_loras(solved), energies, check=progress.check
        )


@contextmanager
def _tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Those of an existing file, by key."""
    with CheckpointReader(path) as file:
        yield file.tensor


def run_average(preflight: Preflight, progress: Progress, folders: Folders | None = None) -> Path:
    """Writes the hyper-model alone; arguments as for `run_merge`.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    recipe, inputs = preflight.recipe, preflight.inputs
    folders = folders or preflight.folders
    path = folders.models / f"{recipe.name}.safetensors"
    if recipe.base != AVERAGE:
        raise RecipeError(f"the average has no use for the base {recipe.base}", hint="leave it out")
    require_no_source(path, recipe.models)
    require_free(path, overwrite=recipe.overwrite)
    folders.require_unused(path, preflight.average_id)
    require_disks({folders.models: preflight.estimate.average})
    options = PassOptions(resolve_device(recipe.device), recipe.seed)
    with FileTransaction(overwrite=recipe.overwrite) as outputs:
        hashing, reading = progress.split(average_costs(inputs, folders.cache))
        lineage = lineage_of(inputs, recipe, folders.cache, hashing)
        with average_writer(outputs, path, preflight, lineage) as writer:
            stream_layers(inputs, options, writer.write, _ignore, reading)
    return path


def _read(
    preflight: Preflight,
    place: Place,
    outputs: FileTransaction,
    lineage: Lineage,
    wanted: tuple[Path | None, PassOptions],  # where the analysis goes, if one is to be made
    progress: Progress,
) -> None:
    """The pass over the files, for whatever is not there yet: average, analysis, both or neither."""
    path, options = wanted
    if place.exists and path is None:
        return
    if path is None:
        with average_writer(outputs, place.hyper_model, preflight, lineage) as average:
            options = PassOptions(options.device, options.seed)
            stream_layers(preflight.inputs, options, average.write, _ignore, progress)
        return
    options = replace(options, widths=choose_widths(preflight.inputs, options.width or 0, progress))
    with create_analysis(path, preflight.inputs, options) as analysis:
        if place.exists:
            not_carried = stream_layers(preflight.inputs, options, None, analysis.keep, progress)
        else:
            with average_writer(outputs, place.hyper_model, preflight, lineage) as average:
                not_carried = stream_layers(
                    preflight.inputs, options, average.write, analysis.keep, progress
                )
        analysis.close_with(not_carried)


def _solve(
    analysis: Analysis,
    given: tuple[MergeCosts, Mapping[str, Tensor]],  # and multipliers that are worth a try
    preflight: Preflight,
    progress: Progress,
) -> SolvedMerge:
    costs, start = given
    recipe, allowance = preflight.recipe, preflight.allowance
    solving, rounding = progress.split((costs.solving, costs.rounding))
    where = preflight.pass_options.device, solving
    found = find_blocks(analysis, recipe, preflight.ranks, allowance, where, start)
    stored = preflight.alphas, preflight.lora_dtype
    weighting = make_loss_weights(analysis, recipe)
    blocks = quantize(analysis, found, preflight.groups, stored, weighting, rounding)
    fitted = evaluate(analysis, blocks, preflight.groups, weighting.layers)
    return SolvedMerge(blocks, fitted, found.losses)


def _topped_up(
    analysis: Analysis, preflight: Preflight, solved: SolvedMerge, progress: Progress
) -> SolvedMerge:
    """The same with private LoRAs, if any are wished for."""
    wish = preflight.recipe.topup
    if wish is None:
        return solved
    shared = SharedLoras(
        analysis,
        solved.blocks,
        solved.found,
        preflight.groups,
        preflight.lora_dtype,
    )
    privates = find_private_loras(shared, wish, preflight.rank_bytes, progress)
    return replace(solved, found=add_private_loras(solved.found, privates), privates=privates)


def _choice(preflight: Preflight, solved: SolvedMerge) -> BlockChoice:
    """The ranks of all LoRAs, and the bytes that they could have been spread over otherwise."""
    own = [each.ranks for each in solved.privates]
    ranks = [
        (*shared, *(each[index] for each in own))
        for index, shared in enumerate(solved.blocks.ranks)
    ]
    allowance = preflight.allowance
    if allowance is not None and own:
        costs = allowance.costs
        extra = sum(cost * sum(each[i] for each in own) for i, cost in enumerate(costs))
        allowance = replace(allowance, budget=allowance.budget + extra)
    return BlockChoice(ranks, allowance, preflight.groups)


def _ignore(layer: LayerAnalysis) -> None:
    """No layer is analysed without a width."""
