"""Trains a merge's shared LoRAs by runs of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hyper_merge.calibration.distillation import BYTES_OF_ENTRY, Lesson, distil
from hyper_merge.calibration.student import Course, ReadTensor, Student, TrainedLayer
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import NonFiniteError
from hyper_merge.loras.lora_file import product_scale
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.rank_plan import RankPlan
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.runs.report import TrainingReport
from hyper_merge.runtime.devices import try_device
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.evaluation import evaluate
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.products import FactorPair, StoredFactors
from hyper_merge.solver.quantization import rounded_again


class _NotHereError(Exception):
    """The device cannot do a training whose rounds were left open, so nothing does it."""


def trained(
    metric: Metric,
    preflight: Preflight,
    solved: SolvedMerge,
    average: ReadTensor,
    progress: Progress,
) -> SolvedMerge:
    """Returns the merge with trained LoRAs, or with those of the solve where a training gains nothing.

    The multipliers stay those of the solve.

    Args:
        metric: of the loss.
        preflight: the validated recipe, with rounds of a training.
        solved: without private LoRAs.
        average: reads the average.
        progress: progress and interrupt.
    """
    try:
        lesson, factors = _train(metric, preflight, solved, average, progress)
    except (NonFiniteError, _NotHereError) as error:
        progress.warn(f"{error}; the LoRAs are as they were solved, without a training")
        return solved
    except RuntimeError as error:
        # Nobody loses a merge by a training whose rounds were left open, on whatever device and driver.
        if preflight.recipe.training != "auto":
            raise
        reason = str(error).partition("\n")[0]
        progress.warn(f"the training failed ({reason}); the LoRAs are as they were solved")
        return solved
    if lesson is None:
        progress.warn(
            "the networks give no finite outputs that differ, so the LoRAs are not trained"
        )
        return solved
    rounds = preflight.rounds
    before, after = tuple(lesson.before.tolist()), tuple(lesson.after.tolist())
    if not lesson.is_better:
        progress.warn(
            "the training made no outputs more alike, so the LoRAs are as they were solved"
        )
        return replace(solved, training=TrainingReport(rounds, before, before))
    evaluation = evaluate(metric, factors, solved.plan.groups, solved.evaluation.multipliers)
    training = TrainingReport(rounds, before, after)
    return replace(solved, factors=factors, evaluation=evaluation, training=training)


def _train(
    metric: Metric,
    preflight: Preflight,
    solved: SolvedMerge,
    average: ReadTensor,
    progress: Progress,
) -> tuple[Lesson | None, StoredFactors]:
    """Trains on the device; returns the factors as files hold them.

    Where the device cannot do it the CPU does, if the recipe asks for the rounds: they can take an hour.
    """
    inputs, plan, factors = preflight.inputs, solved.plan, solved.factors
    multipliers = solved.evaluation.multipliers
    course = Course(preflight.rounds, seed=preflight.recipe.seed)

    def write(layers: Sequence[TrainedLayer]) -> list[TrainedLayer]:
        nonlocal factors
        pairs = [_split(*pair) for pair in zip(layers, solved.factors.factors, strict=True)]
        factors = rounded_again(metric, pairs, solved.factors.alphas, plan.dtype, progress.check)
        return _trained_layers(metric, factors, plan, multipliers)

    def train(device: torch.device) -> Lesson | None:
        layers = _trained_layers(metric, solved.factors, plan, multipliers)
        student = Student(average, inputs.headers[0].shapes, inputs.layout, layers)
        teachers = [_opened(header) for header in inputs.headers]
        return distil(student, teachers, metric.checkpoints, course, write, device, progress)

    def warn(failure: str) -> None:
        if preflight.recipe.training == "auto":
            raise _NotHereError(f"{failure} for the training")
        progress.warn(f"{failure} for the training; the CPU does it")

    entries = sum(x.numel() for pairs in factors.factors for pair in pairs for x in pair)
    device = preflight.pass_options.device
    lesson = try_device(device, train, BYTES_OF_ENTRY * entries, on_failure=warn)
    return lesson, factors


@contextmanager
def _opened(header: Header) -> Iterator[Callable[[str], Tensor]]:
    with CheckpointReader(header.path) as file:
        yield file.tensor


def _trained_layers(
    metric: Metric, factors: StoredFactors, plan: RankPlan, multipliers: Mapping[str, Tensor]
) -> list[TrainedLayer]:
    """Returns the layers with their blocks as files hold them."""
    group_of = {index: name for name, members in plan.groups.items() for index in members}
    layers = []
    for index, pairs in enumerate(factors.factors):
        ups, downs = zip(*pairs, strict=True)
        ranks = factors.ranks[index]
        scales = [product_scale(*of_block) for of_block in zip(ranks, factors.alphas, strict=True)]
        rows = (multipliers[group_of[index]] * torch.tensor(scales)).float()
        layers.append(
            TrainedLayer(
                metric.analysis.layers[index],
                torch.cat([up.float() for up in ups], 1),
                torch.cat([down.float() for down in downs]),
                rows.repeat_interleave(torch.tensor(ranks), 1),
                ups[0].dtype,
            )
        )
    return layers


def _split(layer: TrainedLayer, stored: Sequence[FactorPair]) -> list[FactorPair]:
    """Returns the blocks of a layer, of the ranks of stored ones."""
    ranks = [up.shape[1] for up, _ in stored]
    ups, downs = torch.split(layer.up, ranks, 1), torch.split(layer.down, ranks)
    return list(zip(ups, downs, strict=True))
