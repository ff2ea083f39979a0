"""Leaves the end layers out of an analysis and of all that follows where companions do not hold them."""

from __future__ import annotations

from dataclasses import replace

from hyper_merge.analysis.contents import Analysis
from hyper_merge.operations.merge.companions import decide_on_ends
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.metric import Metric


def choose_layers(
    analysis: Analysis, preflight: Preflight, progress: Progress
) -> tuple[Metric, Preflight]:
    """Returns the metric of the layers that LoRAs and companions will carry, and a preflight of these.

    One analysis serves all recipes: it has the end layers, which a recipe may leave averaged.

    Args:
        analysis: of the checkpoints, with all layers.
        preflight: the validated recipe, with all layers.
        progress: interrupt.
    """
    metric = Metric.of(analysis, preflight.recipe, progress)
    ends = decide_on_ends(preflight.recipe, metric)
    preflight = replace(preflight, ends=ends)
    if ends is None or ends.carried:
        return metric, preflight
    inputs = replace(preflight.inputs, layout=preflight.inputs.layout.without_ends())
    return metric.without_ends(), replace(preflight, inputs=inputs)
