"""Describes the request for a fit, and validates it against the headers of the run and the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from hyper_merge.analysis.inputs import MergeInputs, multiplier_groups
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.fingerprint import fingerprint
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.operations.merge.preflight import common_layout
from hyper_merge.operations.sensitivities import AverageNetwork
from hyper_merge.recipe.fields import FIELD_PARSERS
from hyper_merge.recipe.parsing import PrivateLoraTarget, optional, parse_name, parse_path
from hyper_merge.recipe.request import Parsers, Request
from hyper_merge.runs.folders import AVERAGE_ID, Folders
from hyper_merge.runs.integrity import require_family, require_hyper_model
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runtime.devices import resolve_device


@dataclass(frozen=True)
class FitRequest(Request):
    """The request for a fit.

    Attributes:
        run: Its name.
        checkpoint: The file that is to be fitted.
        name: By which the run knows it; None for the file's.
        topup: A private LoRA of what remains, or None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: Whether an earlier fit of this name may be replaced.
        seed: Of everything random.
        damaged: Whether to `refuse` a file that looks damaged or unfinished, or to `accept` it.
    """

    run: str
    checkpoint: Path
    name: str | None = None
    topup: PrivateLoraTarget | None = None
    device: str = "auto"
    overwrite: bool = False
    seed: int = 0
    damaged: Literal["refuse", "accept"] = "refuse"

    PARSERS: ClassVar[Parsers] = {
        **FIELD_PARSERS,
        "run": str,
        "checkpoint": parse_path,
        "name": optional(parse_name),
    }


@dataclass(frozen=True, eq=False)
class PreparedFit:
    """The request's run and files, before the first tensor is read."""

    run: Run
    name: str
    inputs: MergeInputs  # the hyper-model as the base, and the checkpoint
    options: PassOptions
    groups: Mapping[str, list[int]]  # layers by the part whose multipliers they share
    topup_stem: str = ""  # its private LoRA's name without the rank, if one is requested

    @property
    def layers_of(self) -> dict[str, list[int]]:
        """The layers by their own part."""
        return multiplier_groups(self.inputs.layout.layers, separate=True)

    def network(self, folders: Folders) -> AverageNetwork | None:
        """Returns the hyper-model's network, if the run counts errors by what they do to its output."""
        if self.run.report.metric != "output":
            return None
        header, _ = self.inputs.read
        average_id = header.metadata.get(AVERAGE_ID) or fingerprint(header)
        return AverageNetwork.of(
            self.run.recipe.layer_weights,
            header,
            self.inputs.layout,
            average_id,
            folders.cache,
            self.run.recipe.seed,
        )


def validate_fit(request: FitRequest, folders: Folders) -> PreparedFit:
    """Returns the request with its run and its files.

    Raises:
        HyperMergeError: an unknown run, a hyper-model that is missing or was replaced, a file that
            is no checkpoint or of another family, a device that is absent.
    """
    run = load_run(folders, request.run)
    require_family(run)
    hyper_model = read_header(require_hyper_model(run))
    header = read_header(request.checkpoint)
    accepts_damaged = request.damaged == "accept"
    layout = common_layout([hyper_model, header], accepts_damaged=accepts_damaged)
    if not run.report.carries_ends:
        layout = layout.without_ends()
    inputs = MergeInputs(
        (header,), hyper_model, layout, (1.0,), torch.float32, accepts_damaged=accepts_damaged
    )
    separate = any(row.text_multipliers for row in run.report.checkpoints)
    return PreparedFit(
        run=run,
        name=request.name or header.stem,
        inputs=inputs,
        options=PassOptions(resolve_device(request.device), request.seed),
        groups=multiplier_groups(layout.layers, separate=separate),
    )
