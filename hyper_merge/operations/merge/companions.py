"""Companions of the LoRAs: norms and biases with the same multipliers, for hosts that take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.streaming_pass import PassOptions, analyze_tensor
from hyper_merge.checkpoints.architectures.norms_and_biases import (
    Kind,
    NormOrBias,
    norms_and_biases_of,
)
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import content_sha256
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import RecipeError
from hyper_merge.loras.card_images import lora_picture
from hyper_merge.loras.cards import CARD_SUFFIXES, format_companion_card
from hyper_merge.loras.metadata import LoraFile, lora_metadata
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.report import CompanionGain

_DTYPE: Final = torch.float32  # A1111 rounds the norm itself to the type of its change


@dataclass(frozen=True, eq=False)
class NormBiasLoras:
    """What every LoRA's companion adds, and what all of them together bring back."""

    tensors: tuple[dict[str, Tensor], ...]  # per block: key in the file -> (size,)
    recovered: tuple[CompanionGain, ...]  # by kind


def select_norms_and_biases(recipe: Recipe, inputs: MergeInputs) -> tuple[NormOrBias, ...]:
    """The tensors that the companions hold; none if none are asked for.

    Raises:
        RecipeError: companions are asked for that would be empty.
    """
    if recipe.exact == "none":
        return ()
    biases = recipe.exact == "all"
    vectors = norms_and_biases_of(inputs.headers[0], inputs.layout, biases=biases)
    if not vectors:
        raise RecipeError(
            f"{inputs.layout.family.title} has no norms that hosts take from a LoRA file",
            hint="choose exact none or all",
        )
    return vectors


def companion_bytes(vectors: Sequence[NormOrBias]) -> int:
    """Size of one companion, less its header."""
    return sum(vector.size for vector in vectors) * _DTYPE.itemsize


def fit_companions(
    inputs: MergeInputs,
    vectors: Sequence[NormOrBias],
    multipliers: Tensor,  # (k, R), float64
    check: Callable[[], None] = lambda: None,
) -> NormBiasLoras:
    """The changes of norms and biases that fit the LoRAs' multipliers best, by least squares.

    Args:
        inputs: the files.
        vectors: which tensors.
        multipliers: of the LoRAs.
        check: called for every tensor; may raise, to stop.

    Raises:
        CheckpointError: a file was changed or cannot be read.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    solver = torch.linalg.pinv(multipliers)  # (R, k)
    blocks: tuple[dict[str, Tensor], ...] = tuple({} for _ in range(multipliers.shape[1]))
    sums: dict[str, list[float]] = {}  # kind -> energy, energy that is left
    with ExitStack() as stack:
        files = [
            stack.enter_context(CheckpointReader(header.path, expected=header))
            for header in inputs.read
        ]
        for vector in vectors:
            check()
            deltas = _deltas(inputs, vector.key, [file.tensor(vector.key) for file in files])
            changes = (solver @ deltas).to(_DTYPE)
            left = deltas - multipliers @ changes.double()
            energy = sums.setdefault(vector.kind, [0.0, 0.0])
            energy[0] += float(deltas.square().sum())
            energy[1] += float(left.square().sum())
            for block, change in zip(blocks, changes, strict=True):
                block[vector.lora_key] = change
    kinds = (kind for kind in get_args(Kind) if kind in sums)
    recovered = tuple(CompanionGain(kind, _share(*sums[kind])) for kind in kinds)
    return NormBiasLoras(blocks, recovered)


def write_companion(
    outputs: FileTransaction, path: Path, tensors: dict[str, Tensor], file: LoraFile, exact: str
) -> None:
    """Stages one companion with its metadata and card.

    Args:
        outputs: the merge's files.
        path: of the companion.
        tensors: what it holds.
        file: of the LoRA that it goes with.
        exact: the recipe's word for what it holds.

    Raises:
        OutputError: the place is taken.
    """
    declared = {key: TensorInfo(_DTYPE, tuple(tensor.shape)) for key, tensor in tensors.items()}
    model_hash = content_sha256(tensors, declared)
    metadata = lora_metadata(file, path.stem, model_hash, uniform=False)
    with outputs.safetensors(path, declared, {**metadata, "hyper_merge.exact": exact}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    picture = lora_picture(file.run, file.index, file.count, file.rank, file.multipliers)
    outputs.text(path.with_suffix(CARD_SUFFIXES[0]), format_companion_card(file, path.stem, exact))
    outputs.bytes(path.with_suffix(CARD_SUFFIXES[1]), picture)


def _deltas(
    inputs: MergeInputs, key: str, tensors: Sequence[Tensor]
) -> Tensor:  # (k, size), float64
    """Every checkpoint's difference from the average as it is stored."""
    average = analyze_tensor(inputs, key, tensors, PassOptions(torch.device("cpu"))).average
    own = tensors[1:] if inputs.base else tensors
    return torch.stack([tensor.double().flatten() for tensor in own]) - average.double().flatten()


def _share(energy: float, left: float) -> float:
    return 1 - left / energy if energy > 0 else 1.0
