"""Describes the figures of a merge, as FastAPI writes and documents them; for pydantic 1 and 2."""

from __future__ import annotations

from pydantic import BaseModel, Field


class PartResponse(BaseModel):
    """A section of the network."""

    name: str = Field(..., description='"IN00".."IN11", "MID", "OUT00".."OUT11", "TE00"..')
    which: str = Field(..., description='"unet" or "text_encoder"')
    energy: float = Field(..., description="share of all differences in the layers that lies here")
    lost: float = Field(..., description="share of all differences that stays unexplained here")


class CompanionGainResponse(BaseModel):
    """The share of a kind of tensor that the LoRAs' companions restore."""

    kind: str
    share: float


class EndLayersResponse(BaseModel):
    """The layers at the ends of the network, which only companions can hold."""

    share: float = Field(..., description="of all differences, as the loss weighs them")
    carried: bool = Field(..., description="whether the companions hold them")


class PrecisionLossResponse(BaseModel):
    """The loss that rounding adds in programs that hold the weights in half precision."""

    hosts: str
    added: float
    worst: float


class TrainingResponse(BaseModel):
    """What a training of the LoRAs came to, on inputs that it did not see."""

    rounds: int
    before: list[float] = Field(
        ...,
        description="by checkpoint: squared difference of the network's outputs, as a share of the"
        " average's",
    )
    after: list[float] = Field(..., description="the same after the training")


class ReportResponse(BaseModel):
    """The figures of a merge, in addition to those of its checkpoints."""

    method: str
    losses: list[float] = Field(..., description="after each sweep, before rounding")
    loss: float = Field(
        ...,
        description="of the written files: share of all differences in the layers that the shared"
        " LoRAs do not explain",
    )
    private_loss: float | None = Field(
        None,
        description="of private LoRAs of the same bytes; null where the loss has weights, and the"
        " weighted one stands beside it",
    )
    bound: float | None = Field(None, description="no LoRAs of these ranks go below; null likewise")
    not_carried: dict[str, float] = Field(..., description="share of all differences, by kind")
    bytes_before: int
    bytes_average: int
    bytes_loras: int
    curve: list[list[float]] = Field(
        ..., description="explained with the first 0, 1, ... LoRAs, by checkpoint"
    )
    similarity: list[list[float]] = Field(..., description="cosines of the differences")
    parts: list[PartResponse]
    recovered: list[CompanionGainResponse]
    groups: list[list[str]] = Field(..., description="unlike groups of checkpoints, if any")
    between_groups: float = Field(
        ..., description="share of all differences that an average for each group would take away"
    )
    rounding: list[PrecisionLossResponse]
    metric: str = Field(..., description="the recipe's layer_weights; empty: unknown")
    weighted_loss: float = Field(..., description="the loss with these weights; 0: unknown")
    weighted_private_loss: float = Field(..., description="the same of private LoRAs")
    shared_fidelity: list[float] = Field(
        ...,
        description="by checkpoint: weighted share that the shared LoRAs explain; empty: unknown",
    )
    weighted_bound: float = Field(..., description="the same of the bound")
    training: TrainingResponse | None = Field(None, description="null without one")
    ends: EndLayersResponse | None = Field(
        None, description="null where hosts take none from a LoRA"
    )
