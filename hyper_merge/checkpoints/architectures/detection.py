"""Which architecture and variant a file is, told from its header; or what it is instead."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from hyper_merge.checkpoints.architectures.families import FAMILIES, KINDS, match_family
from hyper_merge.checkpoints.architectures.layout import is_position_ids
from hyper_merge.checkpoints.architectures.signatures import KeySignature
from hyper_merge.checkpoints.architectures.spec import Family, NetworkPart, PartName
from hyper_merge.checkpoints.architectures.unsupported import DISGUISED, PARTIAL, UnsupportedModel
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.errors import FamilyError

__all__ = ["FAMILIES", "Family", "NetworkPart", "PartName", "detect_family", "require_supported"]


def detect_family(header: Header) -> Family:
    """The family of a checkpoint, supported or not.

    Raises:
        FamilyError: the file is no checkpoint (a LoRA, a VAE, ...), or of an unknown architecture.
    """
    structure = KeySignature.of(header)
    _refuse(header, structure, DISGUISED)
    family = match_family(structure)
    if family is not None:
        return family
    _refuse(header, structure, PARTIAL)
    first = ", ".join(islice(structure.shapes, 3)) or "none"
    raise FamilyError(
        f"{header.name} is of no architecture that Hyper-Merge knows (first keys: {first});"
        f" choose checkpoints of {KINDS}"
    )


def require_supported(header: Header) -> Family:
    """The family of a checkpoint that can be merged.

    Raises:
        FamilyError: no checkpoint, of a family that is not supported, or stored in types that
            cannot be averaged.
    """
    family = detect_family(header)
    if not family.supported:
        raise FamilyError(
            f"{header.name} is a {family.title} checkpoint, which cannot be merged;"
            f" choose checkpoints of {KINDS}"
        )
    _require_averageable(header, family)
    return family


def _refuse(header: Header, structure: KeySignature, strangers: Iterable[UnsupportedModel]) -> None:
    for stranger in strangers:
        if stranger.matches(structure):
            raise FamilyError(f"{header.name} is {stranger.title}; choose checkpoints of {KINDS}")


def _require_averageable(header: Header, family: Family) -> None:
    odd = dict(header.unsupported)
    networks = tuple(part.prefix for part in family.parts)
    for key, info in header.tensors.items():
        is_weight = key.startswith(networks) and not is_position_ids(key) and info.numel
        if is_weight and not info.dtype.is_floating_point:
            odd[key] = str(info.dtype).removeprefix("torch.")
    if odd:
        key, dtype = next(iter(odd.items()))
        raise FamilyError(
            f"{header.name} stores {len(odd)} tensors in a type that cannot be averaged (first:"
            f" {key} as {dtype}); use its fp16 or fp32 version"
        )
