"""An axis of the WebUI's X/Y/Z plot: hyper-model + LoRAs, by the checkpoint that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from modules import errors, scripts

from hyper_merge.errors import HyperMergeError, PictureError
from hyper_merge.hosts.host import Host
from hyper_merge.recipe.plain_values import suggest_nearest
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.manifest import Run, list_runs, load_run
from hyper_merge.runs.weighted_loras import prompt_tags_of

LABEL: Final = "Hyper-Merge: checkpoint"
_SCRIPT: Final = "xyz_grid.py"
_NEEDED: Final = ("AxisOption", "axis_options", "apply_checkpoint")


def add_axis(host: Host) -> None:
    """Adds the axis once; to be called by `on_before_ui`, when the WebUI's scripts are loaded.

    Where there is no such script, or another one of its name, nothing is added and the WebUI's log
    says so; the WebUI itself goes on.
    """
    try:
        for module in _modules():
            _add(module, host)
    except Exception as error:  # another extension's module may be anything
        errors.display(error, "Hyper-Merge: adding an axis to X/Y/Z plot", full_traceback=True)


def _modules() -> Iterator[Any]:
    """Those of the script: some extensions bring their own copy of it."""
    found = {id(data.module): data for data in scripts.scripts_data}
    for data in found.values():
        is_it = Path(data.path).name == _SCRIPT
        if is_it and all(hasattr(data.module, name) for name in _NEEDED):
            yield data.module


def _add(module: Any, host: Host) -> None:
    if any(option.label == LABEL for option in module.axis_options):
        return
    module.axis_options.append(
        module.AxisOption(
            LABEL,
            str,
            _applying(module, host),
            format_value=lambda _p, _option, value: value,
            confirm=lambda _p, values: [_found(host, value) for value in values],
            cost=1.0,  # as of the axis of checkpoints: the outermost loop
            choices=lambda: choices(host),
        )
    )


def choices(host: Host) -> list[str]:
    """Every checkpoint of every run, as "run/checkpoint"; the newest run first."""
    runs, _ = list_runs(host.folders())
    return [f"{run.name}/{name}" for run in runs for name in _names(run)]


def _names(run: Run) -> list[str]:
    own = [row.name for row in run.report.checkpoints]
    return [*own, *(each.row.name for each in load_fits(run)[0] if each.row.name not in own)]


def _applying(module: Any, host: Host) -> Callable[[Any, str, Any], None]:
    def apply(p: Any, value: str, values: Any) -> None:
        title, tags = _found(host, value)
        module.apply_checkpoint(p, title, values)
        p.prompt = f"{p.prompt} {tags}"

    return apply


def _found(host: Host, value: str) -> tuple[str, str]:
    """By what the WebUI selects the hyper-model, and the tags.

    Raises:
        PictureError: the value is no checkpoint of a run, or the hyper-model is not selectable.
    """
    name, _, checkpoint = value.partition("/")
    try:
        run = load_run(host.folders(), name)
        tags = prompt_tags_of(run, checkpoint)
    except HyperMergeError as error:
        known = choices(host)
        raise PictureError(
            f"expected run/checkpoint, got {value!r} ({error})",
            hint=suggest_nearest(value, known),
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
