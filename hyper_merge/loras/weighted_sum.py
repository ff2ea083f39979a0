"""Adds up LoRA files times their multipliers, layer by layer, as one file would hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.linalg import product_energy
from hyper_merge.decomposition.normalization import even_out
from hyper_merge.decomposition.truncated_svd import truncate_factors
from hyper_merge.loras.lora_file import as_hosts_apply, stored_factors


class OpenLora(Protocol):
    """A LoRA file that is open for reading: one of ours, or one of any trainer."""

    @property
    def modules(self) -> Mapping[str, Layer]:
        """The layer that each module is added to, by its name."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each module."""

    @property
    def dtype(self) -> torch.dtype:
        """The type in which its factors can be stored again."""

    def factors(self, module: str) -> tuple[Tensor, Tensor]:  # (m, r), (r, n), float64
        """Returns factors of what a host adds at multiplier 1."""

    def require_layer(self, layer: Layer) -> None:
        """Returns if the module of a layer is of the layer's size, or the file has none."""


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
        multipliers_of: One per LoRA, for a layer.
        rank: The largest rank of a layer; None to keep the rank of the sum.
    """

    loras: Sequence[OpenLora]
    multipliers_of: Callable[[Layer], tuple[float, ...]]
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

    def spectrum(self, layer: Layer) -> Tensor:  # (rank of the sum,), float64, falling
        """Returns the squared singular values of the exact sum."""
        up, down = self.factors(layer)
        return truncate_factors(up, down, self._rank(layer)).energies

    def stored(
        self, layer: Layer, alpha: float | None, dtype: torch.dtype, rank: int | None = None
    ) -> StoredSum:
        """Returns the sum, cut to its rank where it has more, rounded once.

        Args:
            layer: one of the sum's.
            alpha: of the file; None for a file without.
            dtype: of the stored factors.
            rank: of this layer, at least 1; None for the sum's own.

        Raises:
            NonFiniteError: the type cannot hold it.
        """
        up, down = self.factors(layer)
        kept, rank = (up, down), min(rank or self._rank(layer), self._rank(layer))
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

    def _used(self, layer: Layer) -> list[tuple[OpenLora, float]]:
        pairs = zip(self.loras, self.multipliers_of(layer), strict=True)
        used = [(lora, x) for lora, x in pairs if x and layer.module in lora.modules]
        for lora, _ in used:
            lora.require_layer(layer)
        return used
