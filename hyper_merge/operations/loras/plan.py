"""Forecasts before LoRAs are shared what shared ones of which size would explain; writes nothing."""

from __future__ import annotations

from hyper_merge.decomposition.clustering import Clusters
from hyper_merge.operations.loras.analysis import analyze_loras
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
    merge = preflight.merge
    reading, forecasting = progress.split((1.0, 2.0))
    with (
        device_job(merge.pass_options.device),
        analyze_loras(preflight.loras, merge.recipe, merge.folders.cache, reading) as analysis,
    ):
        metric = Metric.of(analysis, merge.recipe, forecasting)
        forecast = forecast_ranks_for(metric, merge, forecasting)
    # Groups say what an average for each would take away, and there is none.
    return plan_from(forecast, Clusters((), 0.0), merge)
