"""Makes a new run from the checkpoints of an earlier one and further ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

import torch
from torch import Tensor

from hyper_merge.analysis.cache import find_analysis
from hyper_merge.analysis.extension import EarlierAnalysis, limits_of, sample_all
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.errors import DamagedCacheError, RunError
from hyper_merge.operations.fit.fit import fit_onto
from hyper_merge.operations.merge.merge import MergeResult, Origin, run_merge
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.recipe.block_weights import BlockWeights
from hyper_merge.recipe.default_ranks import extended_ranks
from hyper_merge.recipe.parsing import optional, parse_flag, parse_name, parse_paths
from hyper_merge.recipe.recipe import AVERAGE, Recipe
from hyper_merge.recipe.request import Parsers, Request
from hyper_merge.runs.fit_records import FitRecord
from hyper_merge.runs.folders import Folders, average_id_of
from hyper_merge.runs.originals import locate_sources
from hyper_merge.runs.report import PARTS
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runtime.progress import Progress

_EXTENDED: Final = (
    "the analysis and the average of the old run were extended by the new checkpoints; of the old ones a"
    " sample and a few small tensors were read"
)


@dataclass(frozen=True)
class ExtendRequest(Request):
    """The request for a run with further checkpoints.

    Attributes:
        run: Its name.
        checkpoints: The files that are to be added.
        name: Of the new run; None for `<run's recipe>+<number of checkpoints>`.
        from_cache: Whether to read little of the old checkpoints where the cache will do.
    """

    run: str
    checkpoints: tuple[Path, ...]
    name: str | None = None
    from_cache: bool = False

    PARSERS: ClassVar[Parsers] = {
        "run": str,
        "checkpoints": parse_paths,
        "name": optional(parse_name),
        "from_cache": parse_flag,
    }


def run_extend(
    request: ExtendRequest,
    folders: Folders,
    progress: Progress,
    *,
    effort: SearchEffort | None = None,
) -> MergeResult:
    """Merges the run's checkpoints and the new ones; the run itself stays as it is.

    All files are read, or on request average and analysis are those of the run, extended by the new
    checkpoints, where the cache still has the analysis and that is exact enough (`analysis.extension`). The
    new checkpoints are first fitted onto the run, and its multipliers with theirs are one of the starts,
    unless there are more LoRAs now: a merge whose ranks are those of a word has as many as checkpoints.

    Args:
        request: run, files and options.
        folders: where the run is, and where the new one goes.
        progress: progress and interrupt.
        effort: how thorough the search for a start is; None for the default.

    Raises:
        HyperMergeError: an original that is missing or was changed, a checkpoint that the run has
            already or that does not go with it, a name that is taken, a full disk, or the user's
            interrupt.
    """
    run = load_run(folders, request.run)
    finding, fitting, sampling, merging = progress.split([1.0, len(request.checkpoints), 0.5, 10.0])
    models, base = _originals(run, folders, finding)
    fits = _fits(run, request, folders, fitting)
    recipe = _recipe(run, request, models, base)
    preflight = run_preflight(recipe, folders)
    for warning in preflight.warnings:
        progress.warn(warning)
    origin, reason = _origin(run, request, preflight, sampling)
    if reason:
        progress.warn(f"all checkpoints are read again: {reason}")
    has_more = len(recipe.ranks) != len(run.recipe.ranks)
    start = {} if has_more else _start(run, fits)
    merged = run_merge(preflight, merging, start=start, effort=effort, origin=origin)
    return replace(merged, note=_EXTENDED if merged.extended else "")


def _origin(
    run: Run, request: ExtendRequest, preflight: Preflight, progress: Progress
) -> tuple[Origin, str]:
    """Returns where the analysis may come from, and why it cannot be the run's; nothing if it can."""
    if not request.from_cache:
        return Origin(reread=True), ""
    count = len(request.checkpoints)
    recipe = preflight.recipe
    old = run_preflight(
        replace(
            run.recipe,
            models=recipe.models[:-count],
            base=recipe.base,
            output=recipe.output,
        ),
        preflight.folders,
    )
    path = find_analysis(preflight.folders.cache, old.inputs, old.pass_options, old.recipe.ranks)
    if path is None:
        return Origin(), f"the cache has no analysis of the run {run.name} any more"
    if old.inputs.base is None and average_id_of(run.hyper_model) != old.average_id:
        return Origin(), f"{run.hyper_model.name} is not the average that the cache is about"
    average = old.inputs.base or read_header(run.hyper_model)
    samples = sample_all(preflight.inputs, progress)
    earlier = EarlierAnalysis(old.inputs, path, average, samples)
    try:
        refusal = limits_of(earlier, preflight.inputs, progress).refusal
    except (DamagedCacheError, ValueError) as error:
        return Origin(), str(error)
    return (Origin(), refusal) if refusal else (Origin(earlier), "")


def _originals(run: Run, folders: Folders, progress: Progress) -> tuple[tuple[Path, ...], str]:
    """Returns the paths of the run's checkpoints, and its base."""
    originals = locate_sources(run.sources, folders, progress)
    lost = [f"{file.source.name} ({file.state})" for file in originals if file.state != "there"]
    if lost:
        raise RunError(
            f"a new average needs all checkpoints of the run {run.name}, and {', '.join(lost)}"
            " cannot be used any more",
            hint="copy them back from a backup, or fit the new one instead",
        )
    paths = tuple(file.path for file in originals)
    if run.recipe.base == AVERAGE:
        return paths, AVERAGE
    return paths[1:], str(paths[0])


def _fits(
    run: Run, request: ExtendRequest, folders: Folders, progress: Progress
) -> list[FitRecord]:
    known = {source.sha256: source.name for source in run.sources}
    fits = []
    parts = progress.split([1.0] * len(request.checkpoints))
    for path, part in zip(request.checkpoints, parts, strict=True):
        fitted = fit_onto(run, path, folders, part)
        if fitted.sha256 in known:
            raise RunError(
                f"{path.name} has the content of {known[fitted.sha256]}, which is in the run"
                f" {run.name} already"
            )
        known[fitted.sha256] = path.name
        fits.append(fitted)
    return fits


def _recipe(run: Run, request: ExtendRequest, models: tuple[Path, ...], base: str) -> Recipe:
    """Returns the run's recipe with more checkpoints, which get the mean of the weights, if any."""
    recipe, new = run.recipe, len(request.checkpoints)
    ranks = extended_ranks(recipe.ranks, len(models), len(models) + new)
    return replace(
        recipe,
        name=request.name or f"{recipe.name}+{new}",
        models=(*models, *request.checkpoints),
        ranks=recipe.ranks if recipe.finds_ranks else ranks,
        weights=_extended(recipe.weights, new),
        block_weights=_extended_blocks(recipe.block_weights, new),
        fit_weights=_extended(recipe.fit_weights, new),
        base=base,
        overwrite=False,
    )


def _extended(weights: tuple[float, ...] | None, new: int) -> tuple[float, ...] | None:
    return weights and (*weights, *[sum(weights) / len(weights)] * new)


def _extended_blocks(
    weights: tuple[BlockWeights, ...] | None, new: int
) -> tuple[BlockWeights, ...] | None:
    """Returns weights by block with the mean of every block for each new checkpoint."""
    if weights is None:
        return None
    count = max(map(len, weights))
    rows = [row if len(row) == count else row * count for row in weights]
    mean = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
    return (*weights, *[mean] * new)


def _start(run: Run, fits: list[FitRecord]) -> dict[str, Tensor]:  # each (k, R)
    """Returns the multipliers of the run and of the fits, by the layers' part."""
    rows = [*run.report.checkpoints, *(fit.row for fit in fits)]
    return {
        part: torch.tensor([row.multipliers_of(part) for row in rows], dtype=torch.float64)
        for part in PARTS
    }
