"""Writes and reads an analysis on disk, which later lists of ranks use instead of the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.checksums import CHECKSUMS, Integrity, checksum, is_named_after
from hyper_merge.analysis.file_layout import (
    ROUNDING_DTYPE,
    UNCARRIED_KINDS,
    analysis_identity,
    analysis_tensors,
)
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.solutions import Solutions, read_solutions, write_solutions
from hyper_merge.analysis.streaming_pass import LayerAnalysis, PassOptions
from hyper_merge.analysis.use_markers import in_use
from hyper_merge.checkpoints.io.atomic_file import StagedFile
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.checkpoints.io.leftovers import claimed
from hyper_merge.checkpoints.io.output_errors import as_output_error
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.decomposition.bounds import Spectra
from hyper_merge.errors import CheckpointError, DamagedCacheError, OutputError
from hyper_merge.runtime.file_lock import alone, patiently

SUFFIX: Final = ".analysis.safetensors"
SOLUTIONS: Final = ".solutions.json"  # suffix of the file with an analysis's solutions

_NEWEST: Final = 4  # earlier solutions that are tried
_ABOUT: Final = "hyper_merge.analysis"


class Analysis:
    """An analysis in its open file: cores and bases stay mapped.

    Every tensor is checked when it is first read; a damaged one raises `DamagedCacheError`.
    """

    def __init__(
        self, file: CheckpointReader, inputs: MergeInputs, warn: Callable[[str], None]
    ) -> None:
        """Takes the open file from `open_analysis`.

        Args:
            file: the open file.
            inputs: the files that it is the analysis of.
            warn: called with a message for damaged solutions.
        """
        self.layers = inputs.layout.layers
        self.contrasts = inputs.contrasts
        self._file = file
        self._solutions = solutions_path(file.path)
        self._warn = warn
        keys = file.header.tensors.keys()
        checksums = file.tensor(CHECKSUMS) if CHECKSUMS in keys else None
        self._integrity = Integrity(file.path, keys - {CHECKSUMS}, checksums)

    @property
    def grams(self) -> Tensor:  # (layers, d + 1, d + 1), float64
        """The inner products of every layer's slices and, last, the base's rounding error."""
        return self._tensor("grams")

    @property
    def weights(self) -> Tensor:  # (layers,), float64
        """The squared norm of the average in every layer."""
        return self._tensor("weights")

    @property
    def not_carried(self) -> dict[str, Tensor]:  # kind -> (k,), float64
        """The energies outside of all layers, by kind and checkpoint."""
        return dict(zip(UNCARRIED_KINDS, self._tensor("not_carried"), strict=True))

    @property
    def spectra(self) -> list[Spectra]:
        """The spectra of every layer."""
        names = ("rows", "columns", "private")
        return [
            Spectra(*(self._tensor(f"{i}.{name}") for name in names))
            for i in range(len(self.layers))
        ]

    def core(self, index: int) -> Tensor:  # (d, p, q), float32
        """Returns a layer's core, a view of the file."""
        return self._tensor(f"{index}.core")

    def rounding(self, index: int) -> Tensor:  # (p, q), float32
        """Returns the average's rounding error in a layer's bases."""
        return self._tensor(f"{index}.rounding").float()

    def bases(self, index: int) -> tuple[Tensor, Tensor]:  # (m, p), (n, q), float32
        """Returns a layer's bases."""
        left, right = self._tensor(f"{index}.left"), self._tensor(f"{index}.right")
        return left.float(), right.float()

    def core_shape(self, index: int) -> tuple[int, int]:  # p, q
        """Returns the sides of a layer's core, without reading it."""
        p, q = self._file.header.tensors[f"{index}.rounding"].shape
        return p, q

    def earlier_solutions(self, name: str, group: str) -> list[Tensor]:  # each (d, R), float64
        """Returns multipliers that were solved for with other settings before these: good starts.

        Later ones are left out, so that the same settings give the same result again.

        Args:
            name: name of the settings.
            group: name of the group of layers.
        """
        solutions = list(self._read_solutions().items())
        names = [known for known, _ in solutions]
        before = solutions[: names.index(name)] if name in names else solutions
        matrices = [groups[group] for _, groups in before if group in groups]
        return [torch.tensor(rows, dtype=torch.float64) for rows in matrices[-_NEWEST:]]

    def remember(
        self,
        name: str,
        multipliers: Mapping[str, Tensor],  # by group of layers: (d, R)
    ) -> None:
        """Keeps the first solution's multipliers of these settings for later settings."""
        with alone(self._solutions):
            solutions = self._read_solutions()
            solutions.setdefault(
                name, {group: rows.tolist() for group, rows in multipliers.items()}
            )
            write_solutions(self._solutions, solutions, self._warn)

    def _read_solutions(self) -> Solutions:
        """Returns all solutions by their settings; none where the file is missing or damaged."""
        return read_solutions(self._solutions, self.contrasts.dimensions, self._warn)

    def _tensor(self, key: str) -> Tensor:
        """Returns a tensor as it was written.

        Raises:
            DamagedCacheError: it is damaged, or the file is gone by now.
        """
        try:
            tensor = self._file.tensor(key)
        except CheckpointError as error:
            if self._file.path.exists():
                raise
            raise DamagedCacheError(self._file.path, "it was removed") from error
        self._integrity.require(key, tensor)
        return tensor


@contextmanager
def open_analysis(
    path: Path, inputs: MergeInputs, warn: Callable[[str], None] = lambda _message: None
) -> Iterator[Analysis]:
    """Opens an analysis for reading within the block.

    Args:
        path: a file that `find_analysis` returned or `create_analysis` wrote.
        inputs: the files that it is the analysis of.
        warn: called with a message if the analysis's solutions are damaged.

    Raises:
        DamagedCacheError: the file cannot be read, or is no analysis of the inputs.
    """
    with ExitStack() as stack:
        stack.enter_context(in_use(path))
        try:
            file = patiently(
                lambda: stack.enter_context(CheckpointReader(path, replaced_whole=True))
            )
        except CheckpointError as error:
            raise DamagedCacheError(path, str(error)) from error
        fault = _fault(file.header, inputs)
        if fault:
            raise DamagedCacheError(path, fault)
        yield Analysis(file, inputs, warn)


def fault_of(path: Path, inputs: MergeInputs) -> str | None:
    """Returns what is wrong with an analysis of the inputs by its header; None if nothing is."""
    try:
        return _fault(patiently(lambda: read_header(path)), inputs)
    except CheckpointError as error:
        return str(error)


class AnalysisWriter:
    """Writes an analysis layer by layer during the pass."""

    def __init__(self, writer: SafetensorsWriter, tensors: Mapping[str, TensorInfo]) -> None:
        """Takes the open writer of `create_analysis`, and the tensors that it was declared with."""
        self._tensors = tensors
        self._checksums: dict[str, int] = {}
        self._grams: dict[int, Tensor] = {}
        self._weights: dict[int, float] = {}
        self._writer = writer

    def keep(self, layer: LayerAnalysis) -> None:
        """Writes the analysis of one layer."""
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
            self._write(f"{layer.index}.{name}", tensor)

    def close_with(self, not_carried: Mapping[str, Tensor]) -> None:
        """Writes what is known only after the last tensor.

        Args:
            not_carried: energies (k,) outside of all layers, by kind.
        """
        indices = sorted(self._grams)
        grams = torch.stack([self._grams[index] for index in indices])
        weights = torch.tensor([self._weights[index] for index in indices], dtype=torch.float64)
        self._write("weights", weights)
        zeros = grams.new_zeros(next(iter(not_carried.values())).shape)
        self._write("grams", grams)
        self._write(
            "not_carried", torch.stack([not_carried.get(kind, zeros) for kind in UNCARRIED_KINDS])
        )
        checksums = [self._checksums[key] for key in sorted(self._checksums)]
        self._writer.write(CHECKSUMS, torch.tensor(checksums, dtype=torch.int64))

    def _write(self, key: str, tensor: Tensor) -> None:
        stored = tensor.detach().to("cpu", self._tensors[key].dtype)
        self._checksums[key] = checksum(stored)
        self._writer.write(key, stored)


@contextmanager
def create_analysis(
    path: Path, inputs: MergeInputs, options: PassOptions
) -> Iterator[AnalysisWriter]:
    """Opens a new analysis for writing; the file appears when the block is left without an error.

    Where another process has written the same analysis in the meantime, that one stays: it may be in use.

    Args:
        path: path of the file.
        inputs: the files that it is the analysis of.
        options: the options of the pass.

    Raises:
        OutputError: the file cannot be written.
    """
    about = json.dumps({"width": options.width, **analysis_identity(inputs, options.seed)})
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    tensors = analysis_tensors(inputs, options)
    with claimed(path.parent) as owner:
        file = SafetensorsWriter(path, tensors, {_ABOUT: about}, deferred=True, owner=owner)
        with file as writer:
            yield AnalysisWriter(writer, tensors)
        _put(writer.staged, inputs)


def _put(staged: StagedFile, inputs: MergeInputs) -> None:
    try:
        if fault_of(staged.path, inputs) is not None:
            staged.commit()
    except OutputError:
        if fault_of(staged.path, inputs) is not None:
            raise
    finally:
        staged.discard()


def solutions_path(analysis: Path) -> Path:
    """Returns the path of an analysis's solutions."""
    return analysis.with_name(analysis.name.removesuffix(SUFFIX) + SOLUTIONS)


def _fault(header: Header, inputs: MergeInputs) -> str | None:
    """Returns what is wrong with an analysis of the inputs by its header; None if nothing is."""
    sides = [
        header.tensors.get(f"{index}.rounding", TensorInfo(ROUNDING_DTYPE, ())).shape
        for index in range(len(inputs.layout.layers))
    ]
    widths = tuple(max(shape, default=0) for shape in sides)
    expected = analysis_tensors(inputs, PassOptions(torch.device("cpu"), widths=widths))
    tensors = {CHECKSUMS: expected[CHECKSUMS], **header.tensors}  # earlier versions have none
    if tensors != expected:
        wrong = next((key for key in expected if tensors.get(key) != expected[key]), None)
        return f"its tensor {wrong} is missing or another" if wrong else "it has more tensors"
    if not is_named_after(header.name, header.metadata.get(_ABOUT, "")):
        return "it is the analysis of other files or settings"
    return None
