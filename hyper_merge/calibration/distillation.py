"""Trains the factors of LoRAs by runs of the network: knowledge distillation.

The student is the average with its LoRAs, the teachers are the checkpoints. All of them see the same
noisy latents and the same random prompts, and the factors are changed so that the student's outputs,
with each checkpoint's multipliers, come nearer to those of that checkpoint. The average itself draws
the latents for these prompts, so no picture and no prompt of anybody is needed. Outputs for latents
that the training never sees tell what it gained.

Factors are used as files will hold them: in 8 bits, what rounding does to one entry others make good.

Sources: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015; Kingma and Ba,
"Adam: a method for stochastic optimization", 2015; Bengio, Leonard and Courville, "Estimating or
propagating gradients through stochastic neurons for conditional computation", 2013, for gradients
through the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyper_merge.calibration.measure import FORWARD
from hyper_merge.calibration.network import Network
from hyper_merge.calibration.run_clock import RunClock
from hyper_merge.calibration.student import (
    Course,
    ReadTensor,
    Student,
    TrainedLayer,
    is_beside,
    training_cost,
    with_change,
)
from hyper_merge.calibration.unet import Observe, ignore
from hyper_merge.runtime.device_memory import free_memory
from hyper_merge.runtime.progress import Progress

PHASE: Final = "training the LoRAs"

BYTES_OF_ENTRY: Final = 16
"""Of a factor's entry in float32, its gradient and two moments of that."""

# Step of an entry, of the mean size of its factor's entries: times the root of the share of the outputs'
# difference that is left, for so far the factors have to go.
_RATE: Final = 0.05
_MOST: Final = 0.015  # of that
_RISE: Final = 9  # updates until that rate is reached
_BETAS: Final = (0.9, 0.98)
_SPARE: Final = 3 * 10**9  # bytes of a GPU that are left to what the runs take beside the weights
_NOTHING: Final = 1e-4  # of the average's squared difference: no matter whether it is more or less
_EPSILON: Final = 1e-15  # of gradients, far below all that say something


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a training came to.

    Attributes:
        before: (k,): squared differences of the outputs before it, as shares of the average's.
        after: (k,): the same with the factors as they are written.
        is_better: Whether these are better than the former ones, in the mean over the latents: of the sum
            of all squares a single one can be most.
    """

    before: Tensor
    after: Tensor
    is_better: bool


def distil(
    student: Student,
    teachers: Sequence[AbstractContextManager[ReadTensor]],
    weights: Tensor,
    course: Course,
    write: Callable[[Sequence[TrainedLayer]], Sequence[TrainedLayer]],
    device: torch.device,
    progress: Progress,
) -> Lesson | None:
    """Trains the student's factors; the multipliers stay as they are.

    Args:
        student: with the factors at the start; on the device they are, they change in place.
        teachers: open the k checkpoints, once each, one after the other.
        weights: (k,): how much each checkpoint's squared differences count.
        course: how long, and with which inputs.
        write: takes the trained layers, on the CPU, and returns them as files hold them.
        device: that runs the networks.
        progress: progress and interrupt.

    Returns:
        None where a network gives outputs that are not finite, or all give the same.

    Raises:
        InterruptedRun: the training was stopped.
    """
    ranks = {of_layer.layer.module: of_layer.up.shape[1] for of_layer in student.layers}
    by_layer = [ranks.get(layer.module, 0) for layer in student.layout.layers]
    total = training_cost(student.layout, by_layer, len(teachers), course)
    runner = _Runner(student.trainable(device), course, device, RunClock(progress, PHASE, total))
    average = runner.network(student.average)
    runner.draw(average)
    targets = []
    for teacher in teachers:
        with teacher as read:
            network = runner.network(read)
            targets.append([runner.output(network, n) for n in range(course.samples.passes)])
    # Of the average alone, in the same places.
    alone = [runner.output(average, course.rounds + n) for n in range(course.held_out)]
    of_average = torch.stack([_squares(alone, of[course.rounds :]) for of in targets])
    scale = of_average.sum(1)
    if not bool(scale.isfinite().all()) or not bool((scale > 0).any()):
        return None
    # Nothing is left of a checkpoint that does what the average does.
    scale = torch.where(scale > 0, scale, torch.inf)
    of_latents = runner.differences(runner.layers, targets)
    before = of_latents.sum(1) / scale
    runner.train(targets, weights, min(_RATE * float(before.mean().sqrt()), _MOST))
    trained = runner.trained()
    if not all(x.isfinite().all() for layer in trained for x in (layer.up, layer.down)):
        return Lesson(before, before, is_better=False)
    of_latents_after = runner.differences(write(trained), targets)
    runner.clock.finish()
    change = _mean_change(of_latents, of_latents_after, of_average) @ weights.double().cpu()
    # False for NaN too.
    return Lesson(before, of_latents_after.sum(1) / scale, is_better=float(change) < 0)


class _Runner:
    """Runs the networks of checkpoints and of the student."""

    def __init__(
        self, student: Student, course: Course, device: torch.device, clock: RunClock
    ) -> None:
        self._student, self._course, self._device = student, course, device
        self.layers = student.layers
        self.clock = clock
        self._costs = student.costs(course)
        # The average's tensors on a GPU, in the files' types: each run would bring them there twice.
        self._kept: dict[str, Tensor] = {}
        self._latents: list[Tensor] = []  # by number: what the networks see

    def network(self, tensor: ReadTensor) -> Network:
        """Returns the network of a checkpoint."""
        return self._network(partial(self._read, tensor))

    def draw(self, average: Network) -> None:
        """Has the average draw what the networks see, in place of pure noise."""
        course = self._course
        with torch.inference_mode(mode=False):
            self._latents = [
                average.draw(*self._inputs(number), course.drawing)
                for number in range(course.samples.passes)
            ]

    def output(self, network: Network, number: int) -> Tensor:  # (b, channels, side, side)
        """Returns a network's output for the inputs of a number, without a gradient."""
        with torch.inference_mode(mode=False), torch.no_grad():
            return self._run(network, number)

    def differences(
        self, layers: Sequence[TrainedLayer], targets: Sequence[Sequence[Tensor]]
    ) -> Tensor:  # (k, latents), float64
        """Returns a student's squared differences for inputs that no round sees."""
        first, held_out = self._course.rounds, self._course.held_out
        learners = self._learners(layers, len(targets))
        return torch.stack(
            [
                _squares(
                    [self.output(learner, first + n) for n in range(held_out)], of_teacher[first:]
                )
                for learner, of_teacher in zip(learners, targets, strict=True)
            ]
        )

    def train(self, targets: Sequence[Sequence[Tensor]], weights: Tensor, highest: float) -> None:
        """Changes the factors after every batch; the checkpoints take turns in an order of chance.

        Args:
            targets: by checkpoint and number: its outputs.
            weights: (k,): how much each checkpoint's squared differences count.
            highest: step of an entry at most, of the mean size of its factor's entries.
        """
        factors = [
            (factor, highest * _share_of_updates(layer.multipliers) ** 0.5)
            for layer in self.layers
            for factor in (layer.up, layer.down)
            if bool(factor.detach().any())  # nothing goes through a pair of zeros
        ]
        learners = self._learners(self.layers, len(targets))
        with torch.inference_mode(mode=False), torch.enable_grad():  # a host may have set these
            optimizer = torch.optim.Adam(
                [{"params": [factor], "lr": step * _mean_size(factor)} for factor, step in factors],
                betas=_BETAS,
                eps=_EPSILON,
            )
            rate = partial(_rate, self._course.rounds * len(learners))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            generator = torch.Generator().manual_seed(self._course.seed)
            for number in range(self._course.rounds):
                for m in torch.randperm(len(learners), generator=generator).tolist():
                    output = self._run(learners[m], number)
                    loss = (output - targets[m][number]).square().mean()
                    torch.autograd.backward(float(weights[m]) * loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()

    def trained(self) -> list[TrainedLayer]:
        """Returns the layers with their factors on the CPU."""
        return [
            replace(layer, up=layer.up.detach().cpu(), down=layer.down.detach().cpu())
            for layer in self.layers
        ]

    def _run(self, network: Network, number: int) -> Tensor:
        return network.run(*self._inputs(number), self._latents[number])

    def _inputs(self, number: int) -> tuple[Tensor, int, torch.Generator]:
        """Returns the steps, the side, and what gives the noise and the prompts of a number."""
        course = self._course
        generator = torch.Generator().manual_seed(course.seed + number)
        return course.samples.steps(number).to(self._device), course.side, generator

    def _learners(self, layers: Sequence[TrainedLayer], count: int) -> list[Network]:
        """Returns the networks of the average with the LoRAs of each checkpoint."""
        resolution = self._student.layout.family.resolution
        inside: dict[str, list[TrainedLayer]] = {}
        beside: dict[str, TrainedLayer] = {}
        for layer in layers:
            if not layer.up.shape[1]:
                continue
            if is_beside(layer.layer, resolution, self._course):
                beside[layer.layer.key] = layer
            else:
                inside.setdefault(layer.layer.key, []).append(layer)
        return [
            self._network(partial(self._learned, inside, m), partial(with_change, beside, m))
            for m in range(count)
        ]

    def _network(self, read: ReadTensor, observe: Observe = ignore) -> Network:
        return Network(read, self._student.shapes, self._student.layout.family, observe)

    def _learned(
        self, inside: Mapping[str, Sequence[TrainedLayer]], checkpoint: int, key: str
    ) -> Tensor:
        layers = inside.get(key, ())
        # Before a change it is copied: it may be the mapped file, or be kept.
        weight = self._read(self._student.average, key, copy=bool(layers))
        for layer in layers:
            rows = weight[slice(*layer.layer.rows)] if layer.layer.rows else weight
            rows += layer.change(checkpoint, self._device).view(rows.shape)
        return weight

    def _read(self, tensor: ReadTensor, key: str, *, copy: bool = False) -> Tensor:
        """Returns a tensor in float32 on the device."""
        share = 1 - FORWARD if torch.is_grad_enabled() else FORWARD
        self.clock.advance(share * self._costs.get(key, 0.0))
        return self._on_device(tensor, key).to(torch.float32, copy=copy)

    def _on_device(self, tensor: ReadTensor, key: str) -> Tensor:
        """Returns a tensor on the device in the file's type; keeps the average's while there is room."""
        if self._device.type == "cpu" or tensor is not self._student.average:
            return tensor(key).to(self._device)
        if key not in self._kept:
            found = tensor(key).to(self._device)
            if free_memory(self._device) < _SPARE + found.nbytes:
                return found
            self._kept[key] = found
        return self._kept[key]


def _rate(updates: int, number: int) -> float:
    """Returns the rate of an update as a share of the highest: it rises, then falls to nothing."""
    rise = min((number + 1) / _RISE, 1.0)
    return rise * (1 + math.cos(math.pi * number / updates)) / 2


def _squares(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:  # (latents,), float64
    """Returns the squared difference for each latent of all batches."""
    pairs = zip(outputs, others, strict=True)
    return torch.cat(
        [(one - other).double().square().flatten(1).sum(1).cpu() for one, other in pairs]
    )


def _mean_change(before: Tensor, after: Tensor, of_average: Tensor) -> Tensor:
    """Returns the logarithms of what differences are multiplied with, in the mean over the latents.

    Args:
        before: (k, latents): squared differences.
        after: (k, latents): the same later.
        of_average: (k, latents): those of the average, of which a part is added to both: what is next to
            nothing may become many times as much.

    Returns:
        (k,); 0 for a checkpoint that does what the average does.
    """
    least = _NOTHING * of_average
    return torch.where(of_average > 0, ((after + least) / (before + least)).log(), 0.0).mean(1)


def _share_of_updates(multipliers: Tensor) -> float:  # (k, r)
    """Returns the share of all updates that say something of a block, in the mean over the ranks.

    Of a LoRA for one checkpoint alone only each k-th does. Then Adam's mean of squares, by whose root it
    divides, is a k-th of a gradient's square, and its steps are the root of k as large, of one batch.
    """
    squares = multipliers.square()
    of_ranks = squares.mean(0) / squares.amax(0).clamp(min=torch.finfo(squares.dtype).tiny)
    return float(of_ranks.mean())


def _mean_size(factor: Tensor) -> float:
    return float(factor.detach().square().mean().sqrt())
