"""What a merge writes: hyper-model, LoRAs, companions, texts; nothing is computed here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyper_merge import __version__
from hyper_merge.checkpoints.io.atomic_file import require_free
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.prediction_type import find_config_file, v_prediction_config
from hyper_merge.errors import NameTakenError
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.loras.lora_file import write_lora
from hyper_merge.loras.metadata import Lineage, LoraFile, checkpoint_metadata
from hyper_merge.loras.prompt_tags import companion_names, lora_names
from hyper_merge.operations.merge.companions import fit_companions, write_companion
from hyper_merge.operations.merge.host_precision import HostLora
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.report_builder import Sizes
from hyper_merge.runs.folders import AVERAGE_ID, MANIFEST, MULTIPLIERS, REPORT, Folders, Place
from hyper_merge.runs.manifest import MANIFEST_VERSION
from hyper_merge.runs.report import CompanionGain, Report
from hyper_merge.runs.report_text import format_report
from hyper_merge.runtime.names import distinct_words, name_key, one_line
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.evaluation import Evaluation
from hyper_merge.solver.private_loras import PrivateLora
from hyper_merge.solver.quantization import StoredFactors


@dataclass(frozen=True, eq=False)
class SolvedMerge:
    """What the files are made of."""

    blocks: StoredFactors
    found: Evaluation
    losses: tuple[float, ...]
    privates: tuple[PrivateLora, ...] = ()


def host_loras(solved: SolvedMerge) -> list[HostLora]:
    """All LoRAs in the order of the prompt: shared ones, then each checkpoint's own."""
    blocks, found = solved.blocks, solved.found.multipliers
    shared = [
        HostLora(factors, alpha, {part: rows[:, block] for part, rows in found.items()})
        for block, (factors, alpha) in enumerate(
            zip(zip(*blocks.factors, strict=True), blocks.alphas, strict=True)
        )
    ]
    once = torch.eye(len(found["unet"]))
    own = [
        HostLora(each.factors, each.alpha, {"unet": once[each.checkpoint]})
        for each in solved.privates
    ]
    return shared + own


def names_of(preflight: Preflight, place: Place) -> tuple[str, ...]:
    """Of the LoRAs and, after them, of their companions if there are any."""
    names = lora_names(place.run, preflight.recipe.ranks)
    return (*names, *companion_names(names)) if preflight.vectors else names


def topups_of(preflight: Preflight, place: Place, solved: SolvedMerge) -> dict[str, PrivateLora]:
    """The private LoRAs by name, no two of which are equal, even without case."""
    words = distinct_words([header.stem for header in preflight.inputs.headers])
    return {
        f"{place.run}_top-{words[each.checkpoint]}-{each.rank}": each for each in solved.privates
    }


def average_writer(
    outputs: FileTransaction, path: Path, preflight: Preflight, lineage: Lineage
) -> SafetensorsWriter:
    """Stages the hyper-model, with the configuration that some hosts need beside it."""
    metadata = {**checkpoint_metadata(lineage), AVERAGE_ID: preflight.average_id}
    config = v_prediction_config(preflight.inputs.headers[0], preflight.inputs.layout.family)
    if config is not None:
        outputs.text(find_config_file(path), config)
    elif preflight.recipe.overwrite and find_config_file(path).exists():
        outputs.remove(find_config_file(path))  # that of the file which is replaced
    return outputs.safetensors(path, preflight.inputs.outputs(), metadata)


def lora_files(
    preflight: Preflight, place: Place, lineage: Lineage, solved: SolvedMerge
) -> dict[str, LoraFile]:
    """What is written of every block besides its tensors, by name."""
    recipe = preflight.recipe
    stems = [header.stem for header in preflight.inputs.headers]
    names = lora_names(place.run, recipe.ranks)
    text = solved.found.multipliers.get("text_encoder")
    return {
        name: LoraFile(
            lineage=lineage,
            run=place.run,
            index=block,
            count=len(names),
            rank=recipe.ranks[block],
            multipliers=_column(solved.found.multipliers["unet"], block, stems),
            explained=1 - solved.found.loss,
            dtype=preflight.lora_dtype,
            text_multipliers=None if text is None else _column(text, block, stems),
            own_alpha=solved.blocks.alphas[block],
        )
        for block, name in enumerate(names)
    }


def _column(multipliers: Tensor, block: int, stems: Sequence[str]) -> dict[str, float]:
    return dict(zip(stems, multipliers[:, block].tolist(), strict=True))


def stage_loras(
    outputs: FileTransaction,
    preflight: Preflight,
    place: Place,
    files: Mapping[str, LoraFile],
    solved: SolvedMerge,
    progress: Progress,
) -> None:
    """Stages the shared LoRAs."""
    layers = preflight.inputs.layout.layers
    costs = {
        name: 2 * sum(up.nbytes + down.nbytes for up, down in factors)  # hashed and written
        for name, factors in zip(files, zip(*solved.blocks.factors, strict=True), strict=True)
    }
    counter = progress.counter("writing the LoRAs", costs)

    def tick(name: str, count: int) -> None:
        counter.add(name, count)
        counter.tell()

    for name, file in files.items():
        factors = {
            layer.module: solved.blocks.factors[index][file.index]
            for index, layer in enumerate(layers)
        }
        path = place.loras / f"{name}.safetensors"
        write_lora(outputs, path, layers, factors, file, partial(tick, name))
        counter.finish(name)


def stage_topups(
    outputs: FileTransaction,
    preflight: Preflight,
    place: Place,
    lineage: Lineage,
    solved: SolvedMerge,
) -> None:
    """Stages the private LoRAs."""
    layers = preflight.inputs.layout.layers
    explained = solved.found.explained().tolist()
    for name, private in topups_of(preflight, place, solved).items():
        stem = preflight.inputs.headers[private.checkpoint].stem
        file = LoraFile(
            lineage=lineage,
            run=place.run,
            index=0,
            count=1,
            rank=private.rank,
            multipliers={stem: 1.0},
            explained=explained[private.checkpoint],
            dtype=preflight.lora_dtype,
            tops_up=stem,
            own_alpha=private.alpha,
        )
        pairs = zip(layers, private.factors, strict=True)
        factors = {layer.module: pair for layer, pair in pairs}
        write_lora(outputs, place.loras / f"{name}.safetensors", layers, factors, file)


def stage_companions(
    outputs: FileTransaction,
    preflight: Preflight,
    place: Place,
    files: Mapping[str, LoraFile],
    found: Evaluation,
    progress: Progress,
) -> tuple[CompanionGain, ...]:
    """Writes the companions if any are wanted; returns what they bring back."""
    if not preflight.vectors:
        return ()
    vectors = preflight.vectors
    companions = fit_companions(
        preflight.inputs, vectors, found.multipliers["unet"], progress.check
    )
    names = companion_names(tuple(files))
    for name, file, tensors in zip(names, files.values(), companions.tensors, strict=True):
        path = place.loras / f"{name}.safetensors"
        write_companion(outputs, path, tensors, file, preflight.recipe.exact)
    return companions.recovered


def stage_texts(
    outputs: FileTransaction, preflight: Preflight, place: Place, lineage: Lineage, report: Report
) -> None:
    """Stages multipliers, report and manifest."""
    lines = (f"{one_line(row.name)}: {report.tags(row)}\n" for row in report.checkpoints)
    manifest = json.dumps(
        {**_manifest(preflight, place, lineage, report), "files": _hashes(outputs, place, report)},
        indent=1,
    )
    outputs.text(place.folder / MULTIPLIERS, "".join(lines))
    outputs.text(place.folder / REPORT, format_report(report))
    outputs.text(place.folder / MANIFEST, manifest + "\n")


def _manifest(
    preflight: Preflight, place: Place, lineage: Lineage, report: Report
) -> dict[str, Any]:
    """What later commands read: the run's files, sources and figures."""
    paths = [str(header.path.absolute()) for header in preflight.inputs.read]
    return {
        "version": MANIFEST_VERSION,
        "hyper_merge": __version__,
        "created": lineage.date,
        "name": place.run,
        "family": lineage.family.name,
        "recipe": dict(lineage.recipe),
        "settings": preflight.recipe.to_settings(),
        "average_id": preflight.average_id,
        "hyper_model": str(place.hyper_model.absolute()),
        "sources": [
            {
                "path": path,
                "name": each.name,
                "sha256": each.sha256,
                "legacy_hash": each.legacy_hash,
            }
            for path, each in zip(paths, lineage.sources, strict=True)
        ],
        "base_is_first_source": preflight.inputs.base is not None,
        "multipliers": {row.name: list(row.multipliers) for row in report.checkpoints},
        "text_multipliers": {row.name: list(row.text_multipliers) for row in report.checkpoints},
        "report": report.as_dict(),
    }


def _hashes(outputs: FileTransaction, place: Place, report: Report) -> dict[str, str]:
    """By the name of each LoRA and companion: SHA-256 of its tensors' bytes, as hosts know it."""
    return {
        name: outputs.metadata_of(place.loras / f"{name}.safetensors")["sshs_model_hash"]
        for name in (*report.loras, *report.companions, *report.topups)
    }


def remove_outdated(
    outputs: FileTransaction, folders: Folders, run: str, names: Sequence[str]
) -> None:
    """A replaced run's LoRAs whose names the new one has no use for, and its fits, go with it."""
    kept = {name_key(name) for name in names}  # on some file systems these are the very files
    for path in folders.lora_files_of(run):
        if name_key(path.stem) not in kept:
            outputs.remove(path)
    for path in folders.fit_files_of(run):
        outputs.remove(path)


def sizes_of(
    preflight: Preflight, place: Place, outputs: FileTransaction, names: Sequence[str]
) -> Sizes:
    """Bytes of the checkpoints, and of what is written of them."""
    model = place.hyper_model
    return Sizes(
        before=sum(header.size for header in preflight.inputs.headers),
        average=model.stat().st_size if place.exists else outputs.size_of(model),
        loras=sum(outputs.size_of(place.loras / f"{name}.safetensors") for name in names),
    )


def require_free_names(
    place: Place, names: Sequence[str], folders: Folders, *, overwrite: bool
) -> None:
    """Returns if no LoRA of these names is there, nor what is beside one.

    Raises:
        OutputError: one is, and may not be replaced: never one of another run.
    """
    owners = folders.lora_owners()
    for name in names:
        owner = owners.get(name_key(name), place.run)
        if owner != place.run:
            raise NameTakenError(
                f"{name} is a LoRA of the run {owner}",
                hint=f"choose another name than {place.run}, or delete the run {owner} first",
            )
        for suffix in (".safetensors", *CARD_SUFFIXES):
            require_free(place.loras / f"{name}{suffix}", overwrite=overwrite)
