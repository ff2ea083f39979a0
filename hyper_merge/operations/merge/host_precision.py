"""Estimates, on a few rows, the loss that hosts add by rounding weights to half precision.

AUTOMATIC1111 adds LoRAs in the type of the weights, and rounds the weight again after each of them;
Forge and ComfyUI add all of them in float32 and round once. Both ways are imitated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.decomposition.linalg import share
from hyper_merge.runs.report import A1111, FORGE_AND_COMFYUI, PrecisionLoss

_ROWS: Final = 8  # of every layer in the sample


@dataclass(frozen=True, eq=False)
class HostLora:
    """A LoRA as its file holds it, with its multiplier for each checkpoint."""

    factors: Sequence[tuple[Tensor, Tensor]]  # per layer: (m, r), (r, n)
    alpha: float | None  # None for a file without alphas
    multipliers: Mapping[str, Tensor]  # by the layers' part: (k,); "unet" holds for all where alone


@dataclass(frozen=True, eq=False)
class _Block:
    """The factors of one LoRA in some rows of one layer."""

    up: Tensor  # (s, r), as the file holds it
    down: Tensor  # (r, n)
    scale: float  # alpha / rank
    multipliers: Tensor  # (k,), float32


def measure_precision_loss(
    average: Callable[[str], Tensor],
    family: Family,
    layers: Sequence[Layer],
    loras: Sequence[HostLora],
    energies: Tensor,  # (k,)
    rows: int = _ROWS,
    check: Callable[[], None] = lambda: None,
) -> tuple[PrecisionLoss, ...]:
    """Returns the approximate loss that each group of hosts adds to that of the LoRAs.

    Args:
        average: returns a tensor of the hyper-model by its key, as the file holds it.
        family: the checkpoints' family.
        layers: the checkpoints' layers.
        loras: all LoRAs in the order of the prompt.
        energies: squared norms of the checkpoints' deviations, of which the losses are shares.
        rows: approximate number of rows of each layer to look at; the same ones every time.
        check: called for every layer; may raise, to stop.
    """
    ways = (((A1111, _add_in_turn),) if family.in_a1111 else ()) + (
        (FORGE_AND_COMFYUI, _add_at_once),
    )
    errors = torch.zeros(len(ways), len(energies), dtype=torch.float64)
    for index, layer in enumerate(layers):
        check()
        chosen = _choose_rows(layer, rows)
        blocks = [block for lora in loras for block in _blocks(lora, index, layer, chosen)]
        chosen_rows = _matrix(layer, average(layer.key))[chosen]
        weights = chosen_rows.expand(len(energies), -1, -1)
        exact = _sum(weights, blocks)
        for way, (_, add) in enumerate(ways):
            error = add(weights, blocks, family.half).double() - exact
            errors[way] += error.square().sum((1, 2)) * (layer.m / len(chosen_rows))
    return tuple(
        PrecisionLoss(
            hosts=hosts,
            added=_finite_share(squares.sum(), energies.sum()),
            worst=max(
                _finite_share(part, whole) for part, whole in zip(squares, energies, strict=True)
            ),
        )
        for (hosts, _), squares in zip(ways, errors, strict=True)
    )


def _add_in_turn(
    weights: Tensor,  # (k, s, n)
    blocks: Sequence[_Block],
    half: torch.dtype,
) -> Tensor:  # (k, s, n)
    """Adds every LoRA in turn, with all results in half precision.

    Source: A1111's network_lora.py, networks.py.
    """
    weights = weights.to(half)
    for block in blocks:
        product = (block.up.to(half).float() @ block.down.to(half).float()).to(half)
        scaled = (product.float() * block.scale).to(half)
        step = (scaled.float() * block.multipliers[:, None, None]).to(half)
        weights = (weights.float() + step.float()).to(half)
    return weights


def _add_at_once(
    weights: Tensor,  # (k, s, n)
    blocks: Sequence[_Block],
    half: torch.dtype,
) -> Tensor:  # (k, s, n)
    """Adds all LoRAs in float32, and rounds the result once.

    Source: Forge's backend/patcher/lora.py, ComfyUI's lora.py.
    """
    return _sum(weights, blocks).to(half)


def _sum(
    weights: Tensor,  # (k, s, n)
    blocks: Sequence[_Block],
) -> Tensor:  # (k, s, n), float32: some thousand times finer than what is reported
    """Returns the weights of every checkpoint with all LoRAs, in float32."""
    weights = weights.float()
    for block in blocks:
        product = block.up.float() @ block.down.float()
        weights = weights + (block.multipliers * block.scale)[:, None, None] * product
    return weights


def _blocks(lora: HostLora, index: int, layer: Layer, chosen: slice) -> Iterator[_Block]:
    """Yields a LoRA's block in one layer, or nothing where it leaves the layer alone."""
    up, down = lora.factors[index]
    rank = up.shape[1]
    if rank:
        multipliers = lora.multipliers.get(layer.part, lora.multipliers["unet"])
        scale = 1.0 if lora.alpha is None else lora.alpha / rank
        yield _Block(up[chosen], down, scale, multipliers.float())


def _choose_rows(layer: Layer, rows: int) -> slice:
    """Returns evenly spaced rows; by an odd step, or all would be of one place in the attention heads."""
    return slice(None, None, max(layer.m // rows, 1) | 1)


def _matrix(layer: Layer, tensor: Tensor) -> Tensor:  # (m, n)
    """Returns the rows of one layer from a tensor that may hold several layers."""
    return tensor.flatten(1)[slice(*layer.rows) if layer.rows else slice(None)]


def _finite_share(part: Tensor, whole: Tensor) -> float:
    ratio = share(part, whole)
    return ratio if math.isfinite(ratio) else 1.0  # a host whose numbers overflow has nothing left
