"""Extends what is known of one layer's deviations by those of further inputs, without the old inputs.

With a the old average and x a new input whose share of the new average is w, the new average is
a + w * (x - a). The old deviations from a stay slices as they are; the new ones are linear in them and in
x - a (`Extension`). Three things are not known exactly:

* a itself, of which the file has a rounded value. Its error e is known between the old bases, and so are
  its inner products with the old slices. What lies outside of the bases counts as orthogonal to the new
  inputs; by Cauchy and Schwarz this is wrong by at most |e outside| * |x - a| (`rounding_bound`).
* the rest of the old slices, outside of the old bases. Its inner products with all old slices are known;
  those with the new inputs are estimated from a sample of entries (`rest_slopes`).
* that rest between the new bases. What of it lies along the new inputs follows from the same slopes; what
  does not is left outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.compression import (
    CompressedLayer,
    leading_vectors,
    project,
    recompress,
)
from hyper_merge.decomposition.contrasts import Contrasts, leading_directions
from hyper_merge.decomposition.linalg import inner_products, moved, orthonormal

_LEAST_COLUMNS: Final = 16  # that new inputs get of a layer's bases to begin with
_NOTHING: Final = 1e-10  # of the largest eigenvalue: less is no direction among new inputs
_SAME: Final = 1e-9  # by which shares may differ: sums of the same weights in another order


@dataclass(frozen=True, eq=False)
class Extension:
    """From old slices, the average's rounding error and new inputs to the slices of all.

    With S the old slices, e the part of the old average's rounding error that is not known entry by
    entry, and y = input - (average as stored - the part that is known), each an entry of a stack:

        new slices = to_slices @ [S, e, y]
    """

    to_slices: Tensor  # (d', d + 1 + n), float64
    shares: Tensor  # (n,), float64: of the new inputs in the new average
    coupling: Tensor  # (n,), float64: how <e, y> counts in the sum of all squared deviations

    @classmethod
    def of(cls, old: Contrasts, new: Contrasts) -> Extension:
        """Returns the extension from the coordinates of k inputs to those of k + n, the same ones first.

        Raises:
            ValueError: the old inputs' shares in the new average are not in the old proportions.
        """
        count = new.count - old.count
        shares = new.base_weights[-count:]
        rest = 1.0 - float(shares.sum())
        earlier = new.base_weights[: len(new.base_weights) - count]
        if not torch.allclose(earlier, rest * old.base_weights, rtol=0.0, atol=_SAME):
            raise ValueError("the old inputs have other proportions in the new average")
        above = torch.cat(
            [old.to_deviations, old.to_deviations.new_full((old.count, 1), -(1.0 - rest))], 1
        )
        above = torch.cat([above, -shares.expand(old.count, count)], 1)
        below = torch.cat(
            [
                shares.new_zeros(count, old.dimensions),
                shares.new_full((count, 1), rest),
                torch.eye(count, dtype=shares.dtype) - shares,
            ],
            1,
        )
        rows = torch.cat([above, below])  # (k + n, d + 1 + n): every deviation
        place = old.dimensions
        return cls(new.to_deviations.mT @ rows, shares, rows[:, place + 1 :].mT @ rows[:, place])

    @property
    def kept_share(self) -> float:
        """The share of the old average in the new one."""
        return 1.0 - float(self.shares.sum())


@dataclass(frozen=True, eq=False)
class KnownLayer:
    """What an earlier analysis knows of a layer: slices between bases, and all inner products."""

    left: Tensor  # (m, p)
    right: Tensor  # (n, q)
    core: Tensor  # (d, p, q)
    rounding: Tensor  # (p, q): the average as stored less the exact one
    gram: Tensor  # (d + 1, d + 1), float64: slices and, last, the average's rounding error
    is_whole: bool  # whether the core is the slices' exact projection, not that of mixtures alone

    @property
    def is_complete(self) -> bool:
        """Whether nothing of the slices lies outside of what is known."""
        square = self.left.shape[0] == self.left.shape[1]
        return self.is_whole and square and self.right.shape[0] == self.right.shape[1]

    @property
    def rest(self) -> Tensor:  # (d,), float64
        """The squared norm of what is not known of each slice."""
        known = self.core.flatten(1).norm(dim=1).double().square().cpu()
        return (self.gram.diagonal()[:-1] - known).clamp(min=0)

    @property
    def unknown_rounding(self) -> float:
        """The squared norm of the part of the average's rounding error that is not known."""
        return max(float(self.gram[-1, -1]) - float(self.rounding.double().square().sum()), 0.0)

    def to(self, device: torch.device) -> KnownLayer:
        """Returns the layer on a device, but for its Gram matrix."""
        left, right, core, rounding = (
            moved(part, device) for part in (self.left, self.right, self.core, self.rounding)
        )
        return KnownLayer(left, right, core, rounding, self.gram, self.is_whole)

    def entries(
        self,
        between: Tensor,  # (any, p, q): matrices between the bases
        segments: Sequence[slice],  # of the flattened layer, none empty
    ) -> Tensor:  # (any, entries of the segments)
        """Returns some entries of matrices that are known between the bases."""
        n = len(self.right)
        parts = []
        for segment in segments:
            first, last = segment.start // n, -(-segment.stop // n)
            rows = self.left[first:last] @ between @ self.right.mT
            flat = rows.flatten(1)
            parts.append(flat[:, segment.start - first * n : segment.stop - first * n])
        return torch.cat(parts, 1)


def rounding_bound(
    unknown_rounding: float,
    fresh: Tensor,  # (n,), float64: squared norms of the new inputs' distances from the old average
    extension: Extension,
) -> float:
    """Returns the most by which the sum of a layer's squared deviations can be wrong.

    Args:
        unknown_rounding: squared norm of the unknown part of the old average's rounding error.
        fresh: of the new inputs.
        extension: of the tensor.
    """
    return 2 * unknown_rounding**0.5 * float(extension.coupling.abs() @ fresh.sqrt())


@dataclass(frozen=True, eq=False)
class FreshDeviations:
    """New inputs of one layer, and the new average."""

    base: Tensor  # (m, n), as it will be stored
    fresh: Tensor  # (n, m, n), float32: inputs less what is known of the old average
    within: Tensor  # (n, p, q): the same between the old bases
    rounding: Tensor  # (m, n), float32: the base as stored less what it is made of

    def entries(self, segments: Sequence[slice]) -> Tensor:  # (n, entries of the segments)
        """Returns some entries of the new inputs."""
        flat = self.fresh.flatten(1)
        return torch.cat([flat[:, segment] for segment in segments], 1)


def fresh_deviations(
    known: KnownLayer,
    average: Tensor,  # (m, n), as stored
    inputs: Sequence[Tensor],  # n of them, (m, n) each
    extension: Extension,
    stored: torch.dtype,
    written: Tensor | None = None,  # (m, n)
) -> FreshDeviations:
    """Returns the new inputs' deviations from the old average, and the new average.

    Args:
        known: of the layer, on the device of the work.
        average: the old one.
        inputs: the new inputs.
        extension: of the layer.
        stored: type in which the new average will be written.
        written: the new average, where it was written before.
    """
    device = known.left.device
    as_stored = moved(average, device).float()
    exact = as_stored - known.left @ known.rounding @ known.right.mT
    fresh = torch.stack([moved(tensor, device).float() - exact for tensor in inputs])
    shares = moved(extension.shares.float(), device)
    mean = exact + torch.tensordot(shares, fresh, 1)
    mean = torch.where(mean == as_stored, as_stored, mean)  # keeps negative zeros
    base = mean.to(stored) if written is None else moved(written, device)
    within = _batched(known.left.mT, fresh, known.right)
    return FreshDeviations(base, fresh, within, base.float() - mean)


def rest_slopes(
    rest: Tensor,  # (d, entries): what is not known of the slices, in a sample of entries
    fresh: Tensor,  # (n, entries): the new inputs there, as `unexplained` has them
) -> Tensor:  # (d, n)
    """Returns by how much the unknown rest of each slice follows the new inputs, by least squares."""
    rest, fresh = rest.double(), fresh.double()
    inverse = torch.linalg.pinv(fresh @ fresh.mT, rtol=_NOTHING, hermitian=True)
    return rest @ fresh.mT @ inverse


@dataclass(frozen=True, eq=False)
class ExtendedLayer:
    """The analysis of a layer of all inputs."""

    compressed: CompressedLayer  # on the device of the work
    gram: Tensor  # (d' + 1, d' + 1), float64
    rounding: Tensor  # (p, q), CPU
    directions: Tensor | None  # (d', s), of the slices in the core; None for all slices


@dataclass(frozen=True, eq=False)
class NewBases:
    """How many columns and which slices the bases of the extended layer are for."""

    width: int  # columns at most
    kept: int | None = None  # directions among the slices; None for all slices as they are
    common: Tensor | None = None  # (d', any): directions to begin with


def extend_layer(
    known: KnownLayer,
    deviations: FreshDeviations,
    slopes: Tensor,  # (d, n), of `rest_slopes`; zeros where nothing is unknown
    extension: Extension,
    bases: NewBases,
    generator: torch.Generator,
) -> ExtendedLayer:
    """Returns the analysis of old and new inputs of a layer.

    The new bases hold most of what lies between the old ones and the leading singular vectors of the
    new inputs.

    Args:
        known: of the old inputs, on the device of the work.
        deviations: of the new inputs.
        slopes: how the unknown rest of the old slices follows the new inputs.
        extension: of the layer.
        bases: the new bases' size.
        generator: for the starts of iterations.
    """
    fresh, within, error = deviations.fresh, deviations.within, deviations.rounding
    error_within = _batched(known.left.mT, error[None], known.right)
    own = inner_products(fresh.flatten(1), torch.cat([fresh, error[None]]).flatten(1)).cpu()
    gram = _whole_gram(known, within, error_within, own, error, slopes, extension)
    left, right = _joint_bases(known, fresh, own[:, :-1], gram, bases.width, generator)
    between = _between(known, fresh, within, slopes, extension, left, right)
    slices_gram, directions = gram[:-1, :-1], None
    if bases.kept is not None:
        directions = leading_directions(slices_gram, bases.common, bases.kept)
        slices_gram = directions.mT @ slices_gram @ directions
        between = torch.tensordot(moved(directions.mT.to(between), between.device), between, 1)
    compressed = recompress(left, between, right, slices_gram, bases.width, generator)
    rounding = project(error[None], compressed.left, compressed.right)[0].cpu()
    return ExtendedLayer(compressed, gram, rounding, directions)


def unexplained(
    known: KnownLayer, deviations: FreshDeviations, segments: Sequence[slice]
) -> Tensor:  # (n, entries of the segments)
    """Returns what of the new inputs can have to do with the unknown rest of the slices.

    Where all slices are known between the bases that is what lies outside of these.
    """
    fresh = deviations.entries(segments)
    return fresh - known.entries(deviations.within, segments) if known.is_whole else fresh


def _batched(left: Tensor, matrices: Tensor, right: Tensor) -> Tensor:
    """Returns `left @ matrix @ right` for every matrix, one after the other."""
    return torch.stack([left @ matrix @ right for matrix in matrices])


def _whole_gram(
    known: KnownLayer,
    within: Tensor,  # (n, p, q)
    error_within: Tensor,  # (1, p, q)
    own: Tensor,  # (n, n + 1), float64: of the new inputs with themselves and the rounding error
    error: Tensor,  # (m, n)
    slopes: Tensor,  # (d, n)
    extension: Extension,
) -> Tensor:  # (d' + 1, d' + 1), float64
    """Returns the inner products of the new slices and, last, of the new rounding error."""
    d, n = len(known.core), len(within)
    others = torch.cat([known.rounding[None], within, error_within]).flatten(1)
    across = inner_products(known.core.flatten(1), others).cpu()  # (d, 1 + n + 1)
    gram = known.gram.new_zeros(d + n + 2, d + n + 2)  # slices, e, y, the new average's rounding
    gram[:d, :d] = known.gram[:-1, :-1]
    gram[:d, d] = known.gram[:-1, -1] - across[:, 0]
    gram[:d, d + 1 : -1] = across[:, 1:-1] + slopes @ _unexplained_gram(known, within, own)
    gram[:d, -1] = across[:, -1]
    gram[d, d] = known.unknown_rounding
    gram[d + 1 : -1, d + 1 :] = own
    gram[-1, -1] = inner_products(error.flatten()[None], error.flatten()[None])[0, 0]
    gram = gram.triu() + gram.triu(1).mT
    rows = torch.zeros(len(extension.to_slices) + 1, d + n + 2, dtype=gram.dtype)
    rows[:-1, :-1] = extension.to_slices
    rows[-1, d], rows[-1, -1] = extension.kept_share, 1.0
    return rows @ gram @ rows.mT


def _unexplained_gram(
    known: KnownLayer,
    within: Tensor,  # (n, p, q)
    own: Tensor,  # (n, n + 1)
) -> Tensor:  # (n, n), float64
    gram = own[:, :-1]
    if known.is_whole:
        gram = gram - inner_products(within.flatten(1), within.flatten(1)).cpu()
    return gram


def _joint_bases(
    known: KnownLayer,
    fresh: Tensor,  # (n, m, n)
    fresh_gram: Tensor,  # (n, n)
    gram: Tensor,  # (d' + 1, d' + 1), of all
    width: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # (m, any), (n, any), orthonormal columns
    """Returns bases of the old ones and of the leading singular vectors of the new inputs."""
    sides = known.left, known.right
    if all(len(side) == side.shape[1] for side in sides):
        return sides
    sizes = [torch.linalg.eigvalsh(part).clamp(min=0).sqrt().sum() for part in (fresh_gram, gram)]
    share = float(sizes[0] / sizes[1]) if sizes[1] > 0 else 0.0
    columns = min(max(round(share * width), _LEAST_COLUMNS), width)
    vectors = leading_vectors(fresh, fresh_gram, columns, generator)
    return tuple(map(_joined, sides, vectors))  # type: ignore[return-value] # of two


def _joined(
    basis: Tensor,  # (m, p)
    vectors: Tensor,  # (m, any)
) -> Tensor:  # (m, at most m), orthonormal
    size = len(basis)
    if basis.shape[1] + vectors.shape[1] >= size:
        return torch.eye(size, dtype=basis.dtype, device=basis.device)
    new = vectors - basis @ (basis.mT @ vectors)
    return orthonormal(torch.cat([basis, orthonormal(new)], 1))


def _between(
    known: KnownLayer,
    fresh: Tensor,  # (n, m, n)
    within: Tensor,  # (n, p, q): between the old bases
    slopes: Tensor,  # (d, n)
    extension: Extension,
    left: Tensor,  # (m, P)
    right: Tensor,  # (n, Q)
) -> Tensor:  # (d', P, Q)
    """Returns the new slices between the joint bases, as far as they are known."""
    rows, columns = left.mT @ known.left, right.mT @ known.right
    news = _batched(left.mT, fresh, right)
    outside = news - rows @ within @ columns.mT if known.is_whole else news
    device = left.device
    old = rows @ known.core @ columns.mT
    old = old + torch.tensordot(moved(slopes.float(), device), outside, 1)
    d = len(old)
    to_old, to_new = (
        moved(part.float(), device)
        for part in (extension.to_slices[:, :d], extension.to_slices[:, d + 1 :])
    )
    return torch.tensordot(to_old, old, 1) + torch.tensordot(to_new, news, 1)
