"""Makes the lineage of a merge: its recipe, and its checkpoints with their hashes."""

from __future__ import annotations

from hyper_merge.loras.metadata import Lineage
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.runs.hash_cache import current_time, hash_sources
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.remote import RemoteWorkers


def make_lineage(
    preflight: Preflight, name: str, progress: Progress, workers: RemoteWorkers | None = None
) -> Lineage:
    """Returns the origin that all files of a merge record; hashes the checkpoints.

    Args:
        preflight: the validated recipe.
        name: file stem of the hyper-model.
        progress: progress and interrupt.
        workers: hash in place of this process; None for none.
    """
    inputs, recipe = preflight.inputs, preflight.recipe
    return Lineage(
        name=name,
        family=inputs.layout.family,
        recipe=recipe.to_metadata(),
        sources=hash_sources(inputs.read, preflight.folders.cache, progress, workers),
        date=current_time(),
    )
