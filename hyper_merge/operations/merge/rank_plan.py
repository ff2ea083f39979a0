"""Plans the ranks of a merge's shared LoRAs, and the values that a rank search changes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hyper_merge.analysis.inputs import MergeInputs, multiplier_groups
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.dtypes import DTYPES_BY_WORD
from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.solver.allowance import Allowance, LoraFormat


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


def plan_ranks(
    recipe: Recipe,
    inputs: MergeInputs,
    budget: int | None = None,
    formats: tuple[LoraFormat, ...] = (),
) -> RankPlan:
    """Returns the plan of a recipe's ranks.

    Args:
        recipe: the recipe with the ranks, one per LoRA.
        inputs: the files.
        budget: bytes that a search chose; None for those of the recipe.
        formats: of the shared LoRAs, where the bytes are those of their whole files; none where
            they are those of their factors.
    """
    layers, ranks = inputs.layout.layers, recipe.ranks
    dtype = DTYPES_BY_WORD[recipe.factors_dtype]
    layer_ranks = _even_ranks(recipe, layers)
    rank_bytes = tuple(_rank_bytes(layer, dtype) for layer in layers)
    if budget is None:
        even = sum(size * sum(ranks) for size, ranks in zip(rank_bytes, layer_ranks, strict=True))
        budget = even if recipe.budget is None else recipe.budget
    return RankPlan(
        recipe=recipe,
        layer_ranks=layer_ranks,
        groups=multiplier_groups(layers, separate=recipe.multipliers == "separate"),
        alphas=ranks if inputs.layout.family.lora_alpha else (None,) * len(ranks),
        dtype=dtype,
        rank_bytes=rank_bytes,
        allowance=None if recipe.has_even_ranks else Allowance(layers, rank_bytes, budget, formats),
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
