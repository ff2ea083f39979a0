"""Private LoRAs of a merge: what the shared ones leave of the checkpoints that they serve worst."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.store import Analysis
from hyper_merge.checkpoints.io.dtypes import FLOAT8
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.decomposition.contrasts import to_deviations_matrix
from hyper_merge.decomposition.linalg import block_columns, block_gram
from hyper_merge.decomposition.rank_allocation import ranks_within, spread_ranks
from hyper_merge.decomposition.truncated_svd import TruncatedSvd, truncated_svd
from hyper_merge.errors import OutputError
from hyper_merge.loras.lora_file import as_hosts_apply, stored_factors
from hyper_merge.loras.metadata import CHECKPOINT
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver.evaluation import Evaluation
from hyper_merge.solver.float8 import float8_alpha
from hyper_merge.solver.quantization import StoredFactors

_LEADING: Final = 3  # times the wished rank: what a layer can have of it
_MOST: Final = 256  # rank of a layer for a wished share
_MARGIN: Final = 0.998  # of what may remain: rounding takes a little


@dataclass(frozen=True, eq=False)
class PrivateLora:
    """One checkpoint's own LoRA."""

    checkpoint: int  # place
    rank: int  # in the mean of the layers
    alpha: float | None  # of the file
    factors: list[tuple[Tensor, Tensor]]  # per layer (m, r), (r, n), as stored
    errors: Tensor  # (layers,), float64: squared norms of what is left with it

    @property
    def ranks(self) -> list[int]:
        """Per layer."""
        return [up.shape[1] for up, _ in self.factors]


@dataclass(frozen=True, eq=False)
class SharedLoras:
    """What the shared LoRAs bring, to which private ones are added."""

    analysis: Analysis
    blocks: StoredFactors
    found: Evaluation
    groups: Mapping[str, Sequence[int]]  # the layers of each set of multipliers
    dtype: torch.dtype  # of the stored factors


def find_private_loras(
    shared: SharedLoras, wish: PrivateLoraTarget, costs: Sequence[int], progress: Progress
) -> tuple[PrivateLora, ...]:
    """For a wished rank, LoRAs of the checkpoints below the mean; for a share, of those below that.

    Args:
        shared: what is there.
        wish: a rank in the mean of the layers, or a share of every checkpoint.
        costs: bytes of a rank, per layer.
        progress: progress and interrupt.
    """
    explained = shared.found.explained()
    least = float(explained.mean()) if wish.share is None else wish.share
    chosen = [c for c, share in enumerate(explained.tolist()) if share < least]
    parts = progress.split([1.0] * len(chosen))
    return tuple(
        _one(shared, checkpoint, wish, costs, part)
        for checkpoint, part in zip(chosen, parts, strict=True)
    )


def add_private_loras(found: Evaluation, privates: Sequence[PrivateLora]) -> Evaluation:
    """The fit with what private LoRAs bring back besides."""
    errors = found.errors.clone()
    for each in privates:
        errors[:, each.checkpoint] = each.errors
    return replace(found, errors=errors)


def named_topups(outputs: FileTransaction, loras: Path, names: Collection[str]) -> dict[str, str]:
    """The names of staged private LoRAs by the checkpoint that each file says it is of.

    The report names these, and not what was meant to be written.

    Args:
        outputs: with the files.
        loras: folder of all LoRAs.
        names: of the private ones.

    Raises:
        OutputError: two files are of one checkpoint, so that another would go without its LoRA.
    """
    paths = {name: loras / f"{name}.safetensors" for name in names}
    found = {outputs.metadata_of(path).get(CHECKPOINT, ""): name for name, path in paths.items()}
    if len(found) != len(names):
        raise OutputError(
            f"expected a private LoRA for each of {len(names)} checkpoints, got files of"
            f" {', '.join(found)} in {loras}",
            hint="nothing is written: give the checkpoints' files names that are less alike",
        )
    return found


def _one(
    shared: SharedLoras,
    checkpoint: int,
    wish: PrivateLoraTarget,
    costs: Sequence[int],
    progress: Progress,
) -> PrivateLora:
    layers = shared.analysis.layers
    rows = {
        index: found[checkpoint]
        for name, found in shared.found.multipliers.items()
        for index in shared.groups[name]
    }
    most = _LEADING * wish.rank if wish.rank is not None else _MOST

    def leading(index: int) -> TruncatedSvd:
        rest = _rest(shared, index, rows[index], checkpoint)
        dice = torch.Generator().manual_seed(index)
        return truncated_svd(rest, min(most, *rest.shape), dice)

    found: list[TruncatedSvd] = []
    with parallel_map(torch.device("cpu"), progress.check) as each:
        for truncated in each(leading, range(len(layers))):
            found.append(truncated)
            progress.report("making private LoRAs", 0.8 * len(found) / len(layers))
    ranks = _ranks(shared, checkpoint, wish, costs, [each.energies for each in found])
    mean = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) / sum(costs)
    rank = max(round(mean), 1)
    alpha = _alpha(shared, rank, zip(found, ranks, strict=True))
    written = [
        _written(shared, (index, checkpoint), rows[index], (truncated, kept), alpha)
        for index, (truncated, kept) in enumerate(zip(found, ranks, strict=True))
    ]
    factors, errors = zip(*written, strict=True)
    return PrivateLora(checkpoint, rank, alpha, list(factors), torch.stack(errors))


def _alpha(
    shared: SharedLoras, rank: int, kept: Iterable[tuple[TruncatedSvd, int]]
) -> float | None:
    """Of the file: none for a family without, its rank, or what float8 wants."""
    if shared.blocks.alphas[0] is None:
        return None
    if shared.dtype != FLOAT8:
        return float(rank)
    sizes = [count * float(each.energies[0]) ** 0.5 for each, count in kept if count]
    return float8_alpha(max(sizes, default=0.0))


def _ranks(
    shared: SharedLoras,
    checkpoint: int,
    wish: PrivateLoraTarget,
    costs: Sequence[int],
    energies: Sequence[Tensor],
) -> list[int]:
    if wish.rank is not None:
        return spread_ranks(energies, costs, wish.rank * sum(costs))
    errors, of = shared.found.errors[:, checkpoint].sum(), shared.found.energies[:, checkpoint]
    beyond = float(errors) - sum(float(each.sum()) for each in energies)
    allowed = _MARGIN * (1 - (wish.share or 0.0)) * float(of.sum())
    return ranks_within(energies, costs, max(allowed - beyond, 0.0))


def _rest(
    shared: SharedLoras, index: int, multipliers: Tensor, checkpoint: int
) -> Tensor:  # (p, q)
    """What the shared LoRAs leave of a checkpoint in a layer, between its bases."""
    analysis = shared.analysis
    left, right = analysis.bases(index)
    rows = torch.cat([analysis.core(index), analysis.rounding(index)[None]])
    weights = to_deviations_matrix(analysis.contrasts)[checkpoint].to(rows)
    rest = (weights @ rows.flatten(1)).view(rows.shape[1:])
    for up, down, multiplier in _added(shared, index, multipliers):
        rest = rest - multiplier * (block_columns(left, up) @ block_columns(right, down.mT).mT)
    return rest


def _added(
    shared: SharedLoras, index: int, multipliers: Tensor
) -> list[tuple[Tensor, Tensor, float]]:  # (m, r), (r, n), multiplier
    pairs = zip(
        shared.blocks.factors[index], shared.blocks.alphas, multipliers.tolist(), strict=True
    )
    return [(*as_hosts_apply(*factors, alpha), x) for factors, alpha, x in pairs]


def _written(
    shared: SharedLoras,
    place: tuple[int, int],  # layer, checkpoint
    multipliers: Tensor,
    kept: tuple[TruncatedSvd, int],
    alpha: float | None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The factors as stored, and the squared error that is left with them."""
    (index, checkpoint), (truncated, rank) = place, kept
    analysis, layer = shared.analysis, shared.analysis.layers[index]
    left, right = analysis.bases(index)
    up, down = left @ truncated.up[:, :rank], truncated.down[:rank] @ right.mT
    stored = stored_factors(layer, up, down, alpha, shared.dtype)
    own = as_hosts_apply(*stored, alpha)
    rows = torch.cat([analysis.core(index), analysis.rounding(index)[None]]).flatten(1).double()
    product = (block_columns(left, own[0]) @ block_columns(right, own[1].mT).mT).flatten().double()
    cross = to_deviations_matrix(analysis.contrasts)[checkpoint] @ (rows @ product)
    added = _added(shared, index, multipliers)
    gram = block_gram([*(u for u, _, _ in added), own[0]], [*(d for _, d, _ in added), own[1]])
    cross = cross - multipliers @ gram[:-1, -1]
    error = shared.found.errors[index, checkpoint] - 2 * cross + gram[-1, -1]
    return stored, error.clamp(min=0)
