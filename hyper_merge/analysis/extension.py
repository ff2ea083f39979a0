"""Passes over further checkpoints alone, and extends an analysis and an average that are there by them.

Layers, which are nearly all of a file, are read of the new checkpoints and of the old average; of the old
checkpoints only a sample, and what no LoRA carries where its average changes. It is an `AnalyzeTensors`
that takes the place of the pass over all files, and gives the same kinds of results.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.basis_widths import (
    LayerSamples,
    options_by,
    sample,
    sample_layers,
    sample_segments,
)
from hyper_merge.analysis.damaged_tensors import Damage, DamagedTensors
from hyper_merge.analysis.device_bytes import host_bytes, pass_bytes
from hyper_merge.analysis.inputs import MergeInputs, open_checkpoints
from hyper_merge.analysis.layer_analysis import LayerAnalysis, describe_layer
from hyper_merge.analysis.loss_weights import layer_factors
from hyper_merge.analysis.store import StoredAnalysis, open_analysis
from hyper_merge.analysis.streaming_pass import (
    AnalyzedTensor,
    AnalyzeTensors,
    PassOptions,
    TensorAnalysis,
    analyze_tensor,
    raise_non_finite,
)
from hyper_merge.checkpoints.architectures.layout import Treatment, kind_of_tensor
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.contrasts import compute_deviations, energies
from hyper_merge.decomposition.extension import (
    Extension,
    FreshDeviations,
    KnownLayer,
    NewBases,
    extend_layer,
    fresh_deviations,
    rest_slopes,
    rounding_bound,
    unexplained,
)
from hyper_merge.decomposition.linalg import energy_of, squared_norm
from hyper_merge.runtime.devices import try_device
from hyper_merge.runtime.parallel import MemoryLimit, parallel_map
from hyper_merge.runtime.progress import Progress, ProgressCounter

_Rows = slice | EllipsisType

MOST_WRONG: Final = 0.01
"""Share of all squared deviations by which their sum may be wrong, for the rounding of the old average."""

MOST_UNKNOWN: Final = 0.35
"""Share of the old squared deviations that may lie outside of what the old analysis knows."""


@dataclass(frozen=True, eq=False)
class EarlierAnalysis:
    """An analysis of the first of some inputs, with their average.

    Attributes:
        inputs: The old ones, with the settings of the new ones.
        path: Of the analysis.
        average: Header of the file that its deviations are from: the average, or the given base.
        samples: Of all inputs, old and new ones.
    """

    inputs: MergeInputs
    path: Path
    average: Header
    samples: LayerSamples

    def pass_options(self, inputs: MergeInputs, options: PassOptions) -> PassOptions:
        """Returns the options of a pass over all inputs, with the widths of all layers."""
        return options_by(self.samples, inputs, options)


@dataclass(frozen=True)
class ExtensionLimits:
    """How exact an extended analysis can be.

    Attributes:
        wrong: Share of the sum of all squared deviations by which this can be wrong at most, for what
            the rounding of the old average hides.
        unknown: Share of the old squared deviations that lies outside of what the old analysis knows.
    """

    wrong: float
    unknown: float

    @property
    def refusal(self) -> str | None:
        """Why everything must be read instead; None if that is not needed."""
        if self.wrong > MOST_WRONG:
            return (
                f"the old average is rounded so that deviations could be wrong by {self.wrong:.1%},"
                f" more than {MOST_WRONG:.0%}"
            )
        if self.unknown > MOST_UNKNOWN:
            return (
                f"{self.unknown:.0%} of the old deviations lie outside of what the cache has of them,"
                f" more than {MOST_UNKNOWN:.0%}"
            )
        return None


def sample_all(inputs: MergeInputs, progress: Progress) -> LayerSamples:
    """Returns samples of old and new inputs, of which nothing is read ahead."""
    return sample_layers(inputs, progress, sparse=True)


def limits_of(earlier: EarlierAnalysis, inputs: MergeInputs, progress: Progress) -> ExtensionLimits:
    """Returns how exact an extension to more inputs can be.

    Args:
        earlier: of the first inputs.
        inputs: all of them, in the same order.
        progress: checked between layers.

    Raises:
        DamagedCacheError: the analysis is damaged.
    """
    layers = inputs.layout.layers
    factors = layer_factors("output", earlier.samples.sizes, layers).tolist()
    wrong = total = unknown = known = 0.0
    with open_analysis(earlier.path, earlier.inputs) as analysis:
        triples = zip(layers, factors, analysis.grams, strict=True)
        for index, (layer, factor, gram) in enumerate(triples):
            progress.check()
            extension = _extension(earlier.inputs, inputs, layer.key)
            deviations = inputs.contrasts_of(layer.key).to_deviations
            products = deviations @ earlier.samples.grams[index] @ deviations.mT
            hidden = _hidden_rounding(analysis, index, gram)
            fresh = _distances(products, extension, earlier, layer.key)
            wrong += factor * rounding_bound(hidden, fresh, extension)
            total += factor * float(products.trace())
            slices = float(gram.diagonal()[:-1].sum())
            unknown += factor * max(slices - energy_of(analysis.core(index).flatten(0, 1)), 0.0)
            known += factor * slices
    return ExtensionLimits(wrong / (total or 1.0), unknown / (known or 1.0))


def extend_analysis(earlier: EarlierAnalysis, written: Header | None) -> AnalyzeTensors:
    """Returns what analyses the tensors of a pass from an earlier analysis and the new inputs.

    Args:
        earlier: of the first inputs.
        written: header of the new average, where it was written before; None to compute it.
    """

    @contextmanager
    def analyze(
        inputs: MergeInputs,
        options: PassOptions,
        costs: Mapping[str, float],
        counter: ProgressCounter,
    ) -> Iterator[Iterator[AnalyzedTensor]]:
        memory, on_host = MemoryLimit(options.in_flight), options.device.type == "cpu"
        with ExitStack() as stack:
            job = _open_job(stack, earlier, inputs, options, written, costs)
            parallel = stack.enter_context(parallel_map(options.device, counter.report))
            stack.enter_context(counter)

            def extend(key: str) -> AnalyzedTensor:
                nbytes = host_bytes(inputs, key, options.width_of) if on_host else 0
                with memory.holding(nbytes):
                    return job.analyze(key, counter)

            yield parallel(extend, costs)

    return analyze


def _extension(old: MergeInputs, new: MergeInputs, key: str) -> Extension:
    return Extension.of(old.contrasts_of(key), new.contrasts_of(key))


def _hidden_rounding(analysis: StoredAnalysis, index: int, gram: Tensor) -> float:
    """Returns the squared norm of what is not known of the average's rounding error in a layer."""
    known = float(analysis.rounding(index).double().square().sum())
    return max(float(gram[-1, -1]) - known, 0.0)


def _distances(
    products: Tensor,  # (k + n, k + n), float64: inner products of all deviations, estimated
    extension: Extension,
    earlier: EarlierAnalysis,
    key: str,
) -> Tensor:  # (n,), float64
    """Returns the new inputs' squared distances from the old average."""
    old = earlier.inputs.contrasts_of(key)
    count, new = old.count, len(extension.shares)
    rows = torch.zeros(new, count + new, dtype=torch.float64)
    rows[:, count:] = torch.eye(new)
    if earlier.inputs.base is None:
        rows[:, 1:count] -= old.base_weights
        rows[:, 0] -= 1.0 - old.base_weights.sum()
    return ((rows @ products) * rows).sum(1).clamp(min=0)


def _open_job(
    stack: ExitStack,
    earlier: EarlierAnalysis,
    inputs: MergeInputs,
    options: PassOptions,
    written: Header | None,
    costs: Mapping[str, float],
) -> _ExtensionJob:
    """Opens all files that an extension reads, until the stack is left."""
    count = len(earlier.inputs.headers)
    analysis = stack.enter_context(open_analysis(earlier.path, earlier.inputs))
    (average,) = stack.enter_context(open_checkpoints([earlier.average]))
    first: dict[str, str] = {}
    for key in costs:
        first.setdefault(kind_of_tensor(key, inputs.layout), key)
    return _ExtensionJob(
        earlier,
        inputs,
        options,
        analysis,
        average,
        news=stack.enter_context(open_checkpoints(inputs.headers[count:])),
        sampled=stack.enter_context(open_checkpoints(earlier.inputs.read, sparse=True)),
        whole=stack.enter_context(open_checkpoints(inputs.read, mapped=False)),
        written=next(iter(stack.enter_context(open_checkpoints([written]))), None)
        if written
        else None,
        costs=costs,
        first=first,
        grams=analysis.grams,
        damaged=DamagedTensors(inputs),
    )


@dataclass(frozen=True, eq=False)
class _ExtensionJob:
    """The open files of an extension; its methods may be called in several threads."""

    earlier: EarlierAnalysis
    inputs: MergeInputs
    options: PassOptions
    analysis: StoredAnalysis
    average: CheckpointReader  # the old one
    news: Sequence[CheckpointReader]
    sampled: Sequence[CheckpointReader]  # old ones, for small parts
    whole: Sequence[CheckpointReader]  # all of them, for whole small tensors
    written: CheckpointReader | None  # the new average, where it was written before
    costs: Mapping[str, float]
    first: Mapping[str, str]  # kind -> its first tensor
    grams: Tensor  # (layers, d + 1, d + 1), of the old analysis
    damaged: DamagedTensors
    lock: threading.Lock = field(default_factory=threading.Lock)  # of what is read piece by piece

    def analyze(self, key: str, counter: ProgressCounter) -> AnalyzedTensor:
        """Returns the analysis of a tensor of all inputs, and what of it looks damaged."""
        extension = _extension(self.earlier.inputs, self.inputs, key)
        if self.inputs.layout.treatments[key] is Treatment.LAYER:
            counter.add(key, 0.0)
            return self._extended(key, extension), ()
        if not bool(extension.shares.any()):
            return self._unchanged(key), ()
        return self._read_again(key, partial(counter.add, key))

    def _read_again(
        self, key: str, tick: partial[None]
    ) -> tuple[TensorAnalysis, tuple[Damage, ...]]:
        """Analyses a tensor of which the cache has too little from all files."""
        with self.lock:
            tensors = [file.tensor(key) for file in self.whole]
        damages = self.damaged.find(key, tensors)
        options = PassOptions(self.options.device, self.options.seed)
        return analyze_tensor(self.inputs, key, tensors, options, tick), damages

    def _unchanged(self, key: str) -> TensorAnalysis:
        """Analyses a tensor whose average, or base, does not depend on the new inputs."""
        average = self.average.tensor(key)
        kind = kind_of_tensor(key, self.inputs.layout)
        squares = torch.zeros(len(self.inputs.headers), dtype=torch.float64)
        old = len(self.earlier.inputs.headers)
        if self.first[kind] == key:  # of the old ones the sum over all tensors of the kind is known
            squares[:old] = self.analysis.not_carried[kind]
        news = [file.tensor(key) for file in self.news]
        for place, tensor in enumerate(news, old):
            squares[place] = squared_norm(tensor.float().flatten() - average.float().flatten())
        self._require_finite(key, squares, news)
        return TensorAnalysis(average, squares, ())

    def _extended(self, key: str, extension: Extension) -> TensorAnalysis:
        """Analyses a tensor that has layers; where the device cannot do it the CPU takes it."""
        failures: list[str] = []
        nbytes = pass_bytes(self.inputs, key, self.options.width or 0, 2**22)
        work = partial(self._extended_on, key, extension)
        result = try_device(self.options.device, work, nbytes, failures.append)
        warnings = [f"{failure} for some layers; the CPU took them" for failure in failures]
        return replace(result, warning=next(iter(warnings), None))

    def _extended_on(self, key: str, extension: Extension, device: torch.device) -> TensorAnalysis:
        average = self.average.tensor(key)
        news = [file.tensor(key) for file in self.news]
        averages, layers = [], []
        total = torch.zeros(len(self.inputs.headers), dtype=torch.float64)
        for rows, index in self.inputs.pieces(key):
            if index is None:
                raise RuntimeError(f"{key} has rows outside of its layers")
            layer, base = self._layer(rows, index, average, news, extension, device)
            averages.append(base.cpu())
            layers.append(layer)
            total += energies(layer.gram, self.inputs.contrasts)
        return TensorAnalysis(torch.cat(averages).view(average.shape), total, tuple(layers))

    def _layer(
        self,
        rows: _Rows,
        index: int,
        average: Tensor,
        news: Sequence[Tensor],
        extension: Extension,
        device: torch.device,
    ) -> tuple[LayerAnalysis, Tensor]:
        """Returns the analysis of a layer, and the average's rows in it."""
        inputs, layer = self.inputs, self.inputs.layout.layers[index]
        shape = layer.m, layer.n
        known = self._known(index, device)
        written = self.written.tensor(layer.key)[rows].reshape(shape) if self.written else None
        deviations = fresh_deviations(
            known,
            average[rows].reshape(shape),
            [tensor[rows].reshape(shape) for tensor in news],
            extension,
            average.dtype if inputs.base else inputs.dtype,
            written,
        )
        slopes = self._slopes(rows, index, known, deviations)
        contrasts, width = inputs.contrasts, self.options.width_of(index)
        few = contrasts.are_few
        bases = NewBases(width, None if few else contrasts.kept, self.options.directions)
        generator = torch.Generator().manual_seed(
            self.options.seed ^ zlib.crc32(layer.module.encode())
        )
        extended = extend_layer(known, deviations, slopes, extension, bases, generator)
        if not bool(extended.gram.isfinite().all()):
            self._require_finite(layer.key, extended.gram, news)
        analysis = describe_layer(
            index,
            extended.compressed,
            extended.directions,
            gram=extended.gram,
            rounding=extended.rounding,
            weight=squared_norm(deviations.base.flatten()),
        )
        return analysis, deviations.base

    def _known(self, index: int, device: torch.device) -> KnownLayer:
        left, right = self.analysis.bases(index)
        return KnownLayer(
            left,
            right,
            self.analysis.core(index),
            self.analysis.rounding(index),
            self.grams[index],
            is_whole=self.earlier.inputs.contrasts.are_few,
        ).to(device)

    def _slopes(
        self, rows: _Rows, index: int, known: KnownLayer, deviations: FreshDeviations
    ) -> Tensor:  # (d, n)
        """Returns how what is not known of the old slices follows the new inputs, from a sample."""
        if known.is_complete:
            return torch.zeros(len(known.core), len(deviations.fresh), dtype=torch.float64)
        layer, old = self.inputs.layout.layers[index], self.earlier.inputs
        origin, *others = [sample(file.tensor(layer.key)[rows].flatten()) for file in self.sampled]
        slices = compute_deviations(
            origin, others, old.contrasts_of(layer.key), torch.float32, origin.numel()
        ).slices
        segments = sample_segments(layer.m * layer.n)
        rest = slices - known.entries(known.core, segments).cpu()
        return rest_slopes(rest, unexplained(known, deviations, segments).cpu())

    def _require_finite(self, key: str, sums: Tensor, news: Sequence[Tensor]) -> None:
        """Returns if sums are finite; else raises the error that names the new file at fault."""
        if not bool(sums.isfinite().all()):
            headers = self.inputs.headers[-len(news) :]
            raise_non_finite(replace(self.inputs, headers=headers, base=None), key, news)
