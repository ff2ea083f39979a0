"""Makes the LoRAs' companion files: norms and biases with the same multipliers, for some hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.streaming_pass import PassOptions, analyze_tensor
from hyper_merge.checkpoints.architectures.norms_and_biases import (
    Kind,
    NormOrBias,
    norms_and_biases_of,
)
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import content_sha256
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.decomposition.linalg import share
from hyper_merge.errors import RecipeError
from hyper_merge.loras.card_images import lora_picture
from hyper_merge.loras.cards import CARD_SUFFIXES, format_companion_card
from hyper_merge.loras.metadata import LoraFile, lora_metadata
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.report import CompanionGain

_DTYPE: Final = torch.float32  # A1111 rounds the norm itself to the type of its change


@dataclass(frozen=True, eq=False)
class NormBiasLoras:
    """The tensors of every LoRA's companion, and the share that all of them together explain."""

    tensors: tuple[dict[str, Tensor], ...]  # per block: key in the file -> (size,)
    recovered: tuple[CompanionGain, ...]  # by kind


def select_norms_and_biases(recipe: Recipe, inputs: MergeInputs) -> tuple[NormOrBias, ...]:
    """Returns the tensors that the companions hold; none if the recipe asks for none.

    Raises:
        RecipeError: the recipe asks for companions that would be empty.
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


def companion_tensors(vectors: Sequence[NormOrBias]) -> dict[str, TensorInfo]:
    """Returns the table of contents of one companion."""
    return {vector.lora_key: TensorInfo(_DTYPE, (vector.size,)) for vector in vectors}


def companion_bytes(vectors: Sequence[NormOrBias]) -> int:
    """Returns the bytes of one companion without its header."""
    return sum(info.nbytes for info in companion_tensors(vectors).values())


def companion_metadata(file: LoraFile, stem: str, model_hash: str, exact: str) -> dict[str, str]:
    """Returns the metadata of one companion; arguments as for `lora_metadata` and `write_companion`."""
    metadata = lora_metadata(file, stem, model_hash, uniform=False)
    return {**metadata, "hyper_merge.exact": exact}


def fit_companions(
    inputs: MergeInputs,
    vectors: Sequence[NormOrBias],
    multipliers: Tensor,  # (k, R), float64
    check: Callable[[], None] = lambda: None,
) -> NormBiasLoras:
    """Fits changes of norms and biases to the LoRAs' multipliers, by least squares.

    Args:
        inputs: the files.
        vectors: the norms and biases.
        multipliers: the LoRAs' multipliers.
        check: called for every tensor; may raise, to stop.

    Raises:
        CheckpointError: a file was changed or cannot be read.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    solver = torch.linalg.pinv(multipliers)  # (R, k)
    companions: tuple[dict[str, Tensor], ...] = tuple({} for _ in range(multipliers.shape[1]))
    sums: dict[str, list[float]] = {}  # kind -> energy, unexplained energy
    with open_checkpoints(inputs.read) as files:
        for vector in vectors:
            check()
            deviations = _deviations(
                inputs, vector.key, [file.tensor(vector.key) for file in files]
            )
            changes = (solver @ deviations).to(_DTYPE)
            rest = deviations - multipliers @ changes.double()
            energy = sums.setdefault(vector.kind, [0.0, 0.0])
            energy[0] += float(deviations.square().sum())
            energy[1] += float(rest.square().sum())
            for companion, change in zip(companions, changes, strict=True):
                companion[vector.lora_key] = change
    kinds = (kind for kind in get_args(Kind) if kind in sums)
    recovered = tuple(
        CompanionGain(kind, 1 - share(sums[kind][1], sums[kind][0])) for kind in kinds
    )
    return NormBiasLoras(companions, recovered)


def write_companion(
    outputs: FileTransaction, path: Path, tensors: dict[str, Tensor], file: LoraFile, exact: str
) -> None:
    """Stages one companion with its metadata and card.

    Args:
        outputs: the merge's files.
        path: path of the companion.
        tensors: its tensors by key.
        file: the LoRA that it goes with.
        exact: the recipe's word for what companions hold.

    Raises:
        OutputError: the place is taken.
    """
    declared = {key: TensorInfo(_DTYPE, tuple(tensor.shape)) for key, tensor in tensors.items()}
    model_hash = content_sha256(tensors, declared)
    metadata = companion_metadata(file, path.stem, model_hash, exact)
    with outputs.safetensors(path, declared, metadata) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    picture = lora_picture(file.run, file.index, file.count, file.rank, file.multipliers)
    outputs.text(path.with_suffix(CARD_SUFFIXES[0]), format_companion_card(file, path.stem, exact))
    outputs.bytes(path.with_suffix(CARD_SUFFIXES[1]), picture)


def _deviations(
    inputs: MergeInputs, key: str, tensors: Sequence[Tensor]
) -> Tensor:  # (k, size), float64
    """Returns every checkpoint's deviation from the average as it is stored."""
    average = analyze_tensor(inputs, key, tensors, PassOptions(torch.device("cpu"))).average
    checkpoints = tensors[1:] if inputs.base else tensors
    rows = torch.stack([tensor.double().flatten() for tensor in checkpoints])
    return rows - average.double().flatten()
