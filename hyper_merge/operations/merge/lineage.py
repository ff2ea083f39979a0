"""The lineage of a merge: its recipe, and its checkpoints with their hashes."""

from __future__ import annotations

from pathlib import Path

from hyper_merge.analysis.inputs import Sources
from hyper_merge.loras.metadata import Lineage
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.hash_cache import hashed, now
from hyper_merge.runtime.progress import Control


def lineage_of(sources: Sources, recipe: Recipe, cache: Path, control: Control) -> Lineage:
    """What the files of a merge have in common; arguments as for `hashed`."""
    return Lineage(
        name=recipe.name,
        family=sources.layout.family,
        recipe=recipe.to_metadata(),
        sources=hashed(sources.read, cache, control),
        date=now(),
    )
