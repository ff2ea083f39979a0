"""One analysis on disk: what later rank lists need in place of the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs, basis_columns
from hyper_merge.analysis.streaming_pass import LayerAnalysis, PassOptions
from hyper_merge.analysis.use_markers import in_use
from hyper_merge.checkpoints.io.atomic_file import StagedFile, as_output_error
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.io.shared_text import put_text
from hyper_merge.checkpoints.reader import CheckpointReader, fingerprint, read_header
from hyper_merge.decomposition.bounds import Spectra
from hyper_merge.errors import CheckpointError, OutputError
from hyper_merge.runtime.file_lock import alone

KINDS: Final = ("norms", "biases", "embeddings", "other weights", "VAE")
SUFFIX: Final = ".analysis.safetensors"
SOLUTIONS: Final = ".solutions.json"  # beside it

_VERSION: Final = 3  # of the files' content; another one is never read
_TRIED: Final = 4  # earlier solutions, the newest
_ABOUT: Final = "hyper_merge.analysis"
_BASIS_DTYPE: Final = torch.float16
_ROUNDING_DTYPE: Final = torch.bfloat16  # a small correction, whose range float16 does not have


class Analysis:
    """An analysis in its open file: cores and bases stay mapped."""

    def __init__(self, file: CheckpointReader, inputs: MergeInputs) -> None:
        """Takes the open file of `open_analysis`."""
        self.layers = inputs.layout.layers
        self.contrasts = inputs.contrasts
        self._file = file
        self._solutions = solutions_path(file.path)

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
        with alone(self._solutions):
            solutions = self._remembered()
            solutions.setdefault(
                name, {group: rows.tolist() for group, rows in multipliers.items()}
            )
            put_text(self._solutions, json.dumps(solutions))

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
def open_analysis(path: Path, inputs: MergeInputs) -> Iterator[Analysis]:
    """An analysis, open for reading within the block.

    Args:
        path: of a file that `find` returned or `create_analysis` wrote.
        inputs: those it was made for.
    """
    with in_use(path), CheckpointReader(path, replaced_whole=True) as file:
        yield Analysis(file, inputs)


class AnalysisWriter:
    """Takes an analysis layer by layer during the pass."""

    def __init__(self, writer: SafetensorsWriter) -> None:
        """Takes the open writer of `create_analysis`."""
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
def create_analysis(
    path: Path, inputs: MergeInputs, options: PassOptions
) -> Iterator[AnalysisWriter]:
    """An analysis to be written within the block; the file appears when that is left in peace.

    Where another process has put the same one there meanwhile, that stays: it may be in use.
    """
    about = json.dumps({"width": options.width, **analysis_identity(inputs, options.seed)})
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(inputs, options)
    with SafetensorsWriter(path, tensors, {_ABOUT: about}, deferred=True) as writer:
        yield AnalysisWriter(writer)
    _put(writer.staged)


def _put(staged: StagedFile) -> None:
    try:
        if not _is_there(staged.path):
            staged.commit()
    except OutputError:
        if not _is_there(staged.path):
            raise
    finally:
        staged.discard()


def _is_there(path: Path) -> bool:
    """Whether a file is there that is whole by its header."""
    try:
        return bool(read_header(path).tensors)
    except CheckpointError:
        return False


def analysis_bytes(inputs: MergeInputs, options: PassOptions) -> int:
    """Size of an analysis file, less its header."""
    return sum(info.nbytes for info in _tensors(inputs, options).values())


def solutions_path(analysis: Path) -> Path:
    """Where multipliers that were found are remembered."""
    return analysis.with_name(analysis.name.removesuffix(SUFFIX) + SOLUTIONS)


def analysis_identity(inputs: MergeInputs, seed: int) -> dict[str, object]:
    """All that decides an analysis but its width."""
    return {
        "version": _VERSION,
        "files": [file_identity(header) for header in inputs.read],
        "base": inputs.base is not None,
        "weights": list(inputs.contrasts.base_weights.tolist()),
        "dtype": str(inputs.dtype),
        "average_vae": inputs.average_vae,
        "seed": seed,
    }


def file_identity(header: Header) -> list[str | int]:
    """Tells the same file content without reading it whole."""
    return [fingerprint(header), header.size, header.mtime_ns]


def _tensors(inputs: MergeInputs, options: PassOptions) -> dict[str, TensorInfo]:
    d, k = inputs.contrasts.dimensions, inputs.contrasts.count
    count = len(inputs.layout.layers)
    tensors = {
        "grams": TensorInfo(torch.float64, (count, d + 1, d + 1)),
        "weights": TensorInfo(torch.float64, (count,)),
        "not_carried": TensorInfo(torch.float64, (len(KINDS), k)),
    }
    for index, layer in enumerate(inputs.layout.layers):
        p, q = basis_columns(layer, options.width_of(index))
        tensors[f"{index}.core"] = TensorInfo(torch.float32, (d, p, q))
        tensors[f"{index}.rounding"] = TensorInfo(_ROUNDING_DTYPE, (p, q))
        tensors[f"{index}.left"] = TensorInfo(_BASIS_DTYPE, (layer.m, p))
        tensors[f"{index}.right"] = TensorInfo(_BASIS_DTYPE, (layer.n, q))
        tensors[f"{index}.rows"] = TensorInfo(torch.float64, (p,))
        tensors[f"{index}.columns"] = TensorInfo(torch.float64, (q,))
        tensors[f"{index}.private"] = TensorInfo(torch.float64, (k, min(p, q)))
    return tensors
