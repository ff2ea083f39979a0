"""Finds checkpoints whose tensors are blank or wildly off in scale where the other files' are not.

An unfinished download or a damaged copy holds zeros where data are missing. Legitimate files have single
tensors of one value: norms and biases as they were initialised, a layer that someone switched off. So only
matrices and convolutions count that hold one value in some files and not in all; a file is refused where
its last one is such, for downloads end there, or where there are more than a handful of them. Fewer are
named in a warning, and so is every file where the merge accepts damaged ones.

A flipped bit, a lost scale or a foreign type of numbers makes values a thousand times larger than in the
other files, and one such tensor spoils the average: it is refused. Fine-tunes of one model never come near:
their largest values differ by less than a factor of ten, and where a layer of the others is hardly trained
at all, by what a network can bear. Matrices that are a thousand times smaller are as good as blank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low
from typing import Final, Literal

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.layout import Treatment
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.errors import CheckpointError

_HANDFUL: Final = 4  # blank or tiny matrices that a good file may hold
_SMALLEST: Final = 64  # entries of a matrix that counts
_FACTOR: Final = 1000.0  # between largest values, which no training comes to
_LEAST: Final = 0.01  # largest value of a tensor that was trained at all

_BESIDE_OTHERS: Final = {
    "blank": "holds one value throughout {}, and the other files do not",
    "tiny": "holds values a thousand times smaller than the other files in {}",
    "huge": "holds values a thousand times larger than the other files in {}",
}


@dataclass(frozen=True)
class Damage:
    """A tensor of one file that looks damaged beside the same tensor of the others."""

    place: int  # of the file among those that are read
    kind: Literal["blank", "tiny", "huge"]
    largest: float  # magnitude in this file
    usual: float  # of the others' largest magnitudes, about the one in the middle


class DamagedTensors:
    """The tensors of each file that look damaged beside those of the others, as a pass meets them."""

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
        self._damages: list[dict[str, Damage]] = [{} for _ in self._files]

    def find(self, key: str, tensors: Sequence[Tensor]) -> tuple[Damage, ...]:
        """Returns what looks damaged of a tensor. Safe to call from several threads.

        Args:
            key: of the tensor.
            tensors: the tensor in every file that is read.

        Raises:
            CheckpointError: a file is wildly off in scale, and is not accepted so; names file and tensor.
        """
        ranges = [_range(tensor) for tensor in tensors]
        largest = [max(-low, high) for low, high in ranges]
        if len(tensors) < 2 or not all(math.isfinite(value) for value in largest):
            return ()  # infinity and NaN are refused where a tensor is averaged
        huge = _find_huge(largest)
        if huge and not self._accepts:
            raise self._scale_refusal(key, huge[0])
        if huge or key not in self._matrices:
            return tuple(huge)
        return tuple(_find_blank(ranges) or _find_tiny(largest))

    def add(self, key: str, damages: Sequence[Damage]) -> None:
        """Takes what `find` returned for a tensor.

        Raises:
            CheckpointError: a file lacks data, and is not accepted so; names file and tensor.
        """
        for damage in damages:
            known = self._damages[damage.place]
            known[key] = damage
            if self._accepts:
                continue
            if damage.kind == "blank" and key == self._last[damage.place]:
                raise self._refusal(damage.place, key, "its last matrix")
            if len(known) > _HANDFUL:
                place = f"{len(known)} matrices at least, first"
                raise self._refusal(damage.place, next(iter(known)), place)

    def report(self, warn: Callable[[str], None]) -> None:
        """Warns of each file with such tensors; to be called after the last one."""
        for header, damages in zip(self._files, self._damages, strict=True):
            for kind, words in _BESIDE_OTHERS.items():
                keys = [key for key, damage in damages.items() if damage.kind == kind]
                if keys:
                    more = f" and {len(keys) - _HANDFUL} others" if len(keys) > _HANDFUL else ""
                    differs = words.format(", ".join(keys[:_HANDFUL]) + more)
                    warn(
                        f"{header.name} {differs}; compare it with its source if nobody meant that"
                    )

    def _scale_refusal(self, key: str, damage: Damage) -> CheckpointError:
        header = self._files[damage.place]
        return CheckpointError(
            f"{header.name} is wildly off in scale: values in {key} go up to {damage.largest:.3g},"
            f" in the other files to {damage.usual:.3g}",
            hint="the copy is damaged, or was stored without its scales: download it again, or leave"
            " it out; if it is as it should be, set damaged to accept",
            file=header.path,
            key=key,
        )

    def _refusal(self, place: int, key: str, reason: str) -> CheckpointError:
        header, damage = self._files[place], self._damages[place][key]
        differs = (
            f"holds one value throughout {key} ({reason}), where the other files do not"
            if damage.kind == "blank"
            else f"holds nothing above {damage.largest:.3g} in {key} ({reason}), where the other"
            f" files go up to {damage.usual:.3g}"
        )
        return CheckpointError(
            f"{header.name} lacks data: it {differs}",
            hint="its download was not finished or the copy is damaged: download it again, or leave it"
            " out; if it is as it should be, set damaged to accept",
            file=header.path,
            key=key,
        )


def _range(tensor: Tensor) -> tuple[float, float]:
    """Returns the smallest and the largest value; NaN if there is one, zeros for none."""
    if not tensor.numel():
        return 0.0, 0.0
    try:
        low, high = torch.aminmax(tensor)
    except RuntimeError:  # torch 2.1 has none for half precision
        low, high = torch.aminmax(tensor.float())
    return float(low), float(high)


def _find_blank(ranges: Sequence[tuple[float, float]]) -> list[Damage]:
    """Returns the files whose tensor holds one value, if it does not in all."""
    blank = [place for place, (low, high) in enumerate(ranges) if low == high]
    if len(blank) == len(ranges):
        return []
    return [Damage(place, "blank", abs(ranges[place][0]), 0.0) for place in blank]


def _find_huge(largest: Sequence[float]) -> list[Damage]:
    damages = []
    for place, value in enumerate(largest):
        usual = median_high(_others(largest, place))
        if value >= _FACTOR * max(usual, _LEAST):
            damages.append(Damage(place, "huge", value, usual))
    return damages


def _find_tiny(largest: Sequence[float]) -> list[Damage]:
    damages = []
    for place, value in enumerate(largest):
        usual = median_low(_others(largest, place))
        if usual >= max(_LEAST, _FACTOR * value):
            damages.append(Damage(place, "tiny", value, usual))
    return damages


def _others(values: Sequence[float], place: int) -> list[float]:
    return [*values[:place], *values[place + 1 :]]


def _counts(header: Header, key: str) -> bool:
    info = header.tensors[key]
    return len(info.shape) > 1 and min(info.shape[:2]) > 1 and info.numel >= _SMALLEST


def _last_of(header: Header, matrices: set[str]) -> str | None:
    """Returns the matrix that ends a file; headers list tensors in the order of their data."""
    return next((key for key in reversed(list(header.tensors)) if key in matrices), None)
