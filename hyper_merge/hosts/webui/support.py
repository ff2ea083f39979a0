"""Tells whether a WebUI has what the extension builds on; imports nothing that it may lack."""

from __future__ import annotations

import importlib
from typing import Final

_NEEDED: Final = {
    "modules.styles": ("PromptStyle",),
    "modules.sd_models": ("checkpoint_aliases", "checkpoints_list", "unload_model_weights"),
    "modules.sd_samplers": ("visible_sampler_names",),
    "modules.progress": ("add_task_to_queue", "start_task", "finish_task"),
}


def missing_names() -> list[str]:
    """Returns the names that this WebUI lacks, such as "modules.styles.PromptStyle"."""
    return [
        f"{module}.{name}"
        for module, names in _NEEDED.items()
        for name in names
        if not _has(module, name)
    ]


def explain_missing(names: list[str]) -> str:
    """Returns the message for the console of a WebUI that lacks some names."""
    return (
        "Hyper-Merge is not loaded: it runs in AUTOMATIC1111's WebUI, Forge, Forge Neo, reForge and"
        f" Forge Classic, and this WebUI differs from them (it has no {', '.join(names)}). The same tab"
        " runs by itself, with the command: hyper-merge app MODELS"
    )


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False
