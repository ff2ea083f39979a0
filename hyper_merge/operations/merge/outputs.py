"""Stages the files of a merge: LoRAs, companions and texts; nothing is computed here."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.errors import NameTakenError, OutputError
from hyper_merge.loras.cards import CARD_SUFFIXES
from hyper_merge.loras.lora_file import write_lora
from hyper_merge.loras.metadata import CHECKPOINT, Lineage, LoraFile
from hyper_merge.loras.prompt_tags import companion_names, lora_names, private_names
from hyper_merge.operations.merge.companions import (
    companion_blocks,
    end_tensors,
    fit_companions,
    write_companion,
)
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.report_builder import FileSizes
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.runs.folders import MANIFEST, MULTIPLIERS, REPORT, Folders, Place
from hyper_merge.runs.manifest import RunManifest, RunSource
from hyper_merge.runs.report import CompanionGain, Report
from hyper_merge.runs.report_text import format_report
from hyper_merge.runtime.names import name_key, one_line
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.private_loras import PrivateLora


@dataclass(frozen=True, eq=False)
class MergeOutputs:
    """The files of one merge, staged in a transaction.

    Attributes:
        transaction: Takes the files, which appear together.
        place: Where they go.
        lineage: The origin that all of them record.
    """

    transaction: FileTransaction
    place: Place
    lineage: Lineage

    def lora_path(self, name: str) -> Path:
        """Returns the path of a LoRA or companion."""
        return self.place.loras / f"{name}.safetensors"

    def lora_files(self, preflight: Preflight, solved: SolvedMerge) -> dict[str, LoraFile]:
        """Returns the file of every shared LoRA by name: everything but its tensors."""
        ranks = solved.plan.recipe.ranks
        stems = [header.stem for header in preflight.inputs.headers]
        names = lora_names(self.place.run, ranks)
        multipliers = solved.evaluation.multipliers
        text = multipliers.get("text_encoder")
        return {
            name: LoraFile(
                lineage=self.lineage,
                run=self.place.run,
                index=block,
                count=len(names),
                rank=ranks[block],
                multipliers=_column(multipliers["unet"], block, stems),
                explained=1 - solved.evaluation.loss,  # of all differences
                dtype=solved.plan.dtype,
                text_multipliers=None if text is None else _column(text, block, stems),
                own_alpha=solved.factors.alphas[block],
            )
            for block, name in enumerate(names)
        }

    def named_private_loras(
        self, preflight: Preflight, solved: SolvedMerge
    ) -> dict[str, PrivateLora]:
        """Returns the private LoRAs by their names, which are distinct even without case."""
        stems = [header.stem for header in preflight.inputs.headers]
        ranks = {lora.checkpoint: lora.rank for lora in solved.private_loras}
        names = private_names(self.place.run, stems, ranks)
        return dict(zip(names, solved.private_loras, strict=True))

    def stage_loras(
        self,
        preflight: Preflight,
        files: Mapping[str, LoraFile],
        solved: SolvedMerge,
        progress: Progress,
    ) -> None:
        """Stages the shared LoRAs, without end layers, with their cards."""
        layers, factors = preflight.inputs.layout.layers, solved.factors.factors
        main = [layer for layer in layers if not layer.is_end]
        costs = {
            name: 2 * sum(up.nbytes + down.nbytes for up, down in pairs)  # hashed and written
            for name, pairs in zip(files, zip(*factors, strict=True), strict=True)
        }
        counter = progress.counter("writing the LoRAs", costs)
        for name, file in files.items():
            by_module = {
                layer.module: pairs[file.index]
                for layer, pairs in zip(layers, factors, strict=True)
            }
            tick = partial(counter.advance, name)
            write_lora(self.transaction, self.lora_path(name), main, by_module, file, tick)
            counter.finish(name)

    def stage_private_loras(self, preflight: Preflight, solved: SolvedMerge) -> None:
        """Stages the private LoRAs with their cards."""
        layers = preflight.inputs.layout.layers
        explained = solved.evaluation.explained().tolist()
        for name, lora in self.named_private_loras(preflight, solved).items():
            stem = preflight.inputs.headers[lora.checkpoint].stem
            file = LoraFile(
                lineage=self.lineage,
                run=self.place.run,
                index=0,
                count=1,
                rank=lora.rank,
                multipliers={stem: 1.0},
                explained=explained[lora.checkpoint],
                dtype=solved.plan.dtype,
                tops_up=stem,
                own_alpha=lora.alpha,
            )
            pairs = zip(layers, lora.factors, strict=True)
            by_module = {layer.module: pair for layer, pair in pairs}
            write_lora(self.transaction, self.lora_path(name), layers, by_module, file)

    def stage_companions(
        self,
        preflight: Preflight,
        files: Mapping[str, LoraFile],
        solved: SolvedMerge,
        progress: Progress,
    ) -> tuple[CompanionGain, ...]:
        """Stages the companions if there are any; returns the shares of norms and biases, by kind."""
        inputs, vectors, factors = preflight.inputs, preflight.norms_and_biases, solved.factors
        layers, lora_alpha = inputs.layout.layers, inputs.layout.family.lora_alpha
        blocks = companion_blocks(layers, factors, vectors)
        if not blocks:
            return ()
        multipliers = solved.evaluation.multipliers["unet"][:, blocks]
        companions = fit_companions(inputs, vectors, multipliers, progress.check)
        for block, tensors in zip(blocks, companions.tensors, strict=True):
            name, file = list(files.items())[block]
            ends = end_tensors(layers, factors, block, lora_alpha=lora_alpha)
            (path,) = map(self.lora_path, companion_names([name]))
            exact = preflight.recipe.exact
            write_companion(self.transaction, path, {**ends, **tensors}, file, exact)
        return companions.recovered

    def stage_texts(
        self,
        preflight: Preflight,
        report: Report,
    ) -> None:
        """Stages multipliers, report and manifest."""
        lines = (f"{one_line(row.name)}: {report.tags(row)}\n" for row in report.checkpoints)
        hashes = self.hashes(report)
        manifest = _manifest(preflight, self.place, self.lineage, report, hashes)
        folder = self.place.folder
        self.transaction.text(folder / MULTIPLIERS, "".join(lines))
        self.transaction.text(folder / REPORT, format_report(report))
        self.transaction.text(folder / MANIFEST, json.dumps(manifest.to_json(), indent=1) + "\n")

    def remove_outdated(self, folders: Folders, names: Sequence[str]) -> None:
        """Removes a replaced run's fits, and its LoRAs whose names are not among those given."""
        kept = {name_key(name) for name in names}  # on some file systems these are the very files
        for path in folders.lora_files_of(self.place.run):
            if name_key(path.stem) not in kept:
                self.transaction.remove(path)
        for path in folders.fit_files_of(self.place.run):
            self.transaction.remove(path)

    def file_sizes(self, preflight: Preflight, names: Sequence[str]) -> FileSizes:
        """Returns the bytes of the checkpoints, and of the files that take their place."""
        model = self.place.hyper_model
        exists = self.place.exists
        return FileSizes(
            before=sum(header.size for header in preflight.inputs.headers),
            average=model.stat().st_size if exists else self.transaction.size_of(model),
            loras=sum(self.transaction.size_of(self.lora_path(name)) for name in names),
        )

    def hashes(self, report: Report) -> dict[str, str]:
        """Returns the SHA-256 of the tensors' bytes, as hosts know it, by LoRA and companion."""
        return {
            name: self.transaction.metadata_of(self.lora_path(name))["sshs_model_hash"]
            for name in (*report.loras, *report.companions, *report.topups)
        }


def shared_names(
    preflight: Preflight, place: Place, solved: SolvedMerge | None = None
) -> tuple[str, ...]:
    """Returns the names of the shared LoRAs and, after them, of their companions.

    Args:
        preflight: the validated recipe.
        place: where the files go.
        solved: the solution; None before it is known, for all companions that there may be.
    """
    names = lora_names(place.run, preflight.recipe.ranks)
    layout, vectors = preflight.inputs.layout, preflight.norms_and_biases
    if solved is not None:
        blocks = companion_blocks(layout.layers, solved.factors, vectors)
        return (*names, *companion_names([names[block] for block in blocks]))
    has_ends = preflight.recipe.exact != "none" and layout.has_ends
    return (*names, *companion_names(names)) if has_ends or vectors else names


def require_free_names(
    place: Place, names: Sequence[str], folders: Folders, *, overwrite: bool
) -> None:
    """Returns if neither a LoRA of these names exists, nor a card of one.

    Raises:
        OutputError: one exists and may not be replaced, as is any LoRA of another run.
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


def _column(multipliers: Tensor, block: int, stems: Sequence[str]) -> dict[str, float]:
    return dict(zip(stems, multipliers[:, block].tolist(), strict=True))


def _manifest(
    preflight: Preflight,
    place: Place,
    lineage: Lineage,
    report: Report,
    hashes: Mapping[str, str],
) -> RunManifest:
    headers = preflight.inputs.read
    return RunManifest(
        name=place.run,
        created=lineage.date,
        family=lineage.family.name,
        recipe=lineage.recipe,
        settings=preflight.recipe.to_settings(),
        average_id=preflight.average_id,
        hyper_model=place.hyper_model.absolute(),
        sources=tuple(
            RunSource(header.path.absolute(), source.name, source.sha256, source.legacy_hash)
            for header, source in zip(headers, lineage.sources, strict=True)
        ),
        base_is_first_source=preflight.inputs.base is not None,
        report=report,
        hashes=hashes,
    )


def named_topups(outputs: FileTransaction, loras: Path, names: Collection[str]) -> dict[str, str]:
    """Returns the names of staged private LoRAs by the checkpoint that their metadata names.

    The report names these, not the LoRAs that were planned.

    Args:
        outputs: with the files.
        loras: folder of all LoRAs.
        names: of the private ones.

    Raises:
        OutputError: two files belong to one checkpoint, so that another would have no LoRA.
    """
    paths = {name: loras / f"{name}.safetensors" for name in names}
    named = {outputs.metadata_of(path).get(CHECKPOINT, ""): name for name, path in paths.items()}
    if len(named) != len(names):
        raise OutputError(
            f"expected a private LoRA for each of {len(names)} checkpoints, got files of"
            f" {', '.join(named)} in {loras}",
            hint="nothing is written: give the checkpoints' files names that are less alike",
        )
    return named
