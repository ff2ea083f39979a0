"""Makes one LoRA of several, or of one: exact by concatenation, or cut to fewer ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD
from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.decomposition.linalg import share
from hyper_merge.decomposition.rank_allocation import ranks_within, spread_to_fit
from hyper_merge.errors import ExtractionError, RecipeError
from hyper_merge.loras.input_lora import InputLora, stored_dtype
from hyper_merge.loras.lora_file import StoredFormat, lora_bytes, stage_factors
from hyper_merge.loras.metadata import Lineage, LoraFile, lora_metadata
from hyper_merge.loras.weighted_sum import StoredSum, WeightedSum
from hyper_merge.operations.loras.inputs import LoraSet, read_loras
from hyper_merge.operations.loras.request import CombineRequest
from hyper_merge.runs.folders import require_no_source
from hyper_merge.runs.hash_cache import current_time, hash_sources
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.parallel import map_with_progress
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.allowance import LoraFormat

# Of a single LoRA: what it says of itself stays true of it in another size.
_CARRIED: Final = (
    *("ss_tag_frequency", "modelspec.trigger_phrase", "modelspec.usage_hint"),
    *("modelspec.author", "modelspec.description", "modelspec.license", "modelspec.tags"),
)
_HASH: Final = "0" * 64


@dataclass(frozen=True)
class CombineResult:
    """The LoRA, and how much of the exact sum it holds."""

    path: Path
    loras: tuple[str, ...]  # file names without suffix
    multipliers: tuple[float, ...]
    rank: int  # the most that a layer has
    mean_rank: float
    layers: int
    kept: float  # share of the exact sum's squared norm, by the file as written
    parts: Mapping[str, float]  # the kept share of each part of the network
    size_before: int  # bytes of all files
    size: int


def run_combine(request: CombineRequest, progress: Progress) -> CombineResult:
    """Writes the LoRA; on any failure every existing file stays as it was.

    Args:
        request: files and options.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: a file is no LoRA or does not go with the others, the place is taken, the
            size is too small, a full disk, or the user's interrupt.
    """
    loras = read_loras(request.loras, accepts_damaged=request.accepts_damaged)
    for warning in loras.warnings:
        progress.warn(warning)
    request.require_blocks_of(loras.family)
    path = request.path
    require_no_source(path, request.loras)
    require_free(path, overwrite=request.overwrite)
    hashing, looking, cutting, writing = progress.split((1.0, 2.0 * request.cuts, 2.0, 1.0))
    with FileTransaction(overwrite=request.overwrite) as outputs, ExitStack() as stack:
        files = [stack.enter_context(InputLora(modules)) for modules in loras.files]
        total = WeightedSum(files, request.multipliers_in, request.rank)
        combination = _Combination(request, loras, total, path)
        lineage = combination.lineage(hashing)
        ranks = combination.choose_ranks(lineage, looking)
        file = combination.file(lineage, max(ranks.values()))
        sums = combination.sums(ranks, file, cutting)
        combination.stage(outputs, sums, file, writing)
        return combination.result(sums, outputs.size_of(path))


@dataclass(frozen=True, eq=False)
class _Combination:
    """A sum of LoRAs on its way into a file."""

    request: CombineRequest
    loras: LoraSet
    total: WeightedSum
    path: Path

    @property
    def dtype(self) -> torch.dtype:
        """The type of the factors."""
        word = self.request.dtype
        return stored_dtype(self.loras.files) if word == "same" else DTYPES_BY_WORD[word]

    def lineage(self, progress: Progress) -> Lineage:
        """Returns the origin of the file; hashes the LoRAs."""
        headers = self.loras.headers
        bases = {header.metadata.get("ss_sd_model_name", "") for header in headers}
        base = bases.pop() if len(bases) == 1 else ""
        return Lineage(
            name=base.removesuffix(".safetensors"),
            family=self.loras.family,
            recipe=_recipe(self.request),
            sources=hash_sources(headers, None, progress),
            date=current_time(),
            of_loras=True,
        )

    def choose_ranks(self, lineage: Lineage, progress: Progress) -> dict[str, int]:
        """Returns the rank of every layer that keeps any.

        Raises:
            RecipeError: the size is too small for any.
            ExtractionError: nothing is left: the LoRAs cancel each other, or are zero.
        """
        ranked = self.total.ranks()
        if not ranked:
            raise ExtractionError("these LoRAs add up to nothing", hint="there is nothing to write")
        if self.request.size is None and self.request.keep is None:
            return {name: rank for name, (_, rank) in ranked.items()}
        layers = [layer for layer, _ in ranked.values()]
        spectra = self._map("measuring the layers", self.total.spectrum, layers, progress)
        if not any(float(values.sum()) > 0 for values in spectra):
            raise ExtractionError("these LoRAs add up to nothing", hint="there is nothing to write")
        chosen = (
            self._ranks_of_size(layers, spectra, lineage)
            if self.request.size is not None
            else self._ranks_of_share(layers, spectra)
        )
        pairs = zip(layers, chosen, strict=True)
        return {layer.module: rank for layer, rank in pairs if rank}

    def _ranks_of_share(self, layers: Sequence[Layer], spectra: Sequence[Tensor]) -> list[int]:
        everything = sum(float(values.sum()) for values in spectra)
        left = (1 - (self.request.keep or 1.0)) * everything
        costs = [float(layer.m + layer.n) for layer in layers]
        return ranks_within(spectra, costs, max(left, 1e-12 * everything))

    def _ranks_of_size(
        self, layers: Sequence[Layer], spectra: Sequence[Tensor], lineage: Lineage
    ) -> list[int]:
        budget = self.request.size or 0
        largest = max(len(values) for values in spectra)
        file = self.file(lineage, largest)
        alpha = file.alpha if self.loras.family.lora_alpha else None
        metadata = {**self._carried(), **lora_metadata(file, self.path.stem, _HASH, uniform=False)}
        layout = LoraFormat(StoredFormat(alpha, self.dtype), metadata)
        ranks = spread_to_fit(
            spectra,
            [(layer.m + layer.n) * self.dtype.itemsize for layer in layers],
            [layout.least_entry(layer) for layer in layers],
            budget,
            lambda counts: layout.size(layers, counts),
        )
        if not any(ranks):
            least = min(layout.size([layer], [1]) for layer in layers)
            raise RecipeError(
                f"{format_size(budget)} is too small for a LoRA of these layers",
                hint=f"give more than {format_size(least)}",
                key="size",
            )
        return ranks

    def file(self, lineage: Lineage, rank: int) -> LoraFile:
        """Returns everything of the file but its tensors."""
        stems = [header.stem for header in self.loras.headers]
        return LoraFile(
            lineage=lineage,
            run=self.path.stem,
            index=0,
            count=1,
            rank=rank,
            multipliers=dict(zip(stems, self.request.weights, strict=True)),
            explained=None,
            dtype=self.dtype,
            alone=" + ".join(stems),
        )

    def sums(
        self, ranks: Mapping[str, int], file: LoraFile, progress: Progress
    ) -> dict[Layer, StoredSum]:
        """Returns the sum in every layer as the file will hold it."""
        alpha = file.alpha if self.loras.family.lora_alpha else None
        layers = [layer for layer in self.loras.layers if layer.module in ranks]

        def take(layer: Layer) -> StoredSum:
            return self.total.stored(layer, alpha, file.dtype, ranks[layer.module])

        results = self._map("adding the LoRAs up", take, layers, progress)
        return dict(zip(layers, results, strict=True))

    def stage(
        self,
        outputs: FileTransaction,
        sums: Mapping[Layer, StoredSum],
        file: LoraFile,
        progress: Progress,
    ) -> None:
        """Stages the file."""
        ranks = [
            sums[layer].factors[0].shape[1] if layer in sums else 0 for layer in self.loras.layers
        ]
        alpha = self.loras.family.alpha_for(file.rank)
        size = lora_bytes(self.loras.layers, [(rank,) for rank in ranks], file.dtype, (alpha,))
        require_disks({self.path.parent: size})
        factors = {layer.module: part.factors for layer, part in sums.items()}
        counter = progress.counter("writing the LoRA", {self.path: 2 * size})
        tick = partial(counter.advance, self.path)
        layers = self.loras.layers
        stage_factors(outputs, self.path, layers, factors, file, tick, self._carried())
        progress.report("putting the file in place", 1.0)

    def result(self, sums: Mapping[Layer, StoredSum], size: int) -> CombineResult:
        """Returns how good the written file is; what was left out entirely counts as lost."""
        left_out = [layer for layer in self._all_layers() if layer not in sums]
        missing = {layer: float(self._energy(layer)) for layer in left_out}
        parts: dict[str, float] = {}
        energies = {layer: part.energy for layer, part in sums.items()} | missing
        lost = {layer: part.lost for layer, part in sums.items()} | missing
        for which in dict.fromkeys(layer.part for layer in energies):
            inside = [layer for layer in energies if layer.part == which]
            parts[which] = 1 - share(sum(lost[x] for x in inside), sum(energies[x] for x in inside))
        ranks = [part.factors[0].shape[1] for part in sums.values()]
        return CombineResult(
            path=self.path,
            loras=tuple(header.stem for header in self.loras.headers),
            multipliers=self.request.weights,
            rank=max(ranks),
            mean_rank=sum(ranks) / len(ranks),
            layers=len(ranks),
            kept=1 - share(sum(lost.values()), sum(energies.values())),
            parts=parts,
            size_before=sum(header.size for header in self.loras.headers),
            size=size,
        )

    def _all_layers(self) -> list[Layer]:
        return [layer for layer, _ in self.total.ranks().values()]

    def _energy(self, layer: Layer) -> float:
        return float(self.total.spectrum(layer).sum())

    def _carried(self) -> dict[str, str]:
        headers = self.loras.headers
        if len(headers) > 1:
            return {}
        metadata = headers[0].metadata
        return {key: metadata[key] for key in _CARRIED if key in metadata}

    def _map(
        self, phase: str, function: Any, layers: Sequence[Layer], progress: Progress
    ) -> list[Any]:
        costs = {layer: float(layer.m + layer.n) for layer in layers}
        return map_with_progress(function, costs, phase, progress)


def _recipe(request: CombineRequest) -> dict[str, str]:
    sizes = {key: getattr(request, key) for key in ("rank", "size", "keep")}
    return {
        "type": "combination" if len(request.loras) > 1 else "resized",
        "loras": ", ".join(path.name for path in request.loras),
        "multipliers": ", ".join(map(repr, request.weights)),
        **request.recipe_of_blocks(),
        **{key: str(value) for key, value in sizes.items() if value is not None},
        "dtype": request.dtype,
    }
