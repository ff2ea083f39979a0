"""The one table of settings: how each is called, explained, parsed and written; no files.

The YAML reader, the command line, the form, the API's schema and the metadata of written files are
all made from `FIELDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Final, Literal

from hyper_merge.recipe.block_weights import format_block_weights, parse_block_weights
from hyper_merge.recipe.parsing import (
    PrivateLoraTarget,
    choice,
    number,
    parse_bytes,
    parse_device,
    parse_flag,
    parse_models,
    parse_name,
    parse_path,
    parse_private_lora_target,
    parse_ranks,
    parse_share,
    parse_text,
    parse_weights,
    whole,
    whole_or_auto,
)
from hyper_merge.recipe.plain_values import plain_value

AVERAGE: Final = "average"

SIZES: Final = ("ranks", "budget", "target")
"""Settings of which one is given."""


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        name: Key in YAML; the option is `--name`.
        metavar: Placeholder for the value in the command line's help.
        help: Explanation for the user.
        parse: Returns the value in `Recipe` for a value as YAML has it; takes its own results too.
        takes: How many words follow the option: one, several, or none.
        literal: Whether an option's words are text even where they look like numbers.
        to_metadata: Returns the text for a file's metadata, without names of folders; None where
            metadata has no use for the setting.
    """

    name: str
    metavar: str
    help: str
    parse: Callable[[object], object]
    takes: Literal["one", "many", "flag"] = "one"
    literal: bool = False
    to_metadata: Callable[[Any], str] | None = str

    @property
    def option(self) -> str:
        """Name of the option on the command line."""
        return f"--{self.name}"

    def from_text(self, text: str | Sequence[str]) -> object:
        """Returns the value that YAML would have for the words after the option."""
        if self.literal and self.takes == "many":
            return [text] if isinstance(text, str) else list(text)
        word = text if isinstance(text, str) else " ".join(text)
        return word if self.literal else plain_value(word)


def _file_name(path: str | Path) -> str:
    # a Windows path parses the separators of both systems
    return PureWindowsPath(path).name


def _models_text(paths: Sequence[Path]) -> str:
    return json.dumps([_file_name(path) for path in paths], ensure_ascii=False)


def _numbers_text(numbers: Sequence[float] | None) -> str:
    return "equal" if numbers is None else ", ".join(map(repr, numbers))


def _optional_text(value: float | None) -> str:
    return "null" if value is None else repr(value)


def _target_text(target: PrivateLoraTarget | None) -> str:
    return "null" if target is None else str(target)


def _base_text(base: str) -> str:
    return base if base == AVERAGE else _file_name(base)


FIELDS: Final[tuple[Field, ...]] = (
    Field("name", "NAME", "name of the hyper-model and first part of its LoRAs' names", parse_name,
          literal=True),
    Field("models", "FILE", "the checkpoints to merge, two or more", parse_models, "many",
          literal=True, to_metadata=_models_text),
    Field("ranks", "R,R,...", "one LoRA of this rank each; or small, medium or large: as many LoRAs"
          " as checkpoints, eight at most", parse_ranks, "many",
          to_metadata=_numbers_text),
    Field("budget", "SIZE", "instead of ranks: the largest size of all LoRAs together, such as 300MB",
          parse_bytes, to_metadata=_optional_text),
    Field("target", "SHARE", "instead of ranks: the share of every checkpoint's differences to"
          " explain, such as 95%", parse_share, to_metadata=_optional_text),
    Field("topup", "RANK|SHARE", "a private LoRA for each checkpoint below the mean, of this rank,"
          " or below this share, up to it", parse_private_lora_target, to_metadata=_target_text),
    Field("device", "DEVICE", "auto, cpu, cuda or cuda:N", parse_device),
    Field("dtype", "DTYPE", "stored in the files: float16, bfloat16 or float32",
          choice("float16", "bfloat16", "float32")),
    Field("lora_dtype", "DTYPE", "stored in the LoRAs: same (as dtype), float16, bfloat16, float32,"
          " float8: half of float16's bytes (loads where torch is 2.1 or newer: A1111 1.8, Forge,"
          " ComfyUI, kohya, diffusers; not on Apple's GPUs), or auto: float8 but on a Mac, for a"
          " model family whose LoRAs cannot hold it, for dtype float32 and for a target above 98 %",
          choice("auto", "same", "float16", "bfloat16", "float32", "float8")),
    Field("iterations", "N", "number of sweeps at most", whole(1, 10_000)),
    Field("tolerance", "X", "stop when a sweep changes the loss by less than this fraction",
          number(0.0, 1.0)),
    Field("weights", "X,X,...", "weight of each checkpoint in the average", parse_weights, "many",
          to_metadata=_numbers_text),
    Field("block_weights", "W,W,...", "weights of each checkpoint in the average by block of the UNet, one"
          " text for each checkpoint: 26 numbers (XL: 20) in the order BASE, IN00, ..., M00, OUT00, ...,"
          " which multiply its weight", parse_block_weights, "many", literal=True,
          to_metadata=format_block_weights),
    Field("base", "FILE", "what the LoRAs are added to: average, or a checkpoint's path",
          parse_text, literal=True, to_metadata=_base_text),
    Field("output", "FOLDER", "WebUI-shaped models folder that takes the files", parse_path,
          literal=True, to_metadata=None),
    Field("overwrite", "", "replace files that exist already", parse_flag, "flag",
          to_metadata=None),
    Field("seed", "N", "seed of everything random", whole(0, 2**63 - 1)),
    Field("method", "METHOD", "joint, or greedy as in the original project",
          choice("joint", "greedy")),
    Field("allocation", "HOW", "adaptive: the ranks' bytes go to the layers where they explain most;"
          " even: the same ranks in every layer", choice("adaptive", "even")),
    Field("multipliers", "WHICH", "separate ones for text encoder and UNet, or shared: one number",
          choice("separate", "shared")),
    Field("fit_weights", "X,X,...", "how much each checkpoint counts in the fit", parse_weights,
          "many", to_metadata=_numbers_text),
    Field("layer_weights", "HOW", "how differences count: by what they do to the network's output,"
          " measured by runs of the average, or estimated from the layout; relative to each layer's"
          " size; or plain", choice("output", "layout", "relative", "plain")),
    Field("training", "N", "rounds in which runs of the networks improve the LoRAs after the solve: better"
          " pictures for the same bytes; 0 for none; auto for 20 where these take minutes, as on most GPUs,"
          " fewer or none where they take longer", whole_or_auto(0, 10_000)),
    Field("vae", "VAE", "whose VAE is kept: first (of the first checkpoint), or average",
          choice("first", "average")),
    Field("exact", "WHAT", "companion LoRAs of what LoRAs cannot hold: none; ends: the layers at the"
          " UNet's ends; norms: these and the norms (all three load in A1111, Forge, ComfyUI); all:"
          " the biases too (Forge and ComfyUI only); or auto: ends where they matter",
          choice("auto", "none", "ends", "norms", "all")),
    Field("damaged", "HOW", "files that look damaged or like unfinished downloads: refuse, or accept"
          " with a warning", choice("refuse", "accept"), to_metadata=None),
    Field("memory", "SIZE", "what the merge may take of this machine's memory, such as 4GB: the files are"
          " the same with less, and slower to make", parse_bytes, to_metadata=None),
)  # fmt: skip

FIELD_PARSERS: Final[Mapping[str, Callable[[object], object]]] = {
    setting.name: setting.parse for setting in FIELDS
}
"""Parser of every setting by its name."""
