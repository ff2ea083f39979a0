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
    "automatic: first and last layers where they matter": "auto",
    "none": "none",
    "first and last layers (A1111, Forge, ComfyUI)": "ends",
    "these and the norms (A1111, Forge, ComfyUI)": "norms",
    "these, norms and biases (Forge, ComfyUI)": "all",
}
ALLOCATION_CHOICES: Final = {
    "adaptive: where they help most": "adaptive",
    "even: the same in every layer": "even",
}
DIFFERENCE_CHOICES: Final = {
    "by their effect on the picture": "output",
    "by an estimate of that": "layout",
    "relative to each layer's size": "relative",
    "all alike": "plain",
}
DAMAGED_CHOICES: Final = {"refuse them": "refuse", "merge them, with a warning": "accept"}

WidgetKind = Literal["text", "lines", "number", "radio", "menu", "checkbox"]


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
        if self.kind == "radio":
            return self.options[0]
        value = next(row.default for row in dataclasses.fields(Recipe) if row.name == self.setting)
        if self.kind in ("text", "lines"):  # empty where nothing is the default
            return str(value) if isinstance(value, str | int) else ""
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
              "One LoRA per rank, such as 128, 64, 32; or small, medium or large. Or a total size, such as 300 MB. Or the share"
              " of every checkpoint's differences to explain, such as 95 %.",
              settings=("ranks", "budget", "target")),
    FormField("weights", "Weights", "text",
              "How much of each checkpoint the average takes: one number each, in the order they"
              " were picked, such as 2, 1, 1. Leave empty for equal parts."),
    FormField("block_weights", "Weights by block", "lines",
              "For Stable Diffusion 1.x, 2.x and XL: how much of each checkpoint the average takes in"
              " every block of the UNet, times its weight above. One line for each checkpoint, in the"
              " order they were picked: one number for all blocks, or 26 (XL: 20) in the order BASE"
              " (all outside of the UNet), IN00 to IN11 (XL: IN08), M00, OUT00 to OUT11 (XL: OUT08)."
              " Presets of supermerger such as NAME:0,0.5,... can be pasted. Leave empty for no"
              " difference."),
    FormField("base", "Base", "menu",
              "The file to which the LoRAs are added: the average of all, or one of your"
              " checkpoints; then no hyper-model is written."),
    FormField("dtype", "Precision", "radio",
              "Of the written files. float32 takes twice the space, for pictures that hardly"
              " differ."),
    FormField("lora_dtype", "Precision of the LoRAs", "radio",
              "auto takes float8 (8 bits), which halves their size and hardly changes pictures, but 16"
              " bits or more where that does not fit: on a Mac, above a share of 98 %, for float32,"
              " and for families such as SD 3. float8 loads in A1111 from 1.8, Forge and ComfyUI, but"
              " not on a Mac: choose same to share LoRAs with people who use one."),
    FormField("device", "Device", "menu",
              "Where to compute: auto takes the graphics card if there is one. Changes the time"
              " only."),
    FormField("iterations", "Rounds at most", "number",
              "The LoRAs come closer to the checkpoints round by round. More rounds take longer"
              " and change pictures little."),
    FormField("tolerance", "Stop early", "number",
              "Ends the rounds once one gains less than this part: 0.002 is 0.2 %. A smaller number"
              " takes longer and changes pictures little."),
    FormField("seed", "Seed", "number",
              "Where the computation starts; not the seed of a picture. The same number gives the"
              " same files, and none is better than another."),
    FormField("memory", "Memory at most", "text",
              "What the merge may take of this computer's memory, such as 4 GB. With less it takes longer,"
              " and the files are the same. Leave empty for what suits most computers."),
    FormField("vae", "VAE", "radio",
              "The part of the hyper-model that turns its result into colours and pixels.",
              choices=VAE_CHOICES),
    FormField("exact", "Companion LoRAs", "radio",
              "Small extra files for layers that ordinary LoRAs cannot change, with the programs"
              " that load them. They bring pictures closer to the originals.",
              choices=EXACT_CHOICES),
    FormField("topup", "Private LoRAs", "text",
              "An extra LoRA for each checkpoint that would come out least alike: a rank, such as"
              " 16, or the share that every checkpoint should reach, such as 95%. Leave empty for"
              " none."),
    FormField("allocation", "Ranks by layer", "radio",
              "Which layers the LoRAs spend their size on. Where they help most, pictures come"
              " closer at the same size.", choices=ALLOCATION_CHOICES),
    FormField("separate", "Separate multipliers for the text encoder", "checkbox",
              "One number for how the prompt is understood, one for how the picture is drawn:"
              " <lora:name:text encoder:UNet>. Comes closer to the originals.",
              settings=("multipliers",)),
    FormField("fit_weights", "Priorities", "text",
              "Whose pictures should come closest: one number per checkpoint, in the order they"
              " were picked, such as 3, 1, 1. Leave empty to treat all alike."),
    FormField("layer_weights", "Differences count", "radio",
              "Which differences the LoRAs reproduce first. The first choice leaves the least that"
              " can be seen in a picture.", choices=DIFFERENCE_CHOICES),
    FormField("training", "Training", "text",
              "For Stable Diffusion 1.x, 2.x and XL: rounds in which runs of the networks improve the"
              " LoRAs, so that pictures come closer to the originals at the same size. 0: none. auto: up to"
              " 20 where these take minutes, as on most graphics cards. A number, such as 20: so many, also"
              " where they take an hour."),
    FormField("damaged", "Damaged files", "radio",
              "Files that look damaged, or like downloads that did not end. Merged, they can spoil"
              " the pictures of all.", choices=DAMAGED_CHOICES),
)  # fmt: skip

ADVANCED: Final = {
    "Average": (("base",), ("weights",), ("block_weights",), ("vae",)),
    "LoRAs": (("topup",), ("exact",), ("fit_weights",), ("separate",), ("training",)),
    "Files": (("dtype",), ("lora_dtype",), ("damaged",)),
    "Rarely needed": (
        ("layer_weights",), ("allocation",), ("iterations", "tolerance"), ("device", "seed"),
        ("memory",),
    ),
}  # fmt: skip
"""Fields under "Advanced", row by row in their groups; what is rarely used comes last."""

LABELS: Final = {
    setting: row.label for row in FORM_FIELDS for setting in row.settings or (row.name,)
} | {"budget": "Total size", "target": "Share, at worst"}
"""The form's labels by the recipe's settings."""


def form_field(name: str) -> FormField:
    """Returns the field of a name."""
    return next(row for row in FORM_FIELDS if row.name == name)
