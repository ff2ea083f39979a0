"""Detects the architecture and variant of a file from its header, or names what it is instead."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import islice

from hyper_merge.checkpoints.architectures.families import FAMILIES, KINDS, find_family
from hyper_merge.checkpoints.architectures.layout import is_position_ids
from hyper_merge.checkpoints.architectures.shape_rules import require_consistent_shapes
from hyper_merge.checkpoints.architectures.signatures import KeySignature
from hyper_merge.checkpoints.architectures.spec import Family, NetworkPart, PartName
from hyper_merge.checkpoints.architectures.unsupported import DISGUISED, PARTIAL, UnsupportedModel
from hyper_merge.checkpoints.io.header import Header, TensorsAsKey
from hyper_merge.errors import FamilyError

__all__ = ["FAMILIES", "Family", "NetworkPart", "PartName", "detect_family", "require_supported"]


def detect_family(header: Header) -> Family:
    """Returns the family of a checkpoint, supported or not.

    Raises:
        FamilyError: the file is no checkpoint (a LoRA, a VAE, ...), or of an unknown architecture.
    """
    return _family_of(TensorsAsKey(header))


@functools.lru_cache(maxsize=32)
def _family_of(key: TensorsAsKey) -> Family:
    header = key.header
    signature = KeySignature.from_header(header)
    _refuse(header, signature, DISGUISED)
    family = find_family(signature)
    if family is not None:
        return family
    _refuse(header, signature, PARTIAL)
    first = ", ".join(islice(signature.shapes, 3)) or "none"
    raise FamilyError(
        f"{header.name} is of no architecture that Hyper-Merge knows (first keys: {first})",
        hint=f"choose checkpoints of {KINDS}",
        file=header.path,
    )


def require_supported(header: Header) -> Family:
    """Returns the family of a checkpoint that can be merged.

    Raises:
        FamilyError: no checkpoint, of a family that is not supported, stored in types that
            cannot be averaged, or with shapes that contradict each other.
    """
    return _supported_family_of(TensorsAsKey(header))


@functools.lru_cache(maxsize=32)
def _supported_family_of(key: TensorsAsKey) -> Family:
    header = key.header
    family = _family_of(key)
    if not family.supported:
        raise FamilyError(
            f"{header.name} is a {family.title} checkpoint, which cannot be merged",
            hint=f"choose checkpoints of {KINDS}",
            file=header.path,
        )
    _require_averageable(header, family)
    require_consistent_shapes(header, family)
    return family


def _refuse(header: Header, signature: KeySignature, models: Iterable[UnsupportedModel]) -> None:
    for model in models:
        if model.matches(signature):
            raise FamilyError(
                f"{header.name} is {model.title}",
                hint=f"choose checkpoints of {KINDS}",
                file=header.path,
            )


def _require_averageable(header: Header, family: Family) -> None:
    unusable = dict(header.unsupported)
    networks = (*(part.prefix for part in family.parts), *family.vae_prefixes)
    for key, info in header.tensors.items():
        is_weight = key.startswith(networks) and not is_position_ids(key) and info.numel
        if is_weight and not info.dtype.is_floating_point:
            unusable[key] = str(info.dtype).removeprefix("torch.")
    if unusable:
        key, dtype = next(iter(unusable.items()))
        raise FamilyError(
            f"{header.name} stores {len(unusable)} tensors in a type that cannot be averaged (first:"
            f" {key} as {dtype})",
            hint="use its fp16 or fp32 version",
            file=header.path,
            key=key,
        )
