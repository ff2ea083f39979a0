"""The one table of settings: how each is called, explained, parsed and written; no files.

The YAML reader, the command line, the form, the API's schema and the metadata of written files are
all made from `FIELDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Final, Literal

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
        title: Label in the form; empty where the form has no such field.
        metavar: Placeholder for the value in the command line's help.
        help: Explanation for the user.
        parse: Returns the value in `Recipe` for a value as YAML has it; takes its own results too.
        takes: How many words follow the option: one, several, or none.
        literal: Whether an option's words are text even where they look like numbers.
        choices: Label in the form by value, where one of several is chosen.
        to_metadata: Returns the text for a file's metadata, without names of folders; None where
            metadata has no use for the setting.
    """

    name: str
    title: str
    metavar: str
    help: str
    parse: Callable[[object], object]
    takes: Literal["one", "many", "flag"] = "one"
    literal: bool = False
    choices: Mapping[str, str] = field(default_factory=dict)
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


def _choice(
    name: str, title: str, metavar: str, explanation: str, choices: Mapping[str, str]
) -> Field:
    """Returns a setting that is one of several words; `choices` has the form's label of each."""
    return Field(name, title, metavar, explanation, choice(*choices), choices=choices)


_DTYPES: Final = {word: word for word in ("float16", "bfloat16", "float32")}

FIELDS: Final[tuple[Field, ...]] = (
    Field(
        "name",
        "Name",
        "NAME",
        "name of the hyper-model and first part of its LoRAs' names",
        parse_name,
        literal=True,
    ),
    Field(
        "models",
        "Checkpoints",
        "FILE",
        "the checkpoints to merge, two or more",
        parse_models,
        "many",
        literal=True,
        to_metadata=_models_text,
    ),
    Field(
        "ranks",
        "Ranks",
        "R,R,...",
        "one LoRA of this rank each",
        parse_ranks,
        "many",
        to_metadata=_numbers_text,
    ),
    Field(
        "budget",
        "Ranks",
        "SIZE",
        "in place of ranks: all LoRAs together are at most so large, as 300MB",
        parse_bytes,
        to_metadata=_optional_text,
    ),
    Field(
        "target",
        "Ranks",
        "SHARE",
        "in place of ranks: so much comes back of every checkpoint, as 95%",
        parse_share,
        to_metadata=_optional_text,
    ),
    Field(
        "topup",
        "Private LoRAs",
        "RANK|SHARE",
        "a private LoRA for each checkpoint below the mean, of this rank,"
        " or below this share, up to it",
        parse_private_lora_target,
        to_metadata=_target_text,
    ),
    Field("device", "Device", "DEVICE", "auto, cpu, cuda or cuda:N", parse_device),
    _choice(
        "dtype",
        "Stored precision",
        "DTYPE",
        "stored in the files: float16, bfloat16 or float32",
        _DTYPES,
    ),
    _choice(
        "lora_dtype",
        "Stored precision of the LoRAs",
        "DTYPE",
        "stored in the LoRAs: same (as dtype), float16, bfloat16, float32,"
        " or float8: half of float16's bytes (loads where torch is 2.1 or newer: A1111 1.8, Forge,"
        " ComfyUI, kohya, diffusers; not on Apple's GPUs)",
        {"same": "same", **_DTYPES, "float8": "float8"},
    ),
    Field("iterations", "Iterations", "N", "number of sweeps at most", whole(1, 10_000)),
    Field(
        "tolerance",
        "Tolerance",
        "X",
        "stop when a sweep changes the loss by less than this fraction",
        number(0.0, 1.0),
    ),
    Field(
        "weights",
        "Weights",
        "X,X,...",
        "weight of each checkpoint in the average",
        parse_weights,
        "many",
        to_metadata=_numbers_text,
    ),
    Field(
        "base",
        "Base",
        "FILE",
        "what the LoRAs are added to: average, or a checkpoint's path",
        parse_text,
        literal=True,
        to_metadata=_base_text,
    ),
    Field(
        "output",
        "",
        "FOLDER",
        "WebUI-shaped models folder that takes the files",
        parse_path,
        literal=True,
        to_metadata=None,
    ),
    Field(
        "overwrite",
        "",
        "",
        "replace files that exist already",
        parse_flag,
        "flag",
        to_metadata=None,
    ),
    Field("seed", "Seed", "N", "seed of everything random", whole(0, 2**63 - 1)),
    _choice(
        "method",
        "",
        "METHOD",
        "joint, or greedy as in the original project",
        {"joint": "joint", "greedy": "greedy"},
    ),
    _choice(
        "allocation",
        "Ranks go",
        "HOW",
        "adaptive: the ranks' bytes go to the layers where they bring back"
        " most; even: the same ranks in every layer",
        {"adaptive": "where they bring back most", "even": "the same in every layer"},
    ),
    _choice(
        "multipliers",
        "Separate multipliers for the text encoder",
        "WHICH",
        "separate ones for text encoder and UNet, or shared: one number",
        {"separate": "separate", "shared": "shared"},
    ),
    Field(
        "fit_weights",
        "Weights of the fit",
        "X,X,...",
        "how much each checkpoint counts in the fit",
        parse_weights,
        "many",
        to_metadata=_numbers_text,
    ),
    _choice(
        "layer_weights",
        "Differences count",
        "HOW",
        "how differences count: relative to each layer's size, or plain",
        {"relative": "relative to each layer's size", "plain": "as they are"},
    ),
    _choice(
        "vae",
        "VAE",
        "VAE",
        "whose VAE is kept: first (of the first checkpoint), or average",
        {"first": "of the first checkpoint", "average": "average of all"},
    ),
    _choice(
        "exact",
        "Companion LoRAs",
        "WHAT",
        "companion LoRAs of what LoRAs cannot hold: none, norms (loads in A1111,"
        " Forge, ComfyUI), or all: norms and biases (Forge and ComfyUI only)",
        {
            "none": "no",
            "norms": "norms (A1111, Forge, ComfyUI)",
            "all": "norms and biases (Forge, ComfyUI)",
        },
    ),
)

FIELD_PARSERS: Final[Mapping[str, Callable[[object], object]]] = {
    setting.name: setting.parse for setting in FIELDS
}
"""Parser of every setting by its name."""

FIELD_TITLES: Final = {setting.name: setting.title for setting in FIELDS if setting.title}
"""Label in the form of every setting that is there, by its name."""


def choice_labels(name: str) -> dict[str, str]:
    """Returns the value of a setting by its label in the form."""
    choices = next(setting.choices for setting in FIELDS if setting.name == name)
    return {label: value for value, label in choices.items()}
