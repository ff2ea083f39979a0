"""Provides small linear algebra, batched over leading dimensions; device and dtype follow the input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

# Damping of normal equations, in units of the dtype's rounding: enough for Cholesky to succeed on
# blocks that overlap, too little to be seen in the loss.
_DAMPING: Final = 100.0
# How often it is raised to ten times as much: in float32 it is as large as the matrix then.
_RAISES: Final = 5

# Pivots of Cholesky's factor of unit columns.
_GOOD_PIVOT: Final = 0.1
_LEAST_PIVOT: Final = 3e-3

# Rows of symmetric matrices whose eigenvalues a thread of a CPU finds as fast as a GPU, which it
# leaves to others meanwhile.
_HOST_ROWS: Final = 1024

_AT_ONCE: Final = 2**22  # entries that are converted
_CACHED: Final = 2**16  # entries that are converted in a CPU's cache


def orthonormal(
    columns: Tensor,  # (..., m, r), r <= m
) -> Tensor:  # (..., m, r)
    """Returns an orthonormal basis that contains the span of `columns`.

    Cholesky QR: twice to five times as fast as Householder's QR. Pivots tell how much the squared
    condition number costs: a second pass repairs a little, Householder takes over where columns are
    almost dependent.

    Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", 2015.
    """
    if not columns.shape[-1]:
        return columns
    basis, pivot = _cholesky_qr(columns)
    if _LEAST_PIVOT < pivot <= _GOOD_PIVOT:
        basis, pivot = _cholesky_qr(basis)  # where rounding hid a dependent column it fails
    if pivot > _GOOD_PIVOT:
        return basis
    sizes = columns.norm(dim=-2, keepdim=True).clamp(min=_tiny(columns))
    return torch.linalg.qr(columns / sizes)[0]  # also for NaN


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on a device; a CPU does not wait for its way to a GPU."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def eigh(
    gram: Tensor,  # (..., r, r), symmetric
) -> tuple[Tensor, Tensor]:  # (..., r), rising, and (..., r, r)
    """Returns eigenvalues and eigenvectors, where the matrix is; small ones come from the CPU."""
    values, vectors = torch.linalg.eigh(_small_on_host(gram))
    return moved(values, gram.device), moved(vectors, gram.device)


def eigenvalues(
    gram: Tensor,  # (..., r, r), symmetric
) -> Tensor:  # (..., r), rising, CPU
    """Returns eigenvalues; the CPU itself finds those of small matrices."""
    return torch.linalg.eigvalsh(_small_on_host(gram)).cpu()


def thin_svd(
    matrix: Tensor,  # (..., m, n)
) -> tuple[Tensor, Tensor, Tensor]:  # (..., m, r), (..., r), (..., r, n); r = min(m, n)
    """Returns singular vectors and values; of matrices on a GPU the CPU decomposes what is square."""
    if not matrix.is_cuda:
        return tuple(torch.linalg.svd(matrix, full_matrices=False))
    if matrix.shape[-2] > matrix.shape[-1]:
        basis, matrix = torch.linalg.qr(matrix)
        u, s, vh = thin_svd(matrix)
        return basis @ u, s, vh
    host = _small_on_host(matrix)
    u, s, vh = torch.linalg.svd(host, full_matrices=False)
    return moved(u, matrix.device), moved(s, matrix.device), moved(vh, matrix.device)


def solve_damped(
    right: Tensor,  # (..., p, r)
    gram: Tensor,  # (..., r, r), symmetric, positive semidefinite
    previous: Tensor,  # (..., p, r)
) -> Tensor:  # (..., p, r)
    """Returns the X of X @ gram = right, drawn very slightly towards `previous`.

    Minimises the least-squares problem plus epsilon * ||X - previous||^2 (a proximal step), so that
    a singular Gram matrix is no obstacle and the loss never rises.

    Source: Navasca, De Lathauwer and Kindermann, "Swamp reducing technique for tensor
    decomposition", 2008.
    """
    epsilon = _DAMPING * torch.finfo(gram.dtype).eps
    damping = epsilon * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damping, rest = damping.clamp(min=_tiny(gram)), right - previous @ gram
    if gram.is_cuda:
        return previous + _solve_on_gpu(_damped(gram, damping), rest)
    # Not torch.linalg.solve: batched on the CPU it printed MKL errors and failed (torch 2.13).
    factor = _damped_factor(gram, damping)
    if gram.shape[-1] > rest.shape[-2]:  # then two triangular solves take half of the time
        return previous + _solve_triangular(factor, rest)
    return previous + rest @ torch.cholesky_inverse(factor)


def leading_factors(
    matrix: Tensor,  # (..., m, n)
    rank: int,
    generator: torch.Generator,
    iterations: int = 2,
) -> tuple[Tensor, Tensor]:  # (..., m, rank), (..., rank, n)
    """Returns almost the best `up @ down` of a rank: a truncated SVD by subspace iteration.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithm 4.4.
    """
    *batch, m, n = matrix.shape
    rank = min(rank, m, n)
    down = random_normal((*batch, n, rank), matrix, generator).mT
    for _ in range(iterations):
        up = orthonormal(matrix @ orthonormal(down.mT))
        down = up.mT @ matrix
    return up, down


def energy_of(
    matrix: Tensor,  # (m, n)
) -> float:
    """Returns the squared norm: by rows in the matrix's precision, over them in float64."""
    return float(matrix.norm(dim=1).double().square().sum())


def squared_norm(
    values: Tensor,  # (size,)
) -> float:
    """Returns the squared norm, of parts that a CPU's cache holds in float32, and over them in float64."""
    parts = torch.split(values, _CACHED)
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
    return float(torch.stack(norms).double().square().sum())


def inner_products(
    rows: Tensor,  # (r, size)
    others: Tensor,  # (s, size)
) -> Tensor:  # (r, s), float64
    """Returns inner products, summed in float64, in which memory never holds all of the rows."""
    step = _AT_ONCE // 16  # for which several rows are in a CPU's cache
    pairs = zip(torch.split(rows, step, 1), torch.split(others, step, 1), strict=True)
    return torch.stack([part.double() @ other.double().mT for part, other in pairs]).sum(0)


def add_products(
    matrix: Tensor,  # (m, n), float32
    products: Iterable[tuple[Tensor, Tensor, float]],  # (m, r), (r, n), multiplier
) -> None:
    """Adds products times their multipliers to a matrix in place, in its precision."""
    for up, down, multiplier in products:
        matrix.addmm_((up * multiplier).to(matrix), down.to(matrix))


def product_energy(
    up: Tensor,  # (m, r)
    down: Tensor,  # (r, n)
) -> float:
    """Returns the squared norm of `up @ down`, without a matrix of its size."""
    return float(((up.mT @ up) * (down @ down.mT)).sum(dtype=torch.float64))


def block_gram(
    ups: Sequence[Tensor],  # (m, r) each, R of them
    downs: Sequence[Tensor],  # (r, n)
) -> Tensor:  # (R, R), float64
    """Returns inner products of the blocks `up @ down`, without a matrix of their size."""
    up, down = torch.cat(list(ups), 1), torch.cat(list(downs))
    return block_sums((up.mT @ up) * (down @ down.mT), [part.shape[1] for part in ups])


def block_sums(
    columns: Tensor,  # (r, r)
    sizes: Sequence[int],  # of R blocks, r in all
) -> Tensor:  # (R, R), float64
    """Returns the sums over the pairs of each two blocks' columns."""
    member = torch.nn.functional.one_hot(
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(list(sizes))), len(sizes)
    ).double()
    return member.mT @ columns.double() @ member


def block_columns(
    basis: Tensor,  # (m, p)
    factor: Tensor,  # (m, r)
) -> Tensor:  # (p, r)
    """Returns the factor in a rounded basis, corrected for its columns' inner products."""
    first = basis.mT @ factor
    return first + basis.mT @ (factor - basis @ first)


def largest_value(
    up: Tensor,  # (p, r)
    down: Tensor,  # (r, q)
) -> float:
    """Returns the largest singular value s_1 of the product, or up to r ** (1 / 16) times that."""
    return largest_values(up.mT @ up, down @ down.mT, [up.shape[1]])[0]


def largest_values(
    ups: Tensor,  # (r, r), inner products of the columns of R blocks' ups, side by side
    downs: Tensor,  # (r, r), of their downs
    ranks: Sequence[int],  # of the R blocks
) -> list[float]:
    """Returns what `largest_value` does of every block.

    The Schatten norm (sum of s_i ** 16) ** (1 / 16): the product of the factors' Gram matrices has
    the eigenvalues s_i ** 2.
    """
    squares = _diagonal_blocks(ups, ranks) @ _diagonal_blocks(downs, ranks)
    energies = squares.diagonal(dim1=-2, dim2=-1).sum(-1)
    unit = squares / torch.where(energies > 0, energies, 1.0)[:, None, None]
    traces = torch.linalg.matrix_power(unit, 8).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(energies <= 0, 0.0, energies.sqrt() * traces ** (1 / 16)).tolist()


def _diagonal_blocks(
    gram: Tensor,  # (r, r)
    ranks: Sequence[int],  # of R blocks, r in all
) -> Tensor:  # (R, most, most), float64, zero beyond a block's rank
    sizes = torch.tensor(ranks, device=gram.device)
    columns = torch.arange(max(ranks, default=0), device=gram.device)
    places = ((sizes.cumsum(0) - sizes)[:, None] + columns).clamp(max=max(len(gram) - 1, 0))
    inside = columns < sizes[:, None]
    blocks = gram[places[:, :, None], places[:, None]] if len(gram) else gram.new_zeros(1)
    return torch.where(inside[:, :, None] & inside[:, None], blocks, 0.0).double()


def random_normal(
    shape: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Returns standard normal numbers of a shape, with the dtype and device of `like`.

    Drawn where the generator lives, so that a seed means the same numbers on every device.
    """
    numbers = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return moved(numbers, like.device).to(like.dtype)


def _cholesky_qr(columns: Tensor) -> tuple[Tensor, float]:
    """Returns the basis and the smallest pivot: 1 for orthogonal, 0 for dependent columns.

    The factor is that of unit columns, which are nowhere formed.
    """
    gram = columns.mT @ columns
    sizes = gram.diagonal(dim1=-2, dim2=-1).clamp(min=_tiny(gram)).sqrt()
    factor, info = torch.linalg.cholesky_ex(gram / sizes[..., None, :] / sizes[..., :, None])
    pivots = torch.where(info > 0, 0.0, factor.diagonal(dim1=-2, dim2=-1).amin(-1))
    triangle = factor.mT * sizes[..., None, :]
    basis = torch.linalg.solve_triangular(triangle, columns, upper=True, left=False)
    return basis, float(pivots.amin()) if pivots.numel() else 1.0


def _damped_factor(
    gram: Tensor,  # (..., r, r)
    damping: Tensor,  # (..., 1, 1)
) -> Tensor:  # (..., r, r)
    """Returns Cholesky's factor of the damped matrix, with more damping where it is needed.

    Of a thousand columns, a quarter of them dependent, the rounding of a Gram matrix has exceeded the least.

    Raises:
        LinAlgError: even with as much as the diagonal itself there is none, such as for NaN.
    """
    for _ in range(_RAISES):
        factor, info = torch.linalg.cholesky_ex(_damped(gram, damping))
        if not info.any():
            return factor
        damping = torch.where(info[..., None, None] > 0, 10 * damping, damping)
    return torch.linalg.cholesky(_damped(gram, damping))


def _damped(
    gram: Tensor,  # (..., r, r)
    damping: Tensor,  # (..., 1, 1)
) -> Tensor:  # (..., r, r)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram + damping * identity


def _solve_on_gpu(
    gram: Tensor,  # (..., r, r), positive definite
    right: Tensor,  # (..., p, r)
) -> Tensor:  # (..., p, r)
    """Returns the X of X @ gram = right, without a wait; zeros where Cholesky's method fails.

    Both `cholesky` and `cholesky_inverse` wait for the GPU to learn whether they failed.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    return torch.where(info[..., None, None] > 0, 0.0, _solve_triangular(factor, right))


def _solve_triangular(
    factor: Tensor,  # (..., r, r), lower
    right: Tensor,  # (..., p, r)
) -> Tensor:  # (..., p, r)
    """Returns the X of X @ factor @ factor.mT = right."""
    half = torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def _small_on_host(matrix: Tensor) -> Tensor:
    return matrix.cpu() if min(matrix.shape[-2:]) <= _HOST_ROWS else matrix


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def share(part: Tensor | float, whole: Tensor | float) -> float:
    """Returns part / whole; 0 where the whole is 0."""
    return float(part) / float(whole) if float(whole) > 0 else 0.0
