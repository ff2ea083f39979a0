"""Holds the analysis of inputs that are given as factors in memory, as LoRAs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyper_merge.analysis.contents import Analysis
from hyper_merge.analysis.file_layout import UNCARRIED_KINDS
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.contrasts import around_base
from hyper_merge.decomposition.factored import FactoredLayer
from hyper_merge.runtime.scratch import Scratch


class FactoredAnalysis(Analysis):
    """The changes that k inputs make to a base that is not needed: deviations from zero.

    Cores are multiplied out when they are asked for. The base has no rounding error, and its weights
    are taken as those of a usual network: entries of variance 1 / n in a layer of n inputs.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        count: int,
        parts: Sequence[FactoredLayer],
        scratch: Scratch | None = None,
    ) -> None:
        """Takes the layers' parts.

        Args:
            layers: all layers.
            count: of the inputs, k.
            parts: one for each layer.
            scratch: takes what is computed from them; None for memory.
        """
        self.layers = tuple(layers)
        self.contrasts = around_base(count)
        self.sensitivities = None
        self.scratch = scratch or Scratch()
        self._parts = tuple(parts)
        self._has_many = any(part.sizes is not None for part in self._parts)

    def without_ends(self) -> FactoredAnalysis:
        """Returns the analysis of the layers that are at no end of the network."""
        pairs = zip(self.layers, self._parts, strict=True)
        kept = [(layer, part) for layer, part in pairs if not layer.is_end]
        layers, parts = zip(*kept, strict=True) if kept else ((), ())
        return FactoredAnalysis(layers, self.contrasts.count, parts, self.scratch)

    @property
    def has_many(self) -> bool:
        """Tells whether all work is on factors, between bases of which no order is known.

        So it is with what `compress_many` made, for many inputs or for a set of them.
        """
        return self._has_many

    @property
    def grams(self) -> Tensor:  # (layers, k + 1, k + 1), float64
        """The inner products of every layer's matrices and, last, zeros."""
        grams = torch.stack([part.gram for part in self._parts])
        return torch.nn.functional.pad(grams, (0, 1, 0, 1))

    @property
    def weights(self) -> Tensor:  # (layers,), float64
        """The squared norms that the layers' weights usually have, up to a factor."""
        return usual_weights(self.layers)

    @property
    def not_carried(self) -> dict[str, Tensor]:  # kind -> (k,), float64
        """Zeros: inputs hold nothing outside of the layers."""
        return {
            kind: torch.zeros(self.contrasts.count, dtype=torch.float64) for kind in UNCARRIED_KINDS
        }

    def core(self, index: int) -> Tensor:  # (k, p, q), float32
        """Returns a layer's core, multiplied out."""
        return self._parts[index].core()

    def part(self, index: int) -> FactoredLayer:
        """Returns a layer's inputs as factors."""
        return self._parts[index]

    def rounding(self, index: int) -> Tensor:  # (p, q), float32
        """Returns zeros: zero has no rounding error."""
        return torch.zeros(self.core_shape(index))

    def products(
        self,
        index: int,
        blocks: Sequence[tuple[Tensor, Tensor]],  # (p, r), (r, q), R of them, float32
    ) -> Tensor:  # (d + 1, R), float64
        """Returns inner products of a layer's inputs and, last, zero with blocks between its bases."""
        if not self.has_many:
            return super().products(index, blocks)
        part = self._parts[index]
        ups, downs = part.components()
        sizes = torch.tensor([up.shape[1] for up, _ in blocks])
        block_of = torch.arange(len(blocks)).repeat_interleave(sizes)
        up, down = torch.cat([up for up, _ in blocks], 1), torch.cat([down for _, down in blocks])
        of_input = torch.zeros(self.contrasts.count + 1, len(block_of), dtype=torch.float64)
        for row, span in zip(of_input, part.spans, strict=False):
            row.copy_(((ups[:, span].mT @ up) * (downs[span] @ down.mT)).sum(0))
        return of_input.new_zeros(len(of_input), len(blocks)).index_add_(1, block_of, of_input)

    def bases(self, index: int) -> tuple[Tensor, Tensor]:  # (m, p), (n, q), float32
        """Returns a layer's bases."""
        return self._parts[index].left.float(), self._parts[index].right.float()

    def core_shape(self, index: int) -> tuple[int, int]:  # p, q
        """Returns the sides of a layer's core."""
        return self._parts[index].core_shape

    def earlier_solutions(self, name: str, group: str) -> list[Tensor]:  # noqa: ARG002 - the form
        """Returns nothing: this analysis is used once."""
        return []

    def remember(self, name: str, multipliers: Mapping[str, Tensor]) -> None:
        """Does nothing: this analysis is used once."""


def usual_weights(layers: Sequence[Layer]) -> Tensor:  # (layers,), float64
    """Returns the squared norms that weights of variance 1 / n have."""
    return torch.tensor([layer.m for layer in layers], dtype=torch.float64)
