"""Restores a checkpoint: hyper-model and LoRAs, added up, as a standalone file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.compatibility import check_compatible
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.checkpoints.prediction_type import find_config_file, v_prediction_config
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition.linalg import share
from hyper_merge.errors import OutputError
from hyper_merge.loras.metadata import KIND, RUN, checkpoint_metadata
from hyper_merge.loras.stack import LoraStack
from hyper_merge.operations.restore.reconstruction import ReconstructionErrors, write_restored
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.runs.folders import Folders, metadata_of, require_no_source
from hyper_merge.runs.integrity import require_family, require_hyper_model, require_own
from hyper_merge.runs.originals import locate_sources
from hyper_merge.runs.paths import path_exists
from hyper_merge.runs.report import PartLoss, part_losses
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runs.weighted_loras import (
    WeightedLora,
    find_row,
    lineage_of_run,
    source_of,
    weighted_loras_of_mixture,
)
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.names import file_stem, prompt_word, unique_name
from hyper_merge.runtime.progress import Progress

_OWN: Final = "hyper_merge."
_RESTORES: Final = _OWN + "restores"
_RESTORED: Final = "restored"  # the kind of these files


@dataclass(frozen=True)
class RestoreError:
    """The distance of a restored checkpoint from its original; shares are of squared norms."""

    explained: float  # of the original's differences from the hyper-model in the layers
    everything: float  # the same of all its tensors
    reported: float  # in the layers, by the run's report or the fit
    parts: tuple[PartLoss, ...]  # in the network's order


@dataclass(frozen=True)
class RestoreResult:
    """The written file, and how close it is to its original."""

    path: Path
    run: str
    hyper_model: str  # its file's name
    shares: Mapping[str, float]
    size: int  # bytes
    dtype: str
    compared: RestoreError | None
    problem: str  # why it could not be compared; empty where it was


@dataclass(frozen=True, eq=False)
class _Restoration:
    """The request's run and files, before the first tensor is read."""

    run: Run
    shares: Mapping[str, float]  # by the names in the run's report
    hashes: Mapping[str, str]  # SHA-256 of the originals, by the same names
    loras: tuple[WeightedLora, ...]
    inputs: MergeInputs  # the hyper-model alone
    path: Path

    @property
    def whole(self) -> str | None:
        """The name of the checkpoint that this is; None for a mixture."""
        (first, share), *others = self.shares.items()
        return first if share == 1.0 and not others else None


def run_restore(request: RestoreRequest, folders: Folders, progress: Progress) -> RestoreResult:
    """Writes the checkpoint; on any failure every existing file stays as it was.

    Args:
        request: run, files and options.
        folders: where the run is, its LoRAs and hyper-model.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: an unknown run or checkpoint, one whose files are missing or were changed, a
            place that is taken, a full disk, or the user's interrupt.
    """
    restoration = _prepare(request, folders)
    checking, finding, adding = progress.split([1.0, 1.0 if restoration.whole else 0.0, 6.0])
    paths = [lora.path for lora in restoration.loras]
    require_own(restoration.run, paths, checking)
    original, reported, problem = _find_original(restoration, folders, finding)
    header = restoration.inputs.headers[0]
    with FileTransaction(overwrite=request.overwrite) as outputs, ExitStack() as stack:
        loras = stack.enter_context(LoraStack(paths, header, restoration.inputs.layout))
        writer = stack.enter_context(_writer(outputs, restoration, overwrite=request.overwrite))
        errors = write_restored(
            restoration.inputs, restoration.loras, loras, writer, original, adding
        )
        progress.report("putting the file in place", 1.0)
    return RestoreResult(
        path=restoration.path,
        run=restoration.run.name,
        hyper_model=restoration.run.hyper_model.name,
        shares=restoration.shares,
        size=restoration.path.stat().st_size,
        dtype=str(restoration.inputs.dtype).removeprefix("torch."),
        compared=_restore_error(restoration, errors, reported) if original else None,
        problem=problem,
    )


def _prepare(request: RestoreRequest, folders: Folders) -> _Restoration:
    run = load_run(folders, request.run)
    family = require_family(run)
    shares = _shares_by_report(run, request.shares)
    hashes = {name: source_of(run, name).sha256 for name in shares}
    header = read_header(require_hyper_model(run))
    path = request.to or folders.models / f"{_free_stem(run, shares, hashes, folders)}.safetensors"
    if path.suffix != ".safetensors":
        raise OutputError(f"expected a path that ends with .safetensors, got {path}")
    needed = (run.hyper_model, *run.loras, *(source.path for source in run.sources))
    require_no_source(path, filter(path_exists, needed))
    folders.require_unused(path, "")
    require_free(path, overwrite=request.overwrite)
    layout = layout_of(header, family)
    inputs = MergeInputs(
        headers=(header,),
        base=None,
        layout=layout if run.report.carries_ends else layout.without_ends(),
        weights=(1.0,),
        dtype=getattr(torch, request.dtype or run.recipe.dtype),
    )
    require_disks({path.parent: sum(info.nbytes for info in inputs.outputs().values())})
    return _Restoration(run, shares, hashes, weighted_loras_of_mixture(run, shares), inputs, path)


def _shares_by_report(run: Run, shares: Mapping[str, float]) -> dict[str, float]:
    """Returns the shares by the names of the run's report."""
    sums: dict[str, float] = {}
    for name, part in shares.items():
        row, _ = find_row(run, name)
        sums[row.name] = sums.get(row.name, 0.0) + part
    return sums


def _free_stem(
    run: Run, shares: Mapping[str, float], hashes: Mapping[str, str], folders: Folders
) -> str:
    """Returns a name for this restoration: the same every time, and never that of another one."""
    identity = _restores(shares, hashes)

    def is_taken(stem: str) -> bool:
        metadata = metadata_of(folders.models / f"{stem}.safetensors")
        is_same = (metadata.get(RUN), metadata.get(_RESTORES)) == (run.name, identity)
        return metadata.get(KIND) == _RESTORED and not is_same

    return unique_name(_stem(run, shares), is_taken)


def _stem(run: Run, shares: Mapping[str, float]) -> str:
    (first, share), *others = shares.items()
    if share == 1.0 and not others:
        return f"{file_stem(first)}-restored"
    return prompt_word(f"{run.name}-" + "-".join(f"{name} {x:g}" for name, x in shares.items()))


def _restores(shares: Mapping[str, float], hashes: Mapping[str, str]) -> str:
    """Returns the metadata that tells which checkpoint or mixture a file is."""
    parts = [
        {"name": name, "share": share, "sha256": hashes[name]} for name, share in shares.items()
    ]
    return json.dumps(parts, ensure_ascii=False)


def _find_original(
    restoration: _Restoration, folders: Folders, progress: Progress
) -> tuple[Header | None, float, str]:
    """Returns the original or None, its reported share, and why the original is missing."""
    if restoration.whole is None:
        return None, 0.0, "a mixture has no original"
    row, fit = find_row(restoration.run, restoration.whole)
    (located,) = locate_sources([source_of(restoration.run, row.name)], folders, progress)
    if located.state != "there":
        state = "was changed since" if located.state == "changed" else "is not there"
        return None, 0.0, f"{located.source.name} {state}, only its hash is known"
    header = read_header(located.path)
    layout = restoration.inputs.layout
    check_compatible(
        [restoration.inputs.headers[0], header], [layout, layout_of(header, layout.family)]
    )
    return header, fit.explained if fit else row.explained, ""


def _writer(
    outputs: FileTransaction, restoration: _Restoration, *, overwrite: bool
) -> SafetensorsWriter:
    header, family = restoration.inputs.headers[0], restoration.inputs.layout.family
    config_file = find_config_file(restoration.path)
    config = v_prediction_config(header, family)
    if config is not None:
        outputs.text(config_file, config)
    elif overwrite and config_file.exists():
        outputs.remove(config_file)  # it belongs to the file that is replaced
    return outputs.safetensors(
        restoration.path, restoration.inputs.outputs(), _metadata(restoration)
    )


def _metadata(restoration: _Restoration) -> dict[str, str]:
    rows = {lora.path.stem: [lora.multiplier, lora.text_multiplier] for lora in restoration.loras}
    return {
        **checkpoint_metadata(lineage_of_run(restoration.run, restoration.path.stem), _RESTORED),
        RUN: restoration.run.name,
        _OWN + "hyper_model": restoration.run.hyper_model.name,
        _RESTORES: _restores(restoration.shares, restoration.hashes),
        _OWN + "multipliers": json.dumps(rows, ensure_ascii=False),
    }


def _restore_error(
    restoration: _Restoration, errors: ReconstructionErrors, reported: float
) -> RestoreError:
    pairs = torch.tensor([errors.layers[i] for i in sorted(errors.layers)], dtype=torch.float64)
    energies, left = pairs.unbind(1)
    inside = (float(energies.sum()), float(left.sum()))
    everything = tuple(a + b for a, b in zip(inside, errors.outside, strict=True))
    return RestoreError(
        explained=1 - share(inside[1], inside[0]),
        everything=1 - share(everything[1], everything[0]),
        reported=reported,
        parts=part_losses(restoration.inputs.layout.layers, energies, left),
    )
