"""The form held against the files and the folders, and a name where it has none."""

from __future__ import annotations

from dataclasses import replace

from hyper_merge.errors import RecipeError
from hyper_merge.hosts.host import Host
from hyper_merge.operations.merge.naming import suggest_name, with_free_name
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.runs.folders import Place
from hyper_merge.ui.form import Form, recipe_of


def prepare_merge(host: Host, form: Form) -> tuple[Preflight, Place]:
    """The form, held against the files and the folders.

    Raises:
        HyperMergeError: it cannot be merged like this.
    """
    return with_free_name(preflight_form(host, form), host.folders(), named=has_name(form))


def preflight_form(host: Host, form: Form) -> Preflight:
    """The form, held against the files alone; under the suggested name where it has none.

    Raises:
        HyperMergeError: it cannot be merged like this.
    """
    _require_two(form)
    if not has_name(form):
        form = replace(form, name=suggest_name(form.checkpoints))
    folders = host.folders()
    return run_preflight(recipe_of(form, host.checkpoints(), folders), folders)


def has_name(form: Form) -> bool:
    """Whether the form has a name of its own."""
    return bool((form.name or "").strip())


def _require_two(form: Form) -> None:
    count = len(form.checkpoints or [])
    if count < 2:
        picked = "one is picked" if count else "none is picked"
        raise RecipeError(f"A merge takes two checkpoints or more; {picked}.")
