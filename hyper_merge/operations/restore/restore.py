"""The way back: hyper-model and LoRAs, added up, as a checkpoint of its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.compatibility import check_compatible
from hyper_merge.checkpoints.io.atomic_file import require_free
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.prediction_type import find_config_file, v_prediction_config
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import OutputError, RecipeError
from hyper_merge.loras.metadata import KIND, RUN, checkpoint_metadata
from hyper_merge.loras.stack import LoraStack
from hyper_merge.operations.restore.reconstruction import ReconstructionErrors, write_restored
from hyper_merge.recipe.fields import FIELD_PARSERS
from hyper_merge.recipe.parsing import optional, parse_flag, parse_path
from hyper_merge.recipe.plain_values import describe_value
from hyper_merge.recipe.request import Parsers, PlaceOf, check_request, parse_request
from hyper_merge.runs.folders import Folders, metadata_of, path_exists, require_no_source
from hyper_merge.runs.integrity import require_family, require_hyper_model, require_own
from hyper_merge.runs.manifest import Run, load_run
from hyper_merge.runs.originals import locate_sources
from hyper_merge.runs.report import PartLoss, part_losses
from hyper_merge.runs.weighted_loras import (
    WeightedLora,
    find_row,
    lineage_of_run,
    source_of,
    weighted_loras_of_mixture,
)
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import file_stem, prompt_word, unique_name
from hyper_merge.runtime.progress import Progress

_SHARE: Final = re.compile(r"\s*(?P<name>[^:]+?)\s*:\s*(?P<share>[-+]?(\d+\.?\d*|\.\d+))\s*(,|$)")
_WORST: Final = 3  # sections that are named
_OWN: Final = "hyper_merge."
_RESTORES: Final = _OWN + "restores"
_RESTORED: Final = "restored"  # the kind of these files


@dataclass(frozen=True)
class RestoreRequest:
    """What the user asks for.

    Attributes:
        run: Its name.
        shares: By checkpoint of the run; `{name: 1.0}` for that checkpoint itself.
        to: Path of the file; None for one among the checkpoints, named after what it is.
        dtype: Of the file; None for the run's.
        overwrite: Whether an existing file may be replaced.
    """

    run: str
    shares: Mapping[str, float]
    to: Path | None = None
    dtype: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_request(self, _PARSERS)

    @classmethod
    def parse(cls, values: Mapping[str, object], where: PlaceOf) -> RestoreRequest:
        """Returns the request that plain values describe; `where` gives the place of each.

        Raises:
            RecipeError: a value is refused.
        """
        return parse_request(cls, values, _PARSERS, where)


def _parse_shares(value: object) -> dict[str, float]:
    """Returns shares by checkpoint, one or more, all of them finite."""
    if isinstance(value, Mapping) and value and all(map(math.isfinite, value.values())):
        return dict(value)
    raise RecipeError("expected one checkpoint or more, with finite shares", key="mix")


_PARSERS: Final[Parsers] = {
    "run": str,
    "shares": _parse_shares,
    "to": optional(parse_path),
    "dtype": optional(FIELD_PARSERS["dtype"]),
    "overwrite": parse_flag,
}


@dataclass(frozen=True)
class RestoreError:
    """How near a restored checkpoint is to its original; shares are of squared norms ("energy")."""

    explained: float  # of the original's differences from the hyper-model in the layers
    everything: float  # the same of all its tensors
    reported: float  # in the layers, by the run's report or the fit
    parts: tuple[PartLoss, ...]  # in the network's order


@dataclass(frozen=True)
class RestoreResult:
    """The written file, and how near it is."""

    path: Path
    run: str
    hyper_model: str  # its file's name
    shares: Mapping[str, float]
    size: int  # bytes
    dtype: str
    compared: RestoreError | None
    problem: str  # why it could not be compared; empty where it was


def parse_mix(words: str) -> dict[str, float]:
    """Shares by checkpoint from a text such as `A:0.5, B:0.5`; a name may hold commas.

    Raises:
        RecipeError: the text is something else, or names a checkpoint twice.
    """
    shares: dict[str, float] = {}
    place = 0
    while place < len(words):
        match = _SHARE.match(words, place)
        if match is None or match["name"] in shares:
            twice = " twice" if match else ""
            raise RecipeError(
                f'expected checkpoints with their shares, such as "A:0.5,B:0.5", got'
                f" {describe_value(words[place:])}{twice}"
            )
        shares[match["name"]] = float(match["share"])
        place = match.end()
    if not shares:
        raise RecipeError('expected checkpoints with their shares, such as "A:0.5,B:0.5"')
    return shares


@dataclass(frozen=True, eq=False)
class _Job:
    """What is known before the first tensor is read."""

    run: Run
    shares: Mapping[str, float]  # by the names in the run's report
    hashes: Mapping[str, str]  # SHA-256 of the originals, by the same names
    terms: tuple[WeightedLora, ...]
    inputs: MergeInputs  # the hyper-model alone
    path: Path

    @property
    def whole(self) -> str | None:
        """The checkpoint that this is, if it is no mixture."""
        (first, share), *others = self.shares.items()
        return first if share == 1.0 and not others else None


def run_restore(wanted: RestoreRequest, folders: Folders, progress: Progress) -> RestoreResult:
    """Writes the checkpoint; on any failure every existing file stays as it was.

    Args:
        wanted: what the user asks for.
        folders: where the run is, its LoRAs and hyper-model.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: an unknown run or checkpoint, one whose files are missing or were changed, a
            place that is taken, a full disk, or the user's interrupt.
    """
    job = _examined(wanted, folders)
    checking, finding, adding = progress.split([1.0, 1.0 if job.whole else 0.0, 6.0])
    require_own(job.run, [term.path for term in job.terms], checking)
    original, reported, problem = _original(job, folders, finding)
    header = job.inputs.headers[0]
    with FileTransaction(overwrite=wanted.overwrite) as outputs, ExitStack() as stack:
        paths = [term.path for term in job.terms]
        added = stack.enter_context(LoraStack(paths, header, job.inputs.layout))
        writer = stack.enter_context(_writer(outputs, job, overwrite=wanted.overwrite))
        errors = write_restored((job.inputs, job.terms), added, writer, original, adding)
        progress.report("putting the file in place", 1.0)
    return RestoreResult(
        path=job.path,
        run=job.run.name,
        hyper_model=job.run.hyper_model.name,
        shares=job.shares,
        size=job.path.stat().st_size,
        dtype=str(job.inputs.dtype).removeprefix("torch."),
        compared=_compared(job, errors, reported) if original else None,
        problem=problem,
    )


def format_restore(restored: RestoreResult) -> str:
    """The outcome as plain text."""
    what = " + ".join(f"{share:g} {name}" for name, share in restored.shares.items())
    lines = [f"{restored.path.stem}: {what}, of the run {restored.run}"]
    rest = 1 - sum(restored.shares.values())
    if abs(rest) > 1e-9:
        lines.append(
            f"note: the shares add up to {1 - rest:g}; as in prompts, the hyper-model has the rest"
            f" ({rest:g})"
        )
    found = restored.compared
    lines += _comparison(found) if found else [f"the error cannot be measured: {restored.problem}"]
    lines.append(
        f"VAE, embeddings and all else that LoRAs do not carry are those of {restored.hyper_model}"
    )
    lines.append(f"checkpoint: {restored.path} ({format_size(restored.size)}, {restored.dtype})")
    return "\n".join(lines)


def _comparison(found: RestoreError) -> list[str]:
    worst = sorted(found.parts, key=lambda part: -part.lost)[:_WORST]
    left = ", ".join(f"{part.name} {part.lost:.2%}" for part in worst if part.lost > 0)
    return [
        "measured against the original, of its differences from the hyper-model:",
        f"  in the layers {found.explained:.2%} is back (the report says {found.reported:.2%})",
        f"  in all tensors {found.everything:.2%}",
        f"  what remains, by section: {left or 'nothing'}",
    ]


def _examined(wanted: RestoreRequest, folders: Folders) -> _Job:
    run = load_run(folders, wanted.run)
    family = require_family(run)
    shares = _known(run, wanted.shares)
    hashes = {name: source_of(run, name).sha256 for name in shares}
    header = read_header(require_hyper_model(run))
    path = wanted.to or folders.models / f"{_free_stem(run, shares, hashes, folders)}.safetensors"
    if path.suffix != ".safetensors":
        raise OutputError(f"expected a path that ends with .safetensors, got {path}")
    needed = (run.hyper_model, *run.loras, *(each.path for each in run.sources))
    require_no_source(path, filter(path_exists, needed))
    folders.require_unused(path, "")
    require_free(path, overwrite=wanted.overwrite)
    inputs = MergeInputs(
        headers=(header,),
        base=None,
        layout=layout_of(header, family),
        weights=(1.0,),
        dtype=getattr(torch, wanted.dtype or run.recipe.dtype),
    )
    require_disks({path.parent: sum(info.nbytes for info in inputs.outputs().values())})
    return _Job(run, shares, hashes, weighted_loras_of_mixture(run, shares), inputs, path)


def _known(run: Run, shares: Mapping[str, float]) -> dict[str, float]:
    """The same shares by the names of the run's report."""
    found: dict[str, float] = {}
    for name, share in shares.items():
        row, _ = find_row(run, name)
        found[row.name] = found.get(row.name, 0.0) + share
    return found


def _free_stem(
    run: Run, shares: Mapping[str, float], hashes: Mapping[str, str], folders: Folders
) -> str:
    """A name for this restoration: the same each time, and that of no other one."""
    own = _restores(shares, hashes)

    def is_taken(stem: str) -> bool:
        found = metadata_of(folders.models / f"{stem}.safetensors")
        same = (found.get(RUN), found.get(_RESTORES)) == (run.name, own)
        return found.get(KIND) == _RESTORED and not same

    return unique_name(_stem(run, shares), is_taken)


def _stem(run: Run, shares: Mapping[str, float]) -> str:
    (first, share), *others = shares.items()
    if share == 1.0 and not others:
        return f"{file_stem(first)}-restored"
    return prompt_word(f"{run.name}-" + "-".join(f"{name} {x:g}" for name, x in shares.items()))


def _restores(shares: Mapping[str, float], hashes: Mapping[str, str]) -> str:
    """What a restored checkpoint says that it is."""
    parts = [
        {"name": name, "share": share, "sha256": hashes[name]} for name, share in shares.items()
    ]
    return json.dumps(parts, ensure_ascii=False)


def _original(job: _Job, folders: Folders, progress: Progress) -> tuple[Header | None, float, str]:
    """The file that this should be, if it is there; what its report says; why it is not there."""
    if job.whole is None:
        return None, 0.0, "a mixture has no original"
    row, fitted = find_row(job.run, job.whole)
    (found,) = locate_sources([source_of(job.run, row.name)], folders, progress)
    if found.state != "there":
        gone = "was changed since" if found.state == "changed" else "is not there"
        return None, 0.0, f"{found.source.name} {gone}, only its hash is known"
    header = read_header(found.path)
    layout = job.inputs.layout
    check_compatible([job.inputs.headers[0], header], [layout, layout_of(header, layout.family)])
    return header, fitted.explained if fitted else row.explained, ""


def _writer(outputs: FileTransaction, job: _Job, *, overwrite: bool) -> SafetensorsWriter:
    header, family = job.inputs.headers[0], job.inputs.layout.family
    beside = find_config_file(job.path)
    config = v_prediction_config(header, family)
    if config is not None:
        outputs.text(beside, config)
    elif overwrite and beside.exists():
        outputs.remove(beside)  # that of the file which is replaced
    return outputs.safetensors(job.path, job.inputs.outputs(), _metadata(job))


def _metadata(job: _Job) -> dict[str, str]:
    rows = {term.path.stem: [term.multiplier, term.text_multiplier] for term in job.terms}
    return {
        **checkpoint_metadata(lineage_of_run(job.run, job.path.stem), _RESTORED),
        RUN: job.run.name,
        _OWN + "hyper_model": job.run.hyper_model.name,
        _RESTORES: _restores(job.shares, job.hashes),
        _OWN + "multipliers": json.dumps(rows, ensure_ascii=False),
    }


def _compared(job: _Job, errors: ReconstructionErrors, reported: float) -> RestoreError:
    pairs = torch.tensor([errors.layers[i] for i in sorted(errors.layers)], dtype=torch.float64)
    energies, left = pairs.unbind(1)
    inside = (float(energies.sum()), float(left.sum()))
    everything = tuple(a + b for a, b in zip(inside, errors.outside, strict=True))
    return RestoreError(
        explained=_share(*inside),
        everything=_share(*everything),
        reported=reported,
        parts=part_losses(job.inputs.layout.layers, energies, left),
    )


def _share(energy: float, left: float) -> float:
    return 1 - left / energy if energy > 0 else 1.0
