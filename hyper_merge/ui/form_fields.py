"""Describes how the form shows the recipe's settings: labels, hints, kinds of widgets.

Names, explanations, defaults and plain choices come from the recipe's own table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args, get_type_hints

from hyper_merge.recipe.fields import FIELDS
from hyper_merge.recipe.recipe import Recipe

BASE_AVERAGE: Final = "average of the checkpoints"
VAE_CHOICES: Final = {"from the first checkpoint": "first", "average of all": "average"}
EXACT_CHOICES: Final = {
    "automatic: end layers where they matter": "auto",
    "none": "none",
    "end layers (A1111, Forge, ComfyUI)": "ends",
    "end layers and norms (A1111, Forge, ComfyUI)": "norms",
    "end layers, norms and biases (Forge, ComfyUI)": "all",
}
ALLOCATION_CHOICES: Final = {
    "adaptive, where they explain most": "adaptive",
    "even, the same in every layer": "even",
}
DIFFERENCE_CHOICES: Final = {
    "by their effect on the output": "output",
    "by an estimate of that": "layout",
    "relative to each layer's size": "relative",
    "unweighted": "plain",
}
DAMAGED_CHOICES: Final = {"are refused": "refuse", "are merged, with a warning": "accept"}
PRESETS: Final = {
    "small": "64, 32, 16",
    "medium": "128, 64, 32, 16",
    "large": "256, 128, 64, 32",
}

WidgetKind = Literal["text", "number", "radio", "menu", "checkbox"]


@dataclass(frozen=True)
class FormField:
    """One field of the form.

    Attributes:
        name: Name of the field in `Form`, and of its widget.
        label: The text above it, with which error messages begin.
        kind: The kind of widget.
        hint: The text below the label; empty for the explanation of the recipe's table.
        settings: The recipe's settings that it decides; empty for the one of the same name.
        choices: Text on the form -> value in the recipe; empty for the recipe's own values.
    """

    name: str
    label: str
    kind: WidgetKind
    hint: str = ""
    settings: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """The recipe's setting that explains it and has its default."""
        return self.settings[0] if self.settings else self.name

    @property
    def info(self) -> str:
        """The explanation for the user, as a sentence."""
        if self.hint:
            return self.hint
        text = next(row.help for row in FIELDS if row.name == self.setting)
        return f"{text[0].upper()}{text[1:]}."

    @property
    def default(self) -> Any:
        """The value that the form starts with."""
        if self.kind == "text":
            return ""
        if self.kind == "radio":
            return self.options[0]
        value = next(row.default for row in dataclasses.fields(Recipe) if row.name == self.setting)
        return value == "separate" if self.kind == "checkbox" else value

    @property
    def options(self) -> Sequence[str]:
        """The texts to choose from; the first one is the default."""
        return list(self.choices) or list(get_args(get_type_hints(Recipe)[self.setting]))


FORM_FIELDS: Final = (
    FormField("checkpoints", "Checkpoints", "text", "Two or more of one family.",
              settings=("models",)),
    FormField("name", "Name", "text",
              "Name of the hyper-model and its LoRAs. Leave empty for the suggested name."),
    FormField("ranks", "Ranks", "text",
              "One LoRA per rank, such as 128, 64, 32. Or a total size, such as 300 MB. Or the share"
              " of every checkpoint's differences to explain, such as 95 %.",
              settings=("ranks", "budget", "target")),
    FormField("weights", "Weights", "text",
              "One number per checkpoint for the average, in the order they were picked. Leave empty"
              " for equal weights."),
    FormField("base", "Base", "menu",
              "What the LoRAs are added to. If it is a checkpoint, no hyper-model is written."),
    FormField("dtype", "Precision", "radio",
              "Of the written files: 2, 2 or 4 bytes per number."),
    FormField("lora_dtype", "Precision of the LoRAs", "radio",
              "The same, or a different one. float8 halves their size and explains slightly less; it"
              " needs torch 2.1 or newer (A1111 1.8) and does not load on Apple's GPUs."),
    FormField("device", "Device", "menu", "Where to compute. auto uses the GPU of the host if there is one."),
    FormField("iterations", "Iterations", "number",
              "Maximum number of sweeps. More take longer and may explain slightly more."),
    FormField("tolerance", "Tolerance", "number"),
    FormField("seed", "Seed", "number",
              "Seed of all random numbers. The same seed gives the same files."),
    FormField("vae", "VAE", "radio", "Which VAE the hyper-model gets.", choices=VAE_CHOICES),
    FormField("exact", "Companion LoRAs", "radio",
              "Additional files for what ordinary LoRAs cannot carry, and the programs that load"
              " them.", choices=EXACT_CHOICES),
    FormField("topup", "Private LoRAs", "text",
              "Additional LoRAs for the checkpoints that the shared ones explain least: a rank, such"
              " as 16, or a share that every checkpoint should reach, such as 95%. Leave empty for"
              " none."),
    FormField("allocation", "Rank allocation", "radio", "The LoRAs have the same size either way.",
              choices=ALLOCATION_CHOICES),
    FormField("separate", "Separate multipliers for the text encoder", "checkbox",
              "Tags read <lora:name:text encoder:UNet>. Explains more.", settings=("multipliers",)),
    FormField("fit_weights", "Fit weights", "text",
              "How much each checkpoint counts in the fit: one number per checkpoint, in the order"
              " they were picked. Leave empty for equal weights."),
    FormField("layer_weights", "Layer weighting", "radio",
              "How much the differences in a layer count. The others leave more of the difference"
              " in pictures at the same size.", choices=DIFFERENCE_CHOICES),
    FormField("damaged", "Damaged files", "radio",
              "Files that look damaged, or like downloads that did not end.", choices=DAMAGED_CHOICES),
)  # fmt: skip

LABELS: Final = {
    setting: row.label for row in FORM_FIELDS for setting in row.settings or (row.name,)
} | {"budget": "Total size", "target": "Share, at worst"}
"""The form's labels by the recipe's settings."""


def form_field(name: str) -> FormField:
    """Returns the field of a name."""
    return next(row for row in FORM_FIELDS if row.name == name)
