"""How an architecture is declared: how it is recognised, where its parts are, what LoRAs call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hyper_merge.checkpoints.module_names import Module, Shape
from hyper_merge.checkpoints.sections import section_of
from hyper_merge.checkpoints.structure import Structure

PartName = Literal["unet", "text_encoder"]


@dataclass(frozen=True)
class Signs:
    """What a family is recognised by; each thing said must hold, None says nothing.

    Data instead of a function, so that a family can be sent to another process.
    """

    any_of: tuple[str, ...]  # some key begins with one of these
    input_channels: int | None = None
    label_embedding: bool | None = None
    pruned: bool | None = None

    def match(self, structure: Structure) -> bool:
        """Whether a file of this structure bears the signs."""
        said = (
            (self.input_channels, structure.input_channels),
            (self.label_embedding, structure.label_embedding),
            (self.pruned, structure.pruned),
        )
        return structure.has(*self.any_of) and all(
            expected is None or expected == found for expected, found in said
        )


@dataclass(frozen=True)
class Part:
    """A network within a checkpoint whose layers take LoRAs."""

    name: PartName
    prefix: str  # of its keys
    lora_prefix: str  # of its modules' names in a LoRA file
    modules: Callable[[str, Shape], tuple[Module, ...]]  # (dotted path, stored shape)
    section: Callable[[str], str] = section_of  # dotted path -> name for people: "IN04", "TE11"


@dataclass(frozen=True)
class Family:
    """Checkpoints of one architecture and variant: they have the same keys and shapes."""

    name: str  # never changes: recipes and caches keep it
    title: str  # for people, after "is a"
    signs: Signs
    supported: bool = False
    parts: tuple[Part, ...] = ()  # in the order of the computation
    vae_prefixes: tuple[str, ...] = ()
    # What LoRA files of this family say of themselves, by the names of their metadata.
    ss_base_model_version: str = ""
    ss_v2: str = "False"
    modelspec_architecture: str = ""  # without "/lora"
    modelspec_implementation: str = ""
    modelspec_resolution: str = ""
    modelspec_prediction_type: str = ""
    sd_version: str = ""  # of the WebUI's LoRA card
