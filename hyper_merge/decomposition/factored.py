"""Compresses one layer's matrices that are given as factors, without ever forming one of full size.

Orthonormal bases hold the rows and columns of all matrices, ordered by what they hold (the
higher-order SVD of the stack); the cores are exact projections, and factors themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.bounds import Spectra
from hyper_merge.decomposition.linalg import orthonormal

# Of the largest eigenvalue of a Gram matrix in float32: what is smaller is rounding.
_RESOLVED: Final = 1e-7

FactorPair = tuple[Tensor, Tensor]  # (m, r), (r, n)


@dataclass(frozen=True, eq=False)
class FactoredLayer:
    """One layer's matrices between two bases: `left @ ups_c @ downs_c @ right.T` is about matrix c.

    Attributes:
        left: (m, p), orthonormal columns in half precision, those that hold most first.
        right: (n, q), likewise.
        ups: (p, S), float32: of all matrices side by side.
        downs: (S, q), float32.
        spans: The columns of each of the k matrices among the S.
        gram: (k, k), float64: inner products; what lies outside of the bases counts on the diagonal,
            which is exact.
        spectra: Squared singular values; those of the single matrices are exact.
    """

    left: Tensor
    right: Tensor
    ups: Tensor
    downs: Tensor
    spans: tuple[slice, ...]
    gram: Tensor
    spectra: Spectra

    @property
    def core_shape(self) -> tuple[int, int]:
        """The sides (p, q) of the cores."""
        return self.left.shape[1], self.right.shape[1]

    def core(self) -> Tensor:  # (k, p, q), float32
        """Returns the matrices between the bases."""
        p, q = self.core_shape
        core = self.ups.new_zeros(len(self.spans), p, q)
        for matrix, span in zip(core, self.spans, strict=True):
            if span.stop > span.start:
                torch.mm(self.ups[:, span], self.downs[span], out=matrix)
        return core


def compress_factors(
    pairs: Sequence[FactorPair], shape: tuple[int, int], width: int
) -> FactoredLayer:
    """Returns bases of at most `width` columns, the cores, and what is exactly known of the matrices.

    Where the ranks add up to no more than the width, the bases hold everything. Else they hold the
    components, of all matrices, that are largest.

    Args:
        pairs: factors (m, r), (r, n) of the k matrices, float32; r may be 0, and differ.
        shape: m, n.
        width: at least 1.
    """
    parts = _components(pairs, shape)
    kept = _largest(parts.energies, width)
    left, left_values = _basis(parts.ups[:, kept] * parts.energies[kept].sqrt().float())
    right, right_values = _basis(parts.downs[kept].mT)
    ups, downs = left.float().mT @ parts.ups, parts.downs @ right.float()
    if len(kept) < int((parts.energies > 0).sum()):
        # With the other side whole these are at least those of the cores: the bound stays one.
        left_values = _squares(ups * parts.energies.sqrt().float())
        right_values = _squares(downs.mT)
    spectra = Spectra(left_values, right_values, parts.spectra(min(len(ups), downs.shape[1])))
    layer = FactoredLayer(left, right, ups, downs, parts.spans, parts.energies, spectra)
    flat = layer.core().flatten(1)
    gram = (flat @ flat.mT).double()
    gram.diagonal().copy_(parts.total())
    return FactoredLayer(left, right, ups, downs, parts.spans, gram, spectra)


@dataclass(frozen=True, eq=False)
class _Components:
    """All matrices as sums of their singular components, side by side."""

    ups: Tensor  # (m, S), float32; orthonormal columns within each matrix
    downs: Tensor  # (S, n), orthogonal rows within each, as long as the singular values
    energies: Tensor  # (S,), float64: squared singular values
    spans: tuple[slice, ...]  # of each matrix, falling within it

    def total(self) -> Tensor:  # (k,)
        """Returns the squared norms of the matrices."""
        sums = [self.energies[span].sum() for span in self.spans]
        return torch.stack(sums)

    def spectra(self, count: int) -> Tensor:  # (k, count)
        """Returns the squared singular values of every matrix, filled up with zeros or cut."""
        values = torch.zeros(len(self.spans), count, dtype=torch.float64)
        for row, span in zip(values, self.spans, strict=True):
            own = self.energies[span][:count]
            row[: len(own)] = own
        return values


def _components(pairs: Sequence[FactorPair], shape: tuple[int, int]) -> _Components:
    """Returns the matrices' singular components, through Gram matrices of their factors.

    With U^T U = A^T A and (A V)(A V)^T = P S^2 P^T the components are U A^+ P and P^T A V.
    """
    m, n = shape
    most = max(1, *(up.shape[1] for up, _ in pairs))
    ups = torch.zeros(len(pairs), m, most)
    downs = torch.zeros(len(pairs), most, n)
    for place, (up, down) in enumerate(pairs):
        ups[place, :, : up.shape[1]] = up
        downs[place, : up.shape[1]] = down
    values, vectors = torch.linalg.eigh((ups.mT @ ups).double())
    values = values.clamp(min=0)
    small = values <= _RESOLVED**2 * values.amax(-1, keepdim=True)
    root = torch.where(small, 0.0, values.sqrt())[..., None] * vectors.mT
    inverse = vectors * torch.where(small, 0.0, values.rsqrt())[..., None, :]
    energies, turn = torch.linalg.eigh(root @ (downs @ downs.mT).double() @ root.mT)
    energies, turn = energies.flip(-1).clamp(min=0), turn.flip(-1)
    ups = ups @ (inverse @ turn).float()
    downs = (turn.mT @ root).float() @ downs
    ranks = [min(up.shape[1], m, n) for up, _ in pairs]
    return _side_by_side(ups, downs, energies, ranks)


def _side_by_side(
    ups: Tensor,  # (k, m, r)
    downs: Tensor,  # (k, r, n)
    energies: Tensor,  # (k, r)
    ranks: Sequence[int],
) -> _Components:
    ends = (0, *accumulate(ranks))
    kept = [
        (up[:, :rank], down[:rank], row[:rank])
        for up, down, row, rank in zip(ups, downs, energies, ranks, strict=True)
    ]
    left, right, values = zip(*kept, strict=True)
    return _Components(
        torch.cat(left, 1),
        torch.cat(right),
        torch.cat(values),
        tuple(slice(start, end) for start, end in pairwise(ends)),
    )


def _largest(energies: Tensor, width: int) -> Tensor:
    """Returns the places of the largest energies above 0, at most `width`, in their order."""
    count = min(width, int((energies > 0).sum()))
    return energies.topk(count).indices.sort().values


def _basis(
    columns: Tensor,  # (m, s)
) -> tuple[Tensor, Tensor]:  # (m, p) in half precision, and (p,) squared singular values
    """Returns an ordered orthonormal basis of the columns; one column at least."""
    m, s = columns.shape
    if not s or not float(columns.abs().amax()) > 0:
        return torch.eye(m, 1).half(), torch.zeros(1, dtype=torch.float64)
    gram = columns.mT @ columns if s <= m else columns @ columns.mT
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0), vectors.flip(1)
    count = int((values > _RESOLVED * values[0]).sum())
    values, vectors = values[:count], vectors[:, :count].float()
    if s <= m:
        vectors = orthonormal(columns @ (vectors * values.rsqrt().float()))
    return vectors.half(), values


def _squares(
    columns: Tensor,  # (p, s)
) -> Tensor:  # (p,), float64, falling
    return torch.linalg.eigvalsh((columns @ columns.mT).double()).flip(0).clamp(min=0)
