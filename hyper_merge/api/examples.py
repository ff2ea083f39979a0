"""Holds an example of every request and every answer, for the schema; a test keeps them true to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hyper_merge.api.example_parts import Example, done_example, job_example, start_example
from hyper_merge.api.lora_examples import LORA_DONE, LORA_EXAMPLES
from hyper_merge.api.run_example import RUN

_NAMES: Final = ["anime.safetensors", "photo/portrait.safetensors"]
_MERGE: Final = {"checkpoints": _NAMES, "name": "mix", "ranks": [128, 64]}
_LISTED: Final = {
    "checkpoints": [
        {"name": "anime.safetensors", "short_hash": "1f2a5b9c07", "size": 2132625612},
        {"name": "photo/portrait.safetensors", "short_hash": None, "size": 2132625894},
    ]
}
_INSPECTED: Final = {
    "name": "anime.safetensors",
    "family": "Stable Diffusion 1.x",
    "size": 2132625612,
    "dtype": "fp16",
    "short_hash": "1f2a5b9c07",
    "legacy_hash": "e3b0c442",
    "vae": "d4134de7471301b7dd9019ea72c23c81fd4962314e86b26892bef63624468e73",
    "problem": None,
}
_PLAN: Final = {
    "name": "mix",
    "family": "Stable Diffusion 1.x",
    "hyper_model": {"name": "mix.safetensors", "exists": False, "size": 2132625612},
    "loras": ["mix_0-128", "mix_1-64"],
    "loras_size": 227480000,
    "seconds": 244.0,
    "training": 0,
    "memory": 3120000000,
    "disk": 4410000000,
    "warnings": [],
    "expected": [{"name": "anime", "explained": 0.868}, {"name": "portrait", "explained": 0.851}],
    "curve": [
        {"size": 113740000, "ranks": [96], "explained": 0.77, "explained_worst": 0.754},
        {"size": 227480000, "ranks": [128, 64], "explained": 0.86, "explained_worst": 0.851},
    ],
}
_SUMMARY: Final = {
    "name": "mix",
    "kind": "checkpoints",
    "created": "2026-11-30T20:23:12+00:00",
    "family": "Stable Diffusion 1.x",
    "checkpoints": ["anime", "portrait"],
    "ranks": [128, 64],
    "explained": 0.86,
    "explained_worst": 0.851,
    "missing": [],
}
_RESTORED: Final = {
    "file": "anime-restored.safetensors",
    "size": 2132625612,
    "dtype": "float16",
    "shares": {"anime": 1.0},
    "explained_in_weights": 0.709,
    "everything_in_weights": 0.702,
    "problem": "",
}
_EXPORTED: Final = {
    "checkpoint": "anime",
    "name": "mix_anime",
    "companions": "",
    "rank": 192,
    "size": 227480000,
    "explained": 0.868,
    "lost": 0.0,
}
_EXTRACTED: Final = {
    "name": "portrait-from-anime",
    "rank": 64,
    "size": 75810000,
    "explained": 0.61,
    "parts": {"unet": 0.6, "text_encoder": 0.7},
    "not_carried": {"norms": 0.005, "VAE": 0.0003},
}
_VERDICT: Final = {
    "name": "anime.safetensors",
    "restored_as": "anime",
    "safe": False,
    "reason": "less than 99% is restored",
    "frees": 2132625612,
    "explained": 0.868,
    "everything": 0.861,
    "not_carried": 0.005,
    "vae_differs": False,
}
_FIGURES: Final = {
    "checkpoint": "anime",
    "prompt": "a cat",
    "seed": 1,
    "pixels": {"restored": 4.8},
    "perceptual": {},
}
_COMPARISON: Final = {
    "run": "mix",
    "name": "comparison-1",
    "created": "2026-11-30T21:02:40+00:00",
    "host": "Forge",
    "hyper_model": "mix.safetensors",
    "settings": {
        "prompts": ["a cat"],
        "negative": "",
        "sampler": "Euler a",
        "steps": 20,
        "cfg_scale": 7.0,
        "width": 512,
        "height": 512,
        "seeds": [1],
    },
    "tags": {"anime": "<lora:mix_0-128:0.91234> <lora:mix_1-64:-0.33121>"},
    "originals": {"anime": "anime.safetensors"},
    "notes": [],
    "figures": [_FIGURES],
    "measure": "",
}
_COMPARED: Final = {"name": "comparison-1", "notes": [], "figures": [_FIGURES], "measure": ""}
_STYLES: Final = {"styles": ["mix: anime", "mix: portrait"]}
_PRESET: Final = {
    "name": "portraits, small",
    "settings": {"checkpoints": _NAMES, "ranks": "64, 32", "dtype": "float16", "separate": True},
}
_CACHE: Final = {"size": 2380000000, "limit": 20000000000, "freed": 0}

_ENDED: Final = {
    "running": job_example("mix", phase="reading and analysing", fraction=0.23, seconds_left=71.7),
    "merged": done_example("mix", run="mix"),
    "refused": job_example("mix", outcome="refused", message="the disk is full"),
    "averaged": done_example(
        "the average mean", result={"file": "mean.safetensors", "size": 2132625612}
    ),
    "restored": done_example("a checkpoint of mix", result=_RESTORED),
    "exported": done_example("the LoRAs of mix", result={"loras": [_EXPORTED]}),
    "extracted": done_example("the LoRA from anime to portrait", result=_EXTRACTED),
    "checked": done_example(
        "the check of mix", result={"originals": [_VERDICT], "frees": 0, "problem": ""}
    ),
    "compared": done_example("pictures of mix", result=_COMPARED),
    **LORA_DONE,
}

EXAMPLES: Final[Mapping[tuple[str, str], Example]] = {
    ("GET", "/checkpoints"): Example({"list": _LISTED}),
    ("POST", "/refresh"): Example({"list": _LISTED}),
    ("POST", "/inspect"): Example(
        {"one": {"checkpoints": [_INSPECTED]}}, {"checkpoints": _NAMES[:1]}
    ),
    ("POST", "/demo"): start_example("demo checkpoints"),
    ("GET", "/cache"): Example({"held": _CACHE}),
    ("DELETE", "/cache"): Example({"cleared": {**_CACHE, "size": 0, "freed": 2380000000}}),
    ("GET", "/presets"): Example({"one": {"presets": [_PRESET]}}),
    ("POST", "/presets"): Example({"saved": _PRESET}, _PRESET),
    ("DELETE", "/presets"): Example({"last": {"presets": []}}),
    ("POST", "/plan"): Example({"plan": _PLAN}, _MERGE),
    ("POST", "/look"): start_example("the forecast", _MERGE),
    ("POST", "/merge"): start_example("mix", {**_MERGE, "save_styles": True}),
    ("POST", "/fit"): start_example(
        "the fit of ink onto mix", {"run": "mix", "checkpoint": "ink.safetensors", "topup": "95%"}
    ),
    ("POST", "/average"): start_example(
        "the average mean", {"checkpoints": _NAMES, "name": "mean"}
    ),
    ("POST", "/absorb"): start_example(
        "mix with further checkpoints", {"run": "mix", "checkpoints": ["ink.safetensors"]}
    ),
    ("POST", "/restore"): start_example(
        "a checkpoint of mix", {"run": "mix", "shares": {"anime": 1}}
    ),
    ("POST", "/export"): start_example(
        "the LoRAs of mix", {"run": "mix", "checkpoints": ["anime"]}
    ),
    ("POST", "/extract"): start_example(
        "the LoRA from anime to portrait", {"base": _NAMES[0], "checkpoint": _NAMES[1], "rank": 64}
    ),
    ("POST", "/safe"): start_example("the check of mix", {"run": "mix", "threshold": "95%"}),
    ("POST", "/compare"): start_example(
        "pictures of mix", {"run": "mix", "prompts": ["a cat"], "seeds": [1], "average": True}
    ),
    ("GET", "/jobs"): Example({"one": {"jobs": [_ENDED["running"]]}}),
    ("GET", "/jobs/{job_id}"): Example(_ENDED),
    ("POST", "/jobs/{job_id}/cancel"): Example({"asked": job_example("mix", stopping=True)}),
    ("GET", "/runs"): Example({"one": {"runs": [_SUMMARY], "problems": []}}),
    ("GET", "/runs/{name}"): Example({"run": RUN}),
    ("DELETE", "/runs/{name}"): Example(
        {"deleted": {"files": ["mix_0-128.safetensors", "mix.safetensors"], "problems": []}}
    ),
    ("POST", "/runs/{name}/mix"): Example(
        {"half": {"prompt": "<lora:mix_0-128:0.45617>", "hyper_model_title": "mix.safetensors"}},
        {"shares": {"anime": 0.5, "portrait": 0.25}},
    ),
    ("POST", "/runs/{name}/styles"): Example({"saved": _STYLES}),
    ("DELETE", "/runs/{name}/styles"): Example({"removed": _STYLES}),
    ("GET", "/runs/{name}/comparisons"): Example({"one": {"comparisons": ["comparison-1"]}}),
    ("GET", "/runs/{name}/comparisons/{comparison}"): Example({"comparison": _COMPARISON}),
    ("GET", "/runs/{name}/comparisons/{comparison}/picture"): Example(),
    **LORA_EXAMPLES,
}
"""By method and path."""
