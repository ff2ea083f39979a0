"""Describes the answers to requests, as FastAPI writes and documents them; for pydantic 1 and 2.

Shares are fractions 0..1 of squared norms, sizes are bytes. Files are given by their names alone. What
may be null is always there, but not required by the schema: FastAPI leaves nulls out of its examples.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from hyper_merge.api.report_models import ReportResponse


class RefusalResponse(BaseModel):
    """The reason why something was not done, as text."""

    detail: str


class CheckpointResponse(BaseModel):
    """A checkpoint of the host's list."""

    name: str = Field(..., description="the name that requests use")
    short_hash: str | None = Field(
        None, description="first 10 digits of its SHA-256, where the host has it"
    )
    size: int = Field(..., description="0 where its file has gone")


class CheckpointsResponse(BaseModel):
    """The host's list as it is now."""

    checkpoints: list[CheckpointResponse]


class InspectedFileResponse(BaseModel):
    """A checkpoint as its header describes it."""

    name: str
    family: str | None = Field(None, description='such as "SD 1.x"; null where it is unknown')
    size: int
    dtype: str
    short_hash: str | None = Field(
        None, description="first 10 digits of its SHA-256, where the host has it"
    )
    legacy_hash: str = Field(..., description="A1111's old 8 digits")
    vae: str | None = Field(None, description="fingerprint of its VAE: equal for equal VAEs")
    problem: str | None = Field(None, description="why it cannot be merged, else null")


class InspectionResponse(BaseModel):
    """The inspected checkpoints, in the order of the request."""

    checkpoints: list[InspectedFileResponse]


class HyperModelResponse(BaseModel):
    """The file that the LoRAs are added to."""

    name: str = Field(..., description="of the file")
    exists: bool = Field(..., description="whether it exists already and will be used again")
    size: int


class ExpectedResponse(BaseModel):
    """The expected share of a checkpoint that the LoRAs explain."""

    name: str
    explained: float = Field(..., description="share of its difference, approximately")


class ForecastResponse(BaseModel):
    """What shared LoRAs of a size would explain, approximately."""

    size: int = Field(..., description="of all LoRAs")
    ranks: list[int] = Field(..., description="one for each LoRA, in the mean of the layers")
    explained: float = Field(..., description="mean over the checkpoints")
    explained_worst: float = Field(..., description="of the checkpoint that is explained least")


class PlanResponse(BaseModel):
    """The files, time and memory that a merge would take."""

    name: str = Field(..., description="of the run, and first part of its LoRAs' names")
    family: str
    hyper_model: HyperModelResponse
    loras: list[str] = Field(
        ..., description="names in prompts; empty where the merge finds the ranks"
    )
    loras_size: int | None = Field(
        None, description="of all LoRAs; null where the merge finds it and nothing is known yet"
    )
    seconds: float = Field(..., description="approximately, less what earlier work saves")
    training: int = Field(..., description="rounds in which runs of the networks improve the LoRAs")
    memory: int = Field(..., description="at the peak, approximately")
    disk: int = Field(..., description="at most, with the analysis in the cache")
    warnings: list[str]
    expected: list[ExpectedResponse] | None = Field(
        None, description="known where these checkpoints have been analyzed before, else null"
    )
    curve: list[ForecastResponse] | None = Field(
        None, description="the same for other sizes, from small to large; null where unknown"
    )


class JobResponse(BaseModel):
    """A job, and how far it is."""

    id: str
    title: str
    outcome: Literal["running", "done", "stopped", "refused", "failed"]
    phase: str = Field(..., description="what is being done, as text")
    fraction: float = Field(..., description="of the whole, 0..1")
    seconds: float = Field(..., description="since the work itself began")
    seconds_left: float | None = Field(
        None, description="at the present pace; null while it is unknown"
    )
    stopping: bool = Field(..., description="whether it has been asked to stop")
    message: str = Field(..., description="why it ended, unless done")
    warnings: list[str]
    run: str | None = Field(None, description="name of the run that it made or added to, once done")
    result: dict[str, Any] | None = Field(
        None,
        description="files and figures of restore, export, extract, safe, compare, average, and of"
        " resizing, combining and adding LoRAs, once done; what they are is said with these routes",
    )


class JobsResponse(BaseModel):
    """The jobs of this process, the last one first."""

    jobs: list[JobResponse]


class RunSummaryResponse(BaseModel):
    """A summary of an earlier merge."""

    name: str
    kind: Literal["checkpoints", "loras"] = Field(..., description="what it was made of")
    created: str = Field(..., description="ISO 8601")
    family: str
    checkpoints: list[str] = Field(..., description="names of the checkpoints, or of the LoRAs")
    ranks: list[int]
    explained: float = Field(
        ...,
        description="mean over the checkpoints of their `explained`, as in the tab; the share"
        " of all differences in weights is 1 - loss of the run's report",
    )
    explained_worst: float = Field(..., description="of the checkpoint that is explained least")
    missing: list[str] = Field(..., description="files that are gone or were replaced since")


class RunsResponse(BaseModel):
    """All runs, the newest first."""

    runs: list[RunSummaryResponse]
    problems: list[str] = Field(..., description="what is wrong with runs that cannot be read")


class DeletionResponse(BaseModel):
    """The files of a deleted run."""

    files: list[str] = Field(..., description="names of the files that are gone")
    problems: list[str] = Field(..., description="what could not be removed in addition: styles")


class MixtureResponse(BaseModel):
    """The prompt of a mixture."""

    prompt: str = Field(..., description="what makes the hyper-model this mixture")
    hyper_model_title: str | None = Field(
        None, description="by which the host selects it; null where it is not in its list"
    )


class StylesResponse(BaseModel):
    """The prompt styles of a run that were saved or removed."""

    styles: list[str] = Field(..., description="their names")


class PresetResponse(BaseModel):
    """Settings of the tab's form under a name."""

    name: str
    settings: dict[str, Any] = Field(..., description="values as the tab shows them")


class PresetsResponse(BaseModel):
    """All presets, in the order in which they were first saved."""

    presets: list[PresetResponse]


class CacheResponse(BaseModel):
    """The cache of analyses."""

    size: int
    limit: int = Field(..., description="the size to which it is cut after each job")
    freed: int = Field(..., description="by this request")


class ComparisonsResponse(BaseModel):
    """The comparisons of a run, the newest first."""

    comparisons: list[str] = Field(..., description="their names")


class ComparisonFiguresResponse(BaseModel):
    """The distances of the pictures of one checkpoint, prompt and seed to those of the original."""

    checkpoint: str
    prompt: str
    seed: int
    pixels: dict[str, float] = Field(
        ..., description="mean difference, 0..255, by what was drawn: restored, average"
    )
    perceptual: dict[str, float] = Field(..., description="LPIPS, where the host can measure it")


class PictureSettingsResponse(BaseModel):
    """The settings of all pictures of a comparison."""

    prompts: list[str]
    negative: str
    sampler: str
    steps: int
    cfg_scale: float
    width: int
    height: int
    seeds: list[int]


class ComparisonResponse(BaseModel):
    """A comparison; its pictures have a route of their own."""

    run: str
    name: str
    created: str = Field(..., description="ISO 8601")
    host: str = Field(..., description="what drew the pictures")
    hyper_model: str = Field(..., description="name of the file")
    settings: PictureSettingsResponse
    tags: dict[str, str] = Field(..., description="added to the prompts, by checkpoint")
    originals: dict[str, str] = Field(..., description="names of files, as far as they were drawn")
    notes: list[str] = Field(..., description="a sentence for each original that was left out")
    figures: list[ComparisonFiguresResponse]
    measure: str = Field(
        ..., description="name of the perceptual figure; empty where there is none"
    )


class RunCheckpointResponse(BaseModel):
    """A checkpoint of a run, or fitted onto it: its prompt, and how close that comes."""

    name: str
    prompt: str = Field(..., description="what makes the hyper-model this checkpoint")
    explained: float = Field(
        ...,
        description="share of its difference in the layers, weighed as the loss does and the tab; after a"
        " training, of what the network does, measured for random prompts",
    )
    explained_in_weights: float = Field(..., description="the same unweighed, as a squared norm")
    explained_unet: float = Field(..., description="in weights")
    explained_text_encoder: float = Field(..., description="in weights")
    error: float = Field(..., description="norm of what is left, as a fraction of its difference's")
    not_carried: float = Field(
        ..., description="share of all its differences that lies in tensors that no LoRA carries"
    )
    multipliers: list[float] = Field(..., description="one per LoRA: of the UNet, or of everything")
    text_multipliers: list[float] = Field(..., description="of the text encoder, if it has its own")
    topups: list[str] = Field(..., description="private LoRAs, at most one, with multiplier 1")


class FitResponse(RunCheckpointResponse):
    """A checkpoint that was fitted later."""

    explained_with_topups: float = Field(..., description="as `explained`")
    created: str = Field(..., description="ISO 8601")


class RunResponse(BaseModel):
    """An earlier merge with its report and its prompts."""

    name: str
    kind: Literal["checkpoints", "loras"] = Field(..., description="what it was made of")
    created: str = Field(..., description="ISO 8601")
    family: str
    hyper_model: str = Field(..., description="name of the file; empty for a run of LoRAs")
    hyper_model_title: str | None = Field(
        None, description="by which the host selects it; null where it is not in its list"
    )
    loras: list[str] = Field(..., description="names in prompts, in the order of the multipliers")
    companions: list[str] = Field(..., description="names in prompts; empty without companions")
    missing: list[str] = Field(..., description="files that are gone or were replaced since")
    settings: dict[str, str] = Field(..., description="the recipe, as text")
    checkpoints: list[RunCheckpointResponse]
    report: ReportResponse
    fits: list[FitResponse] = Field(..., description="checkpoints that were fitted later")
    problems: list[str] = Field(..., description="what is wrong with fits that cannot be read")
