"""Finds checkpoints that lack parts of their data: matrices of one value that differ in other files.

An unfinished download or a damaged copy holds zeros where data are missing. Legitimate files have single
tensors of one value: norms and biases as they were initialised, a layer that someone switched off. So only
matrices and convolutions count that hold one value in some files and not in all; a file is refused where
its last one is such, for downloads end there, or where there are more than a handful of them. Fewer are
named in a warning, and so is every file where the merge accepts damaged ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.layout import Treatment
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.errors import CheckpointError

_HANDFUL: Final = 4  # matrices of one value that a good file may hold
_SAMPLES: Final = 16  # entries by which almost every matrix is seen to be none
_SMALLEST: Final = 64  # entries of a matrix that counts


class BlankTensors:
    """The matrices of each file that hold one value there and not in the others, as a pass meets them."""

    def __init__(self, inputs: MergeInputs) -> None:
        """Takes the files; nothing is read."""
        self._files = inputs.read
        self._accepts = inputs.accepts_damaged
        self._matrices = {
            key
            for key, treatment in inputs.layout.treatments.items()
            if treatment in (Treatment.LAYER, Treatment.AVERAGE, Treatment.VAE)
            and _counts(inputs.headers[0], key)
        }
        self._last = [_last_of(header, self._matrices) for header in self._files]
        self._keys: list[list[str]] = [[] for _ in self._files]

    def find(self, key: str, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """Returns the numbers of the files whose tensor holds one value, if it does not in all.

        Reads a few entries of a tensor that holds several values. Safe to call from several threads.

        Args:
            key: of the tensor.
            tensors: the tensor in every file that is read.
        """
        if key not in self._matrices:
            return ()
        blank = tuple(place for place, tensor in enumerate(tensors) if holds_one_value(tensor))
        return blank if len(blank) < len(tensors) else ()

    def add(self, key: str, places: Sequence[int]) -> None:
        """Takes what `find` returned for a tensor.

        Raises:
            CheckpointError: a file lacks data, and is not accepted so; names file and tensor.
        """
        for place in places:
            keys = self._keys[place]
            keys.append(key)
            if self._accepts:
                continue
            if key == self._last[place]:
                raise _refusal(self._files[place], key, "its last matrix")
            if len(keys) > _HANDFUL:
                raise _refusal(self._files[place], keys[0], f"{len(keys)} matrices at least, first")

    def report(self, warn: Callable[[str], None]) -> None:
        """Warns of each file with few such matrices; to be called after the last tensor."""
        for header, keys in zip(self._files, self._keys, strict=True):
            if keys:
                more = f" and {len(keys) - _HANDFUL} others" if len(keys) > _HANDFUL else ""
                named = ", ".join(keys[:_HANDFUL]) + more
                warn(
                    f"{header.name} holds one value throughout {named}, and the other files"
                    " do not; compare it with its source if nobody meant that"
                )


def holds_one_value(tensor: Tensor) -> bool:
    """Tells whether all entries of a tensor are equal."""
    flat = tensor.flatten()
    step = max(1, len(flat) // _SAMPLES)
    first = flat[0]
    return bool((flat[::step] == first).all()) and bool((flat == first).all())


def _counts(header: Header, key: str) -> bool:
    info = header.tensors[key]
    return len(info.shape) > 1 and min(info.shape[:2]) > 1 and info.numel >= _SMALLEST


def _last_of(header: Header, matrices: set[str]) -> str | None:
    """Returns the matrix that ends a file; headers list tensors in the order of their data."""
    return next((key for key in reversed(list(header.tensors)) if key in matrices), None)


def _refusal(header: Header, key: str, place: str) -> CheckpointError:
    return CheckpointError(
        f"{header.name} lacks data: it holds one value throughout {key} ({place}), where the other"
        " files do not",
        hint="its download was not finished or the copy is damaged: download it again, or leave it"
        " out; if it is as it should be, set damaged to accept",
        file=header.path,
        key=key,
    )
