"""Whether the LoRA files that prompts name are those that a run wrote, by what their headers say."""

from __future__ import annotations

from pathlib import Path

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.metadata import CHECKPOINT


def is_own_lora(path: Path, model_hash: str | None, checkpoint: str | None = None) -> bool:
    """Whether a file is there, and is the LoRA that was written there.

    What the header does not say (some editors of metadata leave it out) only its content can tell.

    Args:
        path: of the file.
        model_hash: of the tensors' bytes; None where it is not known.
        checkpoint: that a private LoRA is of; None for a shared one.
    """
    try:
        said = read_header(path).metadata
    except CheckpointError:
        return False
    wanted = (("sshs_model_hash", model_hash), (CHECKPOINT, checkpoint))
    return all(value is None or said.get(key, value) == value for key, value in wanted)
