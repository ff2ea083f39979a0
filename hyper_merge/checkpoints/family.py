"""Which architecture and variant a file is, told from its header; or what it is instead."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from hyper_merge.checkpoints.architecture import Family, Part, PartName
from hyper_merge.checkpoints.families import FAMILIES
from hyper_merge.checkpoints.header import Header
from hyper_merge.checkpoints.strangers import DISGUISED, PARTIAL, Stranger
from hyper_merge.checkpoints.structure import UNET, Structure
from hyper_merge.errors import FamilyError

__all__ = ["FAMILIES", "Family", "Part", "PartName", "identify", "require_supported"]


def identify(header: Header) -> Family:
    """The family of a checkpoint, supported or not.

    Raises:
        FamilyError: the file is no checkpoint (a LoRA, a VAE, ...), or of an unknown architecture.
    """
    structure = Structure.of(header)
    _refuse(header, structure, DISGUISED)
    for family in FAMILIES:
        if family.signs.match(structure):
            return family
    _refuse(header, structure, PARTIAL)
    first = ", ".join(islice(structure.shapes, 3)) or "none"
    raise FamilyError(
        f"{header.name} is of no architecture that Hyper-Merge knows (first keys: {first});"
        f" choose {_supported_titles()} checkpoints"
    )


def require_supported(header: Header) -> Family:
    """The family of a checkpoint that can be merged.

    Raises:
        FamilyError: no checkpoint, of a family that is not supported yet, or stored in types that
            cannot be averaged.
    """
    family = identify(header)
    if not family.supported:
        raise FamilyError(
            f"{header.name} is a {family.title} checkpoint;"
            f" Hyper-Merge handles {_supported_titles()} so far"
        )
    _require_averageable(header)
    return family


def _refuse(header: Header, structure: Structure, strangers: Iterable[Stranger]) -> None:
    for stranger in strangers:
        if stranger.matches(structure):
            raise FamilyError(
                f"{header.name} is {stranger.title}; Hyper-Merge needs full checkpoints"
                " (UNet, text encoder and VAE in one file)"
            )


def _require_averageable(header: Header) -> None:
    odd = dict(header.unsupported)
    for key, info in header.tensors.items():
        if key.startswith(UNET) and not info.dtype.is_floating_point:
            odd[key] = str(info.dtype).removeprefix("torch.")
    if odd:
        key, dtype = next(iter(odd.items()))
        raise FamilyError(
            f"{header.name} stores {len(odd)} tensors in a type that cannot be averaged (first:"
            f" {key} as {dtype}); use its fp16 or fp32 version"
        )


def _supported_titles() -> str:
    return ", ".join(family.title for family in FAMILIES if family.supported)
