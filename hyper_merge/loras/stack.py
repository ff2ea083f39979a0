"""Opens LoRA files together, and gives what they add to each tensor of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer, Layout
from hyper_merge.checkpoints.architectures.norms_and_biases import (
    Kind,
    NormOrBias,
    norms_and_biases_of,
)
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.reader import LoraReader


class LoraStack:
    """LoRA files and companions that are open for reading; use as a context manager."""

    def __init__(self, paths: Sequence[Path], header: Header, layout: Layout) -> None:
        """Names the files; nothing is read before the block is entered.

        Args:
            paths: of LoRAs and companions.
            header: of the checkpoint that they are added to.
            layout: of that checkpoint.
        """
        self._vectors = {vector.key: vector for vector in norms_and_biases_of(header, layout)}
        self._loras = [LoraReader(path, layout.family) for path in paths]
        self._files = [CheckpointReader(path) for path in paths]
        self._resources = ExitStack()

    def __enter__(self) -> LoraStack:
        with ExitStack() as stack:
            for lora in self._loras:
                stack.enter_context(lora)
            for file in self._files:
                stack.enter_context(file)
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which factors like these can be stored; float32 if the files differ."""
        dtypes = {dtype for lora in self._loras for dtype in lora.dtypes}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def factors(self, layer: Layer) -> list[tuple[Tensor, Tensor]]:  # (m, r), (r, n), float64
        """Returns what each file adds to a layer at multiplier 1; rank 0 where it has nothing.

        Raises:
            CheckpointError: a file has factors of another size.
        """
        for lora in self._loras:
            lora.require_layer(layer)
        none = torch.zeros(layer.m, 0).double(), torch.zeros(0, layer.n).double()
        return [
            lora.factors(layer.module) if layer.module in lora.modules else none
            for lora in self._loras
        ]

    def vector_kind(self, key: str) -> Kind | None:
        """Returns the kind of a norm or bias that a file may add to; None for any other tensor."""
        vector = self._vectors.get(key)
        return vector.kind if vector else None

    def vectors(self, key: str) -> list[Tensor | None]:  # each (size,)
        """Returns what each file adds to a norm or bias at multiplier 1; None for nothing.

        Raises:
            CheckpointError: a file has a tensor of another size.
        """
        vector = self._vectors.get(key)
        return [_vector(file, vector) for file in self._files]


def _vector(file: CheckpointReader, vector: NormOrBias | None) -> Tensor | None:
    if vector is None or vector.lora_key not in file.header.tensors:
        return None
    size = file.header.tensors[vector.lora_key].numel
    if size != vector.size:
        raise CheckpointError(
            f"{vector.lora_key} in {file.path.name} has {size} numbers, expected {vector.size}",
            hint="use a LoRA of the same architecture",
            file=file.path,
            key=vector.lora_key,
        )
    return file.tensor(vector.lora_key)
