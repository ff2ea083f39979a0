"""Forecasts the share that LoRAs of any size explain, from the analysis alone, before a solve.

Blocks along the eigenvectors of the checkpoints' Gram matrix have orthonormal multipliers, so each of
them is the truncated SVD of its own mixture of deviations, and what any choice of ranks explains of
all checkpoints together is a sum of squared singular values. The joint solve begins at about there
and ends better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.rank_allocation import ranks_within, spread_ranks

_WORTH: Final = (
    0.995  # of what all directions explain: beyond that, more LoRAs are not worth a file
)
_ENOUGH: Final = 0.8  # of what mixtures explain: private LoRAs that explain more are worth files,
_NEARLY: Final = 2.5  # if they leave at most so many times what mixtures leave
_MOST_TAGS: Final = 8  # of LoRAs in a prompt, unless private ones are better
_HALVINGS: Final = 24  # of the search for a budget


@dataclass(frozen=True, eq=False)
class RankForecast:
    """Squared singular values of every layer's mixtures and private deviations, times its weight.

    The explained share of a single checkpoint leaves out the inner products between the errors of
    different blocks, which cancel over all checkpoints.
    """

    names: tuple[str, ...]  # of the checkpoints
    mixtures: tuple[tuple[Tensor, ...], ...]  # per layer and direction, falling
    private: tuple[tuple[Tensor, ...], ...]  # per layer and checkpoint, falling
    multipliers: tuple[Tensor, ...]  # per layer (k, d): of the directions
    energies: Tensor  # (k,), of all deviations in the layers, times their weights
    costs: tuple[int, ...]  # bytes of a rank, per layer
    sampled: tuple[int, ...] = ()  # places of the layers, where these stand for all
    # Bytes beside the factors, which only `ranks_for` counts.
    entries: tuple[int, ...] = ()  # of a layer's first rank in a file, per layer
    file_bytes: int = 0  # of a file

    @property
    def directions(self) -> int:
        """The number of LoRAs that can have different multipliers, d."""
        return self.multipliers[0].shape[1]

    @cached_property
    def largest(self) -> int:
        """The bytes of all ranks that the bases hold."""
        pairs = zip(self.mixtures, self.costs, strict=True)
        return sum(len(values) * cost for layer, cost in pairs for values in layer)

    def explained_by_shared(self, budget: float) -> Tensor:  # (k,), shares 0..1
        """Returns what shared LoRAs of these bytes explain of every checkpoint, approximately."""
        return self._shares(self._counts(budget))

    def explained_by_private(self, budget: float) -> Tensor:  # (k,), shares 0..1
        """Returns what private LoRAs of these bytes together explain of every checkpoint, at most."""
        k = len(self.energies)
        plain = replace(self, entries=(), file_bytes=0)
        explained = torch.zeros_like(self.energies)
        for layer, counts in zip(self.private, plain.private_counts(budget), strict=True):
            explained += torch.stack([layer[c][: counts[c]].sum() for c in range(k)])
        return self._of_all(explained)

    def private_size(self, checkpoint: int, target: float) -> int:
        """Returns the bytes of factors with which a private LoRA alone reaches a share."""
        spectra = [layer[checkpoint] for layer in self.private]
        left = max(1 - target, 0.0) * float(self.energies[checkpoint])
        inside = sum(float(values.sum()) for values in spectra)
        outside = float(self.energies[checkpoint]) - inside
        ranks = ranks_within(spectra, self.costs, max(left - outside, 0.0))
        return sum(rank * cost for rank, cost in zip(ranks, self.costs, strict=True))

    def curves(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:  # (sizes, k) each, shares 0..1
        """Returns `explained_by_shared` and `explained_by_private` for many budgets, up to the last few ranks of each."""
        shared = torch.cat([layer.square().mT for layer in self.multipliers])
        private = torch.eye(len(self.energies), dtype=torch.float64).repeat(len(self.costs), 1)
        return (
            self._curve(self.mixtures, shared, sizes),
            self._curve(self.private, private, sizes),
        )

    def rank_curve(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:  # one per size
        """Returns approximately what `ranks_for` does for many budgets, in the time of one."""
        spent, gained = self._by_list(self.mixtures, sizes)
        blocks = (gained.cumsum(1) < _WORTH * gained.sum(1, keepdim=True)).sum(1) + 1
        alone, private = self._by_list(self.private, sizes)
        curve = []
        for place, count in enumerate(blocks.tolist()):
            many = self._want_one_each(float(gained[place].sum()), float(private[place].sum()))
            row = alone[place] if many else spent[place, :count]
            curve.append(self._mean_ranks(row))
        return curve

    def ranks_for(self, budget: float) -> tuple[int, ...]:
        """Returns the ranks, one per LoRA and in the mean of the layers, that use these bytes best."""
        choices = [
            self._counts(budget - blocks * self.file_bytes, blocks, self.entries)
            for blocks in range(1, self.directions + 1)
        ]
        gains = [float(self._explained(counts).sum()) for counts in choices]
        if self._want_one_each(max(gains), self.private_gain(budget)):
            return self.private_ranks_for(budget)
        blocks = next(place for place, gain in enumerate(gains, 1) if gain >= _WORTH * max(gains))
        return self._mean_ranks(self._sizes(choices[blocks - 1]))

    def _want_one_each(self, shared: float, private: float) -> bool:
        """Tells whether as many LoRAs as checkpoints are best, by the energies that each kind explains.

        The solve has more to choose from than the mixtures of the forecast: with as many LoRAs, one for each
        checkpoint where they are alone, and anything between.
        """
        if private > shared:
            return True
        total, k = float(self.energies.sum()), len(self.energies)
        is_close = private >= _ENOUGH * shared and total - private <= _NEARLY * (total - shared)
        return 2 < k <= _MOST_TAGS and is_close

    def private_ranks_for(self, budget: float) -> tuple[int, ...]:
        """Returns the ranks of one LoRA for each checkpoint that use these bytes best."""
        return self._mean_ranks(self._sizes(self.private_counts(budget)))

    def private_gain(self, budget: float) -> float:
        """Returns the energy that private LoRAs explain whose files take these bytes."""
        return sum(
            float(values[:count].sum())
            for layer, counts in zip(self.private, self.private_counts(budget), strict=True)
            for values, count in zip(layer, counts, strict=True)
        )

    def private_counts(self, budget: float) -> list[list[int]]:
        """Returns ranks per layer and checkpoint."""
        k = len(self.energies)
        flat = spread_ranks(
            [values for layer in self.private for values in layer],
            [cost for cost in self.costs for _ in range(k)],
            budget - k * self.file_bytes,
            [entry for entry in self.entries for _ in range(k)],
        )
        return [flat[start : start + k] for start in range(0, len(flat), k)]

    def budget_for(self, target: float) -> int | None:
        """Returns the fewest bytes at which the worst checkpoint reaches a target; None if none do."""
        if float(self.explained_by_shared(self.largest).min()) < target:
            return None
        low, high = 0, self.largest
        for _ in range(_HALVINGS):
            middle = (low + high) // 2
            enough = float(self.explained_by_shared(middle).min()) >= target
            low, high = (low, middle) if enough else (middle, high)
        return high

    def _curve(
        self,
        spectra: Sequence[Sequence[Tensor]],  # per layer and list, falling
        parts: Tensor,  # (lists, k): of a list's gain for every checkpoint
        sizes: Sequence[int],
    ) -> Tensor:  # (sizes, k)
        owner, price, gains = self._best_first(spectra)
        explained = (gains[:, None] * parts[owner]).cumsum(0)
        return self._of_all(_at_sizes(explained, price, sizes))

    def _best_first(
        self, spectra: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:  # (items,) each
        """Returns the list, the bytes and the gain of every rank, those of most gain for a byte first."""
        lists = [values for layer in spectra for values in layer]
        owner = torch.arange(len(lists)).repeat_interleave(torch.tensor([len(v) for v in lists]))
        price = torch.tensor(self.costs).double().repeat_interleave(len(spectra[0]))[owner]
        gains = torch.cat(lists)
        ranking = (gains / price).argsort(descending=True, stable=True)
        return owner[ranking], price[ranking], gains[ranking]

    def _by_list(
        self, spectra: Sequence[Sequence[Tensor]], sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:  # (sizes, lists) each
        """Returns the bytes and the gain of every list of a layer, over all layers, for each size."""
        owner, price, gains = self._best_first(spectra)
        lists = len(spectra[0])
        of_list = torch.nn.functional.one_hot(owner % lists, lists).double()
        spent, gained = (of_list * part[:, None] for part in (price, gains))
        return _at_sizes(spent.cumsum(0), price, sizes), _at_sizes(gained.cumsum(0), price, sizes)

    def _counts(
        self, budget: float, blocks: int | None = None, entries: Sequence[int] = ()
    ) -> list[list[int]]:
        """Returns ranks per layer and direction, of the first directions or of all."""
        count = blocks or self.directions
        lists = [values for layer in self.mixtures for values in layer[:count]]
        costs, firsts = ([x for x in part for _ in range(count)] for part in (self.costs, entries))
        flat = spread_ranks(lists, costs, budget, firsts)
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _explained(self, counts: Sequence[Sequence[int]]) -> Tensor:  # (k,)
        explained = torch.zeros_like(self.energies)
        for layer, values, ranks in zip(self.multipliers, self.mixtures, counts, strict=True):
            kept = torch.stack([v[:n].sum() for v, n in zip(values, ranks, strict=False)])
            explained += layer[:, : len(kept)].square() @ kept
        return explained

    def _shares(self, counts: Sequence[Sequence[int]]) -> Tensor:
        return self._of_all(self._explained(counts))

    def _of_all(self, explained: Tensor) -> Tensor:
        return torch.where(self.energies > 0, explained / self.energies, 1.0).clamp(0, 1)

    def _sizes(self, counts: Sequence[Sequence[int]]) -> Tensor:  # (lists,), bytes
        """Returns the bytes of every LoRA by its ranks per layer."""
        return torch.tensor(counts, dtype=torch.float64).mT @ torch.tensor(self.costs).double()

    def _mean_ranks(self, sizes: Tensor) -> tuple[int, ...]:
        """Returns the ranks of LoRAs of these bytes in the mean of the layers, falling."""
        ranks = (sizes / sum(self.costs)).round().clamp(min=1)
        return tuple(sorted((int(rank) for rank in ranks), reverse=True))


def _at_sizes(
    sums: Tensor,  # (items, any), of the first items
    price: Tensor,  # (items,), bytes
    sizes: Sequence[int],
) -> Tensor:  # (sizes, any)
    """Returns the sums over the first items that a budget of each size pays for."""
    bought = torch.searchsorted(price.cumsum(0), torch.tensor(sizes).double(), right=True)
    return torch.cat([sums.new_zeros(1, sums.shape[1]), sums])[bought]
