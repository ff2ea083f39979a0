"""Coordinates in which deviations have no redundancy: k checkpoints around their mean span k - 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import moved

FEW: Final = 16
"""Slices of which layers keep all, as they are."""

KEPT: Final = 24
"""Directions that a layer keeps of more slices; of the rest it knows the inner products."""

_SUMMED: Final = 2**13  # products that are summed in float32, at 1e-7 of the sum; more in float64


@dataclass(frozen=True, eq=False)
class Contrasts:
    """From checkpoints to their base and to slices in orthonormal coordinates.

    With D[c] = checkpoint c - origin (the first checkpoint, or the given base):

        base       = origin + base_weights @ D
        slices     = to_slices @ D                  (d of them)
        deviations = checkpoint - base = to_deviations @ slices

    `to_deviations` has orthonormal columns, so norms of slices and deviations agree.
    """

    base_weights: Tensor  # (j,), float64; j = k - 1, or k for a given base
    to_slices: Tensor  # (d, j), float64
    to_deviations: Tensor  # (k, d), float64

    @property
    def count(self) -> int:
        """Number of checkpoints, k."""
        return len(self.to_deviations)

    @property
    def dimensions(self) -> int:
        """Number of slices, d."""
        return len(self.to_slices)

    @property
    def are_few(self) -> bool:
        """Whether layers keep all slices as they are."""
        return self.dimensions <= FEW

    @property
    def kept(self) -> int:
        """Number of slices, or of mixtures of them, of which a layer keeps more than inner products."""
        return self.dimensions if self.are_few else min(self.dimensions, KEPT)

    def along(
        self,
        directions: Tensor,  # (d, s), orthonormal columns
    ) -> Contrasts:
        """Returns the coordinates in which the slices are mixtures along some directions."""
        return Contrasts(
            self.base_weights, directions.mT @ self.to_slices, self.to_deviations @ directions
        )


def around_mean(weights: Sequence[float]) -> Contrasts:
    """Returns coordinates of deviations from the weighted mean (d = k - 1).

    Differences to the first checkpoint are exactly zero where all agree, so equal checkpoints
    average to themselves, bit for bit.

    Args:
        weights: one per checkpoint, at least 0, not all 0; normalised here.
    """
    share = torch.tensor(weights, dtype=torch.float64)
    share = share / share.sum()
    centred = torch.eye(len(share), dtype=torch.float64) - share
    basis, triangle = torch.linalg.qr(centred[:, 1:])
    return Contrasts(share[1:], triangle, basis)


def around_any_mean(weights: Sequence[float]) -> Contrasts:
    """Returns the deviations from a weighted mean themselves as coordinates (d = k).

    For means with other weights in other tensors: their deviations then fill no common space of
    k - 1 dimensions, in which multipliers that all tensors share could be found.

    Args:
        weights: one per checkpoint, at least 0, not all 0; normalised here.
    """
    share = torch.tensor(weights, dtype=torch.float64)
    share = share / share.sum()
    identity = torch.eye(len(share), dtype=torch.float64)
    return Contrasts(share[1:], (identity - share)[:, 1:], identity)


def around_base(count: int) -> Contrasts:
    """Returns coordinates of `count` checkpoints around a base that is not one of them (d = k)."""
    identity = torch.eye(count, dtype=torch.float64)
    return Contrasts(torch.zeros(count, dtype=torch.float64), identity, identity)


def leading_directions(
    gram: Tensor,  # (d, d), float64, CPU: of one layer's slices
    common: Tensor | None,  # (d, any), orthonormal columns
    count: int,
) -> Tensor:  # (d, count), orthonormal columns
    """Returns directions among slices: common ones, then those that hold most of the layer's rest.

    Multipliers are the same in all layers, so what counts in a layer is what lies along them: those
    that hold most in all layers together are common to all, and further ones are the layer's own.

    Args:
        gram: inner products of the slices.
        common: the directions to begin with; None for the layer's own alone.
        count: how many.
    """
    first = gram.new_zeros(len(gram), 0) if common is None else common[:, :count]
    rest = torch.eye(len(gram), dtype=gram.dtype) - first @ first.mT
    _, vectors = torch.linalg.eigh(rest @ gram @ rest)
    columns = torch.cat([first, vectors.flip(1)], 1)[:, :count]
    # Again, for eigenvectors of the value 0 may lie along the first columns.
    basis, triangle = torch.linalg.qr(columns)
    return basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class TensorDeviations:
    """One tensor of all checkpoints as its base and deviations."""

    base: Tensor  # (size,), as it will be stored
    slices: Tensor  # (d, size), float32; (d, 0) where they were not wanted
    rounding: Tensor  # (size,), float32: the base as stored less the exact one; (0,) likewise
    gram: Tensor  # (d + 1, d + 1), float64, CPU: slices and, last, the base's rounding error


def compute_deviations(
    origin: Tensor,  # (size,)
    others: Sequence[Tensor],  # j of them, each (size,)
    contrasts: Contrasts,
    stored: torch.dtype,
    chunk: int,
    tick: Callable[[float], None] = lambda _entries: None,
    device: torch.device | None = None,
    *,
    keep: bool = True,
) -> TensorDeviations:
    """Computes base and slices of one tensor, in float32 with float64 sums, chunk by chunk.

    Args:
        origin: the first checkpoint's tensor, or the given base's.
        others: the other checkpoints' tensors, any floating type, same device.
        contrasts: the coordinates.
        stored: type in which the base will be written.
        chunk: entries at a time; on a CPU what its cache holds.
        tick: called with the entries of every chunk; may raise, to stop.
        device: of the work and of the result but for the Gram matrix, to which the tensors go in
            chunks; None for theirs.
        keep: whether slices and rounding error are wanted, beside their inner products.
    """
    size, device = origin.numel(), device or origin.device
    d = contrasts.dimensions
    base = torch.empty(size, dtype=stored, device=device)
    slices = torch.empty(d, size if keep else 0, device=device)
    rounding = torch.empty(size if keep else 0, device=device)
    chunk = max(min(chunk, size), 1)
    gram = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)
    base_weights, to_slices = (
        moved(part.float(), device) for part in (contrasts.base_weights, contrasts.to_slices)
    )
    differences = torch.empty(len(others), chunk, device=device)
    rows = torch.empty(d + 1, chunk, device=device)
    for start in range(0, size, chunk):
        part = slice(start, min(start + chunk, size))
        if part.stop - start < chunk:
            differences, rows = (buffer[:, : part.stop - start] for buffer in (differences, rows))
        first = moved(origin[part], device).float()
        for other, difference in zip(others, differences, strict=True):
            torch.sub(moved(other[part], device), first, out=difference)
        mean = torch.addmv(first, differences.mT, base_weights)
        mean = torch.where(mean == first, first, mean)  # keeps negative zeros
        base[part] = mean
        rows[:-1] = to_slices @ differences
        torch.sub(base[part], mean, out=rows[-1])
        if keep:
            slices[:, part] = rows[:-1]
            rounding[part] = rows[-1]
        gram += _gram(rows)
        tick(part.stop - part.start)
    return TensorDeviations(base, slices, rounding, gram.cpu())


def _gram(
    rows: Tensor,  # (d + 1, any), float32
) -> Tensor:  # (d + 1, d + 1), float64
    """Returns inner products, summed in float64 over blocks whose sums are float32."""
    whole = rows.shape[1] // _SUMMED * _SUMMED
    blocks = rows[:, :whole].view(len(rows), whole // _SUMMED, _SUMMED).transpose(0, 1)
    rest = rows[:, whole:]
    return torch.bmm(blocks, blocks.mT).double().sum(0) + (rest @ rest.mT).double()


def to_deviations_matrix(contrasts: Contrasts) -> Tensor:  # (k, d + 1)
    """Returns the map from slices and the base's rounding error to checkpoint - base as stored."""
    return torch.cat([contrasts.to_deviations, -torch.ones(contrasts.count, 1).double()], 1)


def energies(
    gram: Tensor,  # (..., d + 1, d + 1), as in `TensorDeviations`
    contrasts: Contrasts,
) -> Tensor:  # (..., k)
    """Returns the squared distance of every checkpoint from the base as stored."""
    rows = to_deviations_matrix(contrasts)
    return ((rows @ gram) * rows).sum(-1).clamp(min=0)
