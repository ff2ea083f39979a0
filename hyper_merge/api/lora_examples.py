"""Holds the examples of the routes for LoRAs; a test keeps them true to the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from hyper_merge.api.example_parts import Example, done_example, start_example

_NAMES: Final = ["ink.safetensors", "style/oil.safetensors"]
_COMBINED: Final = {
    "name": "ink-rank8",
    "size": 57112408,
    "size_before": 228448616,
    "rank": 8,
    "kept": 0.942,
    "parts": {"unet": 0.941, "text_encoder": 0.953},
}
_APPLIED: Final = {"file": "inked.safetensors", "size": 2132625612, "layers": 264, "changed": 0.031}

LORA_DONE: Final[Mapping[str, Any]] = {
    "combined": done_example("ink-rank8", result=_COMBINED),
    "added": done_example("anime with LoRAs", result=_APPLIED),
}
"""Ends of jobs, by what they are about."""

LORA_EXAMPLES: Final[Mapping[tuple[str, str], Example]] = {
    ("GET", "/loras"): Example(
        {
            "list": {
                "loras": [
                    {"name": "ink.safetensors", "size": 228448616},
                    {"name": "style/oil.safetensors", "size": 114228840},
                ]
            }
        }
    ),
    ("POST", "/loras/inspect"): Example(
        {
            "one": {
                "loras": [
                    {
                        "name": "ink.safetensors",
                        "family": "Stable Diffusion XL",
                        "rank": 32,
                        "problem": None,
                    }
                ]
            }
        },
        {"loras": _NAMES[:1]},
    ),
    ("POST", "/loras/share"): start_example(
        "few", {"loras": _NAMES, "name": "few", "budget": "100MB"}
    ),
    ("POST", "/loras/resize"): start_example("ink-rank8", {"lora": _NAMES[0], "rank": 8}),
    ("POST", "/loras/combine"): start_example(
        "ink-and-oil", {"loras": _NAMES, "multipliers": [1, -0.5], "name": "ink-and-oil"}
    ),
    ("POST", "/loras/add"): start_example(
        "anime with LoRAs",
        {
            "checkpoint": "anime.safetensors",
            "loras": _NAMES[:1],
            "multipliers": [0.8],
            "block_weights": ["OUTD:1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0"],
        },
    ),
    ("POST", "/loras/subtract"): start_example(
        "anime without LoRAs", {"checkpoint": "anime.safetensors", "loras": _NAMES[:1]}
    ),
    ("POST", "/loras/fit"): start_example(
        "the fit of oil onto few", {"run": "few", "lora": _NAMES[1], "topup": "95%"}
    ),
}
"""By method and path."""
