"""Describes what the solver needs to know of deviations, wherever they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hyper_merge.analysis.sensitivities import Sensitivities
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.contrasts import Contrasts
from hyper_merge.decomposition.linalg import inner_products
from hyper_merge.runtime.parallel import LayerMaps, parallel_map
from hyper_merge.runtime.scratch import Scratch


class Analysis(ABC):
    """The deviations of k inputs in every layer, compressed between two bases.

    Attributes:
        layers: All layers.
        contrasts: The coordinates of the deviations, d of them.
        sensitivities: The network's, by module, where a run of it measured them.
        scratch: Takes what is computed from it and needed later.
    """

    layers: tuple[Layer, ...]
    contrasts: Contrasts
    sensitivities: Sensitivities | None
    scratch: Scratch

    @contextmanager
    def maps(
        self, device: torch.device, check: Callable[[], None], work: str
    ) -> Iterator[LayerMaps]:
        """Gives maps over layers within the block, here in threads of this process.

        Args:
            device: the device that the work is done on.
            check: called in the caller's thread for every item and while it waits for one; may raise,
                to stop.
            work: the work, as text, where a part of it is named.
        """
        del work
        with parallel_map(device, check) as parallel:
            yield LayerMaps(parallel, parallel)

    @property
    def has_many(self) -> bool:
        """Tells whether the inputs are so many that what can be done on factors alone must be."""
        return False

    @abstractmethod
    def without_ends(self) -> Analysis:
        """Returns the analysis of a layout whose layers at the ends are averaged only."""

    @property
    @abstractmethod
    def grams(self) -> Tensor:  # (layers, d + 1, d + 1), float64
        """The inner products of every layer's slices and, last, the base's rounding error."""

    @property
    @abstractmethod
    def weights(self) -> Tensor:  # (layers,), float64
        """The squared norm of the average in every layer."""

    @property
    @abstractmethod
    def not_carried(self) -> dict[str, Tensor]:  # kind -> (k,), float64
        """The energies outside of all layers, by kind and input."""

    @abstractmethod
    def core(self, index: int) -> Tensor:  # (d, p, q), float32
        """Returns a layer's core."""

    @abstractmethod
    def rounding(self, index: int) -> Tensor:  # (p, q), float32
        """Returns the base's rounding error in a layer's bases."""

    @abstractmethod
    def bases(self, index: int) -> tuple[Tensor, Tensor]:  # (m, p), (n, q), float32
        """Returns a layer's bases."""

    @abstractmethod
    def core_shape(self, index: int) -> tuple[int, int]:  # p, q
        """Returns the sides of a layer's core, without reading it."""

    def products(
        self,
        index: int,
        blocks: Sequence[tuple[Tensor, Tensor]],  # (p, r), (r, q), R of them, float32
    ) -> Tensor:  # (d + 1, R), float64
        """Returns inner products of a layer's slices and, last, the rounding error with blocks."""
        rows = torch.cat([self.core(index), self.rounding(index)[None]])
        matrices = torch.stack([(up @ down).flatten() for up, down in blocks])
        return inner_products(rows.flatten(1), matrices)

    @abstractmethod
    def earlier_solutions(self, name: str, group: str) -> list[Tensor]:  # each (d, R), float64
        """Returns multipliers that were solved for with other settings before these: good starts.

        Args:
            name: name of the settings.
            group: name of the group of layers.
        """

    @abstractmethod
    def remember(
        self,
        name: str,
        multipliers: Mapping[str, Tensor],  # by group of layers: (d, R)
    ) -> None:
        """Keeps the first solution's multipliers of these settings for later settings."""
