"""Counts the bytes that the files of a merge hold beside the factors of its LoRAs.

Everything but the numbers in the metadata is known before a solve, and of these the longest text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.norms_and_biases import NormOrBias
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD, FLOAT8
from hyper_merge.checkpoints.io.safetensors_writer import file_size
from hyper_merge.loras.lora_file import StoredFormat
from hyper_merge.loras.metadata import Lineage, LoraFile, SourceRecord, lora_metadata
from hyper_merge.loras.prompt_tags import companion_names, lora_names, private_names
from hyper_merge.operations.merge.companions import companion_metadata, companion_tensors
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.hash_cache import current_time
from hyper_merge.solver.allowance import LoraFormat

_NUMBER: Final = -1.2345678901234567e-05  # no number of a file has a longer text
_ALPHA: Final = 2.0**-30  # the same for alphas of float8
_RANK: Final = 999
_HASH: Final = "0" * 64


@dataclass(frozen=True)
class FileOverhead:
    """What decides the size of a merge's files beside ranks.

    Attributes:
        recipe: The settings.
        inputs: The files.
        vectors: Tensors in the companions.
        lineage: The origin that all files record, with any ranks.
        run: Name of the run.
    """

    recipe: Recipe
    inputs: MergeInputs
    vectors: Sequence[NormOrBias]
    lineage: Lineage
    run: str

    @classmethod
    def of(cls, recipe: Recipe, inputs: MergeInputs, vectors: Sequence[NormOrBias]) -> FileOverhead:
        """Returns the overhead before names and hashes are known, which all have one length."""
        sources = tuple(SourceRecord(header.name, _HASH, _HASH[:8], {}) for header in inputs.read)
        family, texts = inputs.layout.family, recipe.to_metadata()
        lineage = Lineage(recipe.name, family, texts, sources, current_time())
        return cls(recipe, inputs, vectors, lineage, recipe.name)

    def formats(self, ranks: Sequence[int]) -> tuple[LoraFormat, ...]:
        """Returns the formats of the shared LoRAs, by the ranks in their names."""
        pairs = zip(lora_names(self.run, ranks), self._files(ranks), strict=True)
        return tuple(self._format(file, stem) for stem, file in pairs)

    def companions(self, ranks: Sequence[int]) -> int:
        """Returns the bytes of all companions."""
        layout = self.inputs.layout
        if not self.vectors and (self.recipe.exact == "none" or not layout.has_ends):
            return 0
        tensors = companion_tensors(layout.layers, self.vectors)
        names = companion_names(lora_names(self.run, ranks))
        return sum(
            file_size(tensors, companion_metadata(file, stem, _HASH, self.recipe.exact))
            for stem, file in zip(names, self._files(ranks), strict=True)
        )

    def private_format(self, ranks: Sequence[int], checkpoint: int) -> LoraFormat:
        """Returns the format of a checkpoint's private LoRA; its rank may have any three digits.

        Args:
            ranks: of the shared LoRAs.
            checkpoint: its place among the checkpoints.
        """
        stems = [header.stem for header in self.inputs.headers]
        file = replace(
            self._files(ranks)[0],
            index=0,
            count=1,
            rank=_RANK,
            multipliers={stems[checkpoint]: 1.0},
            text_multipliers=None,
            tops_up=stems[checkpoint],
        )
        return self._format(file, private_names(self.run, stems, {checkpoint: _RANK})[0])

    def _files(self, ranks: Sequence[int]) -> list[LoraFile]:
        """Returns the shared LoRAs' files, with the longest numbers."""
        recipe = replace(self.recipe, ranks=tuple(ranks))
        lineage = replace(self.lineage, recipe=recipe.to_metadata())
        numbers = {header.stem: _NUMBER for header in self.inputs.headers}
        encoder = any(layer.part == "text_encoder" for layer in self.inputs.layout.layers)
        dtype = DTYPES_BY_WORD[recipe.factors_dtype]
        return [
            LoraFile(
                lineage=lineage,
                run=self.run,
                index=index,
                count=len(ranks),
                rank=rank,
                multipliers=numbers,
                explained=-_NUMBER,
                dtype=dtype,
                text_multipliers=numbers if encoder and recipe.multipliers == "separate" else None,
                own_alpha=_ALPHA if dtype == FLOAT8 else None,
            )
            for index, rank in enumerate(ranks)
        ]

    def _format(self, file: LoraFile, stem: str) -> LoraFormat:
        alpha = file.alpha if self.inputs.layout.family.lora_alpha else None
        metadata = lora_metadata(file, stem, _HASH, uniform=False)
        return LoraFormat(StoredFormat(alpha, file.dtype), metadata)
