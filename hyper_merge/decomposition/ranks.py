"""How the ranks that the user asks for become ranks of each block in each layer."""

from __future__ import annotations

from collections.abc import Sequence

from hyper_merge.errors import RankError


def even_ranks(
    ranks: Sequence[int],
    shapes: Sequence[tuple[int, int]],  # (m, n) of every layer
) -> list[tuple[int, ...]]:  # ranks of the R blocks, per layer
    """The plain meaning of a list of ranks: the same in every layer, capped at what it can have.

    Raises:
        RankError: no ranks, or one below 1.
    """
    if not ranks or min(ranks) < 1:
        raise RankError(f"ranks must be 1 or more, at least one of them, got {list(ranks)}")
    return [tuple(min(rank, *shape) for rank in ranks) for shape in shapes]
