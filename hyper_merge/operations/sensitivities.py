"""Finds how much the output of an average's network depends on each layer: known, or measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyper_merge.analysis.sensitivities import (
    Sensitivities,
    has_sensitivities,
    read_sensitivities,
    sensitivities_path,
    write_sensitivities,
)
from hyper_merge.calibration.measure import can_run, measure_sensitivities
from hyper_merge.checkpoints.architectures.layout import Layout
from hyper_merge.checkpoints.io.header import Header, Shape
from hyper_merge.runtime.damaged_files import DamagedFiles
from hyper_merge.runtime.devices import try_device
from hyper_merge.runtime.progress import Progress


def is_run(layer_weights: str, header: Header, layout: Layout) -> bool:
    """Tells whether a run of the average's network weighs its layers.

    Args:
        layer_weights: of the recipe.
        header: of a file with the tensors of the average; the file is not read.
        layout: of the average.
    """
    return layer_weights == "output" and can_run(layout, header.shapes)


@dataclass(frozen=True, eq=False)
class AverageNetwork:
    """The network of an average, and where its sensitivities are kept.

    Attributes:
        layout: Of the average.
        shapes: Of its tensors by key.
        path: In the cache, of the sensitivities.
        seed: Of the inputs that the network sees.
    """

    layout: Layout
    shapes: Mapping[str, Shape]
    path: Path
    seed: int

    @classmethod
    def of(
        cls,
        layer_weights: str,
        header: Header,
        layout: Layout,
        average_id: str,
        cache: Path,
        seed: int,
    ) -> AverageNetwork | None:
        """Returns the network that a run of weights its layers; None where none is run.

        Args:
            layer_weights: of the recipe.
            header: of a file with the tensors of the average.
            layout: of the average.
            average_id: by which the cache knows it.
            cache: folder of the cache.
            seed: of the recipe.
        """
        if not is_run(layer_weights, header, layout):
            return None
        return cls(layout, header.shapes, sensitivities_path(cache, average_id, seed), seed)

    @property
    def is_known(self) -> bool:
        """Whether an earlier run measured the sensitivities."""
        return has_sensitivities(self.path, self.layout.layers)

    def known(self, damaged: DamagedFiles | None = None) -> Sensitivities | None:
        """Returns the sensitivities that an earlier run measured, if any.

        Args:
            damaged: takes their file if it is damaged; None to leave it where it is.
        """
        return read_sensitivities(self.path, self.layout.layers, damaged)

    def sensitivities(
        self, average: Callable[[str], Tensor], device: torch.device, progress: Progress
    ) -> Sensitivities | None:
        """Returns the sensitivities, measured and remembered where they are not known.

        Args:
            average: returns a tensor of the average by its key.
            device: that runs the network.
            progress: progress and interrupt.

        Returns:
            None where the network gives no finite outputs.
        """
        known = self.known(DamagedFiles(progress.warn))
        if known is not None:
            return known
        measured = self._measure(average, device, progress)
        means = [sensitivity.mean for sensitivity in measured.values()]
        if not all(map(math.isfinite, means)) or not any(means):
            progress.warn(
                "the average's network gives no finite outputs, so its layers count by their size"
                " and positions"
            )
            return None
        write_sensitivities(self.path, measured, progress.warn)
        return measured

    def _measure(
        self, average: Callable[[str], Tensor], device: torch.device, progress: Progress
    ) -> Sensitivities:
        """Measures on the device, or on the CPU where that cannot do it."""
        reached = [0.0]
        watch = Progress(lambda _phase, fraction: reached.append(fraction))

        def measure(on: torch.device) -> Sensitivities:
            part = progress.part(reached[-1], 1.0).joined(watch)
            return measure_sensitivities(
                average, self.shapes, self.layout, on, part, seed=self.seed
            )

        def warn(failure: str) -> None:
            progress.warn(f"{failure} for the network of the average; the CPU runs it")

        return try_device(device, measure, on_failure=warn)
