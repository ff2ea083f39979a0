"""Handles the tab "Runs": lists, copies, shows and deletes earlier runs; clears the cache.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr

from hyper_merge.errors import HyperMergeError, UnknownRunError
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.operations.cache import clear_cache, format_cache
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.fit_records import styles_of
from hyper_merge.runs.hash_cache import find_by_hash
from hyper_merge.runs.lora_runs import is_lora_run, list_all_runs, load_any_run
from hyper_merge.runs.run import Run, load_run
from hyper_merge.ui.form import Form, form_from_recipe
from hyper_merge.ui.handlers.dropdowns import refill
from hyper_merge.ui.html.common import format_hint, format_message
from hyper_merge.ui.html.runs import format_file_list, format_run_comparison, format_run_list


def list_earlier_runs(
    host: Host, first: str | None, second: str | None
) -> tuple[str, Any, Any, str]:
    """Returns the table of runs, the picked one, an update of the others, and the line about the cache.

    Args:
        host: the program around the tab.
        first: the picked run; the newest takes the place of one that is gone.
        second: the run that stands beside it.
    """
    folders = host.folders()
    runs, problems = list_all_runs(folders)
    names = [run.name for run in runs]
    picked = first if first in names else next(iter(names), "")
    return (
        format_run_list(runs, problems),
        gr.update() if picked == first else picked,
        _others(names, picked, second),
        format_hint(format_cache(folders)),
    )


def list_others(host: Host, name: str, second: str | None) -> Any:
    """Returns an update of the runs that may stand beside the picked one."""
    return _others([run.name for run in list_all_runs(host.folders())[0]], name, second)


def copy_settings(host: Host, name: str | None) -> tuple[Any, ...]:
    """Returns the form's values for a merge with the settings of a run, and a message.

    Changes nothing for a run of LoRAs, whose settings go elsewhere.
    """
    if is_lora_run(host.folders(), name or ""):
        return (*(gr.update() for _ in fields(Form)), "")
    try:
        run = load_run(host.folders(), name or "")
    except HyperMergeError as error:
        return (*(gr.update() for _ in fields(Form)), _format_error(error))
    listed = host.checkpoints()
    recipe = _with_renamed_files(run, host.folders().cache, listed)
    form = form_from_recipe(
        recipe, listed, save_styles=host.defaults().save_styles and host.has_txt2img
    )
    gone = len(recipe.models) - len(form.checkpoints)
    text = f"The settings of {name} were copied to the form."
    if gone:
        text += f" {gone} of its checkpoints are no longer in the list."
    return (*form.widget_values(), format_message("info" if gone else "good", text))


def _with_renamed_files(run: Run, cache: Path, listed: Mapping[str, Path]) -> Recipe:
    """Returns a run's recipe, in which checkpoints that were renamed are found by remembered hashes."""
    known = {path.resolve() for path in listed.values()}
    sources = run.sources[-len(run.recipe.models) :]  # without a given base

    def find(path: Path, sha256: str) -> Path:
        if path.resolve() in known:
            return path
        return next((p for p in find_by_hash(sha256, cache) if p.resolve() in known), path)

    pairs = zip(run.recipe.models, sources, strict=True)
    return replace(run.recipe, models=tuple(find(p, source.sha256) for p, source in pairs))


def show_side_by_side(host: Host, first: str | None, second: str | None) -> str:
    """Returns two runs side by side."""
    if not second or first == second:
        return format_message("info", "Pick another run to stand beside this one.")
    try:
        one, other = (load_any_run(host.folders(), name or "") for name in (first, second))
    except HyperMergeError as error:
        return _format_error(error)
    return format_run_comparison(one, other)


def ask_to_delete_run(host: Host, jobs: Jobs, name: str | None) -> tuple[str, Any, Any, str]:
    """Lists what deleting a run removes, and shows the buttons that confirm or cancel it.

    Refused while a merge runs, which may be adding LoRAs to the run's hyper-model.

    Returns:
        The list of files, updates of both buttons, and the name of the run.
    """
    try:
        jobs.require_idle()
        run = load_any_run(host.folders(), name or "")
        files = files_of(run, host.folders())
    except HyperMergeError as error:
        return _answered(_format_error(error))
    question = f"Deleting the run {run.name} removes {len(files)} files"
    styles = len(_styles(host, run))
    question += f" and {styles} prompt styles:" if styles else ":"
    return (format_file_list(files, question), *_buttons(visible=True), run.name)


def delete_confirmed_run(host: Host, jobs: Jobs, name: str | None) -> tuple[str, Any, Any, str]:
    """Deletes the files and styles of the run whose files were listed."""
    try:
        jobs.require_idle()
        run = load_any_run(host.folders(), name or "")
        styles = _styles(host, run)
        gone = delete_run(run, host.folders())
    except UnknownRunError as error:  # after a second click, or by another page
        text = (
            format_message("good", f"The run {name} is deleted.") if name else _format_error(error)
        )
        return _answered(text)
    except HyperMergeError as error:
        return _answered(_format_error(error))
    host.refresh()
    text = format_message("good", f"Deleted {len(gone)} files of {name}.")
    try:
        host.remove_styles(styles)
    except HyperMergeError as error:
        text += _format_error(error)
    return _answered(text)


def cancel_deletion() -> tuple[str, Any, Any, str]:
    """Hides the list of files and its buttons."""
    return _answered("")


def clear_idle_cache(host: Host, jobs: Jobs) -> str:
    """Empties the cache, unless a job runs that may need it; returns what that freed."""
    try:
        jobs.require_idle()
        return format_message("good", clear_cache(host.folders()))
    except HyperMergeError as error:
        return _format_error(error)


def _others(names: Sequence[str], picked: str, second: str | None) -> Any:
    """Updates the runs that can stand beside the picked one: all but itself."""
    others = [name for name in names if name != picked]
    return refill(others, second, next(iter(others), None))


def _styles(host: Host, run: Run) -> set[str]:
    return styles_of(run).keys() & host.styles().keys()


def _answered(text: str) -> tuple[str, Any, Any, str]:
    """Returns a message without buttons."""
    return (text, *_buttons(visible=False), "")


def _buttons(*, visible: bool) -> tuple[Any, Any]:
    return gr.update(visible=visible), gr.update(visible=visible)


def _format_error(error: HyperMergeError) -> str:
    return format_message("bad", str(error))
