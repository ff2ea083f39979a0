"""Decides how many rounds a training of a merge's LoRAs has, where the recipe leaves it open."""

from __future__ import annotations

from typing import Final

import torch

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.calibration.measure import can_run
from hyper_merge.calibration.student import Course, training_cost
from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.errors import RecipeError
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.formatting import format_count

MOST_ROUNDS: Final = 20
"""Rounds at most where the recipe leaves it open: more gain little."""

_FEWEST: Final = 5  # rounds that are worth their time
_SECONDS: Final = 300.0
# Multiply-adds a second of a usual device. Not those of this one: equal recipes make equal files.
_USUAL_RATES: Final = {"cpu": 1e11, "cuda": 5e12}


def training_rounds(recipe: Recipe, inputs: MergeInputs, device: torch.device) -> int:
    """Returns the rounds of the training that a merge is to have; 0 for none.

    Where the recipe leaves it open, as many as a usual device does in minutes, and none where LoRAs are
    not to go by runs of the network.

    Args:
        recipe: with its ranks.
        inputs: the files.
        device: of the training.

    Raises:
        RecipeError: the recipe asks for a training that cannot be done.
    """
    if recipe.training == "auto":
        goes_by_runs = recipe.layer_weights == "output" and recipe.method == "joint"
        if not goes_by_runs or recipe.target is not None or not _can_train(inputs):
            return 0
        of_round = _cost(recipe, inputs, rounds=1) - _cost(recipe, inputs, rounds=0)
        rounds = int(_SECONDS * _USUAL_RATES.get(device.type, 0.0) / of_round)
        return min(rounds, MOST_ROUNDS) if rounds >= _FEWEST else 0
    if not recipe.training:
        return 0
    if not _can_train(inputs):
        first, family = inputs.headers[0], inputs.layout.family
        raise RecipeError(
            f"the network of {first.name} ({family.title}) cannot be run here, so no LoRA can be trained",
            hint="leave the training out",
            key="training",
        )
    if recipe.target is not None:
        raise RecipeError(
            "a training goes by the network's outputs, and leaves other shares of the differences than"
            " the target's",
            hint="give ranks or a budget in place of a target, or leave the training out",
            key="training",
        )
    return recipe.training


def with_training(rounds: int) -> str:
    """Returns words behind the time that a merge with so many rounds takes; none without a training."""
    return f" with a training of {format_count(rounds, 'round')}" if rounds else ""


def _can_train(inputs: MergeInputs) -> bool:
    return can_run(inputs.layout, inputs.headers[0].shapes)


def _cost(recipe: Recipe, inputs: MergeInputs, rounds: int) -> float:
    layers = inputs.layout.layers
    ranks = even_ranks(recipe.ranks, [(layer.m, layer.n) for layer in layers])
    together = [sum(of_layer) for of_layer in ranks]
    return training_cost(inputs.layout, together, len(inputs.headers), Course(rounds))
