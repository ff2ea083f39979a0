"""Adds an axis to the WebUI's X/Y/Z plot: the checkpoints that hyper-model and LoRAs restore."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from modules import errors, scripts

from hyper_merge.errors import HyperMergeError, PictureError
from hyper_merge.hosts.host import Host
from hyper_merge.recipe.plain_values import suggest_nearest
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.run import Run, list_runs, load_run
from hyper_merge.runs.weighted_loras import prompt_tags_of

LABEL: Final = "Hyper-Merge: checkpoint"
_SCRIPT: Final = "xyz_grid.py"
_CHECKPOINTS: Final = "Checkpoint name"  # the label of the host's own axis of checkpoints

_log = logging.getLogger(__name__)


def add_axis(host: Host) -> None:
    """Adds the axis once; to be called by `on_before_ui`, when the WebUI's scripts are loaded.

    Where there is no such script, or another one of its name, nothing is added, the log says so, and
    the WebUI starts as usual; an error goes to its log.
    """
    try:
        modules = _modules()
        for module in modules:
            _add(module, host)
        if not modules:
            _log.warning("Hyper-Merge adds no axis: this WebUI has no X/Y/Z plot")
    except Exception as error:  # another extension's module may be anything
        errors.display(error, "Hyper-Merge: adding an axis to X/Y/Z plot", full_traceback=True)


def _modules() -> list[Any]:
    """Returns the script's modules: some extensions bring their own copy of it."""
    plots = [data for data in scripts.scripts_data if Path(data.path).name == _SCRIPT]
    return list({id(data.module): data.module for data in plots}.values())


def _add(module: Any, host: Host) -> None:
    options = {option.label: option for option in module.axis_options}
    if LABEL in options:
        return  # Forge Classic keeps its list when the page is loaded again
    if _CHECKPOINTS not in options:
        _log.warning(
            'Hyper-Merge adds no axis to this X/Y/Z plot (%s): it has no axis "%s"',
            module,
            _CHECKPOINTS,
        )
        return
    module.axis_options.append(
        module.AxisOption(
            LABEL,
            str,
            _applying(options[_CHECKPOINTS].apply, host),
            format_value=lambda _p, _option, value: value,
            confirm=lambda _p, values: [_title_and_tags(host, value) for value in values],
            cost=1.0,  # that of the axis of checkpoints: the outermost loop
            choices=lambda: run_checkpoints(host),
        )
    )


def run_checkpoints(host: Host) -> list[str]:
    """Returns every checkpoint of every run as "run/checkpoint", the newest run first."""
    runs, _ = list_runs(host.folders())
    return [f"{run.name}/{name}" for run in runs for name in _names(run)]


def _names(run: Run) -> list[str]:
    merged = [row.name for row in run.report.checkpoints]
    fitted = [fit.row.name for fit in load_fits(run)[0]]
    return [*merged, *(name for name in fitted if name not in merged)]


def _applying(
    select: Callable[[Any, str, Any], None], host: Host
) -> Callable[[Any, str, Any], None]:
    """Returns what a cell of the plot does: selects the hyper-model as the host does, and adds tags."""

    def apply(p: Any, value: str, values: Any) -> None:
        title, tags = _title_and_tags(host, value)
        select(p, title, values)
        p.prompt = f"{p.prompt} {tags}"

    return apply


def _title_and_tags(host: Host, value: str) -> tuple[str, str]:
    """Returns the title by which the WebUI selects the hyper-model, and the tags.

    Raises:
        PictureError: the value is no checkpoint of a run, or the hyper-model is not selectable.
    """
    name, _, checkpoint = value.partition("/")
    try:
        run = load_run(host.folders(), name)
        tags = prompt_tags_of(run, checkpoint)
    except HyperMergeError as error:
        nearest = suggest_nearest(value, run_checkpoints(host))
        raise PictureError(
            f"expected run/checkpoint, got {value!r} ({error})",
            hint=nearest,
            where=LABEL,
        ) from error
    title = host.checkpoint_title(run.hyper_model)
    if title is None:
        raise PictureError(
            f"{LABEL}: {run.hyper_model.name}, the hyper-model of {name}, is not in the WebUI's"
            " list of checkpoints, or another one answers to its name",
            hint="refresh the list",
        )
    return title, tags
