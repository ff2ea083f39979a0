"""A new run with further checkpoints added to those of an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.errors import RunError
from hyper_merge.operations.fit.fit import fit_onto
from hyper_merge.operations.merge.merge import MergeResult, run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.parsing import optional, parse_name, parse_paths
from hyper_merge.recipe.recipe import AVERAGE, Recipe
from hyper_merge.recipe.request import Parsers, PlaceOf, check_request, parse_request
from hyper_merge.runs.fit_records import FitRecord
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.manifest import Run, load_run
from hyper_merge.runs.originals import locate_sources
from hyper_merge.runs.report import PARTS
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class ExtendRequest:
    """What the user asks for.

    Attributes:
        run: Its name.
        checkpoints: The files that are to be added.
        name: Of the new run; None for `<run's recipe>+<number of checkpoints>`.
    """

    run: str
    checkpoints: tuple[Path, ...]
    name: str | None = None

    def __post_init__(self) -> None:
        check_request(self, _PARSERS)

    @classmethod
    def parse(cls, values: Mapping[str, object], where: PlaceOf) -> ExtendRequest:
        """Returns the request that plain values describe; `where` gives the place of each.

        Raises:
            RecipeError: a value is refused.
        """
        return parse_request(cls, values, _PARSERS, where)


_PARSERS: Final[Parsers] = {
    "run": str,
    "checkpoints": parse_paths,
    "name": optional(parse_name),
}


def run_extend(wanted: ExtendRequest, folders: Folders, progress: Progress) -> MergeResult:
    """Merges the run's checkpoints and the new ones; the run itself stays as it is.

    Everything is computed anew, for the average is another one and all deviations with it. The new
    checkpoints are first fitted onto the run, and its multipliers with theirs are one of the starts.

    Args:
        wanted: what the user asks for.
        folders: where the run is, and where the new one goes.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: an original that is missing or was changed, a checkpoint that the run has
            already or that does not go with it, a name that is taken, a full disk, or the user's
            interrupt.
    """
    run = load_run(folders, wanted.run)
    finding, fitting, merging = progress.split([1.0, len(wanted.checkpoints), 10.0])
    models, base = _originals(run, folders, finding)
    fits = _fits(run, wanted, folders, fitting)
    recipe = _recipe(run, wanted, models, base)
    preflight = run_preflight(recipe, folders)
    for warning in preflight.warnings:
        progress.warn(warning)
    return run_merge(preflight, merging, folders, _start(run, fits))


def _originals(run: Run, folders: Folders, progress: Progress) -> tuple[tuple[Path, ...], str]:
    """Where the run's checkpoints are, and its base."""
    found = locate_sources(run.sources, folders, progress)
    lost = [f"{each.source.name} ({each.state})" for each in found if each.state != "there"]
    if lost:
        raise RunError(
            f"a new average needs all checkpoints of the run {run.name}, and {', '.join(lost)}"
            " cannot be had any more",
            hint="bring them back from a copy, or fit the new one instead",
        )
    paths = tuple(each.path for each in found)
    if run.recipe.base == AVERAGE:
        return paths, AVERAGE
    return paths[1:], str(paths[0])


def _fits(run: Run, wanted: ExtendRequest, folders: Folders, progress: Progress) -> list[FitRecord]:
    known = {source.sha256: source.name for source in run.sources}
    fits = []
    for path, part in zip(
        wanted.checkpoints, progress.split([1.0] * len(wanted.checkpoints)), strict=True
    ):
        fitted = fit_onto(run, path, folders, part)
        if fitted.sha256 in known:
            raise RunError(
                f"{path.name} has the content of {known[fitted.sha256]}, which is in the run"
                f" {run.name} already"
            )
        known[fitted.sha256] = path.name
        fits.append(fitted)
    return fits


def _recipe(run: Run, wanted: ExtendRequest, models: tuple[Path, ...], base: str) -> Recipe:
    """The run's with more checkpoints; where they had weights, new ones get the mean of these."""
    recipe, new = run.recipe, len(wanted.checkpoints)
    return replace(
        recipe,
        name=wanted.name or f"{recipe.name}+{new}",
        models=(*models, *wanted.checkpoints),
        weights=_extended(recipe.weights, new),
        fit_weights=_extended(recipe.fit_weights, new),
        base=base,
        overwrite=False,
    )


def _extended(weights: tuple[float, ...] | None, new: int) -> tuple[float, ...] | None:
    return weights and (*weights, *[sum(weights) / len(weights)] * new)


def _start(run: Run, fits: list[FitRecord]) -> dict[str, Tensor]:  # each (k, R)
    """The multipliers of the run and of the fits, by the layers' part."""
    rows = [*run.report.checkpoints, *(each.row for each in fits)]
    return {
        part: torch.tensor([row.multipliers_of(part) for row in rows], dtype=torch.float64)
        for part in PARTS
    }
