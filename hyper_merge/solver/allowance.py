"""Counts the bytes of LoRA files by their ranks, and keeps ranks within a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.safetensors_writer import file_size
from hyper_merge.decomposition.rank_allocation import kept_ranks
from hyper_merge.loras.lora_file import StoredFormat, complete_groups, lora_tensors
from hyper_merge.solver.batching import Ranks

_PADDING: Final = 7  # bytes at most, of a header


@dataclass(frozen=True)
class LoraFormat:
    """Everything about a LoRA file that decides its size, but for the ranks.

    Attributes:
        stored: How it holds its factors.
        metadata: Its texts, at their longest.
    """

    stored: StoredFormat
    metadata: Mapping[str, str]

    def size(self, layers: Sequence[Layer], rank_of: Sequence[int]) -> int:
        """Returns the bytes of the file, with a rank for each layer, and of its companion's factors.

        Whole layers take the same bytes at any rank, and are no part of it.
        """
        pairs = [pair for pair in zip(layers, rank_of, strict=True) if not pair[0].whole]
        factored, ranks = zip(*pairs, strict=True) if pairs else ((), ())
        tensors = lora_tensors(factored, ranks, self.stored.dtype, self.stored.alpha)
        return file_size(tensors, self.metadata)

    def least_entry(self, layer: Layer) -> int:
        """Returns the least bytes that a layer of rank 1 takes beside its factors."""
        if layer.whole:
            return 0
        factors = (layer.m + layer.n) * self.stored.dtype.itemsize
        return self.size([layer], [1]) - self.size([layer], [0]) - factors - _PADDING


@dataclass(frozen=True)
class Allowance:
    """The bytes that ranks may take: in whole files, or in the factors alone.

    Attributes:
        layers: All layers.
        costs: Bytes of a rank, per layer.
        budget: The bytes of everything.
        formats: Of the R files where whole files count; none where their factors do.
    """

    layers: Sequence[Layer]
    costs: tuple[int, ...]
    budget: int
    formats: tuple[LoraFormat, ...] = ()

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """The least bytes of a layer's first rank in a file, beside the rank's own."""
        if not self.formats:
            return (0,) * len(self.layers)
        return tuple(self.formats[0].least_entry(layer) for layer in self.layers)

    def size(self, ranks: Ranks) -> int:
        """Returns the bytes of ranks per layer and file."""
        by_file = list(zip(*ranks, strict=True))
        if self.formats:
            return sum(self._file_size(place, rank_of) for place, rank_of in enumerate(by_file))
        filled = (complete_groups(self.layers, rank_of) for rank_of in by_file)
        return sum(
            cost * rank
            for rank_of in filled
            for cost, rank in zip(self.costs, rank_of, strict=True)
        )

    @cached_property
    def _file_size(self) -> Callable[[int, tuple[int, ...]], int]:
        """Returns the bytes of one of the files; remembers the last ones."""

        def size(place: int, rank_of: tuple[int, ...]) -> int:
            return self.formats[place].size(self.layers, rank_of)

        return lru_cache(maxsize=2 * len(self.formats))(size)

    def keep(self, energies: Mapping[int, Sequence[Tensor]]) -> dict[int, tuple[int, ...]]:
        """Returns ranks by layer that keep the blocks' components of most energy for their bytes.

        Args:
            energies: by layer: of every block's components, falling; other layers get no rank.
        """
        indices = sorted(energies)
        if not indices:
            return {}
        nothing = (0,) * len(energies[indices[0]])

        def size_of(kept: Sequence[tuple[int, ...]]) -> int:
            ranks = [nothing] * len(self.layers)
            for index, rank in zip(indices, kept, strict=True):
                ranks[index] = rank
            return self.size(ranks)

        kept = kept_ranks(
            [energies[index] for index in indices],
            [self.costs[index] for index in indices],
            [self.entries[index] for index in indices],
            self.budget,
            size_of,
        )
        return dict(zip(indices, kept, strict=True))
