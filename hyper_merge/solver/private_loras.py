"""Plans and makes private LoRAs, each for what the shared ones leave of one checkpoint.

A merge makes them from its analysis, a later fit from the files themselves; both are residuals here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import FLOAT8
from hyper_merge.decomposition.rank_allocation import ranks_within, spread_ranks
from hyper_merge.loras.lora_file import StoredFormat
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.allowance import Allowance
from hyper_merge.solver.compressed_residual import CompressedResidual, SharedLoras
from hyper_merge.solver.evaluation import Evaluation
from hyper_merge.solver.float8 import float8_alpha
from hyper_merge.solver.low_rank_layer import LowRankLayer

_LEADING: Final = 3  # times the mean rank: the most that one layer can have
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
        """Weighted squared norm of the checkpoint's deviations in all layers."""

    @property
    def error(self) -> float:
        """Weighted squared norm of the rest that the shared LoRAs leave of them."""

    @property
    def margin(self) -> float:
        """The fraction of the allowed error that is planned for; rounding takes the rest."""

    def spectra(self, most: int, progress: Progress) -> list[Tensor]:
        """Returns each layer's leading squared singular values, falling, float64, on the CPU.

        They are those of the rest as the loss counts it.

        Args:
            most: how many are needed, at most.
            progress: progress and interrupt.
        """

    def largest(self, spectra: Sequence[Tensor]) -> list[float]:
        """Returns the largest singular value of the rest in every layer, or more.

        Args:
            spectra: from `spectra`.
        """

    def unreachable(self, spectra: Sequence[Tensor]) -> float:
        """Returns the weighted part of the error that lies outside of these spectra."""

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
        """The squared norm by which it reduces what the shared LoRAs leave."""
        return sum(layer.energy - layer.error for layer in self.layers)

    @property
    def weighted_gain(self) -> float:
        """The same as the loss counts it."""
        return sum(layer.weighted_energy - layer.weighted_error for layer in self.layers)


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
    allowance: Allowance | None = None,
) -> PrivateLoraPlan | None:
    """Spreads the ranks where they reduce the error most; None if the target needs none.

    Args:
        residual: what the shared LoRAs leave of the checkpoint.
        target: a rank in the mean of the layers, or a share of the checkpoint as the loss counts it.
        dtype: of the stored factors.
        progress: progress and interrupt.
        has_alpha: whether LoRA files of this family hold an alpha.
        allowance: the bytes that the file takes in place of what the target asks for.
    """
    costs = [layer.m + layer.n for layer in residual.layers]
    # Of rank 1 in all layers that private LoRAs hold.
    even = sum(cost for layer, cost in zip(residual.layers, costs, strict=True) if not layer.is_end)
    allowed = (1 - (target.share or 0.0)) * residual.energy
    if target.rank is None and residual.error <= allowed:
        return None
    spectra = residual.spectra(_most_ranks(target, allowance), progress)
    if allowance is not None:
        kept = allowance.keep({index: [values] for index, values in enumerate(spectra)})
        ranks = [kept[index][0] for index in range(len(costs))]
    elif target.rank is not None:
        ranks = spread_ranks(spectra, costs, target.rank * even)
    else:
        unreachable = residual.unreachable(spectra)
        if unreachable >= allowed:
            # No number of ranks would do: the share is one of what the LoRA can hold.
            allowed = (1 - (target.share or 0.0)) * (residual.energy - unreachable) + unreachable
            progress.warn(
                f"no private LoRA reaches {target.share:.1%}: what it does not hold, end layers above"
                f" all, is {unreachable / residual.energy:.1%}; it takes the share of the rest"
            )
        remaining = residual.margin * allowed - unreachable
        ranks = ranks_within(spectra, costs, max(remaining, 0.0))
    if not any(ranks):
        return None
    mean = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) / even
    rank = max(round(mean), 1)
    alpha = _alpha(rank, ranks, residual.largest(spectra), dtype) if has_alpha else None
    return PrivateLoraPlan(rank, ranks, StoredFormat(alpha, dtype))


def _most_ranks(target: PrivateLoraTarget, allowance: Allowance | None) -> int:
    """Returns the most ranks that a layer of a private LoRA can need."""
    if allowance is not None:
        return _LEADING * -(-allowance.budget // sum(allowance.costs))
    return _MOST if target.rank is None else _LEADING * target.rank


def make_private_lora(
    residual: CheckpointResidual, plan: PrivateLoraPlan, progress: Progress
) -> PrivateLora:
    """Makes the factors that a plan asks for."""
    layers = residual.low_rank(plan.ranks, plan.stored, progress)
    return PrivateLora(residual.checkpoint, plan.rank, plan.stored.alpha, layers)


@dataclass(frozen=True)
class PrivateBudget:
    """The bytes that the files of all private LoRAs take together.

    Attributes:
        total: The bytes.
        allowance: Returns the allowance of a checkpoint's file, from its place and bytes.
    """

    total: int
    allowance: Callable[[int, int], Allowance]


def find_private_loras(
    shared: SharedLoras,
    target: PrivateLoraTarget,
    progress: Progress,
    budget: PrivateBudget | None = None,
) -> tuple[PrivateLora, ...]:
    """Makes LoRAs for the checkpoints below the mean, or below the target's share.

    Args:
        shared: the shared LoRAs.
        target: a rank in the mean of the layers, or a share of every checkpoint.
        progress: progress and interrupt.
        budget: what the files take in place of what the target asks for.
    """
    chosen = needy_checkpoints(shared.evaluation.fidelity, target)
    residuals = [CompressedResidual(shared, checkpoint) for checkpoint in chosen]
    has_alpha = shared.blocks.alphas[0] is not None
    lacks = [_lack(residual, target) for residual in residuals]
    left = budget.total if budget else 0
    loras = []
    for place, (residual, part) in enumerate(
        zip(residuals, progress.split([1.0] * len(chosen)), strict=True)
    ):
        planning, making = part.split([_PLANNING, _MAKING])
        share = int(left * lacks[place] / sum(lacks[place:]))
        limit = budget.allowance(residual.checkpoint, share) if budget else None
        plan = plan_private_lora(
            residual, target, shared.dtype, planning, has_alpha=has_alpha, allowance=limit
        )
        if plan is not None:
            left -= limit.size([(rank,) for rank in plan.ranks]) if limit else 0
            loras.append(make_private_lora(residual, plan, making))
    return tuple(loras)


def needy_checkpoints(
    explained: Tensor,  # (k,), shares
    target: PrivateLoraTarget,
) -> list[int]:
    """Returns the places of the checkpoints below the mean, or below the target's share."""
    least = float(explained.mean()) if target.share is None else target.share
    return [c for c, share in enumerate(explained.tolist()) if share < least]


def _lack(residual: CheckpointResidual, target: PrivateLoraTarget) -> float:
    """Returns the weight with which a checkpoint has part in the bytes for all."""
    if target.share is None:
        return 1.0
    return residual.error - (1 - target.share) * residual.energy


def add_private_loras(evaluation: Evaluation, loras: Sequence[PrivateLora]) -> Evaluation:
    """Returns the evaluation of the shared LoRAs together with private ones."""
    errors, weighted = evaluation.errors.clone(), evaluation.weighted_errors.clone()
    for lora in loras:
        errors[:, lora.checkpoint] = torch.tensor(
            [layer.error for layer in lora.layers], dtype=torch.float64
        )
        weighted[:, lora.checkpoint] = torch.tensor(
            [layer.weighted_error for layer in lora.layers], dtype=torch.float64
        )
    return replace(evaluation, errors=errors, weighted_errors=weighted)


def _alpha(rank: int, ranks: Sequence[int], largest: Sequence[float], dtype: torch.dtype) -> float:
    """Returns the file's alpha: its rank, or a power of two that suits the range of float8."""
    if dtype != FLOAT8:
        return float(rank)
    pairs = zip(largest, ranks, strict=True)
    return float8_alpha(max(count * value for value, count in pairs if count))
