"""What the phases of a job take, in one unit, so that progress is near to the share of the time.

The unit is a multiply-add of the pass's large products: 1e11 of them take a second on two cores,
where the constants here and in `analysis` and `solution` were measured with four full-size files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from hyper_merge.analysis import pass_costs
from hyper_merge.analysis_cache import width_for
from hyper_merge.folders import Place
from hyper_merge.lineage import bytes_to_hash
from hyper_merge.preflight import Preflight
from hyper_merge.solution import solve_costs

_HASHED: Final = 120.0  # for each byte
_WRITTEN: Final = 200.0  # for each byte of the LoRAs: rounded, hashed, written and synchronised


def merge_costs(
    preflight: Preflight,
    cache: Path,
    place: Place,
    cached: Path | None,
) -> tuple[float, float, float, float]:
    """Of hashing, the pass over the files, solving, writing the LoRAs; 0 for what is there already.

    Args:
        preflight: of the merge.
        cache: folder with the known hashes.
        place: where the files go; an average that is there is not made again.
        cached: the analysis that serves, if one does.
    """
    sources, recipe = preflight.sources, preflight.recipe
    width = None if cached else width_for(recipe.ranks)
    needless = cached is not None and place.exists
    return (
        _HASHED * bytes_to_hash(preflight, cache),
        0.0 if needless else sum(pass_costs(sources, width).values()),
        sum(solve_costs(sources, recipe, preflight.ranks)),
        _WRITTEN * preflight.estimate.loras,
    )


def average_costs(preflight: Preflight, cache: Path) -> tuple[float, float]:
    """Of hashing and the pass over the files."""
    hashed = _HASHED * bytes_to_hash(preflight, cache)
    return hashed, sum(pass_costs(preflight.sources, None).values())
