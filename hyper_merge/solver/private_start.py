"""Makes private LoRAs, one for each checkpoint, as a start of the joint solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import leading_factors
from hyper_merge.decomposition.problem import Batch, Factors, Problem
from hyper_merge.solver.allowance import Allowance
from hyper_merge.solver.batching import Ranks, stack_cores
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.rank_pruning import GroupSolution

_ITERATIONS: Final = 3  # of the subspace, for each LoRA


@dataclass(frozen=True, eq=False)
class PrivateStart:
    """Private LoRAs within an allowance, and what they leave.

    Attributes:
        multipliers: (d, R), in the coordinates of the metric.
        ranks: Per layer, of the R blocks.
        loss: What stays unexplained, as a fraction of the weighted energy.
    """

    multipliers: Tensor
    ranks: Ranks
    loss: float

    def group(
        self,
        name: str,
        metric: Metric,
        members: Sequence[int],
        device: torch.device,
        check: Callable[[], None],
    ) -> GroupSolution:
        """Returns the blocks of the layers that share multipliers: truncated SVDs."""
        nonempty = [index for index in members if sum(self.ranks[index])]
        batches = stack_cores(metric, nonempty, self.ranks, device, check)
        generator = torch.Generator().manual_seed(0)
        problem = Problem(batches, metric.energy(members), keep=metric.analysis.scratch.keep)
        factors = tuple(
            _truncate(batch, self.multipliers, generator).kept(problem.keep) for batch in batches
        )
        return GroupSolution(name, problem, self.multipliers, factors, ())


def plan_private_start(metric: Metric, blocks: int, allowance: Allowance) -> PrivateStart | None:
    """Returns the best private LoRAs within an allowance; None where checkpoints are more than files.

    Args:
        metric: of the loss.
        blocks: number of files, R.
        allowance: the bytes of all files.
    """
    directions, order = metric.directions, metric.order
    if blocks < len(order):
        return None
    multipliers = torch.zeros(len(directions), blocks, dtype=torch.float64)
    multipliers[:, : len(order)] = directions[:, order]
    spare = [torch.zeros(0, dtype=torch.float64)] * (blocks - len(order))
    spectra = metric.spectra
    energies = {
        index: [*(layer.private[c] for c in order), *spare] for index, layer in enumerate(spectra)
    }
    ranks = allowance.keep(energies)
    kept = sum(
        float(values[:rank].sum())
        for index, layer in energies.items()
        for values, rank in zip(layer, ranks[index], strict=True)
    )
    total = metric.energy(range(len(spectra)))
    loss = max(total - kept, 0.0) / total if total > 0 else 0.0
    return PrivateStart(multipliers, [ranks[index] for index in range(len(spectra))], loss)


def _truncate(
    batch: Batch,
    multipliers: Tensor,  # (d, R)
    generator: torch.Generator,
) -> Factors:
    mixtures = batch.loaded().mixtures(multipliers)
    pairs = [
        leading_factors(mixtures[:, block], rank, generator, _ITERATIONS)
        for block, rank in enumerate(batch.ranks)
    ]
    ups, downs = zip(*pairs, strict=True)
    return Factors(torch.cat(ups, 2), torch.cat(downs, 1))
