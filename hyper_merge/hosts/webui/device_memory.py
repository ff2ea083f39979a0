"""Tells which device the WebUI computes on, and takes its loaded model off it for a while.

A failure to unload the model, or to load it again, goes to the host's log and does not end or hide
the run: the WebUI loads its model again when it needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from modules import devices, errors, sd_models, shared

from hyper_merge.hosts.webui.capabilities import capabilities
from hyper_merge.hosts.webui.checkpoint_list import (
    list_entries,
    list_titled_entries,
    refresh_list,
)
from hyper_merge.hosts.webui.model_thread import run_in_model_thread, unload_all_models

Stamp = tuple[int, int, int] | None  # inode, size, time; None where there is no file


def chosen_device() -> str:
    """Returns the name of the device that the WebUI is told to compute on.

    That is by `--device-id` and `--use-cpu all` in A1111, by `--always-cpu` in the others.
    """
    choose = getattr(devices, "get_device_for", lambda _task: "cuda")  # each has it, so far
    return str(choose("hyper-merge"))


def unloaded_model() -> AbstractContextManager[None]:
    """Takes the loaded model off the device; to be used with the WebUI's queue lock held.

    If the file of the loaded checkpoint is another one afterwards, it is loaded again: neither host
    notices by itself (`contract.md` section 7).
    """
    return _unloaded_until_drawing() if capabilities().loads_when_drawing else _unloaded_models()


@contextmanager
def _unloaded_models() -> Iterator[None]:
    """Takes off the device what A1111, reForge and Forge Classic keep loaded between pictures."""
    data = sd_models.model_data
    with data.lock:  # at its start the WebUI loads without the queue lock: let it finish
        current = data.sd_model  # never shared.sd_model, which loads one where none is
        loaded = [model for model in data.loaded_sd_models if model is not current]
    models = [current, *loaded] if current is not None else loaded
    stamps = [_stamp(_file(model)) for model in models]
    with _errors_logged("unloading the checkpoint for Hyper-Merge"):
        _unload(models)
    try:
        yield
    finally:
        changed = [
            model
            for model, before in zip(models, stamps, strict=True)
            if _stamp(_file(model)) not in (before, None)
        ]
        with _errors_logged(
            "loading the checkpoint again (Settings, Actions: Load SD checkpoint to VRAM)"
        ):
            for model in changed:
                if model is not current:
                    data.loaded_sd_models.remove(model)
                    sd_models.send_model_to_trash(model)
            if current is not None and data.sd_model is current:
                _load_again(current, changed=current in changed)


def _unload(models: list[Any]) -> None:
    if not capabilities().model_manager:
        for model in models:
            sd_models.unload_model_weights(model)
    elif models:
        # Not unload_model_weights: reForge's moves the weights and does not tell its manager, which
        # then draws the next picture with weights on the CPU.
        unload_all_models()


def _load_again(model: Any, *, changed: bool) -> None:
    if not changed:
        sd_models.send_model_to_device(
            model
        )  # nothing where a manager does it for the next picture
        return
    file, selected = _file(model), _selected()
    refresh_list()  # keeps what it has read of a file with the file's entry
    if capabilities().model_manager:
        sd_models.model_data.sd_model = None  # Forge Classic keeps the model of a file of that name
    run_in_model_thread(sd_models.reload_model_weights, info=_info(file), forced_reload=True)
    _select(selected)


@contextmanager
def _unloaded_until_drawing() -> Iterator[None]:
    """Takes the model of Forge or Forge Neo off the device; the next picture brings it back."""
    data = sd_models.model_data
    file = getattr(data.sd_model, "filename", None)  # Forge's stand-in for no model has none
    before = _stamp(file) if file else None
    with _errors_logged("unloading the checkpoint for Hyper-Merge"):
        unload_all_models()
    try:
        yield
    finally:
        if file and _stamp(file) not in (before, None):
            with _errors_logged("choosing the new file of the loaded checkpoint"):
                selected = _selected()
                refresh_list()
                _select(selected)
                refresh_loading_parameters()
                data.forge_hash = ""  # of name and part of the content: may not have changed


def refresh_loading_parameters() -> None:
    """Makes Forge or Forge Neo load the selected checkpoint the next time that it draws."""
    from modules_forge import main_entry  # noqa: PLC0415 - in these WebUIs only

    main_entry.refresh_model_loading_parameters()


def _selected() -> str | None:
    """Returns the file of the checkpoint that is selected in the WebUI."""
    info = sd_models.get_closet_checkpoint_match(shared.opts.data.get("sd_model_checkpoint"))
    return info.filename if info is not None else None


def _select(file: str | None) -> None:
    """Selects a file, whose title may have changed with its hash; loads nothing."""
    for title, info in list_titled_entries():
        if info.filename == file:
            shared.opts.data["sd_model_checkpoint"] = title


def _info(file: str) -> Any:
    return next((info for info in list_entries() if info.filename == file), None)


def _file(model: Any) -> str:
    return str(model.sd_checkpoint_info.filename)


def _stamp(file: str) -> Stamp:
    try:
        stat = Path(file).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextmanager
def _errors_logged(task: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a host's model code may raise anything
        errors.display(error, task, full_traceback=True)
