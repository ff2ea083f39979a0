"""Computes a matrix's truncated SVD, much faster than a full one and as good to a fixed tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import (
    eigenvalues,
    eigh,
    energy_of,
    orthonormal,
    random_normal,
    thin_svd,
)
from hyper_merge.decomposition.normalization import balance

TOLERANCE: Final = 5e-4
"""The estimate by which a squared error may exceed the least one: half of what is promised."""

# Measured at rank 64 on layers of Stable Diffusion with flat, steep and mixed spectra.
_DENSE: Final = 5  # times the rank: where the shorter side is no longer, a full SVD is as fast
_SMALL: Final = 192  # a side for which that is always so
_BLOCK: Final = 3 / 8  # of the rank: columns of a step; narrower ones converge in fewer products
_LEAST: Final = 16  # columns of a step at least, for with very few gains are uneven
_FIRST: Final = 2.5  # times the rank: columns before the first look at what is gained

_RESOLVED: Final = 1e-7  # of the energy: a smaller tail is float32's rounding
_PASSES: Final = 5  # one is usual; more where little is new
_OVERLAP: Final = 1e-2  # of orthonormal columns with the basis: a projection then leaves none
_NOTHING: Final = 1e-10  # of the energy: a step that finds less has found rounding errors
_SLOWEST: Final = 0.9  # rate at which gains may be taken to fall

# For the progress: columns that are usual, in ranks, and times the multiply-adds of large products.
_USUAL: Final = 3.0
_NARROW: Final = 4.0
_TALL: Final = 8.0
_SQUARE: Final = 16.0


@dataclass(frozen=True, eq=False)
class TruncatedSvd:
    """The leading part of a matrix as `up @ down`, singular vectors in falling order."""

    up: Tensor  # (m, r), orthogonal columns; root of S on each side
    down: Tensor  # (r, n)
    energies: Tensor  # (r,), float64, falling: squared singular values


def truncated_svd(
    matrix: Tensor,  # (m, n)
    rank: int,
    generator: torch.Generator,
    tick: Callable[[float], None] = lambda _cost: None,
) -> TruncatedSvd:
    """Returns an approximation of a rank, its squared error at most 0.1 % above the least one.

    A block Krylov space of the shorter side grows until the energy that it holds settles: every step
    gains less than the one before, and once what is still to come by that rate is a small part of the
    tail, it is enough. Where the space would become most of the side, the full SVD is taken.
    Flat spectra take most steps, but there the error depends least on them.

    Args:
        matrix: float32 or float64, finite.
        rank: at least 1; capped at what the matrix can have.
        generator: for the start.
        tick: called with what every step cost, all together about `truncation_cost`; may raise,
            to stop.

    Source: Golub, Luk and Overton, "A block Lanczos method for computing the singular values and
    corresponding singular vectors of a matrix", 1981; with reorthogonalisation of one side alone,
    Simon and Zha, 2000.
    """
    m, n = matrix.shape
    if m > n:
        transposed = truncated_svd(matrix.mT, rank, generator, tick)
        return TruncatedSvd(transposed.down.mT, transposed.up.mT, transposed.energies)
    space = None if _is_dense(m, rank) else _krylov(matrix, rank, generator, tick)
    if space is not None:
        return _leading(space, rank)
    tick(_dense_cost(m, n))
    return _full(matrix, rank)


def truncate_factors(
    up: Tensor,  # (m, r)
    down: Tensor,  # (r, n)
    rank: int,
) -> TruncatedSvd:
    """Returns the best approximation of `up @ down` of a rank, through QR of both factors."""
    up, down = balance(up.double(), down.double())
    up, down = up[:, :rank], down[:rank]
    return TruncatedSvd(up, down, up.square().sum(0).square())


def truncation_cost(m: int, n: int, rank: int) -> float:
    """Returns what `truncated_svd` usually takes, in multiply-adds of large products."""
    side, rank = min(m, n), min(m, n, rank)
    if _is_dense(side, rank):
        return _dense_cost(side, max(m, n))
    return 2 * m * n * _USUAL * rank * _NARROW


@dataclass(frozen=True, eq=False)
class _Space:
    """A subspace of the rows' side, and the matrix seen in it."""

    basis: Tensor  # (m, k), orthonormal columns
    rows: Tensor  # (k, n): basis.T @ matrix
    gram: Tensor  # (k, k), float64: rows @ rows.T


def _full(matrix: Tensor, rank: int) -> TruncatedSvd:
    # Upright: LAPACK takes three to five times as long for a matrix that lies.
    u, s, vh = thin_svd(matrix.mT)
    root = s[:rank].sqrt()
    energies = s[:rank].double().square()
    return TruncatedSvd(vh.mT[:, :rank] * root, root[:, None] * u.mT[:rank], energies)


def _krylov(
    matrix: Tensor,  # (m, n), m <= n
    rank: int,
    generator: torch.Generator,
    tick: Callable[[float], None],
) -> _Space | None:
    """Returns a space that holds almost as much as the best one; None if it would be too large."""
    m, n = matrix.shape
    width = max(round(_BLOCK * rank), _LEAST)
    first = max(_FIRST * rank, rank + 2 * width)
    energy = energy_of(matrix)
    space = _Space(matrix[:, :0], matrix[:0], matrix.new_zeros(0, 0, dtype=torch.float64))
    right = random_normal((n, width), matrix, generator)
    held: list[float] = []
    while len(space.rows) + width <= m:
        tick(2 * m * n * width * _NARROW)
        space = _grown(space, matrix, right)
        if float(space.gram.diagonal()[-width:].sum()) <= _NOTHING * energy:
            return space
        if len(space.rows) >= first:
            held = held or [_held(space, rank, 2 * width), _held(space, rank, width)]
            held = [*held[-2:], _held(space, rank)]
            if _to_come(held) <= TOLERANCE * max(energy - held[-1], _RESOLVED * energy):
                return space
        right = orthonormal(space.rows[-width:].mT)
    return None


def _grown(
    space: _Space,
    matrix: Tensor,  # (m, n)
    right: Tensor,  # (n, b)
) -> _Space:
    """Returns the space enlarged by the matrix's image of a block."""
    columns = _apart(matrix @ right, space.basis)
    new = columns.mT @ matrix
    rows = torch.cat([space.rows, new])
    cross = rows.double() @ new.mT.double()
    old = len(space.rows)
    gram = torch.cat([torch.cat([space.gram, cross[:old]], 1), cross.mT])
    return _Space(torch.cat([space.basis, columns], 1), rows, gram)


def _apart(
    columns: Tensor,  # (m, b)
    basis: Tensor,  # (m, k), orthonormal columns
) -> Tensor:  # (m, b)
    """Returns orthonormal columns orthogonal to the basis, projected as often as rounding needs."""
    columns = orthonormal(columns - basis @ (basis.mT @ columns))
    for _ in range(_PASSES):
        overlap = basis.mT @ columns
        columns = orthonormal(columns - basis @ overlap)
        if float(overlap.norm()) < _OVERLAP:
            break
    return columns


def _held(space: _Space, rank: int, without: int = 0) -> float:
    """Returns the most energy that the rank can hold in the space without its last columns."""
    count = len(space.gram) - without
    return float(eigenvalues(space.gram[:count, :count])[-rank:].sum())


def _to_come(
    held: list[float],  # after the last three steps
) -> float:
    """Returns a bound of what further steps gain: as if their gains fell as the last ones did."""
    before, last = held[1] - held[0], held[2] - held[1]
    rate = min(max(last / before, 0.0), _SLOWEST) if before > 0 else 0.0
    return last * rate / (1 - rate)


def _leading(space: _Space, rank: int) -> TruncatedSvd:
    vectors = eigh(space.gram)[1][:, -rank:].flip(1).to(space.basis)
    rows = vectors.mT @ space.rows
    sizes = rows.norm(dim=1)
    root = sizes.sqrt()
    down = torch.where(root > 0, 1 / root, root)[:, None] * rows
    return TruncatedSvd(space.basis @ (vectors * root), down, sizes.double().square())


def _is_dense(side: int, rank: int) -> bool:
    return side <= max(_DENSE * rank, _SMALL)


def _dense_cost(m: int, n: int) -> float:
    return _TALL * m * m * n + _SQUARE * m**3
