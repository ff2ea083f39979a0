"""Gives what a merge's shared LoRAs leave of one checkpoint, between the bases of its analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.contents import Analysis
from hyper_merge.decomposition.contrasts import to_deviations_matrix
from hyper_merge.decomposition.linalg import block_columns, block_gram, largest_value
from hyper_merge.decomposition.normalization import balance
from hyper_merge.decomposition.stretch import LayerMetric
from hyper_merge.decomposition.truncated_svd import TruncatedSvd, truncated_svd
from hyper_merge.loras.lora_file import StoredFormat, as_hosts_apply, stored_factors
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.evaluation import Evaluation
from hyper_merge.solver.low_rank_layer import LowRankLayer
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.products import FactorPair, StoredFactors, keep_pairs

_PHASE: Final = "making private LoRAs"


@dataclass(frozen=True, eq=False)
class SharedLoras:
    """The shared LoRAs of a merge, to which private ones are added."""

    metric: Metric
    blocks: StoredFactors
    evaluation: Evaluation
    groups: Mapping[str, Sequence[int]]  # the layers of each set of multipliers
    dtype: torch.dtype  # of the stored factors

    @property
    def analysis(self) -> Analysis:
        """The analysis of the checkpoints."""
        return self.metric.analysis


class CompressedResidual:
    """The rest of a checkpoint that a merge's shared LoRAs leave, between the bases of its analysis."""

    margin = 0.998

    def __init__(self, shared: SharedLoras, checkpoint: int) -> None:
        self.checkpoint = checkpoint
        self.layers = shared.analysis.layers
        self._shared = shared
        self._errors = shared.evaluation.errors[:, checkpoint]
        self._weighted_errors = shared.evaluation.weighted_errors[:, checkpoint]
        self.energy = float(shared.evaluation.weighted_energies[:, checkpoint].sum())
        self.error = float(self._weighted_errors.sum())
        self._multipliers = {  # (R,) by layer
            index: multipliers[checkpoint]
            for name, multipliers in shared.evaluation.multipliers.items()
            for index in shared.groups[name]
        }
        self._leading: list[TruncatedSvd] = []

    def spectra(self, most: int, progress: Progress) -> list[Tensor]:
        """Returns each layer's leading squared singular values, falling, float64, on the CPU."""
        places = range(len(self.layers))
        blocks = self._shared.blocks
        leading = partial(_leading, self._shared.metric, self.checkpoint, blocks.alphas, most)
        multipliers = [self._multipliers[index] for index in places]
        with self._shared.analysis.maps(torch.device("cpu"), progress.check, _PHASE) as maps:
            for truncated in maps.layers(leading, places, multipliers, blocks.factors):
                self._leading.append(truncated)
                progress.report(_PHASE, len(self._leading) / len(self.layers))
        return [truncated.energies for truncated in self._leading]

    def unreachable(self, spectra: Sequence[Tensor]) -> float:
        """Returns the weighted part of the error that lies outside of these spectra."""
        return self.error - sum(float(values.sum()) for values in spectra)

    def largest(self, _spectra: Sequence[Tensor]) -> list[float]:
        """Returns the largest singular value of the rest in every layer, or a little more."""
        return [
            largest_value(*self._metric(index).undo(leading.up, leading.down))
            for index, leading in enumerate(self._leading)
        ]

    def low_rank(
        self, ranks: Sequence[int], stored: StoredFormat, progress: Progress
    ) -> list[LowRankLayer]:
        """Returns every layer's factors of these ranks as a file will hold them."""
        layers = []
        for index, rank in enumerate(ranks):
            layers.append(self._stored(index, rank, stored))
            progress.report(_PHASE, len(layers) / len(ranks))
        return layers

    def _metric(self, index: int) -> LayerMetric:
        """Returns the metric between a layer's bases."""
        shape = self._shared.analysis.core_shape(index)
        return self._shared.metric.between(index, shape)

    def _shared_factors(self, index: int) -> list[tuple[Tensor, Tensor]]:  # (m, r), (r, n)
        """Returns the factors of what hosts add for each shared LoRA at multiplier 1."""
        blocks = self._shared.blocks
        return _as_applied(blocks.factors[index], blocks.alphas)

    def _stored(self, index: int, rank: int, stored: StoredFormat) -> LowRankLayer:
        """Returns a layer's factors as stored, and the squared errors that are left with them."""
        analysis, layer = self._shared.analysis, self.layers[index]
        left, right = analysis.bases(index)
        truncated = self._leading[index]
        pair = self._metric(index).undo(truncated.up[:, :rank], truncated.down[:rank])
        if rank:
            pair = balance(*pair)
        up, down = left @ pair[0], pair[1] @ right.mT
        factors = stored_factors(layer, up, down, stored.alpha, stored.dtype)
        pair = as_hosts_apply(*factors, stored.alpha)
        of_layer = self._shared.metric.layers[index]
        plain = self._gain(index, pair, [*self._shared_factors(index), pair])
        blocks = [of_layer.apply_to_factors(*f) for f in (*self._shared_factors(index), pair)]
        weighted = self._gain(index, of_layer.dual(*pair), blocks)
        before, weighted_before = (
            float(errors[index]) for errors in (self._errors, self._weighted_errors)
        )
        return LowRankLayer(
            layer,
            *keep_pairs(analysis.scratch.keep, [factors])[0],
            before,
            max(before - plain, 0.0),
            weighted_before,
            max(weighted_before - weighted, 0.0),
        )

    def _gain(self, index: int, dual: FactorPair, blocks: Sequence[FactorPair]) -> float:
        """Returns by how much the last of the blocks reduces the squared error.

        Args:
            index: of the layer.
            dual: the last block as it enters inner products with the layer's slices.
            blocks: shared ones, and the last, as they enter inner products with each other.
        """
        analysis = self._shared.analysis
        left, right = analysis.bases(index)
        up, down = dual
        rows = _rows(analysis, index).flatten(1).double()
        product = (block_columns(left, up) @ block_columns(right, down.mT).mT).flatten().double()
        cross = to_deviations_matrix(analysis.contrasts)[self.checkpoint] @ (rows @ product)
        gram = block_gram(*zip(*blocks, strict=True))
        cross = cross - self._multipliers[index] @ gram[:-1, -1]
        return float(2 * cross - gram[-1, -1])


def _leading(
    metric: Metric,
    checkpoint: int,
    alphas: Sequence[float | None],  # of the R files
    most: int,
    index: int,
    multipliers: Tensor,  # (R,)
    stored: Sequence[FactorPair],  # per block (m, r), (r, n)
) -> TruncatedSvd:
    """Returns the leading part of the rest that shared LoRAs leave in a layer, as the loss counts it."""
    analysis = metric.analysis
    shape = analysis.core_shape(index)
    if analysis.layers[index].is_end:  # private LoRAs have no companions
        return _no_components(*shape)
    left, right = analysis.bases(index)
    rows = _rows(analysis, index)
    weights = to_deviations_matrix(analysis.contrasts)[checkpoint].to(rows)
    rest = (weights @ rows.flatten(1)).view(rows.shape[1:])
    for (up, down), x in zip(_as_applied(stored, alphas), multipliers.tolist(), strict=True):
        rest = rest - x * (block_columns(left, up) @ block_columns(right, down.mT).mT)
    rest = metric.between(index, shape).apply(rest)
    generator = torch.Generator().manual_seed(index)
    truncated = truncated_svd(rest, min(most, *rest.shape), generator)
    up, down = analysis.scratch.keep([truncated.up, truncated.down])
    return replace(truncated, up=up, down=down)


def _rows(analysis: Analysis, index: int) -> Tensor:  # (d + 1, p, q)
    """Returns slices and, last, the average's rounding error."""
    return torch.cat([analysis.core(index), analysis.rounding(index)[None]])


def _as_applied(
    stored: Sequence[FactorPair], alphas: Sequence[float | None]
) -> list[FactorPair]:  # (m, r), (r, n)
    """Returns the factors of what hosts add for each shared LoRA at multiplier 1."""
    pairs = zip(stored, alphas, strict=True)
    return [as_hosts_apply(*factors, alpha) for factors, alpha in pairs]


def _no_components(p: int, q: int) -> TruncatedSvd:
    nothing = torch.zeros(0, dtype=torch.float64)
    return TruncatedSvd(torch.zeros(p, 0), torch.zeros(0, q), nothing)
