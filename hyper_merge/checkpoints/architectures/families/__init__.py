"""The table of known architectures; the first entry that matches a file's structure is its family.

To add one: a file here with its declaration (signs, parts, words), its entry in the table, and a
rule in `module_names` if its modules have new names. Nothing else changes.
"""

from __future__ import annotations

from typing import Final

from hyper_merge.checkpoints.architectures.families import flux, sd1, sd2, sd3, sdxl
from hyper_merge.checkpoints.architectures.signatures import KeySignature
from hyper_merge.checkpoints.architectures.spec import Family

FAMILIES: Final[tuple[Family, ...]] = (
    *sd3.FAMILIES,
    *flux.FAMILIES,
    *sdxl.FAMILIES,
    *sd2.FAMILIES,
    *sd1.FAMILIES,
)

KINDS: Final = "Stable Diffusion 1.x, 2.x, XL, 3, 3.5 and Flux"
"""What can be merged, in short."""


def match_family(structure: KeySignature) -> Family | None:
    """The family whose signs a file of this structure bears; None for none of them."""
    return next((family for family in FAMILIES if family.signs.match(structure)), None)


def family_named(name: str) -> Family | None:
    """The family of a name; None for one that is not known."""
    variants = (family.predicting_v() for family in FAMILIES if family.v_words)
    return next((each for each in (*FAMILIES, *variants) if each.name == name), None)


def family_title(name: str) -> str:
    """The title of a family by its name; the name itself for one that is not known."""
    family = family_named(name)
    return family.title if family else name
