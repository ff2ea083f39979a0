"""Tells by the headers whether LoRA files that prompts name are those that a run wrote."""

from __future__ import annotations

from pathlib import Path

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.metadata import CHECKPOINT


def is_own_lora(path: Path, model_hash: str | None, checkpoint: str | None = None) -> bool:
    """Tells whether a file exists and is still the LoRA that was written there.

    Where the header lacks these values (some editors of metadata drop them), the file passes: only
    its content could tell.

    Args:
        path: of the file.
        model_hash: of the tensors' bytes; None where it is not known.
        checkpoint: whose private LoRA it is; None for a shared one.
    """
    try:
        metadata = read_header(path).metadata
    except CheckpointError:
        return False
    expected = (("sshs_model_hash", model_hash), (CHECKPOINT, checkpoint))
    return all(value is None or metadata.get(key, value) == value for key, value in expected)
