"""Declaration of an architecture: how it is recognised, its parts, and its names in LoRA files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch

from hyper_merge.checkpoints.architectures.lora_modules import Module, no_modules
from hyper_merge.checkpoints.architectures.positions import text_positions
from hyper_merge.checkpoints.architectures.sections import section_of
from hyper_merge.checkpoints.architectures.signatures import KeySignature
from hyper_merge.checkpoints.architectures.split_modules import SplitModule, no_split_modules
from hyper_merge.checkpoints.io.header import Shape

_RESOLUTION: Final = 512  # where nothing says another

PartName = Literal["unet", "text_encoder"]


@dataclass(frozen=True)
class DetectionRule:
    """Conditions by which a family is recognised; all that are given must hold.

    Data instead of a function, so that a family can be sent to another process.
    """

    all_of: tuple[str, ...] = ()  # for each of these some key begins with it
    none_of: tuple[str, ...] = ()  # no key begins with one of these
    depths: tuple[int, ...] | None = None  # transformers by level, then in the middle
    input_channels: int | None = None
    texts: tuple[str, ...] = ()  # keys of the text encoder begin with one of these, or ...
    context: int | None = None  # ... there is none, and the UNet reads features of this width

    def matches(self, signature: KeySignature) -> bool:
        """Tells whether a file of this signature fulfils all conditions."""
        return (
            all(signature.has(prefix) for prefix in self.all_of)
            and not signature.has(*self.none_of)
            and self.depths in (None, signature.depths)
            and self.input_channels in (None, signature.input_channels)
            and self._reads(signature)
        )

    def _reads(self, signature: KeySignature) -> bool:
        if not self.texts or signature.has(*self.texts):
            return True
        alone = self.context is not None and not signature.has_text_encoder
        return alone and signature.context == self.context


@dataclass(frozen=True)
class LoraSpelling:
    """How LoRA files of a family name a module and its factors."""

    separator: str  # between the words of a module's path
    up: str  # ends of the factors' keys
    down: str

    def module(self, prefix: str, path: str) -> str:
        """Returns the name of a module.

        Args:
            prefix: of the network's modules.
            path: dotted, within the network.
        """
        return prefix + path.replace(".", self.separator)


KOHYA: Final = LoraSpelling("_", ".lora_up.weight", ".lora_down.weight")
"""The spelling of kohya's scripts, which all hosts take for the older families."""

PEFT: Final = LoraSpelling(".", ".lora_B.weight", ".lora_A.weight")
"""The spelling of PEFT under the checkpoint's own names."""


@dataclass(frozen=True)
class NetworkPart:
    """A network within a checkpoint whose layers take LoRAs."""

    name: PartName
    title: str  # for people
    prefix: str  # of its keys
    lora_prefix: str  # of its modules' names in a LoRA file
    modules: Callable[[str, Shape], tuple[Module, ...]]  # (dotted path, stored shape)
    section: Callable[[str], str] = section_of  # dotted path -> name for people: "IN04", "TE11"
    # (dotted path, pixels of the pictures' side) -> how often the layer is applied in one run
    positions: Callable[[str, int], int] = text_positions
    # (dotted path, stored shape) -> modules that diffusers has instead, by which LoRAs are read
    split_modules: Callable[[str, Shape], tuple[SplitModule, ...]] = no_split_modules
    # (dotted path, stored shape) -> modules that LoRAs of other programs may have in addition
    foreign_modules: Callable[[str, Shape], tuple[Module, ...]] = no_modules

    def with_foreign_modules(self, path: str, shape: Shape) -> tuple[Module, ...]:
        """Returns all modules that LoRAs of any program have."""
        return self.modules(path, shape) or self.foreign_modules(path, shape)


@dataclass(frozen=True)
class Family:
    """Checkpoints of one architecture and variant: they have the same keys and shapes."""

    name: str  # never changes: recipes and caches keep it
    title: str  # for people, after "is a"
    rule: DetectionRule
    parts: tuple[
        NetworkPart, ...
    ] = ()  # in the order of the computation; none: it cannot be merged
    vae_prefixes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()  # keys that begin so: weights that nobody runs
    lora_alpha: bool = True  # whether LoRA files of the family hold alphas
    lora_spelling: LoraSpelling = KOHYA
    # Words in the names of files that have the same keys and shapes as those without, but were trained
    # to do something else: their average does neither.
    strains: tuple[str, ...] = ()
    in_a1111: bool = True  # whether AUTOMATIC1111 runs it
    half: torch.dtype = torch.float16  # in which hosts hold its weights
    # Metadata of LoRA files of this family, by their names there.
    ss_base_model_version: str = ""
    ss_v2: str = "False"
    modelspec_architecture: str = ""  # without "/lora"
    modelspec_implementation: str = ""
    modelspec_resolution: str = ""
    modelspec_prediction_type: str = ""
    sd_version: str = ""  # of the WebUI's LoRA card
    # Where files of the same keys may predict v instead of noise: the metadata that differ, the key of
    # a tensor whose values spread wider then, and the configuration by which hosts know.
    v_metadata: tuple[tuple[str, str], ...] = ()
    v_spread: str = ""
    v_configuration: Callable[[], dict[str, Any]] | None = None

    @property
    def supported(self) -> bool:
        """Tells whether checkpoints of the family can be merged."""
        return bool(self.parts)

    @property
    def predicts_v(self) -> bool:
        """Tells whether checkpoints of the family predict v instead of noise."""
        return self.modelspec_prediction_type == "v"

    @property
    def resolution(self) -> int:
        """The side in pixels of the pictures that the family was trained on."""
        return int(self.modelspec_resolution.partition("x")[0] or _RESOLUTION)

    def as_lora_input(self) -> Family:
        """Returns the family with all modules that LoRAs of any program have."""
        parts = (replace(part, modules=part.with_foreign_modules) for part in self.parts)
        return replace(self, parts=tuple(parts))

    def alpha_for(self, rank: int) -> int | None:
        """Returns the alpha by which a factor pair of this rank needs no scaling; None for no alpha."""
        return rank if self.lora_alpha else None

    def part_of(self, module: str) -> PartName:
        """Returns the part that a module of a LoRA file belongs to.

        Raises:
            ValueError: no module of this family is named so.
        """
        for part in self.parts:
            if module.startswith(part.lora_prefix):
                return part.name
        raise ValueError(f"{module} is no module of {self.title}")

    def predicting_v(self) -> Family:
        """Returns the variant of the same keys and shapes that predicts v."""
        name, title = f"{self.name}_v", f"{self.title} with v-prediction"
        metadata: dict[str, Any] = dict(self.v_metadata)
        return replace(self, name=name, title=title, v_metadata=(), **metadata)
