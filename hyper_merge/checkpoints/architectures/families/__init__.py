"""The table of known architectures; the first entry whose rule matches a file is its family.

To add one: a file here with its declaration (rule, parts, metadata), its entry in the table, and a
rule in `lora_modules` if its modules have new names. Nothing else changes.
"""

from __future__ import annotations

from typing import Final

from hyper_merge.checkpoints.architectures.diffusers_layout import DiffusersLayout
from hyper_merge.checkpoints.architectures.families import (
    anima,
    flux,
    flux2,
    lumina,
    qwen_image,
    sd1,
    sd2,
    sd3,
    sdxl,
    wan,
)
from hyper_merge.checkpoints.architectures.signatures import KeySignature
from hyper_merge.checkpoints.architectures.spec import Family

FAMILIES: Final[tuple[Family, ...]] = (
    *sd3.FAMILIES,
    *flux2.FAMILIES,
    *flux.FAMILIES,
    *lumina.FAMILIES,
    *anima.FAMILIES,
    *qwen_image.FAMILIES,
    *wan.FAMILIES,
    *sdxl.FAMILIES,
    *sd2.FAMILIES,
    *sd1.FAMILIES,
)

DIFFUSERS_LAYOUTS: Final[tuple[DiffusersLayout, ...]] = (
    sd3.LAYOUT_IN_DIFFUSERS,
    flux2.LAYOUT_IN_DIFFUSERS,
    flux.LAYOUT_IN_DIFFUSERS,
    lumina.Z_IMAGE_LAYOUT_IN_DIFFUSERS,
    lumina.LUMINA_LAYOUT_IN_DIFFUSERS,
    wan.LAYOUT_IN_DIFFUSERS,
)
"""The layouts of diffusers' transformers that are read as the checkpoint's."""

KINDS: Final = (
    "Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, Flux, Flux.2, Chroma, Z-Image, Lumina 2, Anima,"
    " Qwen-Image and Wan"
)
"""Short names of what can be merged, for messages."""


def find_family(signature: KeySignature) -> Family | None:
    """Returns the first family whose rule matches; None if no rule does."""
    return next((family for family in FAMILIES if family.rule.matches(signature)), None)


def family_named(name: str) -> Family | None:
    """Returns the family of a name; None for one that is not known."""
    variants = [family.predicting_v() for family in FAMILIES if family.v_metadata]
    return next((family for family in (*FAMILIES, *variants) if family.name == name), None)


def family_title(name: str) -> str:
    """Returns the title of a family by its name; the name itself for one that is not known."""
    family = family_named(name)
    return family.title if family else name
