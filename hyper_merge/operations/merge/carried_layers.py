"""Leaves the end layers out of an analysis and of all that follows where companions do not hold them."""

from __future__ import annotations

from dataclasses import replace

from hyper_merge.analysis.store import Analysis
from hyper_merge.operations.merge.companions import decide_on_ends
from hyper_merge.operations.merge.preflight import Preflight


def choose_layers(analysis: Analysis, preflight: Preflight) -> tuple[Analysis, Preflight]:
    """Returns analysis and preflight with the layers that LoRAs and companions will carry.

    One analysis serves all recipes: it has the end layers, which a recipe may leave averaged.

    Args:
        analysis: of the checkpoints, with all layers.
        preflight: the validated recipe, with all layers.
    """
    ends = decide_on_ends(preflight.recipe, analysis)
    preflight = replace(preflight, ends=ends)
    if ends is None or ends.carried:
        return analysis, preflight
    inputs = replace(preflight.inputs, layout=preflight.inputs.layout.without_ends())
    return analysis.without_ends(), replace(preflight, inputs=inputs)
