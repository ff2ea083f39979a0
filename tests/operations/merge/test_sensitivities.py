"""A merge runs its average once, remembers what it found, and does without where that is not possible."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fitting import fit
from narrow_layouts import one
from random_checkpoints import files as write_files
from random_checkpoints import state
from tiny_family import layers_of, merge, recipe, snapshot, temporaries

from hyper_merge.analysis.sensitivities import read_sensitivities
from hyper_merge.calibration.measure import PHASE, Samples, measure_sensitivities
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.errors import InterruptedRun
from hyper_merge.operations.merge import sensitivities
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.plan import make_plan
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress

CACHE = "hyper-merge/cache"


def only(folder):
    """Returns the one file of sensitivities in the cache."""
    (path,) = (folder / CACHE).glob("*.sensitivities.json")
    return path


def manifest_of(merged):
    return json.loads((merged.place.folder / "manifest.json").read_text())


class Runner:
    """Stands in for runs of the network: the UNet's first layers count most."""

    def __init__(self):
        self.devices, self.seeds = [], []
        self.values = None  # by module; None for the usual ones
        self.errors = []  # raised by the next calls

    def __call__(self, tensor, shapes, layout, device, progress, samples=None, seed=0):
        self.devices.append(device)
        self.seeds.append(seed)
        for fraction in (0.0, 0.5):
            progress.report(PHASE, fraction)
        assert tensor(layout.layers[0].key).shape == shapes[layout.layers[0].key]
        if self.errors and (error := self.errors.pop(0)):
            raise error
        progress.report(PHASE, 1.0)
        modules = [layer.module for layer in layout.layers]
        return self.values or {name: 1 / (1 + n) for n, name in enumerate(modules)}


@pytest.fixture
def runner(monkeypatch):
    """Takes the place of the network, which then can be run for all files."""
    stub = Runner()
    monkeypatch.setattr(sensitivities, "can_run", lambda layout, shapes: True)
    monkeypatch.setattr(sensitivities, "measure_sensitivities", stub)
    return stub


def multipliers(merged):
    return [[*row.multipliers, *row.text_multipliers] for row in merged.report.checkpoints]


def test_the_average_runs_once_for_all_merges(files, tmp_path, runner, log):
    first = merge(files, tmp_path, log.progress)
    assert runner.devices == [torch.device("cpu")]
    known = read_sensitivities(only(tmp_path))
    assert known == manifest_of(first)["sensitivities"]
    assert known.keys() == {layer.module for layer in layers_of(files[0])}
    second = merge(files, tmp_path, log.progress, ranks=(3,), name="other")
    assert len(runner.devices) == 1
    assert manifest_of(second)["sensitivities"] == known
    merge(files[:2], tmp_path, log.progress, name="fewer")
    assert len(runner.devices) == 2
    assert log.warnings == []


def test_measured_layers_change_the_merge(files, tmp_path, merged, runner):
    assert multipliers(merge(files, tmp_path)) != multipliers(merged)


def test_the_seed_is_that_of_the_inputs(files, tmp_path, runner):
    merge(files, tmp_path, seed=5)
    merge(files, tmp_path, seed=6, name="other")
    assert runner.seeds == [5, 6]
    assert len(list((tmp_path / CACHE).glob("*.sensitivities.json"))) == 2


@pytest.mark.parametrize(
    "text", ["[[", "null", '{"a": -1}', '{"a": NaN}', '{"a": "1"}', '{"a": 1e999}', "{}"]
)
def test_damaged_sensitivities_are_set_aside_and_measured(files, tmp_path, runner, log, text):
    first = merge(files, tmp_path)
    path = only(tmp_path)
    good = path.read_bytes()
    path.write_text(text)
    second = merge(files, tmp_path, log.progress, name="other")
    assert len(runner.devices) == 2
    assert multipliers(second) == multipliers(first)
    (warning,) = log.warnings
    assert str(path) in warning
    assert f"set aside as {path.name}.damaged" in warning
    assert path.with_name(path.name + ".damaged").read_text() == text
    assert path.read_bytes() == good


def test_sensitivities_of_other_layers_are_measured_again(files, tmp_path, runner, log):
    runner.values = {"lora_unet_of_another_version": 1.0}
    merge(files, tmp_path)
    runner.values = None
    merge(files, tmp_path, log.progress, name="other")
    assert len(runner.devices) == 2
    assert log.warnings == []
    assert len(read_sensitivities(only(tmp_path))) == len(layers_of(files[0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_average_without_outputs_counts_by_the_layout(files, tmp_path, merged, runner, log, value):
    modules = [layer.module for layer in layers_of(files[0])]
    runner.values = dict.fromkeys(modules, 0.0) | {modules[0]: value}
    other = merge(files, tmp_path, log.progress)
    assert multipliers(other) == multipliers(merged)
    assert log.warnings == [
        "the average's network gives no finite outputs, so its layers count by their size and"
        " positions"
    ]
    assert manifest_of(other)["sensitivities"] is None
    assert not list((tmp_path / CACHE).glob("*.sensitivities.json"))


@pytest.mark.parametrize("weighting", ["relative", "plain"])
def test_other_weightings_run_nothing(files, tmp_path, runner, weighting):
    made = merge(files, tmp_path, layer_weights=weighting)
    assert runner.devices == []
    assert manifest_of(made)["sensitivities"] is None
    merge(files, tmp_path, name="measured")
    again = merge(files, tmp_path, layer_weights=weighting, name="again")
    assert manifest_of(again)["sensitivities"] is None
    assert multipliers(again) == multipliers(made)


def test_partial_files_run_nothing(merged):
    assert manifest_of(merged)["sensitivities"] is None


def test_cpu_runs_what_the_device_has_no_memory_for(files, tmp_path, runner, log):
    runner.errors = [torch.cuda.OutOfMemoryError("CUDA out of memory (pretended)")]
    reports = []
    progress = Progress(lambda _phase, x: reports.append(x), warn=log.warnings.append)
    made = merge(files, tmp_path, progress)
    assert len(runner.devices) == 2
    assert reports == sorted(reports)
    assert log.warnings == ["cpu has too little memory to run the average; the CPU runs it"]
    assert manifest_of(made)["sensitivities"] == read_sensitivities(only(tmp_path))


def test_sensitivities_that_cannot_be_kept_are_used(files, tmp_path, runner, log):
    merge(files, tmp_path)
    path = only(tmp_path)
    path.unlink()
    path.mkdir()
    made = merge(files, tmp_path, log.progress, name="other")
    assert manifest_of(made)["sensitivities"] is not None
    (warning,) = log.warnings
    assert warning.startswith("the sensitivities of the layers are not remembered: ")


def test_a_stop_while_the_average_runs_changes_no_file(files, tmp_path, runner):
    runner.errors = [InterruptedRun("stopped")]
    with pytest.raises(InterruptedRun):
        merge(files, tmp_path)
    assert snapshot(tmp_path) == {}
    assert temporaries(tmp_path) == []
    assert not list((tmp_path / CACHE).glob("*.sensitivities.json"))


def test_a_plan_uses_the_known_sensitivities_alone(files, tmp_path, runner):
    preflight = run_preflight(recipe(files, tmp_path))
    by_layout = make_plan(preflight, Progress())
    assert runner.devices == []
    merge(files, tmp_path)
    assert make_plan(preflight, Progress()).curve != by_layout.curve
    assert len(runner.devices) == 1


# with the network itself


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A merge of whole narrow files of SD 1.x that ran their average; not to be changed."""
    folder, patch = tmp_path_factory.mktemp("whole"), pytest.MonkeyPatch()
    shapes, half = one(width=32), torch.float16
    models = write_files(folder, *(state(shapes, seed, dtype=half) for seed in range(2)))
    samples, reports = Samples(passes=1, batch=2, side=8), []
    few = partial(measure_sensitivities, samples=samples)
    settings = {"ranks": (2,), "iterations": 1}
    preflight = run_preflight(recipe(models, folder / "models", **settings))
    before = estimate_merge(preflight).seconds
    with patch.context() as context:
        context.setattr(sensitivities, "measure_sensitivities", few)
        progress = Progress(lambda *report: reports.append(report))
        merged = merge(models, folder / "models", progress, **settings)
    return SimpleNamespace(
        root=folder / "models",
        models=models,
        merged=merged,
        samples=samples,
        reports=reports,
        preflight=preflight,
        seconds_before=before,
    )


def test_a_merge_measures_its_hyper_model(measured):
    path = measured.merged.place.hyper_model
    layout = measured.preflight.inputs.layout
    shapes = {key: info.shape for key, info in read_header(path).tensors.items()}
    with CheckpointReader(path) as file:
        expected = measure_sensitivities(
            file.tensor, shapes, layout, torch.device("cpu"), Progress(), measured.samples
        )
    assert min(expected.values()) > 0
    assert manifest_of(measured.merged)["sensitivities"] == expected
    assert load_run(Folders.under(measured.root), "mix").sensitivities == expected


def test_the_phase_has_its_share_of_progress_and_time(measured):
    fractions = [fraction for phase, fraction in measured.reports if phase == PHASE]
    every = [fraction for _, fraction in measured.reports]
    assert every == sorted(every)
    assert len(set(fractions)) > 50
    assert fractions[-1] - fractions[0] > 0.05
    known = estimate_merge(measured.preflight).seconds
    shutil.move(only(measured.root), measured.root / "away")
    unknown = estimate_merge(measured.preflight).seconds
    shutil.move(measured.root / "away", only_path(measured))
    assert known < unknown < measured.seconds_before


def only_path(measured):
    return sensitivities._path(measured.preflight)


def test_a_fit_weighs_layers_as_the_merge_did(measured, tmp_path, monkeypatch):
    root = shutil.copytree(measured.root, tmp_path / "models")
    shutil.rmtree(root / CACHE)
    (row, _) = measured.merged.report.checkpoints
    fitted = fit(Folders.under(root), measured.models[0], name="same", device="cpu").row
    for part in ("unet", "text_encoder"):
        assert fitted.multipliers_of(part) == pytest.approx(row.multipliers_of(part), abs=1e-3)
    path = root / "hyper-merge/mix/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "sensitivities": None}))
    other = fit(Folders.under(root), measured.models[0], name="other", device="cpu").row
    assert other.multipliers != pytest.approx(row.multipliers, abs=1e-3)


@pytest.mark.parametrize("numbers", ["[1]", '{"a": -1}', '{"a": "x"}', '{"a": NaN}', "3"])
def test_manifest_with_wrong_sensitivities_is_refused(started, numbers):
    path = started / "hyper-merge/mix/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"sensitivities": json.loads(numbers)}))
    with pytest.raises(Exception, match="sensitivities"):
        load_run(Folders.under(started), "mix")
