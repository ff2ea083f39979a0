"""Holds the example of a run, the longest of all answers."""

from __future__ import annotations

from typing import Any, Final

_CHECKPOINT: Final[dict[str, Any]] = {
    "name": "anime",
    "prompt": "<lora:mix_0-128:0.91234> <lora:mix_1-64:-0.33121>",
    "explained": 0.868,
    "explained_in_weights": 0.709,
    "explained_unet": 0.705,
    "explained_text_encoder": 0.737,
    "error": 0.539,
    "not_carried": 0.005,
    "multipliers": [0.91234, -0.33121],
    "text_multipliers": [],
    "topups": [],
}
_REPORT: Final[dict[str, Any]] = {
    "method": "joint",
    "losses": [0.152, 0.141, 0.14],
    "loss": 0.291,
    "private_loss": None,
    "bound": None,
    "not_carried": {"norms": 0.0049, "biases": 0.0001, "embeddings": 0.0, "VAE": 0.0005},
    "bytes_before": 4265251506,
    "bytes_average": 2132625612,
    "bytes_loras": 227480000,
    "curve": [[0.0, 0.0], [0.61, 0.58], [0.868, 0.851]],
    "similarity": [[1.0, -1.0], [-1.0, 1.0]],
    "parts": [{"name": "MID", "which": "unet", "energy": 0.064, "lost": 0.01}],
    "recovered": [{"kind": "norms", "share": 0.99}],
    "groups": [],
    "between_groups": 0.0,
    "rounding": [{"hosts": "Forge and ComfyUI", "added": 1.8e-06, "worst": 2.1e-06}],
    "metric": "output",
    "training": {"rounds": 20, "before": [0.092, 0.141], "after": [0.038, 0.053]},
    "weighted_loss": 0.14,
    "weighted_private_loss": 0.21,
    "shared_fidelity": [0.868, 0.851],
    "weighted_bound": 0.1,
    "ends": {"share": 0.002, "carried": False},
}

RUN: Final[dict[str, Any]] = {
    "name": "mix",
    "kind": "checkpoints",
    "created": "2026-11-30T20:23:12+00:00",
    "family": "Stable Diffusion 1.x",
    "hyper_model": "mix.safetensors",
    "hyper_model_title": "mix.safetensors [1f2a5b9c07]",
    "loras": ["mix_0-128", "mix_1-64"],
    "companions": [],
    "missing": [],
    "settings": {"name": "mix", "ranks": "128, 64", "method": "joint"},
    "checkpoints": [_CHECKPOINT],
    "report": _REPORT,
    "fits": [
        {
            **_CHECKPOINT,
            "name": "ink",
            "explained": 0.412,
            "topups": ["mix_fit-ink-32"],
            "explained_with_topups": 0.95,
            "created": "2026-11-30T20:41:05+00:00",
        }
    ],
    "problems": [],
}
"""A run of two checkpoints, shortened: one of them, and one that was fitted later."""
