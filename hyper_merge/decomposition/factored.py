"""Compresses one layer's matrices that are given as factors, without ever forming one of full size.

Orthonormal bases hold the rows and columns of all matrices, ordered by what they hold (the
higher-order SVD of the stack); the cores are exact projections, and factors themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.bounds import Spectra
from hyper_merge.decomposition.linalg import orthonormal

FEW: Final = 8
"""Matrices up to which `compress_factors` is used; with more it would take as long as all that follows."""

_SOON_ORDERED: Final = 384  # columns, whose eigenvectors take no longer than a basis without order

# Of the largest eigenvalue of a Gram matrix in float32: what is smaller is rounding.
_RESOLVED: Final = 1e-7

# Likewise: down to here that rounding takes no more of orthogonality than half precision does.
_ORTHOGONAL: Final = 1e-4

# Of the largest size of a component: what is smaller is lost between the eigenvectors of all.
_TOLD: Final = 1e-6

FactorPair = tuple[Tensor, Tensor]  # (m, r), (r, n)


@dataclass(frozen=True, eq=False)
class FactoredLayer:
    """One layer's matrices between two bases: `left @ ups_c @ downs_c @ right.T` is about matrix c.

    Attributes:
        left: (m, p), orthonormal columns in half precision, those that hold most first.
        right: (n, q), likewise.
        ups: (p, S), float32, or half precision with `sizes`: of all matrices side by side.
        downs: (S, q), likewise.
        spans: The columns of each of the k matrices among the S.
        gram: (k, k), float64: inner products; what lies outside of the bases counts on the diagonal,
            which is exact.
        spectra: Squared singular values; those of the single matrices are exact.
        sizes: (S,), by which rows of `downs` are to be multiplied; None for 1.
    """

    left: Tensor
    right: Tensor
    ups: Tensor
    downs: Tensor
    spans: tuple[slice, ...]
    gram: Tensor
    spectra: Spectra
    sizes: Tensor | None = None

    @property
    def core_shape(self) -> tuple[int, int]:
        """The sides (p, q) of the cores."""
        return self.left.shape[1], self.right.shape[1]

    def core(self) -> Tensor:  # (k, p, q), float32
        """Returns the matrices between the bases."""
        p, q = self.core_shape
        core = torch.zeros(len(self.spans), p, q)
        ups, downs = self.components()
        for matrix, span in zip(core, self.spans, strict=True):
            if span.stop > span.start:
                torch.mm(ups[:, span], downs[span], out=matrix)
        return core

    @property
    def owners(self) -> Tensor:  # (S,)
        """The matrix of each component."""
        counts = torch.tensor([span.stop - span.start for span in self.spans])
        return torch.arange(len(counts)).repeat_interleave(counts)

    def components(
        self, places: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:  # (p, any), (any, q), float32
        """Returns all components between the bases, or those at some places."""
        if self.sizes is None:
            return self.ups[:, places], self.downs[places]
        return self.ups[:, places].float(), self.downs[places].float() * self.sizes[places, None]

    def weighted_spectra(
        self,
        weights: Tensor,  # (k,), float64
    ) -> Spectra:
        """Returns the spectra of the matrices times the roots of weights, without multiplying any out.

        It is for layers with `sizes`, whose components are singular ones of their matrices.
        """
        if self.sizes is None:
            raise ValueError("expected a layer of many matrices, which has the sizes of components")
        ups = self.ups.float() * (self.sizes * weights.sqrt().float()[self.owners])
        rows = _squares(ups)
        return Spectra(rows, rows, self.spectra.private * weights[:, None])

    def largest(self, count: int) -> Tensor:  # (count,) or fewer, rising
        """Returns the places of the components with most energy."""
        ups, downs = self.components()
        energies = ups.square().sum(0) * downs.square().sum(1)
        return energies.topk(min(count, len(energies))).indices.sort().values


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
    parts = singular_components(pairs, shape)
    kept = _largest(parts.energies, width)
    left, left_values, _ = _basis(parts.ups[:, kept], parts.energies[kept].sqrt().float())
    right, right_values, _ = _basis(parts.downs[kept].mT)
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


def compress_many(
    pairs: Sequence[FactorPair], shape: tuple[int, int], width_for: Callable[[Tensor], int]
) -> FactoredLayer:
    """Returns what `compress_factors` does, in a fraction of the time, for many matrices.

    No order of the bases is known. Inner products of components that both lie outside of them are left out.

    Args:
        pairs: factors (m, r), (r, n) of the matrices, float32.
        shape: m, n.
        width_for: returns the columns of the bases at most, from the energies of all components.
    """
    parts = singular_components(pairs, shape)
    kept = _largest(parts.energies, width_for(parts.energies))
    left, right, ups, downs, rows = _between_bases(parts, kept)
    sizes = parts.energies.sqrt().float()
    spectra = Spectra(rows, rows, parts.spectra(min(len(ups), downs.shape[1])))
    unit = downs * _inverse(sizes)[:, None]
    layer = FactoredLayer(
        left, right, ups.half(), unit.half(), parts.spans, parts.energies, spectra, sizes
    )
    gram = _products_of_kept(ups, downs, kept, parts.spans)
    gram.diagonal().copy_(parts.total())
    return replace(layer, gram=gram)


def _between_bases(
    parts: SingularComponents,
    kept: Tensor,  # (s,), the places of those that the bases hold
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns bases (m, p), (n, q), components between them (p, S), (S, q), and squared singular values.

    These (p,) are of the rows: a limit of what the columns' would allow, too.
    """
    sizes = parts.energies.sqrt().float()
    if len(kept) > _SOON_ORDERED:
        left = _span(parts.ups[:, kept] * sizes[kept])
        right = _span(parts.downs[kept].mT)
    elif not len(kept) or len(kept) < len(sizes):
        left, right = _basis(parts.ups[:, kept], sizes[kept])[0], _basis(parts.downs[kept].mT)[0]
    else:
        # Relatives share columns, and each that is left out is saved in all that follows.
        left, rows, ups = _basis(parts.ups, sizes)
        right, _, downs = _basis(parts.downs.mT)
        ups, downs = ups * _inverse(sizes), downs.mT
        small = (sizes <= _TOLD * sizes.amax()).nonzero().flatten()
        if len(small):
            ups[:, small] = left.float().mT @ parts.ups[:, small]
            downs[small] = parts.downs[small] @ right.float()
        return left, right, ups, downs, rows
    ups, downs = left.float().mT @ parts.ups, parts.downs @ right.float()
    return left, right, ups, downs, _squares(ups * sizes)


def _products_of_kept(
    ups: Tensor,  # (p, S)
    downs: Tensor,  # (S, q)
    kept: Tensor,  # (any,): places of the components that the bases hold, rising
    spans: Sequence[slice],
) -> Tensor:  # (k, k), float64
    """Returns inner products of the matrices, without those of components that are both not kept.

    The bases hold what is kept, so that its inner products are those between them.
    """
    up, down = ups[:, kept].mT, downs[kept]
    every, among = torch.zeros(2, len(spans), len(kept), dtype=torch.float64)
    is_kept = torch.zeros(ups.shape[1], dtype=ups.dtype)
    is_kept[kept] = 1
    owners = torch.empty_like(kept)
    for place, span in enumerate(spans):  # one after the other: all products are many
        products = (up @ ups[:, span]) * (down @ downs[span].mT)
        every[place] = products.sum(1)
        among[place] = products @ is_kept[span]
        owners[(kept >= span.start) & (kept < span.stop)] = place
    member = torch.nn.functional.one_hot(owners, len(spans)).double()
    half = every @ member
    return half + half.mT - among @ member


def _span(
    columns: Tensor,  # (m, s)
) -> Tensor:  # (m, p) in half precision, p <= min(m, s)
    """Returns an orthonormal basis that holds the columns."""
    m, s = columns.shape
    return (torch.eye(m) if s >= m else orthonormal(columns)).half()


@dataclass(frozen=True, eq=False)
class SingularComponents:
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
        """Returns the squared singular values of every matrix: so many at most, and as many of each."""
        count = min(count, max(span.stop - span.start for span in self.spans))
        values = torch.zeros(len(self.spans), count, dtype=torch.float64)
        for row, span in zip(values, self.spans, strict=True):
            own = self.energies[span][:count]
            row[: len(own)] = own
        return values


def singular_components(pairs: Sequence[FactorPair], shape: tuple[int, int]) -> SingularComponents:
    """Returns the matrices' singular components, through Gram matrices of their factors.

    With U^T U = A^T A and (A V)(A V)^T = P S^2 P^T the components are U A^+ P and P^T A V.
    """
    m, n = shape
    most = max(1, *(up.shape[1] for up, _ in pairs))
    left, right = torch.zeros(2, len(pairs), most, most)
    for place, (up, down) in enumerate(pairs):
        rank = up.shape[1]
        left[place, :rank, :rank] = up.mT @ up
        right[place, :rank, :rank] = down @ down.mT
    values, vectors = torch.linalg.eigh(left.double())
    values = values.clamp(min=0)
    small = values <= _RESOLVED**2 * values.amax(-1, keepdim=True)
    root = torch.where(small, 0.0, values.sqrt())[..., None] * vectors.mT
    inverse = vectors * torch.where(small, 0.0, values.rsqrt())[..., None, :]
    energies, turn = torch.linalg.eigh(root @ right.double() @ root.mT)
    energies, turn = energies.flip(-1).clamp(min=0), turn.flip(-1)
    turns = zip((inverse @ turn).float(), (turn.mT @ root).float(), strict=True)
    ranks = [min(up.shape[1], m, n) for up, _ in pairs]
    spans = _spans(ranks)
    ups, downs = torch.empty(spans[-1].stop, m), torch.empty(spans[-1].stop, n)
    for (up, down), (of_up, of_down), span in zip(pairs, turns, spans, strict=True):
        rank, kept = up.shape[1], span.stop - span.start
        torch.mm(of_up[:rank, :kept].mT, up.mT, out=ups[span])
        torch.mm(of_down[:kept, :rank], down, out=downs[span])
    kept_energies = [row[:rank] for row, rank in zip(energies, ranks, strict=True)]
    return SingularComponents(ups.mT, downs, torch.cat(kept_energies), spans)


def _spans(counts: Sequence[int]) -> tuple[slice, ...]:
    ends = (0, *accumulate(counts))
    return tuple(slice(start, end) for start, end in pairwise(ends))


def _largest(energies: Tensor, width: int) -> Tensor:
    """Returns the places of the largest energies above 0, at most `width`, in their order."""
    count = min(width, int((energies > 0).sum()))
    return energies.topk(count).indices.sort().values


def _basis(
    columns: Tensor,  # (m, s)
    sizes: Tensor | None = None,  # (s,), by which they are to be multiplied; None for 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an ordered orthonormal basis of the columns; one column at least.

    It is (m, p), in half precision, and with it come (p,) squared singular values in float64, and the
    columns in the basis, (p, s).
    """
    m, s = columns.shape
    if s > m and sizes is not None:
        columns, sizes = columns * sizes, None
    gram = columns.mT @ columns if s <= m else columns @ columns.mT
    if sizes is not None:
        gram = gram * sizes * sizes[:, None]
    if not s or not float(gram.diagonal().amax()) > 0:
        return torch.eye(m, 1).half(), torch.zeros(1, dtype=torch.float64), torch.zeros(1, s)
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0), vectors.flip(1)
    count = int((values > _RESOLVED * values[0]).sum())
    values, vectors = values[:count], vectors[:, :count]
    if s > m:
        basis = vectors.float()
        return basis.half(), values, basis.mT @ columns
    roots = values.sqrt()
    turn = (vectors / roots).float()
    basis = columns @ (turn if sizes is None else turn * sizes[:, None])
    if float(values[-1]) > _ORTHOGONAL * float(values[0]):
        return basis.half(), values, (vectors * roots).float().mT
    basis = orthonormal(basis)
    within = basis.mT @ columns
    return basis.half(), values, within if sizes is None else within * sizes


def _inverse(
    sizes: Tensor,  # (s,)
) -> Tensor:  # (s,)
    """Returns 1 / sizes; 0 for those that are too small for it."""
    return torch.where(sizes > torch.finfo(sizes.dtype).tiny, 1 / sizes, 0.0)


def _squares(
    columns: Tensor,  # (p, s)
) -> Tensor:  # (p,), float64, falling
    return torch.linalg.eigvalsh(columns @ columns.mT).flip(0).clamp(min=0).double()
