"""What reads each kind of file, and uses all that it read, as commands, API and tab do."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from tiny_family import merge

from fuzzing.hostile_json import TEXTS
from fuzzing.workshop import Workshop
from hyper_merge.analysis.cache import cache_bytes, clear_analyses, prune_analyses
from hyper_merge.analysis.sensitivities import read_sensitivities
from hyper_merge.analysis.store import open_analysis
from hyper_merge.api.serialize import run_response, run_summary_response
from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.families.sd2 import SD2
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.leftovers import remove_leftovers
from hyper_merge.checkpoints.io.temporary_names import owner_of
from hyper_merge.checkpoints.prediction_type import v_prediction_config, with_prediction_type
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.errors import HyperMergeError
from hyper_merge.loras.stack import LoraStack
from hyper_merge.operations.compare.records import comparison_names
from hyper_merge.operations.deletable import find_deletable
from hyper_merge.operations.deletable_text import format_deletion_report
from hyper_merge.operations.export import ExportRequest, run_export
from hyper_merge.operations.fit.text import format_fit
from hyper_merge.operations.inspect import inspect_files
from hyper_merge.operations.inspect_text import format_inspection
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.recipe.loading import load_recipe
from hyper_merge.recipe.request import key_place
from hyper_merge.runs.deletion import files_of
from hyper_merge.runs.fit_records import load_fits, prompts_of, styles_of
from hyper_merge.runs.hash_cache import bytes_to_hash, find_by_hash, hash_sources
from hyper_merge.runs.report_text import format_report
from hyper_merge.runs.run import list_runs, load_run
from hyper_merge.runtime.damaged_files import DamagedFiles
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.handlers.compare import choose_compared_run, show_comparison
from hyper_merge.ui.handlers.history import copy_settings
from hyper_merge.ui.html.result import format_run_card
from hyper_merge.ui.html.runs import format_run_comparison, format_run_list
from hyper_merge.ui.html.use import format_fit_result, format_sliders, format_used_run
from hyper_merge.ui.plots.report import explained_plot, parts_plot, similarity_plot


def checkpoint(workshop: Workshop, path: Path) -> None:
    """Reads a checkpoint's header and all its tensors, and checks a merge with another one."""
    inspect_files(path)
    with suppress(HyperMergeError):
        format_inspection([path, workshop.sources[1]])
    with suppress(HyperMergeError):
        require_supported(read_header(path))
    with CheckpointReader(path) as file:
        for key in file.header.tensors:
            file.tensor(key)
    _preflight(workshop, path)


def _preflight(workshop: Workshop, path: Path) -> None:
    settings = {"name": "other", "ranks": (2, 1), "device": "cpu", "output": str(workshop.root)}
    recipe = load_recipe_of({"models": [str(path), str(workshop.sources[1])], **settings}, workshop)
    run_preflight(recipe, workshop.folders).warnings  # noqa: B018 - made when they are asked for


def load_recipe_of(settings: dict[str, Any], workshop: Workshop) -> Any:
    """Returns the recipe of settings that are written to a file."""
    path = workshop.root / "preflight.yaml"
    path.write_text(json.dumps(settings))
    return load_recipe(path)


def merge_with(workshop: Workshop, **settings: Any) -> None:
    """Merges three checkpoints anew."""
    values = {"name": "new", "ranks": (1,), "iterations": 1, **settings}
    merge(workshop.sources[:3], workshop.root, **values)


def merged(workshop: Workshop, _path: Path) -> None:
    """Merges a checkpoint."""
    merge_with(workshop, exact="all")


def rerun(workshop: Workshop, path: Path) -> None:
    """Merges by a damaged cache, which is set aside: the merge must succeed."""
    try:
        merge_with(workshop)
    except HyperMergeError as error:
        raise AssertionError(f"{path.name} ended a merge: {error}") from error


def configuration(workshop: Workshop, path: Path) -> None:
    """Reads the configuration beside a checkpoint of a family in which some predict v."""
    header = replace(read_header(workshop.sources[0]), path=path.with_suffix(".safetensors"))
    with_prediction_type(header, SD2)
    v_prediction_config(header, SD2.predicting_v())


def lora(workshop: Workshop, path: Path) -> None:
    """Adds a LoRA of the run to its hyper-model."""
    inspect_files(path)
    run = load_run(workshop.folders, "mix")
    header = read_header(run.hyper_model)
    layout = layout_of(header, require_supported(header))
    with suppress(HyperMergeError), LoraStack(run.loras, header, layout) as stack:
        for layer in layout.layers:
            for up, down in stack.factors(layer):
                up @ down
        for key in layout.treatments:
            stack.vectors(key)
    files_of(run, workshop.folders)
    run_restore(_restoring("a"), workshop.folders, Progress())
    run_export(ExportRequest("mix", ("a",)), workshop.folders, Progress())


def _restoring(name: str) -> RestoreRequest:
    return RestoreRequest.parse({"run": "mix", "shares": {name: 1.0}}, key_place)


def run(workshop: Workshop, _path: Path) -> None:
    """Shows a run with its fits in all ways, and restores checkpoints by it."""
    folders, host = workshop.folders, workshop.host
    runs, problems = list_runs(folders)
    assert len(runs) + len(problems) == 1
    format_run_list(runs, problems)
    for run in runs:
        _show(run, host)
        files_of(run, folders)
    folders.lora_files_of("mix")
    folders.fit_files_of("mix")
    folders.lora_owners()
    copy_settings(host, "mix")


def run_restored(workshop: Workshop, path: Path) -> None:
    """Shows a run, judges what could be deleted, and restores checkpoints by it."""
    folders = workshop.folders
    run(workshop, path)
    format_deletion_report(find_deletable("mix", 0.5, folders, Progress()))
    with suppress(HyperMergeError):
        run_restore(_restoring("d"), folders, Progress())
    run_restore(_restoring("a"), folders, Progress())


def _show(run: Any, host: Any) -> None:
    format_report(run.report)
    fits, _ = load_fits(run)
    for fit in fits:
        format_fit(fit, run)
        format_fit_result(fit, run)
    for text in (*prompts_of(run).values(), *styles_of(run)):
        text.encode()
    for answer in (run_response(run, host), run_summary_response(run)):
        json.dumps(answer.model_dump(), allow_nan=False, ensure_ascii=False).encode()
    format_run_card(run)
    format_run_comparison(run, run)
    format_used_run(run).encode()
    format_sliders(run).encode()


def plots(workshop: Workshop, _path: Path) -> None:
    """Draws the plots of a run."""
    import matplotlib.pyplot as plt

    report = load_run(workshop.folders, "mix").report
    try:
        for draw in (explained_plot, similarity_plot, parts_plot):
            draw(report).canvas.draw()
    finally:
        plt.close("all")


def comparison(workshop: Workshop, _path: Path) -> None:
    """Shows a comparison in the tab."""
    comparison_names(load_run(workshop.folders, "mix"))
    json.dumps(choose_compared_run(workshop.host, "mix"), default=str)
    show_comparison(workshop.host, "mix", "comparison-1").encode()


def analysis(workshop: Workshop, _path: Path) -> None:
    """Reads all of an analysis, and its solutions."""
    inputs = workshop.inputs
    with open_analysis(workshop.cached("*.analysis.safetensors"), inputs) as file:
        assert file.grams.isfinite().all()
        assert file.weights.isfinite().all()
        file.not_carried  # noqa: B018 - read when they are asked for
        for index in range(len(file.layers)):
            tensors = file.core(index), file.rounding(index), *file.bases(index)
            assert all(tensor.isfinite().all() for tensor in tensors)
        for name in file._read_solutions():
            file.earlier_solutions(name, "unet")
        file.remember("new", {"unet": torch.zeros(2, 1)})


def sensitivities(workshop: Workshop, path: Path) -> None:
    """Reads sensitivities."""
    header = read_header(workshop.sources[0])
    layers = layout_of(header, require_supported(header)).layers
    known = read_sensitivities(path, layers, DamagedFiles(lambda message: message.encode()))
    for layer in layers if known else ():
        value = known[layer.module]
        assert math.isfinite(value.mean * value.rest)
        assert value.left.apply(torch.ones(layer.m, 1)).isfinite().all()
        assert value.right.inverse.apply(torch.ones(layer.n, 1)).isfinite().all()


def hashes(workshop: Workshop, _path: Path) -> None:
    """Finds the hashes of the checkpoints, and remembers them."""
    cache, headers = workshop.folders.cache, [*map(read_header, workshop.sources)]
    bytes_to_hash(headers, cache)
    find_by_hash("0" * 64, cache)
    hash_sources(headers, cache, Progress())
    assert bytes_to_hash(headers, cache) == 0


def recipe(workshop: Workshop, path: Path) -> None:
    """Reads a recipe, and checks it against its files."""
    settings = load_recipe(path)
    json.dumps(settings.to_metadata(), ensure_ascii=False).encode()
    json.dumps(settings.to_settings(), allow_nan=False)
    run_preflight(settings, workshop.folders)


def journal(workshop: Workshop, path: Path) -> None:
    """Undoes what a transaction has left, without a change of anything that is not its own."""
    remove_leftovers(path.parent)
    own = [file for file in path.parent.iterdir() if owner_of(file.name)]
    changed = [file for file in workshop.changed(path, *own) if owner_of(file.name) is None]
    assert {file.name for file in changed} <= {"new.txt"}, changed


def caches(workshop: Workshop, _path: Path) -> None:
    """Counts, prunes and clears the cache."""
    cache = workshop.folders.cache
    cache_bytes(cache)
    prune_analyses(cache, 1000)
    clear_analyses(cache)


def damaged_names(_sample: bytes, random: Random) -> bytes:
    """Returns names of files, one a line."""
    stems = (*TEXTS, "x-512", "comparison-999999999", "comparison-1", "mix", "0" * 32, "x-\u0663")
    suffixes = (".json", ".png", ".analysis.safetensors", ".solutions.json", ".used", ".making", "")
    suffixes += (
        ".damaged",
        ".lock",
        ".journal",
        ".tmp",
        ".old",
        ".safetensors",
        ".sensitivities.safetensors",
    )
    names = [random.choice(stems) + random.choice(suffixes) for _ in range(8)]
    names.append(f".hyper-merge-{random.randbytes(8).hex()}{random.choice(suffixes)}")
    return b"\n".join(
        bytes(byte for byte in name.encode("utf-8", "surrogatepass") if byte not in b"/\0\n")[:240]
        for name in names
    )


def names(workshop: Workshop, path: Path) -> None:
    """Lists all folders with files of these names."""
    folders = workshop.folders
    for number, name in enumerate(path.read_bytes().split(b"\n")):
        for folder in (folders.cache, folders.runs, folders.runs / "mix/fits", folders.loras):
            place = os.path.join(os.fsencode(folder), name or b"x")  # noqa: PTH118 - bytes
            with suppress(OSError, ValueError), open(place, "xb") if number % 4 else _made(place):  # noqa: PTH123
                pass
    run(workshop, path)
    comparison(workshop, path)
    caches(workshop, path)


class _made:  # noqa: N801 - used like a function
    def __init__(self, place: bytes) -> None:
        os.mkdir(place)  # noqa: PTH102 - bytes

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        pass
