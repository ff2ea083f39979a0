"""Forecasts before LoRAs are shared what shared ones of which size would explain; writes nothing."""

from __future__ import annotations

from dataclasses import replace

from hyper_merge.decomposition.clustering import Clusters
from hyper_merge.decomposition.factored import FEW
from hyper_merge.operations.loras.analysis import analyze_loras
from hyper_merge.operations.loras.relatives import common_sample
from hyper_merge.operations.loras.share import SharePreflight
from hyper_merge.operations.merge.plan import MergePlan, plan_from
from hyper_merge.operations.merge.rank_search import forecast_ranks_for
from hyper_merge.runtime.devices import device_job
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.metric import Metric


def plan_share(preflight: SharePreflight, progress: Progress) -> MergePlan:
    """Returns the forecast for the size that a recipe asks for, and for others around it.

    Args:
        preflight: the validated recipe.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: a damaged file, or the user's interrupt.
    """
    merge, loras = preflight.merge, preflight.loras
    if len(loras.files) > FEW:  # to read them all would take minutes
        loras = replace(loras, layers=tuple(common_sample(loras)))
    size, part = (sum(layer.m + layer.n for layer in x.layers) for x in (preflight.loras, loras))
    times = size / part
    budget = None if merge.recipe.budget is None else int(merge.recipe.budget / times)
    recipe = replace(merge.recipe, budget=budget)
    reading, forecasting = progress.split((1.0, 2.0))
    with (
        device_job(merge.pass_options.device),
        analyze_loras(loras, recipe, merge.folders.cache, reading) as analysis,
    ):
        metric = Metric.of(analysis, recipe, forecasting)
        of_part = replace(merge, inputs=loras.inputs(merge.inputs.dtype))
        forecast = forecast_ranks_for(metric, of_part, forecasting)
    count = len(preflight.loras.layers) / len(loras.layers)
    forecast = replace(
        forecast,
        costs=tuple(round(times * cost) for cost in forecast.costs),
        entries=tuple(round(count * entry) for entry in forecast.entries),
    )
    # Groups say what an average for each would take away, and there is none.
    return plan_from(forecast, Clusters((), 0.0), merge)
