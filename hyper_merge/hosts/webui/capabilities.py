"""Tells which WebUI is around us: the one table of what differs between them.

Imports nothing that a WebUI may lack, so that one that lacks something gets a sentence, not a traceback.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Final

_Name = tuple[str, str]  # a module, and an attribute in it


@dataclass(frozen=True)
class Capabilities:
    """What a WebUI does in its own way.

    Attributes:
        title: Its display name.
        marks: Names that it has and that the WebUIs below it in the table lack.
        model_manager: The module whose `unload_all_models` empties the device, to be called in the one
            thread that moves models, `modules_forge.main_thread`; empty where models move one by one
            and in any thread.
        loads_when_drawing: Whether a selected checkpoint is loaded by the next picture alone.
        matches_loosely: Whether a title selects the first checkpoint whose title holds it or is held
            by it, in place of its own.
        checkpoint_folders: Options of its command line; the first that is given leads to the folder.
        lora_folders: The same for LoRAs.
        scales_blocks: Whether the extension LoRA Block Weight scales every LoRA of a prompt by its own
            weights there. In reForge and Classic it takes LoRAs for others where they differ in their
            layers, and in Neo it does not find them (`load_loras_blocks` in its source).
    """

    title: str
    marks: tuple[_Name, ...]
    model_manager: str = ""
    loads_when_drawing: bool = False
    matches_loosely: bool = False
    checkpoint_folders: tuple[str, ...] = ("ckpt_dir",)
    lora_folders: tuple[str, ...] = ("lora_dir",)
    scales_blocks: bool = False


TABLE: Final = (
    Capabilities(
        "Forge Neo",
        (("modules.sd_models", "forge_model_reload"), ("modules.shared", "cmd_opts.ckpt_dirs")),
        model_manager="backend.memory_management",
        loads_when_drawing=True,
        matches_loosely=True,
        checkpoint_folders=("ckpt_dirs",),
        lora_folders=("lora_dirs", "lora_dir"),  # the latter is never empty
    ),
    Capabilities(
        "Forge",
        (("modules.sd_models", "forge_model_reload"),),
        model_manager="backend.memory_management",
        loads_when_drawing=True,
        matches_loosely=True,
        scales_blocks=True,
    ),
    Capabilities(
        "reForge",
        (
            ("ldm_patched.modules.model_management", "unload_all_models"),
            ("modules.sd_models", "load_model_to_device"),
        ),
        model_manager="ldm_patched.modules.model_management",
    ),
    Capabilities(
        "Forge Classic",
        (("ldm_patched.modules.model_management", "unload_all_models"),),
        model_manager="ldm_patched.modules.model_management",
    ),
    Capabilities("AUTOMATIC1111", (), scales_blocks=True),
)
"""The WebUIs, the more special first."""

_NEEDED: Final[tuple[_Name, ...]] = (
    ("modules.styles", "PromptStyle"),
    ("modules.sd_models", "checkpoint_aliases"),
    ("modules.sd_models", "checkpoints_list"),
    ("modules.sd_models", "unload_model_weights"),
    ("modules.sd_samplers", "visible_sampler_names"),
    ("modules.progress", "add_task_to_queue"),
    ("modules.progress", "start_task"),
    ("modules.progress", "finish_task"),
)

_SD_NEXT: Final[_Name] = ("modules.styles", "Style")  # where the others have PromptStyle


@functools.cache
def capabilities() -> Capabilities:
    """Returns the row of the WebUI around us, which stays the same as long as the process lives."""
    return next(row for row in TABLE if all(map(_has, row.marks)))


def missing_names() -> list[str]:
    """Returns the names that this WebUI lacks, such as "modules.styles.PromptStyle"."""
    return [".".join(name) for name in _NEEDED if not _has(name)]


def explain_missing(names: list[str]) -> str:
    """Returns the message for the console of a WebUI that lacks some names."""
    known = [row.title for row in reversed(TABLE)]
    webui = "SD.Next" if _has(_SD_NEXT) else "this WebUI"
    return (
        f"Hyper-Merge is not loaded: {webui} lacks {', '.join(names)}. The tab needs one of"
        f" {', '.join(known)}. Without them it runs by itself, with the same checkpoints: install it as"
        " its README says, then start: hyper-merge app MODELS"
    )


def _has(name: _Name) -> bool:
    module, path = name
    try:
        value: Any = importlib.import_module(module)
        for attribute in path.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError):
        return False
    return True
