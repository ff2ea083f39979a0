"""How an architecture is declared: how it is recognised, where its parts are, what LoRAs call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from hyper_merge.checkpoints.architectures.lora_modules import Module
from hyper_merge.checkpoints.architectures.sections import section_of
from hyper_merge.checkpoints.architectures.signatures import KeySignature
from hyper_merge.checkpoints.io.header import Shape

PartName = Literal["unet", "text_encoder"]


@dataclass(frozen=True)
class DetectionRule:
    """What a family is recognised by; each thing said must hold, what is not said may be anything.

    Data instead of a function, so that a family can be sent to another process.
    """

    all_of: tuple[str, ...] = ()  # for each of these some key begins with it
    none_of: tuple[str, ...] = ()  # no key begins with one of these
    depths: tuple[int, ...] | None = None  # transformers by level, then in the middle
    input_channels: int | None = None
    texts: tuple[str, ...] = ()  # keys of the text encoder begin with one of these, or ...
    context: int | None = None  # ... there is none, and the UNet reads features of this width

    def match(self, structure: KeySignature) -> bool:
        """Whether a file of this structure bears the signs."""
        return (
            all(structure.has(prefix) for prefix in self.all_of)
            and not structure.has(*self.none_of)
            and self.depths in (None, structure.depths)
            and self.input_channels in (None, structure.input_channels)
            and self._reads(structure)
        )

    def _reads(self, structure: KeySignature) -> bool:
        if not self.texts or structure.has(*self.texts):
            return True
        alone = self.context is not None and not structure.has_text_encoder
        return alone and structure.context == self.context


@dataclass(frozen=True)
class NetworkPart:
    """A network within a checkpoint whose layers take LoRAs."""

    name: PartName
    title: str  # for people
    prefix: str  # of its keys
    lora_prefix: str  # of its modules' names in a LoRA file
    modules: Callable[[str, Shape], tuple[Module, ...]]  # (dotted path, stored shape)
    section: Callable[[str], str] = section_of  # dotted path -> name for people: "IN04", "TE11"


@dataclass(frozen=True)
class Family:
    """Checkpoints of one architecture and variant: they have the same keys and shapes."""

    name: str  # never changes: recipes and caches keep it
    title: str  # for people, after "is a"
    signs: DetectionRule
    parts: tuple[
        NetworkPart, ...
    ] = ()  # in the order of the computation; none: it cannot be merged
    vae_prefixes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()  # keys that begin so: weights that nobody runs
    lora_alpha: bool = True  # whether LoRA files of the family hold alphas
    in_a1111: bool = True  # whether AUTOMATIC1111 runs it
    half: torch.dtype = torch.float16  # in which hosts hold its weights
    # What LoRA files of this family say of themselves, by the names of their metadata.
    ss_base_model_version: str = ""
    ss_v2: str = "False"
    modelspec_architecture: str = ""  # without "/lora"
    modelspec_implementation: str = ""
    modelspec_resolution: str = ""
    modelspec_prediction_type: str = ""
    sd_version: str = ""  # of the WebUI's LoRA card
    # Where files of the same keys may predict v instead of noise: what they say otherwise, the key
    # of a tensor whose values spread wider then, and the configuration that tells hosts.
    v_words: tuple[tuple[str, str], ...] = ()
    v_spread: str = ""
    v_configuration: Callable[[], dict[str, Any]] | None = None

    @property
    def supported(self) -> bool:
        """Whether checkpoints of the family can be merged."""
        return bool(self.parts)

    @property
    def predicts_v(self) -> bool:
        """Whether it is such a variant."""
        return self.modelspec_prediction_type == "v"

    def alpha_for(self, rank: int) -> int | None:
        """The alpha of a LoRA file, by which a factor pair of this rank needs no scaling; None for none."""
        return rank if self.lora_alpha else None

    def part_of(self, module: str) -> PartName:
        """The part that a module of a LoRA file belongs to.

        Raises:
            ValueError: no module of this family is named so.
        """
        for part in self.parts:
            if module.startswith(part.lora_prefix):
                return part.name
        raise ValueError(f"{module} is no module of {self.title}")

    def predicting_v(self) -> Family:
        """The variant of the same keys and shapes that predicts v."""
        name, title = f"{self.name}_v", f"{self.title} with v-prediction"
        words: dict[str, Any] = dict(self.v_words)
        return replace(self, name=name, title=title, v_words=(), **words)
