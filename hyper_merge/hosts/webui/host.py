"""Implements AUTOMATIC1111's WebUI and its relatives as a host; imported by `scripts/` only, in one."""

from __future__ import annotations

import copy
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import modules.progress
from modules import call_queue, errors, scripts, shared
from modules.styles import PromptStyle

from hyper_merge.errors import OutputError
from hyper_merge.hosts.file_lists import LORAS, list_files
from hyper_merge.hosts.host import Defaults, GeneratorInfo
from hyper_merge.hosts.webui import settings
from hyper_merge.hosts.webui.capabilities import capabilities
from hyper_merge.hosts.webui.checkpoint_list import (
    list_entries,
    list_titled_entries,
    name_selected_by,
    refresh_list,
)
from hyper_merge.hosts.webui.device_memory import unloaded_model
from hyper_merge.hosts.webui.txt2img import open_txt2img, visible_samplers
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress

_STEPS: Final = 1000  # of the progress bar
_LISTEN: Final = 0.02  # seconds between looks at the WebUI's buttons
_STOP_HINT: Final = "only Stop in the tab Hyper-Merge ends this while a generation waits"
_BLOCK_WEIGHTS: Final = "lora_block_weight.py"  # the script of that extension
_TAG: Final = re.compile(r"<lora:[^>]*>")


class WebUI:
    """The WebUI around us; holds no state, since it outlives the WebUI's "Reload UI"."""

    has_txt2img = True

    @property
    def title(self) -> str:
        """The WebUI's name."""
        return capabilities().title

    @property
    def takes_block_weights(self) -> bool:
        """Whether the extension LoRA Block Weight is there, where it does what it says."""
        loaded = any(Path(data.path).name == _BLOCK_WEIGHTS for data in scripts.scripts_data)
        return loaded and capabilities().scales_blocks

    def checkpoints(self) -> dict[str, Path]:
        """Returns the WebUI's list; in A1111 empty with --ui-debug-mode until it is refreshed."""
        return {name: Path(info.filename).absolute() for name, info in _infos().items()}

    def loras(self) -> dict[str, Path]:
        """Returns the LoRA files of all folders that the WebUI lists; its own list has no folders."""
        return list_files(settings.read_lora_folders(), LORAS)

    def known_hash(self, name: str) -> str | None:
        """Returns the hash that the WebUI shows in brackets."""
        info = _infos().get(name)
        return info.shorthash if info is not None else None

    def refresh(self) -> None:
        """Does what the WebUI's own refresh buttons of checkpoints and LoRAs do."""
        refresh_list()
        # The built-in Lora extension, by the name it is loaded under; it may be switched off, and
        # other extensions have modules of that name.
        list_loras = getattr(sys.modules.get("networks"), "list_available_networks", None)
        if list_loras is not None:
            list_loras()

    def folders(self) -> Folders:
        """Returns the folders by the command line (--ckpt-dir, --lora-dir, --models-dir) and the settings page."""
        return settings.read_folders()

    def defaults(self) -> Defaults:
        """Returns the defaults from the settings page."""
        return settings.read_defaults()

    @contextmanager
    def running(self, task: str) -> Iterator[Progress]:
        """Waits for the queue lock, without a limit, as every generation does."""
        modules.progress.add_task_to_queue(task)
        try:
            with (
                call_queue.queue_lock,
                _job(task, shares_buttons=True) as progress,
                unloaded_model(),
            ):
                yield progress
        finally:
            modules.progress.pending_tasks.pop(task, None)  # the wait itself may have failed

    def generator_info(self) -> GeneratorInfo:
        """Returns the WebUI's samplers, without those that its settings hide."""
        return GeneratorInfo(visible_samplers())

    @contextmanager
    def drawing(self, task: str) -> Iterator[tuple[Progress, ImageGenerator]]:
        """Draws with the WebUI's own txt2img; waits for it without a limit."""
        modules.progress.add_task_to_queue(task)
        try:
            with call_queue.queue_lock, _job(task) as progress, open_txt2img() as draw:
                yield (
                    Progress(_move_bar, progress.should_stop),
                    ImageGenerator(self.title, draw, self._why_not_selectable),
                )
        finally:
            modules.progress.pending_tasks.pop(task, None)

    def _why_not_selectable(self, path: Path) -> str:
        if self.checkpoint_title(path) is not None:
            return ""
        self.refresh()  # a file that came since, such as from the command line
        if self.checkpoint_title(path) is not None:
            return ""
        return f"{self.title} has no {path.name} in its list of checkpoints, or another one answers to its name"

    def styles(self) -> dict[str, str]:
        """Returns the prompts of all styles, without the headings between the files of styles."""
        styles = shared.prompt_styles.styles.items()
        return {name: style.prompt or "" for name, style in styles if style.path != "do_not_save"}

    def save_styles(self, prompts: Mapping[str, str]) -> None:
        """Writes styles into the WebUI's file of styles, of which it keeps a backup.

        Ours that another file has are renewed there.

        Raises:
            OutputError: see `Host`.
        """
        known = shared.prompt_styles.styles
        taken = [name for name in prompts if name in known and not _is_ours(known[name])]
        if taken:
            raise OutputError(
                f"styles that are not Hyper-Merge's have these names: {', '.join(taken)}",
                hint="rename those in the WebUI, or give the merge another name",
            )
        default = str(shared.prompt_styles.default_path)
        paths = {name: known[name].path if name in known else default for name in prompts}
        _change_styles(
            {name: PromptStyle(name, text, "", paths[name]) for name, text in prompts.items()}
        )

    def remove_styles(self, names: Iterable[str]) -> None:
        """Removes styles from the WebUI's file of styles.

        Raises:
            OutputError: see `Host`.
        """
        known = shared.prompt_styles.styles
        ours = [name for name in names if name in known and _is_ours(known[name])]
        if ours:
            _change_styles(dict.fromkeys(ours))

    def checkpoint_title(self, path: Path) -> str | None:
        """Returns the title in the WebUI's dropdown: in Forge and Neo without its hash.

        Returns None where these would take another checkpoint: the first whose title holds
        the name, or is held by it.
        """
        for title, info in list_titled_entries():
            if Path(info.filename).resolve() == path.resolve():
                return str(title) if _selects(title, info) else None
        return None

    def log(self, error: BaseException) -> None:
        """Writes an unexpected error to the WebUI's console and its list of errors."""
        errors.display(error, "Hyper-Merge", full_traceback=True)


def _selects(title: str, info: Any) -> bool:
    if not capabilities().matches_loosely:
        return True
    return name_selected_by(title) in (info.short_title, info.name)


def _infos() -> dict[str, Any]:
    """Returns the WebUI's entries by name: its titles change as soon as it knows a hash."""
    infos: dict[str, Any] = {}
    for info in list_entries():
        name = info.name.replace(os.sep, "/")
        # Two folders may hold the same name; the title is then the only difference that it shows.
        infos[name if name not in infos else info.title.replace(os.sep, "/")] = info
    return infos


@contextmanager
def _job(task: str, *, shares_buttons: bool = False) -> Iterator[Progress]:
    """Runs a job of the WebUI, from the start of its progress bar to the end.

    Args:
        task: the id by which the WebUI knows it.
        shares_buttons: whether Interrupt and Skip are left to a generation that waits for its turn:
            whoever presses them there means that one, not hours of work in another tab.
    """
    state = shared.state
    state.begin(job=task)
    modules.progress.start_task(task)
    # One job: with several the first press of Interrupt would wait for "the current image".
    stopped, spared, ended = threading.Event(), threading.Event(), threading.Event()

    def on_progress(phase: str, fraction: float) -> None:
        # Everything at every step: events that wait for no lock reset the state when they end.
        state.job_count, state.sampling_steps = 1, _STEPS
        state.textinfo = f"{phase}; {_STOP_HINT}" if spared.is_set() else phase
        state.sampling_step = round(_STEPS * min(max(fraction, 0.0), 1.0))

    def should_stop() -> bool:
        if state.interrupted or state.skipped or state.stopping_generation:
            if shares_buttons and modules.progress.pending_tasks:
                spared.set()
                _release_buttons()
            else:
                stopped.set()  # for the same reason
        return stopped.is_set()

    def listen() -> None:  # a step may take longer than a press of the button lasts
        while not (ended.wait(_LISTEN) or should_stop()):
            pass

    on_progress("starting", 0.0)
    listener = threading.Thread(target=listen, name="hyper-merge buttons", daemon=True)
    listener.start()
    try:
        yield Progress(on_progress, should_stop)
    finally:
        ended.set()
        listener.join()
        modules.progress.finish_task(task)
        state.textinfo, state.sampling_step, state.sampling_steps = None, 0, 0
        _release_buttons()
        state.end()


def _release_buttons() -> None:
    """Takes back the presses of Interrupt and Skip."""
    state = shared.state
    state.interrupted = state.skipped = state.stopping_generation = False


def _move_bar(phase: str, fraction: float) -> None:
    """Moves the WebUI's bar while it draws.

    A picture counts its own steps within the present one of many small jobs, which hardly shows.
    """
    state = shared.state
    state.job_count, state.job_no = _STEPS, round(_STEPS * min(max(fraction, 0.0), 1.0))
    state.textinfo = phase


def _is_ours(style: PromptStyle) -> bool:
    """Returns whether a style holds LoRA tags and nothing else."""
    rest = _TAG.sub("", style.prompt or "").replace("{prompt}", "")
    return "<lora:" in (style.prompt or "") and not rest.strip() and not style.negative_prompt


def _change_styles(changes: Mapping[str, PromptStyle | None]) -> None:
    """Adds styles and, for None, removes them: in memory and on disk, or nowhere."""
    styles = shared.prompt_styles.styles
    before = dict(styles)
    for name, style in changes.items():
        if style is None:
            styles.pop(name)
        else:
            styles[name] = style
    touched = [known[name] for known in (before, styles) for name in changes if name in known]
    try:
        for path in sorted({_file_of(style) for style in touched}):
            _save_styles_of(path)
    except OSError as error:
        styles.clear()
        styles.update(before)
        raise OutputError(
            f"the WebUI's styles cannot be written ({error})",
            hint="close other programs that have styles.csv open and see that it is not"
            " read-only, then try again",
        ) from error


def _save_styles_of(path: str) -> None:
    """Lets the WebUI write one file of styles; by itself it writes all, also those of others."""
    one = copy.copy(shared.prompt_styles)
    one.default_path = Path(path)
    one.styles = {
        name: style
        for name, style in shared.prompt_styles.styles.items()
        if _file_of(style) == path
    }
    one.save_styles()


def _file_of(style: PromptStyle) -> str:
    return str(style.path or shared.prompt_styles.default_path)
