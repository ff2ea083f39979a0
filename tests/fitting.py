"""A fit to the run mix, and the folder that fits of this run are in."""

from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.recipe.request import key_place
from hyper_merge.runtime.progress import Progress

FIT = "hyper-merge/mix/fits"


def fit(folders, path, progress=None, **settings):
    """Fits a checkpoint to the run mix, with settings as a request spells them."""
    request = FitRequest.parse({"run": "mix", "checkpoint": path, **settings}, key_place)
    return run_fit(request, folders, progress or Progress())
