"""Options for work on several processes or machines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from hyper_merge.cli.progress_bar import say_above
from hyper_merge.errors import RecipeError, settings_placed
from hyper_merge.recipe.loading import option_place
from hyper_merge.recipe.parsing import parse_bytes, whole
from hyper_merge.recipe.plain_values import plain_value
from hyper_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from hyper_merge.cluster.opening import ClusterRequest
    from hyper_merge.runtime.remote import RemoteWorkers

_MOST_WORKERS: Final = 1024

_T = TypeVar("_T")


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name workers."""
    group = parser.add_argument_group(
        "workers (they read and analyse the checkpoints; with the extra cluster)"
    )
    group.add_argument(
        "--workers",
        metavar="NUMBER",
        help="start so many processes on this machine, of one thread each; with CUDA each has a GPU",
    )
    group.add_argument(
        "--worker-memory",
        metavar="SIZE",
        help="what each of them may take, such as 4GB (default: an even share of this machine's)",
    )
    group.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="use the workers of a dask cluster that is there, such as tcp://10.0.0.1:8786; they must"
        " see all files under the same paths",
    )


def cluster_request(options: argparse.Namespace) -> ClusterRequest | None:
    """Returns which workers the options ask for, if any; dask is installed then.

    Raises:
        RecipeError: an option is impossible, or contradicts another one.
        ClusterError: dask is not installed.
    """
    count = _parsed(options.workers, "workers", whole(1, _MOST_WORKERS))
    memory = _parsed(options.worker_memory, "worker-memory", parse_bytes)
    if memory is not None and count is None:
        raise RecipeError("--worker-memory is of processes that --workers starts", hint="give both")
    if count is not None and options.scheduler is not None:
        raise RecipeError("--workers and --scheduler were both given", hint="leave one of both out")
    if count is None and options.scheduler is None:
        return None
    from hyper_merge.cluster.opening import ClusterRequest, require_dask

    require_dask()
    return ClusterRequest(count, options.scheduler, memory)


@contextmanager
def workers_of(
    request: ClusterRequest | None, progress: Progress
) -> Iterator[RemoteWorkers | None]:
    """Gives the workers that were asked for within the block; None if none were."""
    if request is None:
        yield None
        return
    from hyper_merge.cluster.opening import open_workers

    with open_workers(request, progress, say_above) as workers:
        yield workers


def _parsed(text: str | None, name: str, parse: Callable[[object], _T]) -> _T | None:
    if text is None:
        return None
    with settings_placed(option_place, name):
        return parse(plain_value(text))
