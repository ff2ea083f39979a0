"""Plans the ranks of a merge's shared LoRAs, and the values that a rank search changes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from hyper_merge.analysis.inputs import MergeInputs, multiplier_groups
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD
from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.operations.merge.companions import companion_bytes, select_norms_and_biases
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.solver.rank_pruning import Allowance

_HEADER_BYTES: Final = 340  # of a layer's three tensors in a file, without their names
_METADATA_BYTES: Final = 600  # per checkpoint in the metadata of a file


@dataclass(frozen=True)
class RankPlan:
    """The ranks of the shared LoRAs, their files' format, and the bytes that they may take.

    Attributes:
        recipe: The recipe with these ranks, one per LoRA.
        layer_ranks: The even ranks of every layer, one per LoRA, capped by the layer's size.
        groups: Indices of the layers that share multipliers, by the name of their part.
        alphas: Alpha of every LoRA file, None for families without; float8 files find their own.
        dtype: Type of the stored factors.
        rank_bytes: Bytes that one rank takes in every layer.
        allowance: The bytes that adaptive ranks may spread over the layers; None for even ranks.
    """

    recipe: Recipe
    layer_ranks: list[tuple[int, ...]]
    groups: Mapping[str, Sequence[int]]
    alphas: tuple[int | None, ...]
    dtype: torch.dtype
    rank_bytes: tuple[int, ...]
    allowance: Allowance | None


def plan_ranks(recipe: Recipe, inputs: MergeInputs, factor_bytes: int | None = None) -> RankPlan:
    """Returns the plan of a recipe's ranks.

    Args:
        recipe: the recipe with the ranks, one per LoRA.
        inputs: the files.
        factor_bytes: bytes of all factors that a search chose; None for those of the recipe.
    """
    layers, ranks = inputs.layout.layers, recipe.ranks
    dtype = DTYPES_BY_WORD[recipe.factors_dtype]
    layer_ranks = _even_ranks(recipe, layers)
    rank_bytes = tuple(_rank_bytes(layer, dtype) for layer in layers)
    if factor_bytes is None:
        factor_bytes = _factor_bytes(recipe, inputs, layer_ranks, rank_bytes)
    return RankPlan(
        recipe=recipe,
        layer_ranks=layer_ranks,
        groups=multiplier_groups(layers, separate=recipe.multipliers == "separate"),
        alphas=ranks if inputs.layout.family.lora_alpha else (None,) * len(ranks),
        dtype=dtype,
        rank_bytes=rank_bytes,
        allowance=_allowance(recipe, layers, rank_bytes, factor_bytes),
    )


def _even_ranks(recipe: Recipe, layers: Sequence[Layer]) -> list[tuple[int, ...]]:
    """Returns every layer's even ranks; whole layers have all, end layers none without companions."""
    even = even_ranks(recipe.ranks, [(layer.m, layer.n) for layer in layers])
    for index, layer in enumerate(layers):
        if layer.is_end and recipe.exact == "none":
            even[index] = (0,) * len(recipe.ranks)
        elif layer.whole:
            even[index] = (min(layer.m, layer.n),) * len(recipe.ranks)
    return even


def _rank_bytes(layer: Layer, dtype: torch.dtype) -> int:
    """Returns the bytes of a rank; next to none for a whole layer, whose bytes are set aside."""
    return 1 if layer.whole else (layer.m + layer.n) * dtype.itemsize


def _factor_bytes(
    recipe: Recipe,
    inputs: MergeInputs,
    layer_ranks: Sequence[tuple[int, ...]],
    rank_bytes: Sequence[int],
) -> int:
    """Returns the bytes of all factors: those of the budget, or of the even ranks."""
    if recipe.budget is not None:
        return recipe.budget - _bytes_without_factors(recipe, inputs)
    return sum(size * sum(ranks) for size, ranks in zip(rank_bytes, layer_ranks, strict=True))


def _bytes_without_factors(recipe: Recipe, inputs: MergeInputs) -> int:
    """Returns the most bytes that headers, metadata and the companions' tensors take in all files."""
    layers = inputs.layout.layers
    header = _HEADER_BYTES * len(layers) + 3 * sum(len(layer.module) for layer in layers)
    metadata = _METADATA_BYTES * (len(inputs.read) + 8)
    vectors = select_norms_and_biases(recipe, inputs)
    companion = 0
    if vectors or (recipe.exact != "none" and inputs.layout.has_ends):
        companion = companion_bytes(layers, vectors) + metadata
    return len(recipe.ranks) * (header + metadata + companion)


def _allowance(
    recipe: Recipe, layers: Sequence[Layer], rank_bytes: tuple[int, ...], factor_bytes: int
) -> Allowance | None:
    if recipe.allocation == "even" or recipe.method == "greedy":
        return None
    # Layers that a file has together or not at all are filled up with zeros: at most rank 1 in each.
    zeros = sum(size for layer, size in zip(layers, rank_bytes, strict=True) if layer.bundle)
    return Allowance(rank_bytes, factor_bytes - len(recipe.ranks) * zeros)
