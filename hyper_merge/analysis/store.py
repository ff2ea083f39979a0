"""Writes and reads an analysis on disk, which later lists of ranks use instead of the checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from hyper_merge.analysis.checksums import CHECKSUMS, Integrity, is_named_after
from hyper_merge.analysis.contents import Analysis
from hyper_merge.analysis.file_layout import (
    OTHER_WEIGHTS,
    ROUNDING_DTYPE,
    UNCARRIED_KINDS,
    analysis_identity,
    analysis_tensors,
)
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.remote_maps import RemoteMaps, open_maps
from hyper_merge.analysis.sensitivities import Sensitivities
from hyper_merge.analysis.solutions import Solutions, read_solutions, write_solutions
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.analysis.use_markers import in_use
from hyper_merge.analysis.writer import AnalysisWriter
from hyper_merge.checkpoints.io.atomic_file import StagedFile
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.checkpoints.io.leftovers import claimed
from hyper_merge.checkpoints.io.output_errors import as_output_error
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.decomposition.contrasts import energies
from hyper_merge.errors import CheckpointError, DamagedCacheError, OutputError
from hyper_merge.runtime.file_lock import alone, patiently
from hyper_merge.runtime.parallel import LayerMaps
from hyper_merge.runtime.parcels import SentOnce
from hyper_merge.runtime.remote import RemoteWorkers
from hyper_merge.runtime.scratch import RESIDENT, Scratch

if TYPE_CHECKING:
    from typing_extensions import Self

SUFFIX: Final = ".analysis.safetensors"
SOLUTIONS: Final = ".solutions.json"  # suffix of the file with an analysis's solutions

_NEWEST: Final = 4  # earlier solutions that are tried
_ABOUT: Final = "hyper_merge.analysis"
# Spectra of the layers in files of earlier versions; nobody reads them.
_EARLIER_SPECTRA: Final = (".rows", ".columns", ".private")


class StoredAnalysis(Analysis, SentOnce):
    """An analysis in its open file: cores and bases stay mapped.

    Every tensor is checked when it is first read; a damaged one raises `DamagedCacheError`.
    """

    def __init__(
        self,
        file: CheckpointReader,
        inputs: MergeInputs,
        warn: Callable[[str], None],
        scratch: Scratch,
        sensitivities: Sensitivities | None = None,
        remote_maps: RemoteMaps | None = None,
    ) -> None:
        """Takes the open file from `open_analysis`.

        Args:
            file: the open file.
            inputs: the files that it is the analysis of.
            warn: called with a message for damaged solutions.
            scratch: takes what is computed from it and needed later.
            sensitivities: the network's, by module, where a run of it measured them.
            remote_maps: over layers on workers; None for this process.
        """
        self.layers = inputs.layout.layers
        self.sensitivities = sensitivities
        self.scratch = scratch
        self._places: list[int] = list(range(len(self.layers)))  # of the layers in the file
        self.contrasts = inputs.contrasts
        self._file = file
        self._solutions = solutions_path(file.path)
        self._warn = warn
        self._remote_maps = remote_maps
        self._integrity = _integrity_of(file)

    def sent(self) -> dict[str, Any]:
        """Returns what a worker needs: it reads the file itself, piece by piece."""
        return {
            "layers": self.layers,
            "contrasts": self.contrasts,
            "scratch": self.scratch,
            "_places": self._places,
            "_file": self._file.path.absolute(),
        }

    @classmethod
    def received(cls, attributes: dict[str, Any]) -> Self:
        """Returns the analysis on a worker, where it has cores and bases alone.

        Raises:
            DamagedCacheError: the file cannot be read.
        """
        # Not mapped: what a process has mapped counts as its memory, and workers may take little.
        file = CheckpointReader(attributes["_file"], replaced_whole=True, mapped=False)
        try:
            file.__enter__()  # until the analysis is forgotten
        except CheckpointError as error:
            raise DamagedCacheError(file.path, str(error)) from error
        return super().received({**attributes, "_file": file, "_integrity": _integrity_of(file)})

    @contextmanager
    def maps(
        self, device: torch.device, check: Callable[[], None], work: str
    ) -> Iterator[LayerMaps]:
        """Gives maps over layers (see `Analysis`): on workers, if there are any and the CPU does the work."""
        if self._remote_maps is None or device.type != "cpu":
            with super().maps(device, check, work) as maps:
                yield maps
        else:
            with self._remote_maps.open(check, work) as maps:
                yield maps

    def without_ends(self) -> StoredAnalysis:
        """Returns the analysis of a layout whose layers at the ends are averaged only."""
        view = copy.copy(self)
        kept = [place for place, layer in enumerate(self.layers) if not layer.is_end]
        view.layers = tuple(self.layers[place] for place in kept)
        view._places = [self._places[place] for place in kept]
        return view

    @property
    def grams(self) -> Tensor:  # (layers, d + 1, d + 1), float64
        """The inner products of every layer's slices and, last, the base's rounding error."""
        return self._tensor("grams")[self._places]

    @property
    def weights(self) -> Tensor:  # (layers,), float64
        """The squared norm of the average in every layer."""
        return self._tensor("weights")[self._places]

    @property
    def not_carried(self) -> dict[str, Tensor]:  # kind -> (k,), float64
        """The energies outside of all layers, by kind and checkpoint."""
        outside = dict(zip(UNCARRIED_KINDS, self._tensor("not_carried"), strict=True))
        everything = self._tensor("grams")
        left_out = sorted(set(range(len(everything))) - set(self._places))
        outside[OTHER_WEIGHTS] = outside[OTHER_WEIGHTS] + sum(
            energies(everything[place], self.contrasts) for place in left_out
        )
        return outside

    def core(self, index: int) -> Tensor:  # (d, p, q), float32
        """Returns a layer's core: a view of the file, or of many checkpoints what it keeps of them."""
        place = self._places[index]
        core = self._tensor(f"{place}.core")
        if self.contrasts.are_few:
            return core
        scaled = self._tensor(f"{place}.directions").float() * self._tensor(f"{place}.scales")
        return (scaled @ core.float().flatten(1)).view(-1, *core.shape[1:])

    def rounding(self, index: int) -> Tensor:  # (p, q), float32
        """Returns the average's rounding error in a layer's bases."""
        return self._tensor(f"{self._places[index]}.rounding").float()

    def bases(self, index: int) -> tuple[Tensor, Tensor]:  # (m, p), (n, q), float32
        """Returns a layer's bases."""
        place = self._places[index]
        return self._tensor(f"{place}.left").float(), self._tensor(f"{place}.right").float()

    def core_shape(self, index: int) -> tuple[int, int]:  # p, q
        """Returns the sides of a layer's core, without reading it."""
        p, q = self._file.header.tensors[f"{self._places[index]}.rounding"].shape
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
    path: Path,
    inputs: MergeInputs,
    warn: Callable[[str], None] = lambda _message: None,
    sensitivities: Sensitivities | None = None,
    workers: RemoteWorkers | None = None,
    resident: int = RESIDENT,
) -> Iterator[StoredAnalysis]:
    """Opens an analysis for reading within the block.

    Args:
        path: a file that `find_analysis` returned or `create_analysis` wrote.
        inputs: the files that it is the analysis of.
        warn: called with a message if the analysis's solutions are damaged.
        sensitivities: the network's, by module, where a run of it measured them.
        workers: which see the file; None for work in this process.
        resident: bytes that what is computed from it takes of the memory before it goes to a file.

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
        scratch = Scratch(path.parent, resident)
        stack.callback(scratch.close)
        maps = stack.enter_context(open_maps(workers, path.parent)) if workers else None
        yield StoredAnalysis(file, inputs, warn, scratch, sensitivities, maps)


def _integrity_of(file: CheckpointReader) -> Integrity:
    keys = file.header.tensors.keys()
    checksums = file.tensor(CHECKSUMS) if CHECKSUMS in keys else None
    return Integrity(file.path, keys - {CHECKSUMS}, checksums)


def fault_of(path: Path, inputs: MergeInputs) -> str | None:
    """Returns what is wrong with an analysis of the inputs by its header; None if nothing is."""
    try:
        return _fault(patiently(lambda: read_header(path)), inputs)
    except CheckpointError as error:
        return str(error)


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
    tensors = {
        key: info for key, info in header.tensors.items() if not key.endswith(_EARLIER_SPECTRA)
    }
    every = header.tensors.keys() - {CHECKSUMS}
    expected[CHECKSUMS] = TensorInfo(expected[CHECKSUMS].dtype, (len(every),))
    tensors.setdefault(CHECKSUMS, expected[CHECKSUMS])  # the first versions had none
    if tensors != expected:
        wrong = next((key for key in expected if tensors.get(key) != expected[key]), None)
        return f"its tensor {wrong} is missing or another" if wrong else "it has more tensors"
    if not is_named_after(header.name, header.metadata.get(_ABOUT, "")):
        return "it is the analysis of other files or settings"
    return None
