"""Measures by runs of the network how much its output depends on each layer.

A `Sensitivity` follows from gradients d(v . output) / dW over v of unit normal entries, noise levels
and prompts. Latents are pure noise and prompts random tokens: on trained families the numbers are
those of pictures and their prompts. No gradient of a weight is formed: those of a layer's outputs and
its inputs say all that is asked.

The average itself runs, from its file, in float32, a block at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from hyper_merge.calibration.network import Network, is_known
from hyper_merge.calibration.run_clock import RunClock
from hyper_merge.calibration.schedule import STEPS
from hyper_merge.checkpoints.architectures.layout import Layer, Layout
from hyper_merge.checkpoints.io.header import Shape
from hyper_merge.decomposition.sensitivity import (
    Sensitivity,
    SensitivitySketch,
    sketching_matrix,
)
from hyper_merge.runtime.progress import Progress

PHASE: Final = "running the average"

IMAGES, _VECTORS = 4, 2  # dimensions of what goes into a layer

_PIXELS: Final = 8  # in height and width, for one of the latents
# Forward, forward again, backward, and sketches.
_RUNS: Final = 9.0
FORWARD: Final = 0.25  # of a pass; the rest is the backward pass, where weights are read again
_ENTRY: Final = 530.0  # multiply-adds that reading an entry twice takes
_LAYER: Final = 4e8  # of a layer in a pass, whatever its size


@dataclass(frozen=True)
class Samples:
    """How many inputs the network sees, and of which size."""

    passes: int = 2
    batch: int = 8  # of a pass
    side: int = 16  # height and width of the latents

    def steps(self, number: int) -> Tensor:  # (batch,)
        """Returns the steps of a pass, of the whole schedule; no other pass has any of them."""
        slots = torch.arange(self.batch) * self.passes + number + 0.5
        return slots * (STEPS / (self.batch * self.passes))


DEFAULT_SAMPLES: Final = Samples()


def can_run(layout: Layout, shapes: Mapping[str, Shape]) -> bool:
    """Tells whether the network of a checkpoint can be run here: by its family, and if it is whole."""
    if not is_known(layout.family):
        return False
    return Network(_refuse_to_read, shapes, layout.family).is_whole


def measuring_cost(layout: Layout, samples: Samples = DEFAULT_SAMPLES) -> float:
    """Returns what `measure_sensitivities` takes, in multiply-adds of large products."""
    resolution = layout.family.resolution
    return samples.passes * sum(pass_cost(layer, resolution, samples) for layer in layout.layers)


def measure_sensitivities(
    tensor: Callable[[str], Tensor],
    shapes: Mapping[str, Shape],
    layout: Layout,
    device: torch.device,
    progress: Progress,
    samples: Samples = DEFAULT_SAMPLES,
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """Returns the sensitivity of every layer by its module.

    Args:
        tensor: returns a tensor of the checkpoint by its key, on the CPU, in the file's type.
        shapes: of the checkpoint's tensors by key.
        layout: of the checkpoint, which `can_run`.
        device: that runs the network.
        progress: progress and interrupt.
        samples: the inputs.
        seed: of the inputs.

    Raises:
        InterruptedRun: the run was stopped.
    """
    resolution = layout.family.resolution
    costs = {layer.module: pass_cost(layer, resolution, samples) for layer in layout.layers}
    clock = RunClock(progress, PHASE, samples.passes * sum(costs.values()))
    observer = _Observer(tensor, layout.layers, device, costs, clock)
    network = Network(observer.read, shapes, layout.family, observer.observe)
    generator = torch.Generator().manual_seed(seed)
    outputs = 0
    for number in range(samples.passes):
        steps = samples.steps(number)
        with torch.inference_mode(mode=False), torch.enable_grad():  # a host may have set these
            output = network.run(steps.to(device), samples.side, generator)
            v = torch.randn(output.shape, generator=generator).to(output)
            torch.autograd.backward(output, v)
        outputs += output.numel()
    clock.finish()
    return observer.sensitivities(outputs)


class _Observer:
    """Reads weights, and sketches their gradients from what goes into the layers and comes back."""

    def __init__(
        self,
        tensor: Callable[[str], Tensor],
        layers: tuple[Layer, ...],
        device: torch.device,
        costs: Mapping[str, float],  # of a pass, by module
        clock: RunClock,
    ) -> None:
        self._tensor, self._device, self._costs, self._clock = tensor, device, costs, clock
        self._layers: dict[str, list[Layer]] = {}
        for layer in layers:
            self._layers.setdefault(layer.key, []).append(layer)
        self._sketches: dict[str, SensitivitySketch] = {}
        self._tests: dict[int, Tensor] = {}  # by size

    def read(self, key: str) -> Tensor:
        """Returns a tensor in float32 on the device."""
        share = 1 - FORWARD if torch.is_grad_enabled() else FORWARD
        layers = self._layers.get(key, ())
        self._clock.advance(share * sum(self._costs[layer.module] for layer in layers))
        return self._tensor(key).to(self._device, torch.float32)

    def observe(self, key: str, inputs: Tensor, output: Tensor, stride: int = 1) -> Tensor:
        """Sketches the gradient of a layer when that of its output is known."""
        if key in self._layers and output.requires_grad:
            output.register_hook(partial(self._take, key, inputs.detach(), stride))  # type: ignore[no-untyped-call]
        return output

    def sensitivities(self, outputs: int) -> dict[str, Sensitivity]:
        """Returns the sensitivities by module, from gradients of so many outputs together."""
        return {
            layer.module: self._sketch(layer).sensitivity(outputs)
            for layers in self._layers.values()
            for layer in layers
        }

    def _take(self, key: str, inputs: Tensor, stride: int, gradient: Tensor) -> None:
        layers = self._layers[key]
        kernel = layers[0].kernel
        if inputs.dim() == IMAGES and kernel:
            padding = (kernel[0] // 2, kernel[1] // 2)
            inputs = functional.unfold(inputs, kernel, padding=padding, stride=stride).mT
            gradient = gradient.flatten(2).mT
        elif inputs.dim() == _VECTORS:
            inputs, gradient = inputs[:, None], gradient[:, None]
        for layer in layers:
            rows = gradient[..., slice(*layer.rows)] if layer.rows else gradient
            self._sketch(layer).add(inputs, rows)

    def _sketch(self, layer: Layer) -> SensitivitySketch:
        if layer.module not in self._sketches:
            tests = self._test(layer.m), self._test(layer.n)
            self._sketches[layer.module] = SensitivitySketch(tests)
        return self._sketches[layer.module]

    def _test(self, size: int) -> Tensor:
        if size not in self._tests:
            self._tests[size] = sketching_matrix(size).to(self._device)
        return self._tests[size]


def pass_cost(layer: Layer, resolution: int, samples: Samples) -> float:
    """Returns what a layer takes in one pass, forward and backward, in multiply-adds."""
    runs = _RUNS * positions_in_pass(layer, resolution, samples)
    return layer.m * layer.n * (runs + _ENTRY) + _LAYER


def positions_in_pass(layer: Layer, resolution: int, samples: Samples) -> float:
    """Returns at how many positions a layer is applied in one pass, all inputs together."""
    shrunk = (samples.side * _PIXELS / resolution) ** 2 if layer.part == "unet" else 1.0
    return samples.batch * layer.positions * shrunk


def _refuse_to_read(key: str) -> Tensor:
    raise AssertionError(f"expected shapes alone to be read, got {key}")
