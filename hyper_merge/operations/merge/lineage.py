"""The lineage of a merge: its recipe, and its checkpoints with their hashes."""

from __future__ import annotations

from pathlib import Path

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.loras.metadata import Lineage
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.hash_cache import current_time, hash_sources
from hyper_merge.runtime.progress import Progress


def lineage_of(inputs: MergeInputs, recipe: Recipe, cache: Path, progress: Progress) -> Lineage:
    """What the files of a merge have in common; arguments as for `hashed`."""
    return Lineage(
        name=recipe.name,
        family=inputs.layout.family,
        recipe=recipe.to_metadata(),
        sources=hash_sources(inputs.read, cache, progress),
        date=current_time(),
    )
