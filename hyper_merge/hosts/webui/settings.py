"""Adds Hyper-Merge's page to the WebUI's settings, and reads the values from it."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import gradio as gr
from modules import call_queue, paths, sd_models, shared

from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Defaults
from hyper_merge.hosts.webui.capabilities import capabilities
from hyper_merge.operations.cache import clear_cache, format_cache
from hyper_merge.recipe.parsing import number, parse_flag, parse_ranks, parse_text
from hyper_merge.runs.folders import SIZE_LIMIT, Folders
from hyper_merge.runtime.formatting import GB

SECTION: Final = ("hyper_merge", "Hyper-Merge")

_CATEGORY: Final = "system"  # else the page stands under "Uncategorized", below all others
_RANKS: Final = "hyper_merge_ranks"
_STYLES: Final = "hyper_merge_save_styles"
_FOLDER: Final = "hyper_merge_folder"
_CACHE: Final = "hyper_merge_cache_gb"
_CLEAR: Final = "hyper_merge_clear_cache"

_CACHE_GB: Final = SIZE_LIMIT // GB
_MORE_LORAS: Final = ("lyco_dir_backcompat",)  # where A1111 lists LoRAs too, if it exists

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def add_settings() -> None:
    """Adds Hyper-Merge's page to the settings; to be called by `on_ui_settings`."""
    info = shared.OptionInfo
    clear_button = info("Clear the analysis cache", "", _clear_button, section=SECTION)
    clear_button.do_not_save = True
    options = {
        _RANKS: info(Defaults.ranks, "Ranks of a new merge", section=SECTION).info(
            "small, medium or large; or one LoRA per rank, such as 128, 64"
        ),
        _STYLES: info(
            Defaults.save_styles,
            "Save a prompt style per checkpoint after a merge",
            section=SECTION,
        ),
        _FOLDER: info(
            "", "Folder of the runs and the cache", None, shared.hide_dirs, section=SECTION
        ).info("empty: hyper-merge in the models folder"),
        _CACHE: info(
            _CACHE_GB, "Analysis cache: largest size in GB", gr.Number, section=SECTION
        ).info("those used last stay; 0 keeps none"),
        _CLEAR: clear_button,
    }
    for key, option in options.items():
        option.category_id = _CATEGORY
        shared.opts.add_option(key, option)


def read_defaults() -> Defaults:
    """Returns the form's defaults by the page."""
    ranks = _saved(_RANKS, _ranks_text, Defaults.ranks)
    return Defaults(ranks, _saved(_STYLES, parse_flag, Defaults.save_styles))


def read_folders() -> Folders:
    """Returns the folders by the WebUI's command line and the page."""
    models = Path(paths.models_path)
    webui = capabilities()
    checkpoints = _first_given(webui.checkpoint_folders) or sd_models.model_path
    loras = _first_given(webui.lora_folders) or models / "Lora"
    runs = _saved(_FOLDER, _folder, models / "hyper-merge")
    limit = _saved(_CACHE, number(0, 1e6), float(_CACHE_GB))
    return Folders(Path(checkpoints), Path(loras), runs, runs / "cache", int(limit * GB))


def read_lora_folders() -> list[Path]:
    """Returns all folders of LoRAs by the WebUI's command line; the first is that of `read_folders`."""
    given = [*_all_given((*capabilities().lora_folders, *_MORE_LORAS))]
    return [read_folders().loras, *map(Path, given)]


def _first_given(options: Iterable[str]) -> Any:
    """Returns the first folder of the command line; None where none is given."""
    return next(_all_given(options), None)


def _all_given(options: Iterable[str]) -> Iterator[Any]:
    """Yields the folders of the command line; an option may hold one, several or none."""
    for name in options:
        given = getattr(shared.cmd_opts, name, None)
        if given:
            yield from given if isinstance(given, list) else [given]


def _saved(key: str, parse: Callable[[Any], _T], default: _T) -> _T:
    """Returns a setting's value, or the default with a warning where it makes no sense."""
    if key not in shared.opts.data:
        return default
    try:
        return parse(shared.opts.data[key])
    except (HyperMergeError, OSError) as error:
        label = shared.opts.data_labels[key].label if key in shared.opts.data_labels else key
        _log.warning("Settings, %s, %s: %s; using %s", SECTION[1], label, error, default)
        return default


def _ranks_text(value: Any) -> str:
    text = parse_text(value)
    parse_ranks(text)
    return text


def _folder(value: Any) -> Path:
    """Returns a folder, relative to the WebUI's data; it need not exist yet."""
    if value == "":
        return Path(paths.models_path) / "hyper-merge"
    folder = Path(paths.data_path) / Path(parse_text(value)).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder, {folder} is a file")
    return folder


def _clear_button(label: str, value: str, elem_id: str) -> gr.Button:
    """Builds the button, and next to it the size of the cache when the page is opened.

    The WebUI takes one component per setting and writes the setting's value into it: the button's
    text. `label` is empty.
    """
    del label
    with gr.Row():
        button = gr.Button(value, elem_id=elem_id)
        size = gr.HTML(cache_html, elem_id=f"{elem_id}_size")
    button.click(clear_cache_html, inputs=[], outputs=[size])
    return button


def cache_html() -> str:
    """Returns HTML with the size of the cache, and where it is."""
    folders = read_folders()
    return html.escape(f"{format_cache(folders)} It is in {folders.cache}.")


def clear_cache_html() -> str:
    """Deletes all analyses, unless the WebUI is at work; returns the outcome as HTML."""
    if not call_queue.queue_lock.acquire(blocking=False):
        return f"{cache_html()}<br>The WebUI is at work; clear the cache when that is done."
    try:
        outcome = clear_cache(read_folders())
    except HyperMergeError as error:
        outcome = str(error)
    finally:
        call_queue.queue_lock.release()
    return f"{cache_html()}<br>{html.escape(outcome)}"
