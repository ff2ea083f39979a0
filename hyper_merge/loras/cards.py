"""Writes the files from which WebUIs make the card of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.loras.card_images import hyper_model_picture
from hyper_merge.loras.metadata import COMPANIONS, Lineage, LoraFile
from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.runtime.names import one_line

CARD_SUFFIXES: Final = (".json", ".png")
"""Suffixes of the files next to a model from which WebUIs make its card: text and picture."""


def format_card(file: LoraFile, stem: str) -> str:
    """Returns the JSON of the sidecar `<stem>.json`, from which WebUIs fill the LoRA's card."""
    lines = [f"{one_line(checkpoint)}: {file.tag(stem, checkpoint)}" for checkpoint in file.users]
    return _card(
        {
            "description": _description(file),
            "sd version": file.lineage.family.sd_version,
            "activation text": "",
            "preferred weight": 1.0,  # the largest multiplier of every LoRA
            "negative text": "",
            "notes": "\n".join(lines),
        }
    )


def format_companion_card(file: LoraFile, stem: str, exact: str) -> str:
    """Returns the JSON of a companion's sidecar; `exact` is the recipe's word for its content."""
    content, programs = COMPANIONS[exact]
    if not file.lineage.family.in_a1111:
        programs = "Forge and ComfyUI"
    lines = [
        f"{one_line(checkpoint)}: {format_tag(stem, x)}"
        for checkpoint, x in file.multipliers.items()
    ]
    return _card(
        {
            "description": f"{content.capitalize()} that go with LoRA {file.index + 1} of {file.count}"
            f" of {file.run}: to be used with the same multiplier. Loads in {programs}.",
            "sd version": file.lineage.family.sd_version,
            "activation text": "",
            "preferred weight": 1.0,
            "negative text": "",
            "notes": "\n".join(lines),
        }
    )


def stage_checkpoint_card(
    outputs: FileTransaction, path: Path, lineage: Lineage, *, overwrite: bool
) -> None:
    """Stages text and picture of the hyper-model's card in WebUIs.

    Args:
        outputs: the merge's files.
        path: of the hyper-model.
        lineage: of the merge.
        overwrite: whether to replace an existing text or picture; else it stays, since it may be the
            user's own.
    """
    stems = [Path(source.name).stem for source in lineage.sources]
    description = f"Average of {len(stems)} checkpoints, which LoRAs of the same merge bring back."
    text = _card({"description": description, "notes": "\n".join(map(one_line, stems))})
    contents = (text.encode(), hyper_model_picture(path.stem, stems))
    for suffix, content in zip(CARD_SUFFIXES, contents, strict=True):
        place = path.with_suffix(suffix)
        if overwrite or not place.exists():
            outputs.bytes(place, content)


def _description(file: LoraFile) -> str:
    name = file.lineage.name
    if file.alone is not None:
        return f"Turns {name} into {file.alone}, by itself; rank {file.rank}."
    if file.tops_up is not None:
        return (
            f"Private LoRA of {file.tops_up}, rank {file.rank}: what the shared LoRAs of {file.run}"
            " leave of it. To be used with all of those."
        )
    if file.lineage.of_loras:
        used, count = len(file.users), len(file.multipliers)
        which = f"LoRA {file.index + 1} of {file.count} of {file.run}, rank {file.rank}"
        if used < count:
            return f"{which}: for {used} of the {count} LoRAs, by the multipliers in the notes."
        return f"{which}: together they stand for {count} LoRAs, by the multipliers in the notes."
    others = "" if file.count == 1 else " and its other LoRAs"
    return (  # cards show three lines
        f"LoRA {file.index + 1} of {file.count} of {file.run}, rank {file.rank}."
        f" Goes with {name}{others}; multipliers in the notes."
    )


def _card(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"
