"""Lists the tensors of an analysis file, and the identity from which its name is made."""

from __future__ import annotations

from typing import Final

import torch

from hyper_merge.analysis.checksums import CHECKSUMS
from hyper_merge.analysis.inputs import MergeInputs, basis_columns
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.fingerprint import fingerprint
from hyper_merge.checkpoints.io.header import Header, TensorInfo

OTHER_WEIGHTS: Final = "other weights"
UNCARRIED_KINDS: Final = ("norms", "biases", "embeddings", OTHER_WEIGHTS, "VAE")
"""The kinds of tensors that no LoRA carries."""

_VERSION: Final = 4  # of the files' content; another one is never read
_BASIS_DTYPE: Final = torch.float16
ROUNDING_DTYPE: Final = torch.bfloat16  # a small correction, whose range float16 does not have


def analysis_identity(inputs: MergeInputs, seed: int) -> dict[str, object]:
    """Returns everything that decides an analysis except its width."""
    return {
        "version": _VERSION,
        "files": [file_identity(header) for header in inputs.read],
        "base": inputs.base is not None,
        "weights": list(inputs.contrasts.base_weights.tolist()),
        "dtype": str(inputs.dtype),
        "average_vae": inputs.average_vae,
        "seed": seed,
        # A merge that refuses damaged files never finds what one has made that accepts them.
        **({"accepts_damaged": True} if inputs.accepts_damaged else {}),
        **({} if inputs.contrasts.are_few else {"kept": inputs.contrasts.kept}),
        **({"block_weights": inputs.block_weights} if inputs.block_weights else {}),
    }


def file_identity(header: Header) -> list[str | int]:
    """Returns an id of a file's content without reading the whole file."""
    return [fingerprint(header), header.size, header.mtime_ns]


def analysis_bytes(inputs: MergeInputs, options: PassOptions) -> int:
    """Returns the bytes of an analysis file without its header."""
    return sum(info.nbytes for info in analysis_tensors(inputs, options).values())


def analysis_tensors(inputs: MergeInputs, options: PassOptions) -> dict[str, TensorInfo]:
    """Returns types and shapes of the tensors of an analysis file, by key."""
    d, k = inputs.contrasts.dimensions, inputs.contrasts.count
    count = len(inputs.layout.layers)
    tensors = {
        "grams": TensorInfo(torch.float64, (count, d + 1, d + 1)),
        "weights": TensorInfo(torch.float64, (count,)),
        "not_carried": TensorInfo(torch.float64, (len(UNCARRIED_KINDS), k)),
    }
    for index in range(count):
        tensors.update(layer_infos(inputs, options, index))
    tensors[CHECKSUMS] = TensorInfo(torch.int64, (len(tensors),))
    return tensors


def layer_infos(inputs: MergeInputs, options: PassOptions, index: int) -> dict[str, TensorInfo]:
    """Returns types and shapes of the tensors of one layer in an analysis file, by key."""
    contrasts = inputs.contrasts
    d, kept = contrasts.dimensions, contrasts.kept
    layer, width = inputs.layout.layers[index], options.width_of(index)
    p, q = basis_columns(layer, width)
    if contrasts.are_few:
        core = {f"{index}.core": TensorInfo(torch.float32, (d, p, q))}
    else:
        core = {
            f"{index}.core": TensorInfo(torch.float16, (kept, p, q)),
            f"{index}.directions": TensorInfo(torch.float64, (d, kept)),
            f"{index}.scales": TensorInfo(torch.float32, (kept,)),
        }
    return {
        **core,
        f"{index}.rounding": TensorInfo(ROUNDING_DTYPE, (p, q)),
        f"{index}.left": TensorInfo(_BASIS_DTYPE, (layer.m, p)),
        f"{index}.right": TensorInfo(_BASIS_DTYPE, (layer.n, q)),
    }
