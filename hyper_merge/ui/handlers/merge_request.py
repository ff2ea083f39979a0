"""Checks the form against files and folders, under a suggested name if it has none."""

from __future__ import annotations

from dataclasses import replace

from hyper_merge.errors import RecipeError
from hyper_merge.hosts.host import Host
from hyper_merge.operations.merge.naming import suggest_name, with_free_name
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.runs.folders import Place
from hyper_merge.ui.form import Form, recipe_from_form


def prepare_merge(host: Host, form: Form) -> tuple[Preflight, Place]:
    """Checks the form against files and folders, and finds a free name.

    Raises:
        HyperMergeError: these checkpoints cannot be merged with these settings.
    """
    return with_free_name(preflight_form(host, form), named=has_name(form))


def preflight_form(host: Host, form: Form) -> Preflight:
    """Checks the form against the files alone, under the suggested name if it has none.

    Raises:
        HyperMergeError: these checkpoints cannot be merged with these settings.
    """
    _require_two(form)
    if not has_name(form):
        form = replace(form, name=suggest_name(form.checkpoints))
    folders = host.folders()
    return run_preflight(recipe_from_form(form, host.checkpoints(), folders), folders)


def has_name(form: Form) -> bool:
    """Returns whether a name was entered."""
    return bool((form.name or "").strip())


def _require_two(form: Form) -> None:
    count = len(form.checkpoints or [])
    if count < 2:
        raise RecipeError(
            "A merge needs two or more checkpoints", hint=f"{count or 'none'} picked."
        )
