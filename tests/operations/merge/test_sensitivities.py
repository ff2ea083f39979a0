"""A merge runs its average once, remembers what it found, and does without where that is not possible."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fitting import fit
from narrow_layouts import one
from random_checkpoints import files as write_files
from random_checkpoints import sane_weights
from tiny_family import (
    QUERY,
    Stop,
    layers_of,
    load,
    merge,
    recipe,
    snapshot,
    temporaries,
)

from hyper_merge.analysis.sensitivities import read_sensitivities
from hyper_merge.calibration.measure import PHASE, Samples, measure_sensitivities
from hyper_merge.errors import InterruptedRun, RunError
from hyper_merge.operations.merge import sensitivities
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.plan import make_plan
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.merge.sensitivities import are_known, find_sensitivities
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress

CACHE = "hyper-merge/cache"
MANIFEST = "hyper-merge/mix/manifest.json"


def only(folder):
    """Returns the one file of sensitivities in the cache."""
    (path,) = (folder / CACHE).glob("*.sensitivities.json")
    return path


def manifest_of(merged):
    return json.loads((merged.place.folder / "manifest.json").read_text())


class Runner:
    """Stands in for runs of the network: the first layers count most."""

    def __init__(self):
        self.devices, self.seeds = [], []
        self.values = None  # by module; None for the usual ones
        self.error = None  # raised once

    def __call__(self, tensor, shapes, layout, device, progress, seed=0):
        self.devices.append(device)
        self.seeds.append(seed)
        for fraction in (0.0, 0.5):
            progress.report(PHASE, fraction)
        assert tensor(layout.layers[0].key).shape == shapes[layout.layers[0].key]
        if self.error:
            error, self.error = self.error, None
            raise error
        progress.report(PHASE, 1.0)
        return self.values or {layer.module: 1 / (1 + n) for n, layer in enumerate(layout.layers)}


@pytest.fixture
def runner(monkeypatch):
    """Takes the place of the network, which then can be run for all files."""
    stub = Runner()
    monkeypatch.setattr(sensitivities, "can_run", lambda layout, shapes: True)
    monkeypatch.setattr(sensitivities, "measure_sensitivities", stub)
    return stub


@pytest.fixture
def find(files, tmp_path, runner):
    """Finds the sensitivities of a merge of the three files, by a recipe's settings."""
    state = load(files[0])

    def find(progress=None, models=files, **settings):
        preflight = run_preflight(recipe(models, tmp_path, **settings))
        return find_sensitivities(preflight, state.__getitem__, progress or Progress())

    return find


def multipliers(merged):
    return [[*row.multipliers, *row.text_multipliers] for row in merged.report.checkpoints]


def test_the_average_runs_once_for_all_merges(files, tmp_path, runner, find, log):
    first = find(log.progress)
    assert runner.devices == [torch.device("cpu")]
    assert first.keys() == {layer.module for layer in layers_of(files[0], ends=True)}
    assert find(log.progress, ranks=(3,), name="other", fit_weights=(3, 1, 1)) == first
    assert len(runner.devices) == 1
    assert read_sensitivities(only(tmp_path)) == first
    find(log.progress, models=files[:2])
    assert len(runner.devices) == 2
    assert log.warnings == []


def test_inputs_of_another_seed_are_run_too(runner, find, tmp_path):
    find(seed=5)
    find(seed=6)
    find(seed=5)
    assert runner.seeds == [5, 6]
    assert len(list((tmp_path / CACHE).iterdir())) == 2


@pytest.mark.parametrize("text", ["[[", "null", '{"a": -1}', '{"a": NaN}', '{"a": "1"}', "[1]"])
def test_damaged_sensitivities_are_set_aside_and_measured(tmp_path, runner, find, log, text):
    first = find()
    path = only(tmp_path)
    good = path.read_bytes()
    path.write_text(text)
    assert find(log.progress) == first
    assert len(runner.devices) == 2
    (warning,) = log.warnings
    assert str(path) in warning
    assert f"set aside as {path.name}.damaged" in warning
    assert path.with_name(path.name + ".damaged").read_text() == text
    assert path.read_bytes() == good


def test_one_wrong_digit_of_sensitivities_is_noticed(tmp_path, runner, find, log):
    find()
    path = only(tmp_path)
    path.write_text(path.read_text().replace("0.5", "0.7", 1))
    find(log.progress)
    assert len(runner.devices) == 2
    assert len(log.warnings) == 1


def test_sensitivities_of_other_layers_are_measured_again(files, tmp_path, runner, find, log):
    runner.values = {"lora_unet_of_another_version": 1.0}
    find()
    runner.values = None
    assert len(find(log.progress)) == len(layers_of(files[0], ends=True))
    assert len(runner.devices) == 2
    assert log.warnings == []


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_average_without_outputs_is_not_remembered(files, tmp_path, runner, find, log, value):
    modules = [layer.module for layer in layers_of(files[0])]
    runner.values = dict.fromkeys(modules, 0.0) | {modules[0]: value}
    assert find(log.progress) is None
    (warning,) = log.warnings
    assert warning.startswith("the average's network gives no finite outputs, so its layers count")
    assert not (tmp_path / CACHE).exists()


@pytest.mark.parametrize("weighting", ["relative", "plain"])
def test_other_weightings_run_nothing(files, tmp_path, runner, find, weighting):
    assert find(layer_weights=weighting) is None
    assert runner.devices == []
    find()
    assert find(layer_weights=weighting) is None
    assert are_known(run_preflight(recipe(files, tmp_path / "b", layer_weights=weighting)))


def test_cpu_runs_what_the_device_has_no_memory_for(runner, find, log):
    runner.error = torch.cuda.OutOfMemoryError("CUDA out of memory (pretended)")
    reports = []
    assert find(Progress(lambda _phase, x: reports.append(x), warn=log.warnings.append))
    assert len(runner.devices) == 2
    assert reports == [0, 0.5, 0.5, 0.75, 1]
    assert log.warnings == ["cpu has too little memory to run the average; the CPU runs it"]


def test_sensitivities_that_cannot_be_kept_are_used(tmp_path, runner, find, log):
    first = find()
    path = only(tmp_path)
    path.unlink()
    path.mkdir()
    assert find(log.progress) == first
    (warning,) = log.warnings
    assert warning.startswith("the sensitivities of the layers are not remembered: ")


# whole merges


def test_measured_layers_change_plan_merge_and_manifest(files, tmp_path, merged, runner):
    preflight = run_preflight(recipe(files, tmp_path))
    by_layout = make_plan(preflight, Progress())
    assert runner.devices == []
    made = merge(files, tmp_path)
    assert multipliers(made) != multipliers(merged)
    assert manifest_of(made)["sensitivities"] == read_sensitivities(only(tmp_path))
    assert make_plan(preflight, Progress()) != by_layout
    assert len(runner.devices) == 1


def test_average_without_outputs_counts_by_the_layout(files, tmp_path, merged, runner):
    runner.values = {layer.module: math.nan for layer in layers_of(files[0], ends=True)}
    made = merge(files, tmp_path)
    assert multipliers(made) == multipliers(merged)
    assert manifest_of(made)["sensitivities"] is None


def test_partial_files_run_nothing(files, tmp_path, merged):
    assert manifest_of(merged)["sensitivities"] is None
    assert are_known(run_preflight(recipe(files, tmp_path)))


def test_a_stop_while_the_average_runs_changes_no_file(files, tmp_path, runner):
    runner.error = InterruptedRun("stopped")
    with pytest.raises(InterruptedRun):
        merge(files, tmp_path)
    assert snapshot(tmp_path) == {}
    assert temporaries(tmp_path) == []
    assert not list((tmp_path / CACHE).glob("*.sensitivities.json"))


def test_a_fit_weighs_layers_as_the_merge_did(files, tmp_path, runner):
    merged = merge(files, tmp_path)
    shutil.rmtree(tmp_path / CACHE)
    row = merged.report.checkpoints[0]

    def fitted(name):
        return fit(Folders.under(tmp_path), files[0], name=name, device="cpu").row

    same = fitted("same")
    for part in ("unet", "text_encoder"):
        assert same.multipliers_of(part) == pytest.approx(row.multipliers_of(part), abs=1e-4)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "sensitivities": None}))
    other = fitted("other")
    for part in ("unet", "text_encoder"):
        assert other.multipliers_of(part) != pytest.approx(row.multipliers_of(part), abs=1e-3)


@pytest.mark.parametrize("numbers", [[1], {"a": -1}, {"a": "x"}, {"a": math.nan}, 3])
def test_manifest_with_wrong_sensitivities_is_refused(started, numbers):
    manifest = json.loads((started / MANIFEST).read_text())
    (started / MANIFEST).write_text(json.dumps(manifest | {"sensitivities": numbers}))
    with pytest.raises(RunError, match="sensitivities"):
        load_run(Folders.under(started), "mix")


# with the network itself


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe of whole narrow files of SD 1.x, and the weights of one; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    state = {key: x.half() for key, x in sane_weights(one(width=32)).items()}
    models = write_files(folder, state, {**state, QUERY: -state[QUERY]})
    return SimpleNamespace(state=state, preflight=run_preflight(recipe(models, folder / "models")))


@pytest.fixture
def few(monkeypatch):
    """Merges run their average for two samples."""
    samples = Samples(passes=1, batch=2, side=8)
    measure = partial(measure_sensitivities, samples=samples)
    monkeypatch.setattr(sensitivities, "measure_sensitivities", measure)
    return samples


def test_the_average_is_measured_from_its_own_tensors(whole, few):
    reports = []
    progress = Progress(lambda *report: reports.append(report)).part(0.2, 0.6)
    layout = whole.preflight.inputs.layout
    shapes = {key: tuple(tensor.shape) for key, tensor in whole.state.items()}
    seconds = estimate_merge(whole.preflight).seconds
    numbers = find_sensitivities(whole.preflight, whole.state.__getitem__, progress)
    assert numbers == measure_sensitivities(
        whole.state.__getitem__, shapes, layout, torch.device("cpu"), Progress(), few
    )
    assert min(numbers.values()) > 0
    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 50
    assert (fractions[0], fractions[-1]) == (0.2, 0.6)
    known = estimate_merge(whole.preflight).seconds  # what is remembered takes no time
    recipe = replace(whole.preflight.recipe, layer_weights="relative")
    relative = estimate_merge(replace(whole.preflight, recipe=recipe)).seconds
    assert known == pytest.approx(relative)
    assert known < 0.9 * seconds


def test_a_stop_within_the_network_ends_the_phase(whole, few, tmp_path):
    preflight = replace(whole.preflight, folders=Folders.under(tmp_path))
    stop = Stop(0.7, "stop")
    with pytest.raises(InterruptedRun):
        find_sensitivities(preflight, whole.state.__getitem__, stop.progress)
    assert stop.late == 0
    assert not (tmp_path / CACHE).exists()
