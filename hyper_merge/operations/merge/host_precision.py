"""What rounding adds where programs hold the weights in half precision, estimated on a few rows.

AUTOMATIC1111 adds LoRAs in the type of the weights, and rounds the weight again after each of them;
Forge and ComfyUI add all of them in float32 and round once. Both are done here as they do it.
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

ROWS: Final = 8  # of every layer


@dataclass(frozen=True, eq=False)
class HostLora:
    """A LoRA as its file holds it, and how much of it each checkpoint takes."""

    factors: Sequence[tuple[Tensor, Tensor]]  # per layer: (m, r), (r, n)
    alpha: float | None  # None for a file without
    multipliers: Mapping[str, Tensor]  # by the layers' part: (k,); all of one where "unet" is alone


@dataclass(frozen=True, eq=False)
class _Block:
    """One LoRA in some rows of one layer."""

    up: Tensor  # (s, r), as the file holds it
    down: Tensor  # (r, n)
    scale: float  # alpha / rank
    multipliers: Tensor  # (k,), float32


def measure_precision_loss(
    average: Callable[[str], Tensor],
    layout: tuple[Family, Sequence[Layer]],
    loras: Sequence[HostLora],
    energies: Tensor,  # (k,)
    rows: int = ROWS,
    check: Callable[[], None] = lambda: None,
) -> tuple[PrecisionLoss, ...]:
    """What each way of adding the LoRAs adds to the loss, nearly.

    Args:
        average: a tensor of the hyper-model by its key, as the file holds it.
        layout: family and layers.
        loras: in the order of the prompt.
        energies: squared norms of the checkpoints' deviations, of which shares are told.
        rows: about how many of each layer are looked at; the same ones every time.
        check: called for every layer; may raise, to stop.
    """
    family, layers = layout
    ways = (((A1111, _one_by_one),) if family.in_a1111 else ()) + ((FORGE_AND_COMFYUI, _together),)
    errors = torch.zeros(len(ways), len(energies), dtype=torch.float64)
    for index, layer in enumerate(layers):
        check()
        chosen = _chosen(layer, rows)
        own = [block for lora in loras for block in _blocks(lora, index, layer, chosen)]
        rows_of_layer = _matrix(layer, average(layer.key))[chosen]
        weights = rows_of_layer.expand(len(energies), -1, -1)
        exact = _sum(weights, own)
        for way, (_, add) in enumerate(ways):
            added = add(weights, own, family.half).double() - exact
            errors[way] += added.square().sum((1, 2)) * (layer.m / len(rows_of_layer))
    return tuple(
        PrecisionLoss(
            hosts=hosts,
            added=_finite_share(of.sum(), energies.sum()),
            worst=max(_finite_share(one, whole) for one, whole in zip(of, energies, strict=True)),
        )
        for (hosts, _), of in zip(ways, errors, strict=True)
    )


def _one_by_one(
    weights: Tensor,  # (k, s, n)
    blocks: Sequence[_Block],
    half: torch.dtype,
) -> Tensor:  # (k, s, n)
    """Every LoRA in turn, all results in half precision. Source: A1111's network_lora.py, networks.py."""
    weights = weights.to(half)
    for block in blocks:
        product = (block.up.to(half).float() @ block.down.to(half).float()).to(half)
        scaled = (product.float() * block.scale).to(half)
        step = (scaled.float() * block.multipliers[:, None, None]).to(half)
        weights = (weights.float() + step.float()).to(half)
    return weights


def _together(
    weights: Tensor,  # (k, s, n)
    blocks: Sequence[_Block],
    half: torch.dtype,
) -> Tensor:  # (k, s, n)
    """All LoRAs in float32, then rounded. Source: Forge's backend/patcher/lora.py, ComfyUI's lora.py."""
    return _sum(weights, blocks).to(half)


def _sum(
    weights: Tensor,  # (k, s, n)
    blocks: Sequence[_Block],
) -> Tensor:  # (k, s, n), float32: some thousand times finer than what is told of it
    """The weights of every checkpoint as the LoRAs mean them."""
    weights = weights.float()
    for block in blocks:
        product = block.up.float() @ block.down.float()
        weights = weights + (block.multipliers * block.scale)[:, None, None] * product
    return weights


def _blocks(lora: HostLora, index: int, layer: Layer, chosen: slice) -> Iterator[_Block]:
    """A LoRA in one layer; nothing where it leaves the layer alone."""
    up, down = lora.factors[index]
    rank = up.shape[1]
    if rank:
        multipliers = lora.multipliers.get(layer.part, lora.multipliers["unet"])
        scale = 1.0 if lora.alpha is None else lora.alpha / rank
        yield _Block(up[chosen], down, scale, multipliers.float())


def _chosen(layer: Layer, rows: int) -> slice:
    """Evenly spaced rows; by an odd step, or they would be the same one of every attention's heads."""
    return slice(None, None, max(layer.m // rows, 1) | 1)


def _matrix(layer: Layer, tensor: Tensor) -> Tensor:  # (m, n)
    """A layer's own rows of a tensor that may hold several."""
    return tensor.flatten(1)[slice(*layer.rows) if layer.rows else slice(None)]


def _finite_share(part: Tensor, whole: Tensor) -> float:
    ratio = share(part, whole)
    return ratio if math.isfinite(ratio) else 1.0  # a host whose numbers overflow has nothing left
