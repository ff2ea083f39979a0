"""Makes the LoRAs' companion files: end layers, norms and biases with the same multipliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, get_args

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.streaming_pass import PassOptions, analyze_tensor
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.architectures.norms_and_biases import (
    Kind,
    NormOrBias,
    norms_and_biases_of,
)
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import content_sha256
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.decomposition.linalg import share
from hyper_merge.errors import RecipeError
from hyper_merge.loras.card_images import lora_picture
from hyper_merge.loras.cards import CARD_SUFFIXES, format_companion_card
from hyper_merge.loras.lora_file import WHOLE, WHOLE_DTYPE, named_tensors
from hyper_merge.loras.metadata import COMPANION_CONTENT, LoraFile, lora_metadata
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs.report import CompanionGain, EndLayers
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.products import StoredFactors

_MATTERS: Final = 0.01  # share of all weighted differences, from which end layers are carried
_DTYPE: Final = torch.float32  # A1111 rounds the norm itself to the type of its change
# The kinds that each word of the recipe asks for.
_KINDS: Final[Mapping[str, tuple[Kind, ...]]] = MappingProxyType(
    {
        "none": (),
        "auto": ("end biases",),
        "ends": ("end biases",),
        "norms": ("end biases", "norms"),
        "all": ("end biases", "norms", "biases"),
    }
)


@dataclass(frozen=True, eq=False)
class NormBiasLoras:
    """The tensors of every LoRA's companion, and the share that all of them together explain."""

    tensors: tuple[dict[str, Tensor], ...]  # per block: key in the file -> (size,)
    recovered: tuple[CompanionGain, ...]  # by kind


def decide_on_ends(recipe: Recipe, metric: Metric) -> EndLayers | None:
    """Returns whether the companions hold the end layers; None for a family without them.

    The recipe decides, or for `auto` the part of the loss that the layers could not reduce.
    """
    places = [place for place, layer in enumerate(metric.analysis.layers) if layer.is_end]
    if not places:
        return None
    part = share(metric.energy(places), metric.energy(range(len(metric.layers))))
    return EndLayers(part, recipe.exact != "none" and (recipe.exact != "auto" or part >= _MATTERS))


def select_norms_and_biases(recipe: Recipe, inputs: MergeInputs) -> tuple[NormOrBias, ...]:
    """Returns the tensors that the companions hold besides end layers.

    Raises:
        RecipeError: the recipe asks for companions that would be empty.
    """
    layout, kinds = inputs.layout, _KINDS[recipe.exact]
    vectors = norms_and_biases_of(inputs.headers[0], layout)
    chosen = tuple(vector for vector in vectors if vector.kind in kinds)
    if recipe.exact == "ends" and not layout.has_ends:
        raise _nothing_to_hold(layout.family, "end layers", "auto or all")
    if recipe.exact == "norms" and not any(vector.kind == "norms" for vector in chosen):
        raise _nothing_to_hold(layout.family, "norms", "auto or all")
    return chosen


def _nothing_to_hold(family: Family, content: str, hint: str) -> RecipeError:
    return RecipeError(
        f"{family.title} has no {content} that hosts take from a LoRA file",
        hint=f"choose exact {hint}",
    )


def vector_bytes(vectors: Sequence[NormOrBias]) -> int:
    """Returns the bytes of the norms and biases in one companion."""
    return sum(vector.size for vector in vectors) * _DTYPE.itemsize


def companion_tensors(
    layers: Sequence[Layer], vectors: Sequence[NormOrBias]
) -> dict[str, TensorInfo]:
    """Returns the table of contents of one companion, without factors."""
    whole = {layer.module + WHOLE: layer.shape for layer in layers if layer.whole}
    return {
        **{key: TensorInfo(WHOLE_DTYPE, shape) for key, shape in whole.items()},
        **{vector.lora_key: TensorInfo(_DTYPE, (vector.size,)) for vector in vectors},
    }


def companion_metadata(file: LoraFile, stem: str, model_hash: str, exact: str) -> dict[str, str]:
    """Returns the metadata of one companion; arguments as for `lora_metadata` and `write_companion`."""
    metadata = lora_metadata(file, stem, model_hash, uniform=False)
    return {**metadata, COMPANION_CONTENT: "ends" if exact == "auto" else exact}


def companion_blocks(
    layers: Sequence[Layer], factors: StoredFactors, vectors: Sequence[NormOrBias]
) -> tuple[int, ...]:
    """Returns the places of the LoRAs that have a companion: those for which it holds something."""
    everywhere = any(vector.kind != "end biases" for vector in vectors)
    ranks = [rank for layer, rank in zip(layers, factors.ranks, strict=True) if layer.is_end]
    return tuple(
        block
        for block in range(len(factors.alphas))
        if everywhere or any(of_blocks[block] for of_blocks in ranks)
    )


def end_tensors(
    layers: Sequence[Layer],
    factors: StoredFactors,
    block: int,
    *,
    lora_alpha: bool,  # whether LoRA files of the family hold alphas
) -> dict[str, Tensor]:
    """Returns the end layers of one LoRA's companion by key.

    Whole ones are there with rank 0 too: A1111 takes the bias of such a layer only beside it.
    """
    alpha = factors.alphas[block] if lora_alpha else None
    tensors: dict[str, Tensor] = {}
    for layer, pairs in zip(layers, factors.factors, strict=True):
        if layer.is_end and (layer.whole or pairs[block][0].shape[1]):
            tensors |= named_tensors(layer, pairs[block], alpha)
    return tensors


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
    declared = {key: TensorInfo(x.dtype, tuple(x.shape)) for key, x in tensors.items()}
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
