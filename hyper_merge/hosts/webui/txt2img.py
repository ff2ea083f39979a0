"""Draws with the WebUI's txt2img; WebUIs differ in how a picture's checkpoint is chosen and loaded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from modules import errors, processing, sd_models, sd_samplers, shared
from PIL import Image

from hyper_merge.errors import PictureError
from hyper_merge.hosts.webui.capabilities import capabilities
from hyper_merge.hosts.webui.checkpoint_list import list_entries
from hyper_merge.hosts.webui.device_memory import refresh_loading_parameters
from hyper_merge.hosts.webui.model_thread import run_in_model_thread
from hyper_merge.loras.prompt_tags import tag_names
from hyper_merge.operations.compare.request import Picture, Txt2Img
from hyper_merge.runtime.progress import Progress

_SELECTED: Final = "sd_model_checkpoint"  # the setting that holds the checkpoint's title
_COMPLAINTS: Final = ("Lora not found", "Networks with errors")  # A1111's
_LISTEN: Final = 0.1  # seconds between looks at the progress, and at the job's own Stop


def visible_samplers() -> tuple[str, ...]:
    """Returns the names of the samplers that the WebUI's own menu shows."""
    return tuple(sd_samplers.visible_sampler_names())


@contextmanager
def open_txt2img() -> Iterator[Txt2Img]:
    """Yields a function that draws; the WebUI's queue lock must be held and its job begun.

    At the end the checkpoint that was selected before is selected again and, if one was loaded,
    loaded. One that the user selects in the meantime stays selected instead.
    """
    selection = _Selection()
    try:
        with _without_total_bar():
            yield lambda picture, progress: _draw(picture, progress, selection)
    finally:
        try:
            selection.restore()
        except (
            Exception
        ) as error:  # a host's model code may raise anything; the WebUI loads it later
            errors.display(error, "loading the checkpoint again", full_traceback=True)


@contextmanager
def _without_total_bar() -> Iterator[None]:
    """Keeps the console's bar over all pictures away, which takes the steps of our job for pictures."""
    bar = shared.total_tqdm
    bar.update = lambda: None
    try:
        yield
    finally:
        del bar.update


class _Selection:
    """The checkpoint that the user has selected, and the one that is selected for a picture."""

    def __init__(self) -> None:
        self._lazy = capabilities().loads_when_drawing
        if self._lazy and not sd_models.model_data.forge_loading_parameters:
            refresh_loading_parameters()  # nothing was drawn since it started
        self._users = self._ours = _selected()
        # Never shared.sd_model, which loads one where none is. Forge's stand-in has no file.
        model = sd_models.model_data.sd_model
        self._was_loaded = hasattr(model, "filename") if self._lazy else model is not None

    def before_picture(self) -> None:
        """Notices a checkpoint that the user has selected since the last picture."""
        if _selected() != self._ours:
            self._users = _selected()

    def after_picture(self) -> None:
        """Remembers the title that is selected: it changes when the host loads and hashes a file."""
        self._ours = _selected()

    def restore(self) -> None:
        """Selects what the user has selected and, if something was loaded, loads it."""
        self.before_picture()
        if not self._lazy:
            shared.opts.data[_SELECTED] = self._users
            load = sd_models.reload_model_weights
        elif _selected() != self._users:
            shared.opts.data[_SELECTED] = self._users
            refresh_loading_parameters()
            load = sd_models.forge_model_reload
        else:
            return
        if self._was_loaded:
            run_in_model_thread(load)


def _selected() -> Any:
    return shared.opts.data.get(_SELECTED)


def _draw(picture: Picture, progress: Progress, selection: _Selection) -> Image.Image:
    title = _title(picture)
    selection.before_picture()
    try:
        with closing(_processing(picture, title)) as p, _joined(progress):
            images = run_in_model_thread(processing.process_images, p)
            complaints = [text for text in p.comments if text.startswith(_COMPLAINTS)]
    except Exception as error:  # a host's model code may raise anything
        errors.display(error, f"drawing with {picture.model.name}", full_traceback=True)
        raise PictureError(
            f"the WebUI cannot draw with {picture.model.name} ({error or 'no reason given'})",
            hint="the WebUI's console has the details",
        ) from error
    finally:
        selection.after_picture()
    progress.check()  # an interrupted picture is half-done
    if images is None or not images.images:
        raise PictureError(
            f"{picture.model.name}: the WebUI made no picture", hint="its console says why"
        )
    _require_loras(picture, complaints)
    return images.images[images.index_of_first_image]


def _require_loras(picture: Picture, complaints: list[str]) -> None:
    """Returns if the picture was drawn with all LoRAs of its prompt, which the WebUI does not check.

    Raises:
        PictureError: a LoRA was not found or failed, or the WebUI has no LoRAs at all.
    """
    # The built-in Lora extension, by the name it is loaded under; it may be switched off.
    loaded = getattr(sys.modules.get("networks"), "loaded_networks", [])
    absent = tag_names(picture.prompt) - {lora.mentioned_name for lora in loaded}
    if absent or complaints:
        names = f"it did not load {', '.join(sorted(absent))}" if absent else "; ".join(complaints)
        raise PictureError(
            f"the WebUI drew without all LoRAs ({names})",
            hint="see that the extension Lora is switched on, refresh its cards, and look at"
            " the console",
        )


def _processing(picture: Picture, title: str) -> Any:
    """Returns the WebUI's request for a picture; nothing is saved, no script of the page takes part."""
    settings = picture.settings
    return processing.StableDiffusionProcessingTxt2Img(
        # The property of this name always gives the loaded model; asking for the model here would
        # load the selected one, only to be replaced.
        sd_model=None,
        prompt=picture.prompt,
        negative_prompt=settings.negative,
        seed=picture.seed,
        sampler_name=settings.sampler,
        steps=settings.steps,
        cfg_scale=settings.cfg_scale,
        width=settings.width,
        height=settings.height,
        batch_size=1,
        n_iter=1,
        do_not_save_samples=True,
        do_not_save_grid=True,
        override_settings={_SELECTED: title},
        # Else each WebUI would select the one before after every picture, and Forge would move the
        # model off the device each time.
        override_settings_restore_afterwards=False,
    )


def _title(picture: Picture) -> str:
    """Returns the title by which the WebUI selects the file; it would silently ignore an unknown one."""
    info = next((info for info in list_entries() if _is_same(info.filename, picture)), None)
    if info is None or sd_models.checkpoint_aliases.get(info.title) is not info:
        raise PictureError(
            f"{picture.model.name} is not in the WebUI's list of checkpoints, or another one"
            " answers to its name",
            hint="press the refresh button next to the list",
        )
    return str(info.title)


def _is_same(file: str, picture: Picture) -> bool:
    return Path(file).resolve() == picture.model.resolve()


@contextmanager
def _joined(progress: Progress) -> Iterator[None]:
    """Reports the WebUI's progress while it draws, and interrupts it if the job is to stop."""
    state, ended = shared.state, threading.Event()

    def listen() -> None:
        furthest = 0.0  # it falls back to zero before the picture is handed over
        while not ended.wait(_LISTEN):
            if progress.should_stop():
                state.interrupt()
            elif state.sampling_step > furthest * state.sampling_steps:
                furthest = min(state.sampling_step / state.sampling_steps, 1.0)
                progress.on_progress("", furthest)

    listener = threading.Thread(target=listen, name="hyper-merge pictures", daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        listener.join()
