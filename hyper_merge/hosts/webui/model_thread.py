"""Runs what touches models in the one thread in which a WebUI moves them, where it has such a thread."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from hyper_merge.hosts.webui.capabilities import capabilities

_T = TypeVar("_T")


def run_in_model_thread(work: Callable[..., _T], *args: Any, **options: Any) -> _T:
    """Returns the work's result, or raises its error.

    Forge itself keeps an error of that thread aside, Forge Neo its text alone, and reForge and Forge
    Classic print it and forget it; so the work brings its own back.
    """
    if not capabilities().model_manager:
        return work(*args, **options)
    from modules_forge import main_thread  # noqa: PLC0415 - in these WebUIs only

    results: list[_T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work(*args, **options))
        except Exception as error:  # a host's model code may raise anything
            errors.append(error)

    main_thread.run_and_wait_result(run)
    if errors:
        raise errors[0]
    return results[0]


def unload_all_models() -> None:
    """Takes all models off the device, by the WebUI's own manager of models, which it must have."""
    manager = importlib.import_module(capabilities().model_manager)
    run_in_model_thread(manager.unload_all_models)
