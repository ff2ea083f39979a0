"""Describes the requests for LoRAs and the answers to them, as FastAPI reads, writes and documents them.

Types are strict, as in `request_models`. LoRAs and checkpoints are names of the host's lists, never paths.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

from hyper_merge.api.request_models import Number, StrictRequest, recipe_setting
from hyper_merge.recipe.default_ranks import RankWord
from hyper_merge.recipe.lora_block_weights import COUNTS

_SEVERAL: Final = "names of the host's list of LoRAs, all of one base"
_NAME: Final = "of the file; without one, made from the names of the files"
_BLOCK_WEIGHTS: Final = (
    "one for each LoRA, by which its blocks are multiplied in addition: text as the extension LoRA Block"
    f" Weight has it, numbers, or one number for all; {COUNTS}"
)
_OVERWRITE: Final = "replace an existing file"


class InspectLorasBody(StrictRequest):
    """The LoRAs to inspect."""

    loras: list[StrictStr] = Field(..., description="names of the host's list of LoRAs")


class ShareLorasBody(StrictRequest):
    """LoRAs that become a few shared ones, and the settings that go with them."""

    loras: list[StrictStr] = Field(..., description=f"two or more {_SEVERAL}")
    name: StrictStr | None = Field(
        None, description="of the run, and first part of its LoRAs' names; without one, a free name"
    )
    ranks: list[StrictInt] | RankWord | None = recipe_setting("ranks")
    budget: StrictInt | StrictStr | None = recipe_setting("budget")
    target: Number | StrictStr | None = recipe_setting("target")
    topup: StrictInt | StrictStr | None = recipe_setting("topup")
    fit_weights: list[Number] | None = Field(None, description="how much each LoRA counts")
    layer_weights: StrictStr | None = Field(
        None, description="how changes count: plain, as squares of weights, or layout"
    )
    allocation: StrictStr | None = recipe_setting("allocation")
    multipliers: StrictStr | None = recipe_setting("multipliers")
    method: StrictStr | None = recipe_setting("method")
    dtype: StrictStr | None = recipe_setting("dtype")
    lora_dtype: StrictStr | None = recipe_setting("lora_dtype")
    device: StrictStr | None = recipe_setting("device")
    iterations: StrictInt | None = recipe_setting("iterations")
    tolerance: Number | None = recipe_setting("tolerance")
    seed: StrictInt | None = recipe_setting("seed")
    overwrite: StrictBool = Field(False, description="replace an earlier run of LoRAs of this name")


class _SizeBody(StrictRequest):
    """How far ranks are cut: one of three, or none."""

    rank: StrictInt | None = Field(None, description="the most that a layer keeps")
    size: StrictInt | StrictStr | None = Field(
        None, description='bytes of the file at most, or text such as "50MB"'
    )
    keep: Number | StrictStr | None = Field(
        None, description='of the squared norm of all changes, such as "95%", with the fewest bytes'
    )
    name: StrictStr | None = Field(None, description=_NAME)
    dtype: StrictStr | None = Field(
        None, description="of the file: same, float16, bfloat16 or float32; without one, same"
    )
    overwrite: StrictBool = Field(False, description=_OVERWRITE)


class ResizeLoraBody(_SizeBody):
    """A request to make a LoRA smaller: one of rank, size and keep is needed."""

    lora: StrictStr = Field(..., description="a name of the host's list of LoRAs")


class CombineLorasBody(_SizeBody):
    """A request for one LoRA of several; exact without rank, size and keep."""

    loras: list[StrictStr] = Field(..., description=_SEVERAL)
    multipliers: list[Number] | None = Field(
        None, description="one per LoRA, in their order; without them, 1 each"
    )
    block_weights: list[StrictStr | Number | list[Number]] | None = Field(
        None, description=_BLOCK_WEIGHTS
    )


class ApplyLorasBody(StrictRequest):
    """A request for a checkpoint with LoRAs added to it, or taken away from it."""

    checkpoint: StrictStr = Field(..., description="a name of the host's list of checkpoints")
    loras: list[StrictStr] = Field(..., description=_SEVERAL)
    multipliers: list[Number] | None = Field(
        None, description="one per LoRA, in their order; without them, 1 each"
    )
    block_weights: list[StrictStr | Number | list[Number]] | None = Field(
        None, description=_BLOCK_WEIGHTS
    )
    name: StrictStr | None = Field(None, description=_NAME)
    overwrite: StrictBool = Field(False, description=_OVERWRITE)


class FitLoraBody(StrictRequest):
    """A request to fit a LoRA onto the shared ones of a run."""

    run: StrictStr = Field(..., description="name of a run of LoRAs")
    lora: StrictStr = Field(..., description="a name of the host's list of LoRAs")
    name: StrictStr | None = Field(
        None, description="its name in the run; without one, the file's name"
    )
    topup: StrictInt | StrictStr | None = Field(
        None,
        description="a private LoRA of what remains: a rank, or the share to be explained in all, such"
        ' as "95%"',
    )
    overwrite: StrictBool = Field(False, description="replace an earlier fit of this name")


class LoraResponse(BaseModel):
    """A LoRA of the host's list."""

    name: str = Field(..., description="the name that requests use")
    size: int = Field(..., description="0 where its file has gone")


class LorasResponse(BaseModel):
    """The host's list of LoRAs as it is now."""

    loras: list[LoraResponse]


class InspectedLoraResponse(BaseModel):
    """A LoRA as its header describes it."""

    name: str
    family: str = Field(..., description='such as "Stable Diffusion XL"; empty where it is unknown')
    rank: int = Field(..., description="the most that a layer has; 0 where it is unknown")
    problem: str | None = Field(None, description="why it cannot be used, else null")


class InspectedLorasResponse(BaseModel):
    """The inspected LoRAs, in the order of the request."""

    loras: list[InspectedLoraResponse]
