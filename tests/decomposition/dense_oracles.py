"""Small problems with a known answer, and the slow, obvious forms of what the package computes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyper_merge.decomposition.ll1 import split_blocks
from hyper_merge.decomposition.problem import Batch, Factors, Problem


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def orthogonal(rng: torch.Generator, m: int, r: int) -> Tensor:  # (m, r)
    return torch.linalg.qr(normal(rng, m, r))[0]


def with_spectrum(rng: torch.Generator, m: int, n: int, spectrum: Tensor) -> Tensor:  # (m, n)
    size = min(m, n)
    left, right = orthogonal(rng, m, size), orthogonal(rng, n, size)
    return (left * spectrum[:size]) @ right.mT


def stack_of(rng: torch.Generator, b: int, k: int, p: int, q: int, power: float) -> Tensor:
    """Centred deviations (b, k, p, q) with power-law spectra and uneven layers."""
    spectrum = torch.arange(1, 100, dtype=torch.float64) ** -power
    layers = [
        torch.stack([with_spectrum(rng, p, q, spectrum) for _ in range(k)]) * 10 ** (0.3 * i)
        for i in range(b)
    ]
    stack = torch.stack(layers)
    return stack - stack.mean(1, keepdim=True)


def problem_of(
    *batches: tuple[Tensor, Sequence[int]],  # slices (b, k, p, q), ranks
    outside: float = 0.0,
) -> Problem:
    made, start = [], 0
    for slices, ranks in batches:
        layers = tuple(range(start, start + len(slices)))
        made.append(Batch(slices, tuple(ranks), layers))
        start += len(slices)
    energy = sum(float(slices.double().square().sum()) for slices, _ in batches)
    return Problem(tuple(made), energy + outside)


def random_family(seed: int, dtype: torch.dtype = torch.float64) -> Problem:
    """Three layers of two shapes, with ranks that leave something over."""
    rng = torch.Generator().manual_seed(seed)
    k = 3 + seed % 3
    ranks = ((2, 1), (3, 1, 1), (1, 2), (2,))[seed % 4]
    first = stack_of(rng, 2, k, 9, 8, 0.5).to(dtype)
    second = stack_of(rng, 1, k, 7, 12, 1.0).to(dtype)
    return problem_of((first, ranks), (second, ranks))


def random_factors(rng: torch.Generator, batch: Batch) -> Factors:
    b, _, p, q = batch.slices.shape
    rho = sum(batch.ranks)
    return Factors(normal(rng, b, p, rho).to(batch.slices), normal(rng, b, rho, q).to(batch.slices))


def dense_blocks(batch: Batch, factors: Factors) -> Tensor:  # (b, R, p, q), float64
    return torch.stack(
        [up.double() @ down.double() for up, down in split_blocks(batch, factors)], 1
    )


def dense_approximation(batch: Batch, factors: Factors, multipliers: Tensor) -> Tensor:
    return torch.einsum("kr,brpq->bkpq", multipliers.double(), dense_blocks(batch, factors))


def dense_loss(problem: Problem, factors: Sequence[Factors], multipliers: Tensor) -> float:
    inside = sum(float(batch.slices.double().square().sum()) for batch in problem.batches)
    error = sum(
        float((batch.slices.double() - dense_approximation(batch, f, multipliers)).square().sum())
        for batch, f in zip(problem.batches, factors, strict=True)
    )
    return (error + problem.energy - inside) / problem.energy


def dense_penalties(
    problem: Problem, factors: Sequence[Factors], multipliers: Tensor
) -> Tensor:  # (R,)
    """Returns each block's penalty in units of the energy, before it is times the ridge."""
    blocks_of = zip(problem.batches, factors, strict=True)
    sizes = sum(dense_blocks(batch, f).square().sum((0, 2, 3)) for batch, f in blocks_of)
    return multipliers.double().square().sum(0) * sizes / problem.energy


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def tail(matrix: Tensor, rank: int) -> float:
    """Returns the squared norm beyond the best matrix of this rank, summed over leading dimensions."""
    return float(torch.linalg.svdvals(matrix.double())[..., rank:].square().sum())
