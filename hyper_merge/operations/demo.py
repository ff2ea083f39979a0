"""Merges a family of small synthetic checkpoints in a models folder, for a first try."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.operations.merge.merge import MergeResult, run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import FamilySpec, write_family

_SPEC: Final = FamilySpec(
    count=4, width=64, context=160, vocabulary=4096, vae_width=32, terms=64, seed=1
)
_NAMES: Final = ("portrait", "landscape", "anime", "watercolour")
DEMO_RANKS: Final = (24, 12, 6, 3)
"""A list of ranks that suits the small layers."""


def make_family(folder: Path, progress: Progress) -> tuple[Path, ...]:
    """Returns the family's files in a folder; makes them unless all are there.

    Args:
        folder: for checkpoints.
        progress: progress and interrupt.
    """
    paths = tuple(folder / f"{name}.safetensors" for name in _NAMES)
    if not all(path.exists() for path in paths):
        write_family(
            folder, _SPEC, _NAMES, lambda done, total: progress.report("making", done / total)
        )
    return paths


def run_demo(
    folder: Path, progress: Progress, *, effort: SearchEffort | None = None
) -> MergeResult:
    """Makes the family where it is not there yet, and merges it; an earlier demo is replaced.

    Args:
        folder: the models folder; its checkpoints go to `Stable-diffusion` within.
        progress: progress and interrupt.
        effort: how thorough the search for a start is; None for the default.
    """
    paths = make_family(folder / "Stable-diffusion", progress.part(0.0, 0.4))
    recipe = Recipe(name="demo", models=paths, ranks=DEMO_RANKS, output=folder, overwrite=True)
    return run_merge(run_preflight(recipe), progress.part(0.4, 1.0), effort=effort)
