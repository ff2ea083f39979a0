"""Tells what memory a merge takes, and keeps it within what the user allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from hyper_merge.analysis.cache import required_width
from hyper_merge.analysis.device_bytes import IN_FLIGHT, bytes_in_flight
from hyper_merge.analysis.inputs import MergeInputs, basis_columns
from hyper_merge.calibration.distillation import BYTES_OF_ENTRY
from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.errors import RecipeError
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.parallel import worker_count
from hyper_merge.runtime.scratch import RESIDENT

_OVERHEAD: Final = 320 * 2**20  # bytes: Python and torch
_IN_PASS: Final = 200 * 2**20  # bytes: what files and their network take besides the tensors
_WEIGHTS_AT_WORK: Final = 32  # bytes for an entry of the largest weight that a network reads
_CORES_AT_WORK: Final = 24  # of each worker: a wide core, its mixtures, products and factors

_MB: Final = 10**6
_HOST: Final = torch.device("cpu")


@dataclass(frozen=True)
class MemoryLimits:
    """The bytes of memory that parts of a merge take; the files do not depend on them.

    Attributes:
        resident: Of what the solver keeps, before it goes to a file.
        in_flight: Of the tensors that are analysed at a time; one may take more.
    """

    resident: int = RESIDENT
    in_flight: int = IN_FLIGHT


USUAL_LIMITS: Final = MemoryLimits()
"""Without a limit of the user's."""


@dataclass(frozen=True)
class MemoryNeeds:
    """The bytes of memory that a merge takes whatever its limits are.

    Attributes:
        always: In all phases.
        solving: Of the layers that the solver's workers are about.
        reading: While tensors are analysed, besides these.
        largest: Of the largest tensor.
        training: Of the factors that a training is about; 0 without one.
    """

    always: int
    solving: int
    reading: int
    largest: int
    training: int = 0

    @property
    def least(self) -> int:
        """The fewest bytes with which the merge works."""
        return self.always + max(self.solving, self.reading + self.largest, self.training)

    def limits(self, memory: int | None) -> MemoryLimits:
        """Returns the limits that the user's follow from; the usual ones without one.

        Args:
            memory: bytes that the merge may take.

        Raises:
            RecipeError: they are too few.
        """
        if memory is None:
            return USUAL_LIMITS
        if memory < self.least:
            raise RecipeError(
                f"these checkpoints and ranks need {_in_megabytes(self.least)} of memory at least, and"
                f" {format_size(memory)} are allowed",
                hint=f"give {_in_megabytes(self.least)} or more, or smaller ranks",
                key="memory",
            )
        rest = memory - self.always
        return MemoryLimits(resident=rest - self.solving, in_flight=rest - self.reading)

    def peak(self, limits: MemoryLimits, kept: int, tensors: int | None) -> int:
        """Returns the bytes at the peak.

        Args:
            limits: of the merge.
            kept: bytes that the solver keeps.
            tensors: bytes of the tensors that are analysed at a time; None where no tensor is.
        """
        phases = [min(kept, limits.resident) + self.solving]
        phases.append(min(kept, limits.resident) + self.training)
        if tensors is not None:
            phases.append(self.reading + tensors)
        return self.always + max(phases)


def memory_needs(
    recipe: Recipe, inputs: MergeInputs, sensitivities: int, *, trains: bool = False
) -> MemoryNeeds:
    """Returns what a merge takes.

    Args:
        recipe: with the ranks.
        inputs: the files.
        sensitivities: bytes of the layers' sensitivities; 0 where none are measured.
        trains: whether there is a training.
    """
    width = required_width(recipe.ranks)
    sides = (basis_columns(layer, width) for layer in inputs.layout.layers)
    core = max(4 * inputs.contrasts.dimensions * p * q for p, q in sides)
    return MemoryNeeds(
        # The directions, and those between the bases.
        always=_OVERHEAD + 2 * sensitivities,
        solving=_CORES_AT_WORK * worker_count(_HOST) * core,
        reading=_IN_PASS,
        largest=bytes_in_flight(inputs, width, 1),
        training=_training_bytes(recipe, inputs) if trains else 0,
    )


def _training_bytes(recipe: Recipe, inputs: MergeInputs) -> int:
    layers = inputs.layout.layers
    ranks = even_ranks(recipe.ranks, [(layer.m, layer.n) for layer in layers])
    entries = sum((x.m + x.n) * sum(of_x) for x, of_x in zip(layers, ranks, strict=True))
    weight = max(x.m * x.n for x in layers)
    return BYTES_OF_ENTRY * entries + _WEIGHTS_AT_WORK * weight


def tensors_in_flight(recipe: Recipe, inputs: MergeInputs, limits: MemoryLimits) -> int:
    """Returns the bytes of the tensors that are analysed at a time."""
    width, workers = required_width(recipe.ranks), worker_count(_HOST)
    return bytes_in_flight(inputs, width, workers, limits.in_flight)


def _in_megabytes(size: int) -> str:
    """Returns a size as text, rounded up: what is said to suffice does."""
    return f"{-(-size // _MB)} MB"
