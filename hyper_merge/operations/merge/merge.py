"""Runs a merge: a recipe in; hyper-model, LoRAs, multipliers and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from hyper_merge.analysis.basis_widths import sampled_options
from hyper_merge.analysis.cache import AnalysisKind, prune_analyses
from hyper_merge.analysis.extension import EarlierAnalysis, extend_analysis
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.remote_checks import require_workers
from hyper_merge.analysis.remote_pass import analyze_on
from hyper_merge.analysis.sensitivities import Sensitivities
from hyper_merge.analysis.store import create_analysis, open_analysis
from hyper_merge.analysis.strangers import find_strangers
from hyper_merge.analysis.streaming_pass import (
    AnalyzeTensors,
    PassOptions,
    analyze_in_threads,
    stream_layers,
)
from hyper_merge.analysis.turns import Turn, analysis_turn
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.loras.cards import stage_checkpoint_card
from hyper_merge.operations.merge.average import average_writer
from hyper_merge.operations.merge.carried_layers import choose_layers
from hyper_merge.operations.merge.cost_model import ExistingFiles
from hyper_merge.operations.merge.estimate import estimate_costs, require_room
from hyper_merge.operations.merge.file_overhead import FileOverhead
from hyper_merge.operations.merge.host_precision import measure_precision_loss
from hyper_merge.operations.merge.lineage import make_lineage
from hyper_merge.operations.merge.outputs import (
    MergeOutputs,
    named_topups,
    require_free_names,
    shared_names,
)
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.operations.merge.report_builder import make_report
from hyper_merge.operations.merge.solved_merge import SolvedMerge
from hyper_merge.operations.merge.solving import Search, solve_shared, with_private_loras
from hyper_merge.operations.merge.training import trained
from hyper_merge.runs.folders import Place
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runs.report import PrecisionLoss, Report
from hyper_merge.runtime.damaged_files import DamagedFiles, with_sound_cache
from hyper_merge.runtime.devices import device_job
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.remote import RemoteWorkers
from hyper_merge.solver.metric import Metric


@dataclass(frozen=True)
class MergeResult:
    """The files of a merge, and its report."""

    report: Report
    place: Place
    loras: tuple[Path, ...]  # with companions and private LoRAs
    reused_analysis: bool
    extended: bool = False  # an earlier analysis by the new checkpoints, without the others
    note: str = ""  # to the user, on how the files were made


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the analysis of a merge may come from.

    Attributes:
        earlier: An analysis of the first checkpoints, to be extended by the others; None for a pass over
            all files.
        reread: Whether to pass over all files even where the cache has an extended analysis.
    """

    earlier: EarlierAnalysis | None = None
    reread: bool = False

    def kind(self, damaged: DamagedFiles) -> AnalysisKind:
        """Returns which analyses of the cache will do, and which is to be made."""
        return AnalysisKind(exact=self.reread, extended=self.usable(damaged) is not None)

    def usable(self, damaged: DamagedFiles) -> EarlierAnalysis | None:
        """Returns the earlier analysis unless it has proved damaged."""
        return None if self.earlier is None or self.earlier.path in damaged else self.earlier


@dataclass(frozen=True, eq=False)
class Source:
    """What makes average and analysis where they are missing: this process, workers, or less work.

    Attributes:
        earlier: An analysis to be extended; None for a pass over all files.
        workers: Do that pass in place of this process; None for none.
    """

    earlier: EarlierAnalysis | None = None
    workers: RemoteWorkers | None = None

    def sampled_options(
        self, inputs: MergeInputs, options: PassOptions, progress: Progress
    ) -> PassOptions:
        """Returns the options with the widths of all layers, from a sample of all files."""
        if self.earlier:
            return self.earlier.pass_options(inputs, options)
        return sampled_options(inputs, options, progress)

    def analyze_tensors(
        self, cache: Path, written: Path | None, *, with_analysis: bool
    ) -> AnalyzeTensors:
        """Returns what analyses the tensors.

        Args:
            cache: folder for what workers find.
            written: the average, where it is there already.
            with_analysis: whether more than the average is wanted.
        """
        if self.earlier and with_analysis:
            return extend_analysis(self.earlier, read_header(written) if written else None)
        if self.workers:
            return analyze_on(self.workers, cache, with_average=written is None)
        return analyze_in_threads


def run_merge(
    preflight: Preflight,
    progress: Progress,
    *,
    start: Mapping[str, Tensor] = MappingProxyType({}),
    effort: SearchEffort | None = None,
    workers: RemoteWorkers | None = None,
    origin: Origin | None = None,
) -> MergeResult:
    """Makes everything that the recipe asks for; on any failure every existing file stays as it was.

    Args:
        preflight: the validated recipe.
        progress: progress and interrupt.
        start: additional starting multipliers (k, R) for the search, by the layers' part.
        effort: how thorough the search for a start is; None for the default.
        workers: hash the checkpoints and pass over them in place of this process.
        origin: where the analysis may come from; None for any that is there, or a pass over all files.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    search = Search(start=start, effort=effort)
    merge = partial(_merge, preflight, progress, search, workers, origin or Origin())
    with device_job(preflight.pass_options.device):
        return with_sound_cache(merge, progress.warn)


def _merge(
    preflight: Preflight,
    progress: Progress,
    search: Search,
    workers: RemoteWorkers | None,
    origin: Origin,
    damaged: DamagedFiles,
) -> MergeResult:
    """Runs a merge once with all its names held, without the damaged files of the cache."""
    recipe, folders = preflight.recipe, preflight.folders
    with held(folders.runs, Hold("merge", recipe.name)):
        place = preflight.find_place()
        model = Hold("model", place.hyper_model.name, shared=place.exists)
        with held(folders.runs, Hold("run", place.run), model):
            if not recipe.finds_ranks:
                names = shared_names(preflight, place)
                require_free_names(place, names, folders, overwrite=recipe.overwrite)
            require_room(preflight, place, with_shards=workers is not None)
            inputs, options = preflight.inputs, preflight.pass_options
            if workers:
                require_workers(workers, inputs, options, folders.cache)
            with analysis_turn(
                folders.cache,
                inputs,
                options,
                recipe.ranks,
                damaged,
                progress,
                origin.kind(damaged),
            ) as turn:
                source = Source(None if turn.exists else origin.usable(damaged), workers)
                result = _make_files(preflight, place, turn, progress, search, source)
    prune_analyses(folders.cache, folders.cache_limit)
    return result


def _make_files(
    preflight: Preflight,
    place: Place,
    turn: Turn,
    progress: Progress,
    search: Search,
    source: Source,
) -> MergeResult:
    """Makes all files, from an analysis that exists or is made on the way."""
    recipe = preflight.recipe
    costs = estimate_costs(
        preflight,
        ExistingFiles(
            preflight.folders.cache,
            average=place.exists,
            analysis=turn.exists,
            sensitivities=preflight.is_network_known,
        ),
    )
    hashing, reading, running, solving, training, writing = progress.split(
        (
            costs.hashing,
            costs.reading,
            costs.running,
            costs.solving + costs.rounding,
            costs.training,
            costs.writing,
        )
    )
    with FileTransaction(overwrite=recipe.overwrite) as transaction:
        lineage = make_lineage(preflight, place.hyper_model.stem, hashing, source.workers)
        outputs = MergeOutputs(transaction, place, lineage)
        _stream(preflight, outputs, None if turn.exists else turn.path, reading, source)
        turn.end_making()
        sensitivities = _sensitivities(preflight, outputs, running)
        with open_analysis(
            turn.path,
            preflight.inputs,
            progress.warn,
            sensitivities,
            source.workers,
            preflight.limits.resident,
        ) as all_layers:
            models = [header.name for header in preflight.inputs.headers]
            for warning in find_strangers(all_layers, models):
                progress.warn(warning)
            metric, preflight = choose_layers(all_layers, preflight, solving)
            overhead = FileOverhead(
                recipe, preflight.inputs, preflight.norms_and_biases, lineage, place.run
            )
            search = replace(search, costs=(costs.solving, costs.rounding))
            solved = solve_shared(metric, preflight, overhead, search, solving)
            if preflight.rounds:
                with _average(outputs) as average:
                    solved = trained(metric, preflight, solved, average, training)
            adding, writing = writing.split((1.0 if recipe.topup else 0.0, 1.0))
            solved = with_private_loras(metric, solved, overhead, adding)
            preflight = replace(preflight, recipe=solved.plan.recipe)
            lineage = replace(lineage, recipe=preflight.recipe.to_metadata())
            outputs = replace(outputs, lineage=lineage)  # with the ranks that a search has found
            report, names = _write(outputs, preflight, metric, solved, writing)
        outputs.stage_texts(preflight, report)
        progress.report("putting the files in place", 1.0)
    paths = tuple(outputs.lora_path(name) for name in names)
    return MergeResult(report, place, paths, turn.exists, source.earlier is not None)


def _stream(
    preflight: Preflight,
    outputs: MergeOutputs,
    analysis_path: Path | None,
    progress: Progress,
    source: Source,
) -> None:
    """Passes over the files for what does not exist yet: average, analysis, both or neither.

    Args:
        preflight: the validated recipe.
        outputs: the merge's files.
        analysis_path: where the analysis goes; None if there is one.
        progress: progress and interrupt.
        source: where the analysis comes from.
    """
    inputs, options, place = preflight.inputs, preflight.pass_options, outputs.place
    transaction, lineage, model = outputs.transaction, outputs.lineage, place.hyper_model
    if place.exists and analysis_path is None:
        return
    with ExitStack() as stack:
        analysis = average = None
        if analysis_path is None:
            options = replace(options, width=None)
        else:
            options = source.sampled_options(inputs, options, progress)
            analysis = stack.enter_context(create_analysis(analysis_path, inputs, options))
        if not place.exists:
            overwrite = preflight.recipe.overwrite
            stage_checkpoint_card(transaction, model, lineage, overwrite=overwrite)
            average = stack.enter_context(average_writer(transaction, model, preflight, lineage))
        write_average = average.write if average else None
        keep_layer = analysis.keep if analysis else None
        cache, written = preflight.folders.cache, model if place.exists else None
        analyze = source.analyze_tensors(cache, written, with_analysis=analysis is not None)
        not_carried = stream_layers(inputs, options, write_average, keep_layer, progress, analyze)
        if analysis:
            analysis.close_with(not_carried)


def _write(
    outputs: MergeOutputs,
    preflight: Preflight,
    metric: Metric,
    solved: SolvedMerge,
    progress: Progress,
) -> tuple[Report, tuple[str, ...]]:
    """Stages all LoRAs; returns the report, and the names of the LoRAs."""
    recipe, folders, place = preflight.recipe, preflight.folders, outputs.place
    private = outputs.named_private_loras(preflight, solved)
    shared = shared_names(preflight, place, solved)
    names = (*shared, *private)
    require_free_names(place, names, folders, overwrite=recipe.overwrite)
    if recipe.overwrite:
        outputs.remove_outdated(folders, names)
    files = outputs.lora_files(preflight, solved)
    outputs.stage_loras(preflight, files, solved, progress)
    recovered = outputs.stage_companions(preflight, files, solved, progress)
    outputs.stage_private_loras(preflight, solved)
    checkpoints = [header.stem for header in preflight.inputs.headers]
    sizes = outputs.file_sizes(preflight, names)
    report = make_report(metric, solved, place.run, tuple(files), checkpoints, sizes)
    topups = named_topups(outputs.transaction, place.loras, private)
    rows = tuple(replace(row, topup=topups.get(row.name, "")) for row in report.checkpoints)
    report = replace(
        report,
        checkpoints=rows,
        companions=shared[len(files) :],
        recovered=recovered,
        ends=preflight.ends,
        rounding=_host_precision(outputs, preflight, solved, progress),
    )
    return report, names


def _host_precision(
    outputs: MergeOutputs, preflight: Preflight, solved: SolvedMerge, progress: Progress
) -> tuple[PrecisionLoss, ...]:
    """Returns the loss that rounding adds in the programs that use the files."""
    layout, energies = preflight.inputs.layout, solved.evaluation.energies.sum(0)
    with _average(outputs) as average:
        return measure_precision_loss(
            average,
            layout.family,
            layout.layers,
            solved.host_loras(),
            energies,
            check=progress.check,
        )


def _sensitivities(
    preflight: Preflight, outputs: MergeOutputs, progress: Progress
) -> Sensitivities | None:
    if preflight.network is None:
        return None
    with _average(outputs) as average:
        device = preflight.pass_options.device
        return preflight.network.sensitivities(average, device, progress)


@contextmanager
def _average(outputs: MergeOutputs) -> Iterator[Callable[[str], Tensor]]:
    """Gives a function that returns the tensors of the hyper-model by key, also of a staged one."""
    path = outputs.place.hyper_model
    if not outputs.place.exists:
        with outputs.transaction.reading(path) as tensor:
            yield tensor
        return
    with CheckpointReader(path) as file:
        yield file.tensor
