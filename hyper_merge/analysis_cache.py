"""Analyses on disk: what later rank lists need in place of the checkpoints.

One .safetensors file per analysis, named after a hash of all that decides it, so that a changed
checkpoint or setting is never served an old one. Safe to delete at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis import LayerAnalysis, Work
from hyper_merge.checkpoints.header import Header, TensorInfo
from hyper_merge.checkpoints.outputs import Outputs
from hyper_merge.checkpoints.reader import Checkpoint, fingerprint, read_header
from hyper_merge.checkpoints.staging import refusing
from hyper_merge.checkpoints.writer import SafetensorsWriter
from hyper_merge.decomposition.bounds import Spectra
from hyper_merge.errors import CacheError, CheckpointError
from hyper_merge.sizes import GB
from hyper_merge.sources import Sources, bases_width

KINDS: Final = ("norms", "biases", "embeddings", "other weights", "VAE")
SIZE_LIMIT: Final = 20 * GB  # bytes of all analyses; the least recently used go first

_VERSION: Final = 3  # of the files' content; another one is never read
_SUFFIX: Final = ".analysis.safetensors"
_SOLUTIONS: Final = ".solutions.json"  # beside it
_TRIED: Final = 4  # of them, the newest
_ABOUT: Final = "hyper_merge.analysis"
_BASIS_DTYPE: Final = torch.float16
_ROUNDING_DTYPE: Final = torch.bfloat16  # a small correction, whose range float16 does not have


class Analysis:
    """An analysis in its open file: cores and bases stay mapped."""

    def __init__(self, file: Checkpoint, sources: Sources) -> None:
        """Takes the open file of `open_analysis`."""
        self.layers = sources.layout.layers
        self.contrasts = sources.contrasts
        self._file = file
        self._solutions = _solutions_of(file.path)

    @property
    def grams(self) -> Tensor:  # (layers, d + 1, d + 1), float64
        """Inner products of every layer's slices and, last, the base's rounding error."""
        return self._file.tensor("grams")

    @property
    def weights(self) -> Tensor:  # (layers,), float64
        """Squared norm of the average in every layer."""
        return self._file.tensor("weights")

    @property
    def not_carried(self) -> dict[str, Tensor]:  # kind -> (k,), float64
        """Energies outside of all layers, by kind and checkpoint."""
        return dict(zip(KINDS, self._file.tensor("not_carried"), strict=True))

    @property
    def spectra(self) -> list[Spectra]:
        """Of every layer."""
        names = ("rows", "columns", "private")
        return [
            Spectra(*(self._file.tensor(f"{i}.{name}") for name in names))
            for i in range(len(self.layers))
        ]

    def core(self, index: int) -> Tensor:  # (d, p, q), float32
        """A layer's core, a view of the file."""
        return self._file.tensor(f"{index}.core")

    def rounding(self, index: int) -> Tensor:  # (p, q), float32
        """The average's rounding error in a layer's bases."""
        return self._file.tensor(f"{index}.rounding").float()

    def bases(self, index: int) -> tuple[Tensor, Tensor]:  # (m, p), (n, q), float32
        """A layer's bases."""
        left, right = self._file.tensor(f"{index}.left"), self._file.tensor(f"{index}.right")
        return left.float(), right.float()

    def core_shape(self, index: int) -> tuple[int, int]:  # p, q
        """Sides of a layer's core, without reading it."""
        return self._file.header.tensors[f"{index}.rounding"].shape  # type: ignore[return-value]

    def earlier_solutions(self, name: str, group: str) -> list[Tensor]:  # each (d, R), float64
        """Multipliers that were found with other settings, before these: good starts.

        Later ones are left out, so that the same settings give the same result again.

        Args:
            name: of the settings.
            group: of the layers.
        """
        solutions = list(self._remembered().items())
        names = [known for known, _ in solutions]
        before = solutions[: names.index(name)] if name in names else solutions
        found = [groups[group] for _, groups in before if group in groups]
        return [torch.tensor(rows, dtype=torch.float64) for rows in found[-_TRIED:]]

    def remember(
        self,
        name: str,
        multipliers: Mapping[str, Tensor],  # by group of layers: (d, R)
    ) -> None:
        """Keeps a solution's multipliers for later settings; the first one for each of them."""
        solutions = self._remembered()
        solutions.setdefault(name, {group: rows.tolist() for group, rows in multipliers.items()})
        with Outputs(overwrite=True) as outputs:
            outputs.text(self._solutions, json.dumps(solutions))

    def _remembered(self) -> dict[str, dict[str, list[list[float]]]]:
        """All solutions by their settings, oldest first; none where the file is missing or damaged."""
        try:
            solutions = json.loads(self._solutions.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        d = self.contrasts.dimensions
        fits = isinstance(solutions, dict) and all(
            isinstance(groups, dict) and all(len(rows) == d for rows in groups.values())
            for groups in solutions.values()
        )
        return solutions if fits else {}


@contextmanager
def open_analysis(path: Path, sources: Sources) -> Iterator[Analysis]:
    """An analysis, open for reading within the block.

    Args:
        path: of a file that `find` returned or `new_analysis` wrote.
        sources: those it was made for.
    """
    with Checkpoint(path) as file:
        yield Analysis(file, sources)


class AnalysisWriter:
    """Takes an analysis layer by layer during the pass."""

    def __init__(self, writer: SafetensorsWriter) -> None:
        """Takes the open writer of `new_analysis`."""
        self._grams: dict[int, Tensor] = {}
        self._weights: dict[int, float] = {}
        self._writer = writer

    def keep(self, layer: LayerAnalysis) -> None:
        """Takes the analysis of one layer."""
        self._grams[layer.index] = layer.gram
        compressed, spectra = layer.compressed, layer.spectra
        parts = {
            "core": compressed.core,
            "left": compressed.left,
            "right": compressed.right,
            "rounding": layer.rounding,
            "rows": spectra.rows,
            "columns": spectra.columns,
            "private": spectra.private,
        }
        self._weights[layer.index] = layer.weight
        for name, tensor in parts.items():
            self._writer.write(f"{layer.index}.{name}", tensor)

    def close_with(self, not_carried: Mapping[str, Tensor]) -> None:
        """Takes what is known only after the last tensor."""
        order = sorted(self._grams)
        grams = torch.stack([self._grams[index] for index in order])
        weights = torch.tensor([self._weights[index] for index in order], dtype=torch.float64)
        self._writer.write("weights", weights)
        k = grams.new_zeros(next(iter(not_carried.values())).shape)
        self._writer.write("grams", grams)
        self._writer.write("not_carried", torch.stack([not_carried.get(kind, k) for kind in KINDS]))


@contextmanager
def new_analysis(path: Path, sources: Sources, work: Work) -> Iterator[AnalysisWriter]:
    """An analysis to be written within the block; the file appears when that is left in peace."""
    about = json.dumps({"width": work.width, **_identity(sources, work.seed)})
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(path, _tensors(sources, work), {_ABOUT: about}) as writer:
        yield AnalysisWriter(writer)


def width_for(ranks: Sequence[int]) -> int:
    """Columns of the bases of a new analysis: twice the ranks, and enough for most later lists."""
    return max(512, -(-2 * sum(ranks) // 256) * 256)


def serves(width: int, ranks: Sequence[int]) -> bool:
    """Whether bases of this width are wide enough for a list of ranks.

    At 1.5 times the sum of the ranks the loss is under 1 % above that at twice the sum.
    """
    return width >= 1.5 * sum(ranks)


def path_for(folder: Path, sources: Sources, work: Work) -> Path:
    """Where the analysis of these files, settings and width belongs."""
    identity = json.dumps(_identity(sources, work.seed), sort_keys=True).encode()
    return folder / f"{hashlib.sha256(identity).hexdigest()[:20]}-{work.width}{_SUFFIX}"


def find(folder: Path, sources: Sources, work: Work, ranks: Sequence[int]) -> Path | None:
    """The narrowest analysis of these files that serves the ranks; a damaged one is passed over."""
    stem = path_for(folder, sources, work).name.partition("-")[0]
    files = {_width(path): path for path in folder.glob(f"{stem}-*{_SUFFIX}")}
    for width in sorted(files):
        if (serves(width, ranks) or width >= (work.width or 0)) and _is_whole(files[width]):
            return files[width]
    return None


def mark_used(path: Path) -> None:
    """Makes an analysis the most recently used one, for `prune`."""
    with refusing(path):
        os.utime(path)


def total_bytes(folder: Path) -> int:
    """Bytes of all analyses in a cache folder, 0 if there is none; hashes of files do not count."""
    return sum(_size(path) for path in _files(folder))


def clear(folder: Path) -> int:
    """Deletes all analyses; the remembered hashes stay, for they are small and slow to make again.

    Returns:
        The bytes that were freed.

    Raises:
        CacheError: a file cannot be deleted; the others are.
    """
    stuck, freed = [], 0
    for path in _files(folder):
        size = _size(path)
        try:
            path.unlink(missing_ok=True)
            freed += size
        except OSError as error:
            stuck.append(f"{path}: {error.strerror or error}")
    if stuck:
        raise CacheError(
            f"part of the cache cannot be deleted (first: {stuck[0]}); try again when no merge is"
            " running"
        )
    return freed


def prune(folder: Path, limit: int = SIZE_LIMIT) -> None:
    """Deletes the analyses used longest ago until all together are at most `limit` bytes.

    One that is in use, or that may not be deleted, is left to the next time.
    """
    analyses = [path for path in _files(folder) if path.name.endswith(_SUFFIX)]
    total = 0
    for path in sorted(analyses, key=_last_used, reverse=True):
        total += _size(path)
        if total > limit:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                _solutions_of(path).unlink(missing_ok=True)


def analysis_bytes(sources: Sources, work: Work) -> int:
    """Size of an analysis file, less its header."""
    return sum(info.nbytes for info in _tensors(sources, work).values())


def _files(folder: Path) -> list[Path]:
    """All analyses and what is remembered beside them."""
    return [path for suffix in (_SUFFIX, _SOLUTIONS) for path in sorted(folder.glob(f"*{suffix}"))]


def _solutions_of(analysis: Path) -> Path:
    return analysis.with_name(analysis.name.removesuffix(_SUFFIX) + _SOLUTIONS)


def _size(path: Path) -> int:
    """In bytes; 0 for a file that is gone by now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _width(path: Path) -> int:
    return int(path.name.removesuffix(_SUFFIX).rpartition("-")[2])


def _is_whole(path: Path) -> bool:
    try:
        return "not_carried" in read_header(path).tensors
    except CheckpointError:
        return False


def _identity(sources: Sources, seed: int) -> dict[str, object]:
    """All that decides an analysis but its width."""
    return {
        "version": _VERSION,
        "files": [file_identity(header) for header in sources.read],
        "base": sources.base is not None,
        "weights": list(sources.contrasts.base_weights.tolist()),
        "dtype": str(sources.dtype),
        "average_vae": sources.average_vae,
        "seed": seed,
    }


def file_identity(header: Header) -> list[str | int]:
    """Tells the same file content without reading it whole."""
    return [fingerprint(header), header.size, header.mtime_ns]


def _tensors(sources: Sources, work: Work) -> dict[str, TensorInfo]:
    d, k = sources.contrasts.dimensions, sources.contrasts.count
    count = len(sources.layout.layers)
    tensors = {
        "grams": TensorInfo(torch.float64, (count, d + 1, d + 1)),
        "weights": TensorInfo(torch.float64, (count,)),
        "not_carried": TensorInfo(torch.float64, (len(KINDS), k)),
    }
    for index, layer in enumerate(sources.layout.layers):
        p, q = bases_width(layer, work.width_of(index))
        tensors[f"{index}.core"] = TensorInfo(torch.float32, (d, p, q))
        tensors[f"{index}.rounding"] = TensorInfo(_ROUNDING_DTYPE, (p, q))
        tensors[f"{index}.left"] = TensorInfo(_BASIS_DTYPE, (layer.m, p))
        tensors[f"{index}.right"] = TensorInfo(_BASIS_DTYPE, (layer.n, q))
        tensors[f"{index}.rows"] = TensorInfo(torch.float64, (p,))
        tensors[f"{index}.columns"] = TensorInfo(torch.float64, (q,))
        tensors[f"{index}.private"] = TensorInfo(torch.float64, (k, min(p, q)))
    return tensors
