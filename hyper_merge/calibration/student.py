"""The average with LoRAs, as a training runs it: what the factors add, and what that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from hyper_merge.calibration.measure import (
    FORWARD,
    IMAGES,
    Samples,
    pass_cost,
    positions_in_pass,
)
from hyper_merge.checkpoints.architectures.layout import Layer, Layout
from hyper_merge.checkpoints.io.header import Shape

ReadTensor = Callable[[str], Tensor]
"""Returns a tensor of a checkpoint by its key, on the CPU, in the file's type."""

_PRODUCTS: Final = 4.0  # with factors: twice forward, twice backward


@dataclass(frozen=True)
class Course:
    """How long the training is, and what the networks see."""

    rounds: int  # of one batch for every checkpoint, with an update of the factors after each
    batch: int = 8
    side: int = 16  # height and width of the latents
    seed: int = 0
    held_out: int = 2  # batches more, that tell what the training gained
    drawing: int = 4  # runs of the average that draw what the networks see

    @property
    def samples(self) -> Samples:
        """The inputs of the rounds and, after them, those that tell what was gained."""
        return Samples(self.rounds + self.held_out, self.batch, self.side)


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """The blocks of a layer, next to each other, which the training changes.

    Attributes:
        layer: Whose blocks they are.
        up: (m, r), of all blocks as files hold them, but in float32.
        down: (r, n), likewise.
        multipliers: (k, r), of every checkpoint: those of the columns' blocks, times what hosts multiply
            the files' product with.
        dtype: Of the files, to which factors are rounded before they are used.
    """

    layer: Layer
    up: Tensor
    down: Tensor
    multipliers: Tensor
    dtype: torch.dtype

    def change(self, checkpoint: int, device: torch.device) -> Tensor:  # (m, n)
        """Returns what the blocks add to the layer's weight for a checkpoint, on a device."""
        up, down, multipliers = self._on(checkpoint, device)
        return (up * multipliers) @ down

    def output(self, checkpoint: int, inputs: Tensor, stride: int) -> Tensor:
        """Returns what the blocks add to the layer's output for a checkpoint, as `Observe` has both."""
        up, down, multipliers = self._on(checkpoint, inputs.device)
        if inputs.dim() != IMAGES:
            return (inputs @ down.mT * multipliers) @ up.mT
        kernel = down.view(len(down), *self.layer.shape[1:])
        padding = kernel.shape[-1] // 2
        inner = functional.conv2d(inputs, kernel, None, stride, padding)
        return functional.conv2d(inner, (up * multipliers)[:, :, None, None])

    def _on(self, checkpoint: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        up, down = (_rounded(x.to(device), self.dtype) for x in (self.up, self.down))
        return up, down, self.multipliers[checkpoint].to(device)

    def trainable(self, device: torch.device) -> TrainedLayer:
        """Returns the same with the factors on a device, which take gradients."""
        up, down = (x.detach().to(device).requires_grad_() for x in (self.up, self.down))
        return replace(self, up=up, down=down)


@dataclass(frozen=True, eq=False)
class Student:
    """The average with LoRAs.

    Attributes:
        average: Reads the average.
        shapes: Of the checkpoints' tensors by key.
        layout: Of the checkpoints, whose network can be run.
        layers: With their blocks.
    """

    average: ReadTensor
    shapes: Mapping[str, Shape]
    layout: Layout
    layers: Sequence[TrainedLayer]

    def trainable(self, device: torch.device) -> Student:
        """Returns the same with the factors on a device, which take gradients."""
        return replace(self, layers=[layer.trainable(device) for layer in self.layers])

    def costs(self, course: Course) -> dict[str, float]:
        """Returns what a tensor takes in a run forward and backward, by key, in multiply-adds."""
        resolution = self.layout.family.resolution
        costs: dict[str, float] = {}
        for of_layer in self.layers:
            layer, rank = of_layer.layer, of_layer.up.shape[1]
            cost = pass_cost(layer, resolution, course.samples)
            cost += products_cost(layer, rank, resolution, course)
            costs[layer.key] = costs.get(layer.key, 0.0) + cost
        return costs


def with_change(
    beside: Mapping[str, TrainedLayer],
    checkpoint: int,
    key: str,
    inputs: Tensor,
    output: Tensor,
    stride: int = 1,
) -> Tensor:
    """Returns a layer's output with what its LoRAs add."""
    layer = beside.get(key)
    return output if layer is None else output + layer.output(checkpoint, inputs, stride)


def is_beside(layer: Layer, resolution: int, course: Course) -> bool:
    """Tells whether factors are applied beside the weight, where that takes less than their product does."""
    positions = positions_in_pass(layer, resolution, course.samples)
    return not layer.rows and positions * (layer.m + layer.n) < layer.m * layer.n


def training_cost(layout: Layout, ranks: Sequence[int], checkpoints: int, course: Course) -> float:
    """Returns what a training takes, in multiply-adds of large products.

    Args:
        layout: of the checkpoints.
        ranks: of all blocks of each layer together.
        checkpoints: how many there are.
        course: of the training.
    """
    resolution = layout.family.resolution
    plain = sum(pass_cost(layer, resolution, course.samples) for layer in layout.layers)
    products = sum(
        products_cost(*pair, resolution, course) for pair in zip(layout.layers, ranks, strict=True)
    )
    student = course.rounds + 2 * FORWARD * course.held_out
    teacher = FORWARD * course.samples.passes
    average = FORWARD * (course.held_out + course.drawing * course.samples.passes)
    return checkpoints * (student * (plain + products) + teacher * plain) + average * plain


def products_cost(layer: Layer, rank: int, resolution: int, course: Course) -> float:
    """Returns what factors of a rank take in a run forward and backward, in multiply-adds."""
    if is_beside(layer, resolution, course):
        positions = positions_in_pass(layer, resolution, course.samples)
        return _PRODUCTS * positions * (layer.m + layer.n) * rank
    return _PRODUCTS * layer.m * layer.n * rank


def _rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:  # float32
    """Returns a factor as a file holds it; gradients go through the rounding as if there were none."""
    if dtype == torch.float32:
        return factor
    largest = torch.finfo(dtype).max
    rounded = factor.detach().clamp(-largest, largest).to(dtype).to(factor.dtype)
    return factor + (rounded - factor.detach()) if factor.requires_grad else rounded
