"""The main job: a recipe in; hyper-model, LoRAs, multipliers and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from hyper_merge.analysis import cache as analysis_cache
from hyper_merge.analysis.basis_widths import widths_for
from hyper_merge.analysis.loss_weights import weighting_of
from hyper_merge.analysis.store import Analysis, new_analysis, open_analysis
from hyper_merge.analysis.streaming_pass import LayerAnalysis, Work, run_pass
from hyper_merge.checkpoints.io.atomic_file import require_free
from hyper_merge.checkpoints.io.transaction import Outputs
from hyper_merge.checkpoints.reader import Checkpoint
from hyper_merge.errors import RecipeError
from hyper_merge.loras.cards import stage_checkpoint_card
from hyper_merge.loras.metadata import Lineage
from hyper_merge.operations.merge.cost_model import Costs, Existing, average_costs
from hyper_merge.operations.merge.host_precision import host_rounding
from hyper_merge.operations.merge.lineage import lineage_of
from hyper_merge.operations.merge.outputs import (
    Solved,
    added_loras,
    average_writer,
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
from hyper_merge.operations.merge.rank_search import solved_as_asked
from hyper_merge.operations.merge.report_builder import BlockChoice, make_report
from hyper_merge.recipe.recipe import AVERAGE
from hyper_merge.runs.folders import Folders, Place, require_no_source
from hyper_merge.runs.report import HostRounding, Report
from hyper_merge.runtime.devices import resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.progress import Control
from hyper_merge.solver.evaluation import fit
from hyper_merge.solver.private_loras import Shared, find_private, with_private
from hyper_merge.solver.quantization import rounded
from hyper_merge.solver.solve import find_blocks


@dataclass(frozen=True)
class Merged:
    """Where everything is, and how good it is."""

    report: Report
    place: Place
    loras: tuple[Path, ...]
    reused_analysis: bool


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
        require_free_names(place, names_of(preflight, place), overwrite=recipe.overwrite)
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
            report, names = _stage(outputs, preflight, place, lineage, (analysis, solved, writing))
        stage_texts(outputs, preflight, place, lineage, report)
        control.step("putting the files in place", 1.0)
    analysis_cache.prune(folders.cache, folders.cache_limit)
    paths = tuple(place.loras / f"{name}.safetensors" for name in names)
    return Merged(report, place, paths, cached is not None)


def _stage(
    outputs: Outputs,
    preflight: Preflight,
    place: Place,
    lineage: Lineage,
    of: tuple[Analysis, Solved, Control],
) -> tuple[Report, tuple[str, ...]]:
    """Stages all LoRAs; returns the report, and their names."""
    analysis, solved, control = of
    recipe = preflight.recipe
    topping, writing = control.split((1.0 if recipe.topup else 0.0, 1.0))
    solved = _topped_up(analysis, preflight, solved, topping)
    topups = topups_of(preflight, place, solved)
    shared = names_of(preflight, place)
    names = (*shared, *topups)
    require_free_names(place, names, overwrite=recipe.overwrite)
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
        (place.run, tuple(files), [header.stem for header in preflight.sources.headers]),
        (recipe.method, solved.losses),
        sizes_of(preflight, place, outputs, names),
    )
    own = {each.checkpoint: name for name, each in topups.items()}
    rows = tuple(replace(row, topup=own.get(c, "")) for c, row in enumerate(report.checkpoints))
    report = replace(
        report,
        checkpoints=rows,
        companions=shared[len(files) :],
        recovered=recovered,
        rounding=_host_rounding(outputs, preflight, place, solved, writing),
    )
    return report, names


def _host_rounding(
    outputs: Outputs, preflight: Preflight, place: Place, solved: Solved, control: Control
) -> tuple[HostRounding, ...]:
    """What rounding adds to the loss where the files are used."""
    layout, path = preflight.sources.layout, place.hyper_model
    of, energies = (layout.family, layout.layers), solved.found.energies.sum(0)
    with _tensors(path) if place.exists else outputs.reading(path) as average:
        return host_rounding(average, of, added_loras(solved), energies, check=control.check)


@contextmanager
def _tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Those of an existing file, by key."""
    with Checkpoint(path) as file:
        yield file.tensor


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
        with average_writer(outputs, path, preflight, lineage) as writer:
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
        with average_writer(outputs, place.hyper_model, preflight, lineage) as average:
            work = Work(work.device, work.seed)
            run_pass(preflight.sources, work, average.write, _ignore, control)
        return
    work = replace(work, widths=widths_for(preflight.sources, work.width or 0, control))
    with new_analysis(path, preflight.sources, work) as analysis:
        if place.exists:
            not_carried = run_pass(preflight.sources, work, None, analysis.keep, control)
        else:
            with average_writer(outputs, place.hyper_model, preflight, lineage) as average:
                not_carried = run_pass(
                    preflight.sources, work, average.write, analysis.keep, control
                )
        analysis.close_with(not_carried)


def _solve(
    analysis: Analysis,
    given: tuple[Costs, Mapping[str, Tensor]],  # and multipliers that are worth a try
    preflight: Preflight,
    control: Control,
) -> Solved:
    costs, start = given
    recipe, allowance = preflight.recipe, preflight.allowance
    solving, rounding = control.split((costs.solving, costs.rounding))
    where = preflight.work.device, solving
    found = find_blocks(analysis, recipe, preflight.ranks, allowance, where, start)
    stored = preflight.alphas, preflight.lora_dtype
    weighting = weighting_of(analysis, recipe)
    blocks = rounded(analysis, found, preflight.groups, stored, weighting, rounding)
    fitted = fit(analysis, blocks, preflight.groups, weighting.layers)
    return Solved(blocks, fitted, found.losses)


def _topped_up(
    analysis: Analysis, preflight: Preflight, solved: Solved, control: Control
) -> Solved:
    """The same with private LoRAs, if any are wished for."""
    wish = preflight.recipe.topup
    if wish is None:
        return solved
    shared = Shared(
        analysis,
        solved.blocks,
        solved.found,
        preflight.groups,
        preflight.lora_dtype,
    )
    privates = find_private(shared, wish, preflight.rank_bytes, control)
    return replace(solved, found=with_private(solved.found, privates), privates=privates)


def _choice(preflight: Preflight, solved: Solved) -> BlockChoice:
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
