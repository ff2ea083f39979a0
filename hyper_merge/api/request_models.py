"""Describes the bodies of requests, as FastAPI reads and documents them; for pydantic 1 and 2.

Types are strict: 4.7 is no rank, and "yes" is no boolean. The recipe decides whether a value makes
sense, and its refusals give advice. Checkpoints are names of the host's list, never paths.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from hyper_merge.recipe.default_ranks import RankWord
from hyper_merge.recipe.recipe import FIELDS, option_help

Number = StrictInt | StrictFloat

_HELP: Final = {field.name: option_help(field) for field in FIELDS}
_EXAMPLE: Final = ["anime.safetensors", "photo/portrait.safetensors"]


def recipe_setting(name: str) -> Any:
    """Returns the field of a recipe's setting, which may be left out for its default."""
    return Field(None, description=_HELP[name])


class StrictRequest(BaseModel, extra="forbid"):
    """A body in which a misspelt field is refused: else it would be ignored."""


class InspectBody(StrictRequest):
    """The checkpoints to inspect."""

    checkpoints: list[StrictStr] = Field(
        ..., description=f"names of the host's list, such as {', '.join(_EXAMPLE)}"
    )


class PresetBody(StrictRequest):
    """Settings of the tab's form, to be kept under a name."""

    name: StrictStr = Field(..., description="one line of text, at most 60 letters")
    settings: dict[str, StrictBool | Number | StrictStr | list[StrictStr] | None] = Field(
        ...,
        description="values of the form as the tab shows them, by the names of its fields: those of"
        " the recipe, and `checkpoints`; what is left out has its default",
    )


class PlanBody(StrictRequest):
    """The checkpoints of a merge, and the recipe's settings."""

    checkpoints: list[StrictStr] = Field(
        ..., description="two or more names of the host's list; the first one's VAE is kept"
    )
    name: StrictStr | None = Field(
        None,
        description="name of the hyper-model and first part of its LoRAs' names; without one, a free"
        " name is made from the first checkpoint's",
    )
    ranks: list[StrictInt] | RankWord | None = recipe_setting("ranks")
    budget: StrictInt | StrictStr | None = recipe_setting("budget")
    target: Number | StrictStr | None = recipe_setting("target")
    topup: StrictInt | StrictStr | None = recipe_setting("topup")
    weights: list[Number] | None = recipe_setting("weights")
    block_weights: list[StrictStr | list[Number]] | None = recipe_setting("block_weights")
    fit_weights: list[Number] | None = recipe_setting("fit_weights")
    layer_weights: StrictStr | None = recipe_setting("layer_weights")
    base: StrictStr | None = Field(
        None,
        description="name of the checkpoint that the LoRAs are added to; without one, the average",
    )
    allocation: StrictStr | None = recipe_setting("allocation")
    multipliers: StrictStr | None = recipe_setting("multipliers")
    method: StrictStr | None = recipe_setting("method")
    memory: StrictInt | StrictStr | None = recipe_setting("memory")
    exact: StrictStr | None = recipe_setting("exact")
    vae: StrictStr | None = recipe_setting("vae")
    dtype: StrictStr | None = recipe_setting("dtype")
    lora_dtype: StrictStr | None = recipe_setting("lora_dtype")
    device: StrictStr | None = recipe_setting("device")
    iterations: StrictInt | None = recipe_setting("iterations")
    tolerance: Number | None = recipe_setting("tolerance")
    training: StrictInt | StrictStr | None = recipe_setting("training")
    seed: StrictInt | None = recipe_setting("seed")
    damaged: StrictStr | None = recipe_setting("damaged")


class MergeBody(PlanBody):
    """A request to merge."""

    save_styles: StrictBool = Field(
        False, description="save a prompt style per checkpoint, where the host has styles"
    )


class FitBody(StrictRequest):
    """A request to fit a checkpoint onto the LoRAs of a run."""

    run: StrictStr = Field(..., description="name of the run")
    checkpoint: StrictStr = Field(..., description="a name of the host's list")
    name: StrictStr | None = Field(
        None, description="its name in the run; without one, the file's name"
    )
    topup: StrictInt | StrictStr | None = Field(
        None,
        description="a private LoRA of what remains: a rank, or the share to be explained in all, such"
        ' as "95%"',
    )
    device: StrictStr | None = recipe_setting("device")
    seed: StrictInt | None = recipe_setting("seed")
    damaged: StrictStr | None = recipe_setting("damaged")
    overwrite: StrictBool = Field(False, description="replace an earlier fit of this name")
    save_styles: StrictBool = Field(
        False, description="save a prompt style for it, where the host has styles"
    )


class AverageBody(StrictRequest):
    """A request for the hyper-model alone."""

    checkpoints: list[StrictStr] = Field(..., description="two or more names of the host's list")
    name: StrictStr = Field(..., description="name of the hyper-model")
    weights: list[Number] | None = recipe_setting("weights")
    block_weights: list[StrictStr | list[Number]] | None = recipe_setting("block_weights")
    vae: StrictStr | None = recipe_setting("vae")
    dtype: StrictStr | None = recipe_setting("dtype")
    device: StrictStr | None = recipe_setting("device")


class AbsorbBody(StrictRequest):
    """A request for a new run of a run's checkpoints and further ones."""

    run: StrictStr = Field(..., description="name of the run, which stays as it is")
    checkpoints: list[StrictStr] = Field(..., description="names of the host's list")
    name: StrictStr | None = Field(None, description="of the new run; without one, a free name")
    from_cache: StrictBool = Field(
        False, description="read little of the old checkpoints where the cache will do"
    )


class RestoreBody(StrictRequest):
    """A request to write a checkpoint of a run, or a mixture of several."""

    run: StrictStr = Field(..., description="name of the run")
    shares: dict[StrictStr, Number] = Field(
        ...,
        description='share of each checkpoint: {"anime": 1} for that one itself; the hyper-model'
        " has the rest",
    )
    name: StrictStr | None = Field(None, description="of the file; without one, a free name")
    dtype: StrictStr | None = Field(None, description="of the file; without one, the run's")
    overwrite: StrictBool = Field(False, description="replace an existing file")


class MixtureBody(StrictRequest):
    """The shares of a mixture of a run's checkpoints."""

    shares: dict[StrictStr, Number] = Field(
        ..., description="share of each checkpoint; the hyper-model has the rest"
    )


class ExportBody(StrictRequest):
    """A request for one LoRA per checkpoint."""

    run: StrictStr = Field(..., description="name of the run")
    checkpoints: list[StrictStr] | None = Field(
        None, description="names of checkpoints of the run; without them, all"
    )
    rank: StrictInt | None = Field(
        None, description="to cut each LoRA to; without one, all is kept"
    )
    overwrite: StrictBool = Field(False, description="replace an earlier export of the same")


class ExtractBody(StrictRequest):
    """A request for the LoRA that turns one checkpoint into another."""

    base: StrictStr = Field(
        ..., description="a name of the host's list, which the LoRA is added to"
    )
    checkpoint: StrictStr = Field(..., description="a name of the host's list, which results")
    rank: StrictInt | None = Field(None, description="of the LoRA; without one, 64")
    name: StrictStr | None = Field(None, description="of the LoRA; without one, a free name")
    device: StrictStr | None = recipe_setting("device")
    seed: StrictInt | None = recipe_setting("seed")
    damaged: StrictStr | None = recipe_setting("damaged")
    overwrite: StrictBool = Field(False, description="replace existing files")


class SafeBody(StrictRequest):
    """A request to say which originals a run can replace."""

    run: StrictStr = Field(..., description="name of the run")
    threshold: Number | StrictStr = Field(
        "99%", description="share of an original's differences that must be restored"
    )


class CompareBody(StrictRequest):
    """A request for pictures by hyper-model and LoRAs beside those by the originals."""

    run: StrictStr = Field(..., description="name of the run")
    checkpoints: list[StrictStr] | None = Field(
        None, description="names of checkpoints of the run; without them, all"
    )
    prompts: list[StrictStr] = Field(..., description="one or more, without the run's tags")
    negative: StrictStr = Field("", description="negative prompt")
    sampler: StrictStr | None = Field(
        None, description="as the host names it; without one, the host's first"
    )
    steps: StrictInt = Field(20, description="of sampling")
    cfg_scale: Number = Field(7.0, description="how strictly the prompt is followed")
    width: StrictInt = Field(512, description="pixels, a multiple of 8")
    height: StrictInt = Field(512, description="pixels, a multiple of 8")
    seeds: list[StrictInt] = Field([1], description="each prompt is drawn with each of them")
    average: StrictBool = Field(False, description="draw the hyper-model alone too")
    difference: StrictBool = Field(False, description="draw the differences within each pair too")
