"""Describes the requests for the everyday tools on LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.errors import RecipeError, settings_placed
from hyper_merge.recipe.lora_block_weights import (
    COUNTS,
    LoraBlockWeights,
    format_lora_block_weights,
    go_with,
    parse_lora_block_weights,
    weight_in,
)
from hyper_merge.recipe.parsing import (
    LARGEST_RANK,
    choice,
    optional,
    parse_bytes,
    parse_flag,
    parse_multipliers,
    parse_path,
    parse_paths,
    parse_share,
    whole,
)
from hyper_merge.recipe.request import Parsers, Request, key_place
from hyper_merge.runtime.names import prompt_word

_SUFFIX: Final = ".safetensors"


def _parse_loras(value: object) -> tuple[Path, ...]:
    paths = parse_paths(value)
    if not paths:
        raise RecipeError("expected one LoRA or more, got none")
    return paths


@dataclass(frozen=True)
class _LoraRequest(Request):
    """LoRAs with a multiplier each, and the file that is made."""

    loras: tuple[Path, ...]
    multipliers: tuple[float, ...] | None = None
    to: Path | None = None
    overwrite: bool = False
    damaged: Literal["refuse", "accept"] = "refuse"
    block_weights: tuple[LoraBlockWeights, ...] | None = None

    PARSERS: ClassVar[Parsers] = {
        "loras": _parse_loras,
        "multipliers": optional(parse_multipliers),
        "to": optional(parse_path),
        "overwrite": parse_flag,
        "damaged": choice("refuse", "accept"),
        "block_weights": parse_lora_block_weights,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        with settings_placed(key_place):
            self._require_multipliers()
            self._require_block_weights()
            if self.to is not None and self.to.suffix != _SUFFIX:
                raise RecipeError(
                    f"expected a path that ends with {_SUFFIX}, got {self.to}", key="to"
                )

    @property
    def accepts_damaged(self) -> bool:
        """Tells whether files are taken that look damaged or like unfinished downloads."""
        return self.damaged == "accept"

    @property
    def weights(self) -> tuple[float, ...]:
        """The multiplier of every LoRA: 1 where none is given."""
        return self.multipliers or (1.0,) * len(self.loras)

    def multipliers_in(self, layer: Layer) -> tuple[float, ...]:
        """Returns the multiplier of every LoRA in a layer."""
        if self.block_weights is None:
            return self.weights
        in_unet = layer.part == "unet"
        return tuple(
            x * weight_in(blocks, layer.section, in_unet=in_unet)
            for x, blocks in zip(self.weights, self.block_weights, strict=True)
        )

    def require_blocks_of(self, family: Family) -> None:
        """Returns if the weights by block are those of a family's UNet, or there are none.

        Raises:
            RecipeError: they are those of another, or the family has no such blocks.
        """
        for blocks in self.block_weights or ():
            if not go_with(blocks, family.name):
                raise RecipeError(
                    f"{len(blocks)} weights by block do not go with {family.title}",
                    hint=f"give {COUNTS}; other networks have none but one number for all",
                    key="block_weights",
                )

    def recipe_of_blocks(self) -> dict[str, str]:
        """Returns the weights by block for a file's metadata."""
        if self.block_weights is None:
            return {}
        return {"block_weights": "; ".join(map(format_lora_block_weights, self.block_weights))}

    def _require_block_weights(self) -> None:
        given = self.block_weights
        if given is not None and len(given) != len(self.loras):
            raise RecipeError(
                f"expected {len(self.loras)} texts, one per LoRA, got {len(given)}",
                key="block_weights",
            )

    def _require_multipliers(self) -> None:
        given = self.multipliers
        if given is not None and len(given) != len(self.loras):
            raise RecipeError(
                f"expected {len(self.loras)} numbers, one per LoRA, got {len(given)}",
                key="multipliers",
            )
        if given is not None and not all(given):
            raise RecipeError(
                "expected numbers other than 0", hint="leave that LoRA out", key="multipliers"
            )


@dataclass(frozen=True)
class CombineRequest(_LoraRequest):
    """The request for one LoRA of several, or of one.

    Attributes:
        loras: The files.
        multipliers: One per file; None for 1 each.
        to: Path of the file; None for one beside the first, named after what it is.
        overwrite: Whether an existing file may be replaced.
        damaged: Whether to `refuse` a file that looks damaged or unfinished, or to `accept` it.
        block_weights: By which the blocks of each LoRA are multiplied in addition; None for all alike.
        rank: The most that a layer keeps; None for no limit.
        size: Bytes of the file at most; ranks then go where they keep most.
        keep: Share 0..1 of the squared norm to keep with the fewest bytes.
        dtype: Of the factors; `same` as in the files.
    """

    rank: int | None = None
    size: int | None = None
    keep: float | None = None
    dtype: Literal["same", "float16", "bfloat16", "float32"] = "same"

    PARSERS: ClassVar[Parsers] = {
        **_LoraRequest.PARSERS,
        "rank": optional(whole(1, LARGEST_RANK)),
        "size": parse_bytes,
        "keep": parse_share,
        "dtype": choice("same", "float16", "bfloat16", "float32"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        with settings_placed(key_place):
            given = [key for key in ("rank", "size", "keep") if getattr(self, key) is not None]
            if len(given) > 1:
                raise RecipeError(
                    f"expected one of rank, size and keep, got {' and '.join(given)}",
                    hint="leave all but one out",
                    key=given[1],
                )

    @property
    def path(self) -> Path:
        """Where the file goes."""
        return self.to or self.loras[0].with_name(f"{self._stem()}.safetensors")

    def _stem(self) -> str:
        first = self.loras[0].stem
        if len(self.loras) > 1:
            return prompt_word("-and-".join(path.stem for path in self.loras[:3]))
        if self.rank is not None:
            return prompt_word(f"{first}-rank{self.rank}")
        return prompt_word(f"{first}-resized")

    @property
    def cuts(self) -> bool:
        """Tells whether ranks are to be cut."""
        return (self.rank, self.size, self.keep) != (None, None, None)


@dataclass(frozen=True)
class ApplyRequest(_LoraRequest):
    """The request for a checkpoint with LoRAs added to it, or taken away from it.

    Attributes:
        checkpoint: The file.
        loras: The LoRAs.
        multipliers: One per LoRA; None for 1 each.
        subtract: Whether they are taken away.
        to: Path of the file; None for one beside the checkpoint, named after what it is.
        overwrite: Whether an existing file may be replaced.
        damaged: Whether to `refuse` a file that looks damaged or unfinished, or to `accept` it.
        block_weights: By which the blocks of each LoRA are multiplied in addition; None for all alike.
    """

    checkpoint: Path = Path()
    subtract: bool = False

    PARSERS: ClassVar[Parsers] = {
        **_LoraRequest.PARSERS,
        "checkpoint": parse_path,
        "subtract": parse_flag,
    }
