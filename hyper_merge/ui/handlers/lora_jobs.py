"""Handles the button of the tab "LoRAs" that starts a job: distil, resize, combine, add, subtract, fit.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host, the process's jobs), the rest from the browser. A refusal becomes a message, never an
error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hyper_merge.checkpoints.io.transaction import require_free
from hyper_merge.errors import HyperMergeError, RecipeError, settings_placed
from hyper_merge.hosts.host import Host, require_listed_file
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.tasks import turn_task
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.fit import run_lora_fit
from hyper_merge.operations.loras.inputs import read_loras
from hyper_merge.operations.loras.request import ApplyRequest, CombineRequest
from hyper_merge.operations.loras.share import (
    free_run_name,
    preflight_share,
    require_several,
    share_loras,
    share_recipe,
)
from hyper_merge.recipe.parsing import parse_name
from hyper_merge.recipe.plain_values import plain_value
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.lora_runs import load_lora_run
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.form import size_key, split_lines
from hyper_merge.ui.handlers.loras import (
    PLACE,
    Action,
    LoraOutcome,
    choice_of,
    draw_lora_run,
    parse_lora_picks,
)
from hyper_merge.ui.html.common import format_refusal
from hyper_merge.ui.html.loras import (
    format_combined_loras,
    format_fitted_lora,
    format_lora_checkpoint,
)

_LABELS: Final = {
    **dict.fromkeys(("ranks", "budget", "target", "rank", "size", "keep", "topup"), "Size"),
    "models": "LoRAs",
    "loras": "LoRAs",
    "multipliers": "Multiplier",
    "block_weights": "Weights by block",
    "name": "Name",
    "to": "Name",
    "checkpoint": "Checkpoint",
    "run": "Run",
}
_Work = Callable[[Progress], LoraOutcome]


@dataclass(frozen=True)
class LoraForm:
    """The values that the browser sends, in the order of the panel's widgets."""

    picked: str
    choice: str | None
    size: str | None
    checkpoint: str | None
    run: str | None
    name: str | None
    replace: bool
    block_weights: str | None

    @property
    def action(self) -> Action:
        """What is to be made."""
        return choice_of(self.choice).action

    def entered(self, field: str) -> str | None:
        """Returns the text of a field; None if it is empty."""
        return (getattr(self, field) or "").strip() or None


def start_lora_job(host: Host, jobs: Jobs, *values: Any) -> str:
    """Starts what the form asks for; returns why not, or "" if it started.

    The request is made twice: at once, for a refusal, and again when its turn comes.
    """
    form = LoraForm(*values)
    prepare = _PREPARE[form.action]
    try:
        jobs.require_idle()
        title, _ = prepare(host, form)

        def work(progress: Progress) -> LoraOutcome:
            return prepare(host, form)[1](progress)

        jobs.start(title, functools.partial(turn_task, host, work), host.log, PLACE)
    except HyperMergeError as error:
        return format_refusal(error)
    return ""


def _prepare_share(host: Host, form: LoraForm) -> tuple[str, _Work]:
    folders, loras = host.folders(), _loras(host, form)
    with settings_placed(_label, "models"):
        require_several(loras)
    text = form.entered("size")
    if text is None:
        raise RecipeError("expected ranks, a size or a share, got nothing", where="Size")
    settings = {
        size_key(text): plain_value(text),
        "name": form.entered("name") or free_run_name(loras, folders),
        "overwrite": bool(form.replace),
    }
    recipe = share_recipe(settings, loras, folders, _label)
    preflight_share(recipe, folders)
    return recipe.name, functools.partial(_share, host, recipe)


def _share(host: Host, recipe: Recipe, progress: Progress) -> LoraOutcome:
    folders = host.folders()
    name = share_loras(recipe, folders, progress).report.name
    return LoraOutcome(draw_lora_run(load_lora_run(folders, name), is_new=True))


def _prepare_resize(host: Host, form: LoraForm) -> tuple[str, _Work]:
    loras = _loras(host, form)
    if len(loras) > 1 and form.entered("name"):
        raise RecipeError(
            "expected nothing where several LoRAs are resized", hint="leave it empty", where="Name"
        )
    sizes = _file_size(form)
    if not sizes:
        raise RecipeError("expected a rank, a size or a share, got nothing", where="Size")
    requests = [_combination(host, form, (lora,), sizes) for lora in loras]
    return _count(loras, requests[0].path.stem), functools.partial(_combine, requests)


def _prepare_combine(host: Host, form: LoraForm) -> tuple[str, _Work]:
    loras = _loras(host, form)
    read_loras(loras)
    values = {**_file_size(form), **_weights(form)}
    request = _combination(host, form, loras, values)
    return request.path.stem, functools.partial(_combine, [request])


def _combination(
    host: Host, form: LoraForm, loras: tuple[Path, ...], values: Mapping[str, object]
) -> CombineRequest:
    to = _path(host.folders().loras, form)
    given = {**values, "loras": loras, "to": to, "overwrite": bool(form.replace)}
    request = CombineRequest.parse(given, _label)
    with settings_placed(_label, "name"):
        require_free(request.path, overwrite=request.overwrite)
    return request


def _combine(requests: list[CombineRequest], progress: Progress) -> LoraOutcome:
    parts = progress.split([1.0] * len(requests))
    return LoraOutcome(
        format_combined_loras([run_combine(*pair) for pair in zip(requests, parts, strict=True)])
    )


def _prepare_application(host: Host, form: LoraForm) -> tuple[str, _Work]:
    loras, name = _loras(host, form), form.entered("checkpoint")
    if name is None:
        raise RecipeError("pick one", where="Checkpoint")
    values = {
        "checkpoint": require_listed_file(name, host.checkpoints()),
        "loras": loras,
        **_weights(form),
        "subtract": form.action == "subtract",
        "to": _path(host.folders().models, form),
        "overwrite": bool(form.replace),
    }
    request = ApplyRequest.parse(values, _label)

    def work(progress: Progress) -> LoraOutcome:
        return LoraOutcome(format_lora_checkpoint(run_apply(request, progress)))

    return f"{name} {'without' if request.subtract else 'with'} LoRAs", work


def _prepare_fit(host: Host, form: LoraForm) -> tuple[str, _Work]:
    folders, loras = host.folders(), _loras(host, form)
    if len(loras) > 1:
        raise RecipeError(f"expected one to fit, got {len(loras)}", where="LoRAs")
    name = form.entered("run")
    if name is None:
        raise RecipeError(
            "expected a run of LoRAs, got none", hint="distil some first", where="Run"
        )
    run = load_lora_run(folders, name)
    entered = {"name": form.entered("name"), "topup": form.entered("size")}
    request = FitRequest.parse(
        {
            "run": run.name,
            "checkpoint": loras[0],
            "overwrite": bool(form.replace),
            **{key: text for key, text in entered.items() if text},
        },
        _label,
    )

    def work(progress: Progress) -> LoraOutcome:
        return LoraOutcome(format_fitted_lora(run_lora_fit(request, folders, progress), run))

    return f"the fit of {loras[0].stem} onto {run.name}", work


_PREPARE: Final[Mapping[Action, Callable[[Host, LoraForm], tuple[str, _Work]]]] = {
    "share": _prepare_share,
    "resize": _prepare_resize,
    "combine": _prepare_combine,
    "add": _prepare_application,
    "subtract": _prepare_application,
    "fit": _prepare_fit,
}


def _loras(host: Host, form: LoraForm) -> tuple[Path, ...]:
    """Returns the files of the picked LoRAs."""
    picked, listed = parse_lora_picks(form.picked), host.loras()
    if not picked:
        raise RecipeError("pick one or more in the list", where="LoRAs")
    return tuple(require_listed_file(name, listed) for name, _ in picked)


def _weights(form: LoraForm) -> dict[str, object]:
    """Returns the multipliers of the picked LoRAs, in all and by block."""
    words = (text.strip().replace(",", ".") or "1" for _, text in parse_lora_picks(form.picked))
    return {
        "multipliers": " ".join(words),
        "block_weights": split_lines(form.block_weights) or None,
    }


def _file_size(form: LoraForm) -> dict[str, object]:
    """Returns the setting that the field of sizes stands for, of a single file; none if it is empty."""
    text = form.entered("size")
    if text is None:
        return {}
    key = {"ranks": "rank", "budget": "size", "target": "keep"}[size_key(text)]
    return {key: plain_value(text)}


def _path(folder: Path, form: LoraForm) -> Path | None:
    """Returns the path of a new file; None for the suggested one."""
    name = form.entered("name")
    if name is None:
        return None
    with settings_placed(_label, "name"):
        return folder / f"{parse_name(name)}.safetensors"


def _count(loras: tuple[Path, ...], one: str) -> str:
    return one if len(loras) == 1 else f"{len(loras)} LoRAs"


def _label(key: str) -> str:
    """Returns the panel's label of a setting."""
    return _LABELS.get(key, key)
