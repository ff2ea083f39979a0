"""Tells by the headers which LoRA files that prompts name were written by merges."""

from __future__ import annotations

from pathlib import Path

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.metadata import CHECKPOINT, KIND, RECIPE, STANDALONE_KIND
from hyper_merge.loras.prompt_tags import tag_names
from hyper_merge.runs.folders import metadata_of


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


def merged_loras_in(prompt: str, folder: Path) -> set[str]:
    """Returns the LoRAs in a prompt that turn a hyper-model into its checkpoints, of any run.

    An extracted LoRA is none of them: it is added to a checkpoint like any other.

    Args:
        prompt: text with LoRA tags.
        folder: of the LoRA files.
    """
    return {name for name in tag_names(prompt) if _is_of_a_merge(folder, name)}


def _is_of_a_merge(folder: Path, name: str) -> bool:
    if Path(name).name != name:  # merges write no folders into names
        return False
    metadata = metadata_of(folder / f"{name}.safetensors")
    is_extracted = '"type": "extraction"' in metadata.get(RECIPE, "")
    return metadata.get(KIND) in ("lora", STANDALONE_KIND) and not is_extracted
