"""Adds up LoRA files times their multipliers, layer by layer, as one file would hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.spec import PartName
from hyper_merge.decomposition.linalg import product_energy
from hyper_merge.decomposition.normalization import even_out
from hyper_merge.decomposition.truncated_svd import truncate_factors
from hyper_merge.loras.lora_file import as_hosts_apply, stored_factors
from hyper_merge.loras.reader import LoraReader


@dataclass(frozen=True, eq=False)
class StoredSum:
    """One layer's sum as a file will hold it."""

    factors: tuple[Tensor, Tensor]  # (m, r), (r, n)
    energy: float  # squared norm of the exact sum
    lost: float  # of what the factors differ from it


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """A sum of LoRAs, and the rank that its layers are cut down to.

    Attributes:
        loras: Open for reading.
        multipliers_of: One per LoRA, for the layers of a part of the network.
        rank: The largest rank of a layer; None to keep the rank of the sum.
    """

    loras: Sequence[LoraReader]
    multipliers_of: Callable[[PartName], tuple[float, ...]]
    rank: int | None = None

    def ranks(self) -> Mapping[str, tuple[Layer, int]]:
        """Returns the modules that are in the sum, each with its layer and its rank."""
        layers = {name: layer for lora in self.loras for name, layer in lora.modules.items()}
        ranked = {name: (layer, self._rank(layer)) for name, layer in layers.items()}
        return {name: (layer, rank) for name, (layer, rank) in ranked.items() if rank}

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the sum can be stored: the LoRAs' own, or float32 if they differ."""
        dtypes = {lora.dtype for lora in self.loras}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def factors(
        self,
        layer: Layer,
    ) -> tuple[Tensor, Tensor]:  # (m, rho), (rho, n), float64
        """Returns the exact sum; each column of the first factor is as long as its row of the second."""
        ups, downs = [], []
        for lora, multiplier in self._used(layer):
            up, down = lora.factors(layer.module)
            ups.append(up * multiplier)
            downs.append(down)
        return even_out(torch.cat(ups, 1), torch.cat(downs))

    def stored(self, layer: Layer, alpha: int | None, dtype: torch.dtype) -> StoredSum:
        """Returns the sum, cut to its rank where it has more, rounded once.

        Raises:
            NonFiniteError: the type cannot hold it.
        """
        up, down = self.factors(layer)
        kept, rank = (up, down), self._rank(layer)
        if rank < up.shape[1]:
            best = truncate_factors(up, down, rank)
            kept = best.up, best.down
        factors = stored_factors(layer, *kept, alpha, dtype)
        rounded = as_hosts_apply(*factors, alpha)
        difference = (
            torch.cat([up, -rounded[0].double()], 1),
            torch.cat([down, rounded[1].double()]),
        )
        return StoredSum(
            factors=factors,
            energy=product_energy(up, down),
            lost=max(product_energy(*difference), 0.0),
        )

    def _rank(self, layer: Layer) -> int:
        everything = sum(lora.ranks[layer.module] for lora, _ in self._used(layer))
        return min(everything, layer.m, layer.n, self.rank or everything)

    def _used(self, layer: Layer) -> list[tuple[LoraReader, float]]:
        pairs = zip(self.loras, self.multipliers_of(layer.part), strict=True)
        used = [(lora, x) for lora, x in pairs if x and layer.module in lora.modules]
        for lora, _ in used:
            lora.require_layer(layer)
        return used
