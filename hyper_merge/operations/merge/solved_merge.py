"""Describes the solution of a merge, from which its files are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hyper_merge.operations.merge.host_precision import HostLora
from hyper_merge.operations.merge.rank_plan import RankPlan
from hyper_merge.runs.report import TrainingReport
from hyper_merge.solver.batching import Ranks
from hyper_merge.solver.evaluation import Evaluation
from hyper_merge.solver.private_loras import PrivateLora
from hyper_merge.solver.products import StoredFactors


@dataclass(frozen=True, eq=False)
class SolvedMerge:
    """The factors of all LoRAs as stored, the ranks they were found with, and how good they are."""

    plan: RankPlan
    factors: StoredFactors  # of the shared LoRAs
    evaluation: Evaluation  # of all LoRAs together
    losses: tuple[float, ...]  # after each sweep of the solver
    private_loras: tuple[PrivateLora, ...] = ()
    training: TrainingReport | None = None

    def all_ranks(self) -> Ranks:
        """Returns the ranks of all LoRAs, private ones last, per layer."""
        private = [lora.ranks for lora in self.private_loras]
        return [
            (*ranks, *(of_lora[index] for of_lora in private))
            for index, ranks in enumerate(self.factors.ranks)
        ]

    def factor_bytes(self) -> int:
        """Returns the bytes of all LoRAs' factors, private ones included."""
        pairs = zip(self.plan.rank_bytes, self.all_ranks(), strict=True)
        return sum(size * sum(ranks) for size, ranks in pairs)

    def host_loras(self) -> list[HostLora]:
        """Returns all LoRAs in the order of the prompt: shared ones, then the private ones."""
        multipliers = self.evaluation.multipliers
        shared = [
            HostLora(factors, alpha, {part: rows[:, block] for part, rows in multipliers.items()})
            for block, (factors, alpha) in enumerate(
                zip(zip(*self.factors.factors, strict=True), self.factors.alphas, strict=True)
            )
        ]
        unit_rows = torch.eye(len(multipliers["unet"]))
        private = [
            HostLora(lora.factors, lora.alpha, {"unet": unit_rows[lora.checkpoint]})
            for lora in self.private_loras
        ]
        return shared + private
