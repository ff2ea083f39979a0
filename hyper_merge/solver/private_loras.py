"""Plans and makes private LoRAs, each for what the shared ones leave of one checkpoint.

A merge makes them from its analysis, a later fit from the files themselves; both are residuals here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

from hyper_merge.analysis.store import Analysis
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import FLOAT8
from hyper_merge.decomposition.contrasts import to_deviations_matrix
from hyper_merge.decomposition.linalg import block_columns, block_gram
from hyper_merge.decomposition.rank_allocation import ranks_within, spread_ranks
from hyper_merge.decomposition.truncated_svd import TruncatedSvd, truncated_svd
from hyper_merge.loras.lora_file import StoredFormat, as_hosts_apply, stored_factors
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.evaluation import Evaluation
from hyper_merge.solver.float8 import float8_alpha
from hyper_merge.solver.low_rank_layer import LowRankLayer
from hyper_merge.solver.quantization import StoredFactors

_LEADING: Final = 3  # times the target's rank: the most that one layer can have
_MOST: Final = 256  # rank of a layer, where the target is a share
_PLANNING, _MAKING = 0.8, 0.2  # of the time for a private LoRA of a merge


class CheckpointResidual(Protocol):
    """The rest of one checkpoint that the shared LoRAs leave, layer by layer."""

    @property
    def checkpoint(self) -> int:
        """Its place among the checkpoints."""

    @property
    def layers(self) -> Sequence[Layer]:
        """All layers."""

    @property
    def energy(self) -> float:
        """Squared norm of the checkpoint's deviations in all layers."""

    @property
    def error(self) -> float:
        """Squared norm of the rest that the shared LoRAs leave of them."""

    @property
    def margin(self) -> float:
        """The fraction of the allowed error that is planned for; rounding takes the rest."""

    def spectra(self, target: PrivateLoraTarget, progress: Progress) -> list[Tensor]:
        """Returns each layer's leading squared singular values, falling, float64, on the CPU."""

    def unreachable(self, spectra: Sequence[Tensor]) -> float:
        """Returns the part of the error that lies outside of these spectra."""

    def low_rank(
        self, ranks: Sequence[int], stored: StoredFormat, progress: Progress
    ) -> list[LowRankLayer]:
        """Returns every layer's factors of these ranks as a file will hold them."""


@dataclass(frozen=True, eq=False)
class PrivateLora:
    """One checkpoint's own LoRA."""

    checkpoint: int  # its place among the checkpoints
    rank: int  # in the mean of the layers
    alpha: float | None  # of the file
    layers: Sequence[LowRankLayer]  # all of them, some with rank 0

    @property
    def ranks(self) -> list[int]:
        """The rank of every layer."""
        return [layer.up.shape[1] for layer in self.layers]

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:  # (m, r), (r, n) per layer
        """The factors of every layer as stored."""
        return [(layer.up, layer.down) for layer in self.layers]

    @property
    def gain(self) -> float:
        """Squared norm by which it reduces what the shared LoRAs leave."""
        return sum(layer.energy - layer.error for layer in self.layers)


@dataclass(frozen=True)
class PrivateLoraPlan:
    """The size of a private LoRA, before its factors are made."""

    rank: int  # in the mean of the layers
    ranks: Sequence[int]  # per layer
    stored: StoredFormat


def plan_private_lora(
    residual: CheckpointResidual,
    target: PrivateLoraTarget,
    dtype: torch.dtype,
    progress: Progress,
    *,
    has_alpha: bool,
) -> PrivateLoraPlan | None:
    """Spreads the ranks where they reduce the error most; None if the target needs none.

    Args:
        residual: what the shared LoRAs leave of the checkpoint.
        target: a rank in the mean of the layers, or a share of the checkpoint.
        dtype: of the stored factors.
        progress: progress and interrupt.
        has_alpha: whether LoRA files of this family hold an alpha.
    """
    costs = [layer.m + layer.n for layer in residual.layers]
    allowed = (1 - (target.share or 0.0)) * residual.energy
    if target.rank is None and residual.error <= allowed:
        return None
    spectra = residual.spectra(target, progress)
    if target.rank is not None:
        ranks = spread_ranks(spectra, costs, target.rank * sum(costs))
    else:
        remaining = residual.margin * allowed - residual.unreachable(spectra)
        ranks = ranks_within(spectra, costs, max(remaining, 0.0))
    if not any(ranks):
        return None
    mean = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) / sum(costs)
    rank = max(round(mean), 1)
    alpha = _alpha(rank, ranks, spectra, dtype) if has_alpha else None
    return PrivateLoraPlan(rank, ranks, StoredFormat(alpha, dtype))


def make_private_lora(
    residual: CheckpointResidual, plan: PrivateLoraPlan, progress: Progress
) -> PrivateLora:
    """Makes the factors that a plan asks for."""
    layers = residual.low_rank(plan.ranks, plan.stored, progress)
    return PrivateLora(residual.checkpoint, plan.rank, plan.stored.alpha, layers)


@dataclass(frozen=True, eq=False)
class SharedLoras:
    """The shared LoRAs of a merge, to which private ones are added."""

    analysis: Analysis
    blocks: StoredFactors
    evaluation: Evaluation
    groups: Mapping[str, Sequence[int]]  # the layers of each set of multipliers
    dtype: torch.dtype  # of the stored factors


def find_private_loras(
    shared: SharedLoras, target: PrivateLoraTarget, progress: Progress
) -> tuple[PrivateLora, ...]:
    """Makes LoRAs for the checkpoints below the mean, or below the target's share.

    Args:
        shared: the shared LoRAs.
        target: a rank in the mean of the layers, or a share of every checkpoint.
        progress: progress and interrupt.
    """
    explained = shared.evaluation.explained()
    least = float(explained.mean()) if target.share is None else target.share
    chosen = [c for c, share in enumerate(explained.tolist()) if share < least]
    has_alpha = shared.blocks.alphas[0] is not None
    loras = []
    for checkpoint, part in zip(chosen, progress.split([1.0] * len(chosen)), strict=True):
        planning, making = part.split([_PLANNING, _MAKING])
        residual = _CompressedResidual(shared, checkpoint)
        plan = plan_private_lora(residual, target, shared.dtype, planning, has_alpha=has_alpha)
        if plan is not None:
            loras.append(make_private_lora(residual, plan, making))
    return tuple(loras)


def add_private_loras(evaluation: Evaluation, loras: Sequence[PrivateLora]) -> Evaluation:
    """Returns the evaluation of the shared LoRAs together with private ones."""
    errors = evaluation.errors.clone()
    for lora in loras:
        errors[:, lora.checkpoint] = torch.tensor(
            [layer.error for layer in lora.layers], dtype=torch.float64
        )
    return replace(evaluation, errors=errors)


def _alpha(rank: int, ranks: Sequence[int], spectra: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Returns the file's alpha: its rank, or a power of two that suits the range of float8."""
    if dtype != FLOAT8:
        return float(rank)
    pairs = zip(spectra, ranks, strict=True)
    return float8_alpha(max(count * float(values[0]) ** 0.5 for values, count in pairs if count))


def _no_components(p: int, q: int) -> TruncatedSvd:
    nothing = torch.zeros(0, dtype=torch.float64)
    return TruncatedSvd(torch.zeros(p, 0), torch.zeros(0, q), nothing)


class _CompressedResidual:
    """The rest of a checkpoint that a merge's shared LoRAs leave, between the bases of its analysis."""

    margin = 0.998

    def __init__(self, shared: SharedLoras, checkpoint: int) -> None:
        self.checkpoint = checkpoint
        self.layers = shared.analysis.layers
        self._shared = shared
        self._errors = shared.evaluation.errors[:, checkpoint]
        self.energy = float(shared.evaluation.energies[:, checkpoint].sum())
        self.error = float(self._errors.sum())
        self._multipliers = {  # (R,) by layer
            index: multipliers[checkpoint]
            for name, multipliers in shared.evaluation.multipliers.items()
            for index in shared.groups[name]
        }
        self._leading: list[TruncatedSvd] = []

    def spectra(self, target: PrivateLoraTarget, progress: Progress) -> list[Tensor]:
        most = _LEADING * target.rank if target.rank is not None else _MOST

        def leading(index: int) -> TruncatedSvd:
            if self.layers[index].is_end:  # private LoRAs have no companions
                return _no_components(*self._shared.analysis.core_shape(index))
            rest = self._rest(index)
            generator = torch.Generator().manual_seed(index)
            return truncated_svd(rest, min(most, *rest.shape), generator)

        with parallel_map(torch.device("cpu"), progress.check) as parallel:
            for truncated in parallel(leading, range(len(self.layers))):
                self._leading.append(truncated)
                progress.report("making private LoRAs", len(self._leading) / len(self.layers))
        return [truncated.energies for truncated in self._leading]

    def unreachable(self, spectra: Sequence[Tensor]) -> float:
        return self.error - sum(float(values.sum()) for values in spectra)

    def low_rank(
        self, ranks: Sequence[int], stored: StoredFormat, progress: Progress
    ) -> list[LowRankLayer]:
        layers = []
        for index, rank in enumerate(ranks):
            layers.append(self._stored(index, rank, stored))
            progress.report("making private LoRAs", len(layers) / len(ranks))
        return layers

    def _rows(self, index: int) -> Tensor:  # (d + 1, p, q)
        """Returns slices and, last, the average's rounding error."""
        analysis = self._shared.analysis
        return torch.cat([analysis.core(index), analysis.rounding(index)[None]])

    def _rest(self, index: int) -> Tensor:  # (p, q)
        """Returns the rest that the shared LoRAs leave in a layer, between its bases."""
        analysis = self._shared.analysis
        left, right = analysis.bases(index)
        rows = self._rows(index)
        weights = to_deviations_matrix(analysis.contrasts)[self.checkpoint].to(rows)
        rest = (weights @ rows.flatten(1)).view(rows.shape[1:])
        factors = self._shared_factors(index)
        for (up, down), x in zip(factors, self._multipliers[index].tolist(), strict=True):
            rest = rest - x * (block_columns(left, up) @ block_columns(right, down.mT).mT)
        return rest

    def _shared_factors(self, index: int) -> list[tuple[Tensor, Tensor]]:  # (m, r), (r, n)
        """Returns the factors of what hosts add for each shared LoRA at multiplier 1."""
        blocks = self._shared.blocks
        pairs = zip(blocks.factors[index], blocks.alphas, strict=True)
        return [as_hosts_apply(*factors, alpha) for factors, alpha in pairs]

    def _stored(self, index: int, rank: int, stored: StoredFormat) -> LowRankLayer:
        """Returns a layer's factors as stored, and the squared error that is left with them."""
        analysis, layer = self._shared.analysis, self.layers[index]
        left, right = analysis.bases(index)
        truncated = self._leading[index]
        up, down = left @ truncated.up[:, :rank], truncated.down[:rank] @ right.mT
        factors = stored_factors(layer, up, down, stored.alpha, stored.dtype)
        up, down = as_hosts_apply(*factors, stored.alpha)
        rows = self._rows(index).flatten(1).double()
        product = (block_columns(left, up) @ block_columns(right, down.mT).mT).flatten().double()
        cross = to_deviations_matrix(analysis.contrasts)[self.checkpoint] @ (rows @ product)
        shared = self._shared_factors(index)
        gram = block_gram([*(u for u, _ in shared), up], [*(d for _, d in shared), down])
        cross = cross - self._multipliers[index] @ gram[:-1, -1]
        error = self._errors[index] - 2 * cross + gram[-1, -1]
        return LowRankLayer(layer, *factors, float(self._errors[index]), float(error.clamp(min=0)))
